"""The guide's JavaScript in Node, as it is printed but for the port, through a whole gateway."""

import asyncio
import queue
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from gpuproxy.events.outbox import record
from gpuproxy.store.engine import open_store

from .gateway import running_gateway
from .guide import filled, sample

NODE = shutil.which("node")
WAIT_S = 20.0


async def happen(directory: Path, name: str, data: dict[str, Any]) -> None:
    store = open_store(f"sqlite:///{directory}/g.db")
    async with store.writing() as connection:
        await connection.run_sync(record, name, None, data)
    await store.close()


@pytest.mark.skipif(NODE is None, reason="node is not installed")
def test_the_websocket_sample_of_the_guide_runs_in_node(tmp_path: Path) -> None:
    with running_gateway(tmp_path, "", {}) as gateway:
        code = filled(sample("WebSocket Streaming"), gateway.url.removeprefix("http://"))
        line = [str(NODE), "--experimental-websocket", "-e", code]
        node = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            assert node.stdout is not None
            said: queue.Queue[str] = queue.Queue()
            reading = threading.Thread(target=lambda: [said.put(text) for text in node.stdout], daemon=True)
            reading.start()
            heard = until(said, "subscribed")
            asyncio.run(happen(tmp_path, "gpu.available", {"provider": "vast.ai"}))
            heard += until(said, "vast.ai")
            assert "Event: error" in heard
            assert "billing_events is private" in heard
            assert "Event: gpu_available { provider: 'vast.ai' }" in heard
        finally:
            node.kill()
            node.wait()
            reading.join(WAIT_S)
            node.stdout.close()


def until(said: "queue.Queue[str]", word: str) -> str:
    """Return what was said up to the line with `word`."""
    heard, deadline = "", time.monotonic() + WAIT_S
    while word not in heard:
        heard += said.get(timeout=max(0.1, deadline - time.monotonic()))
    return heard
