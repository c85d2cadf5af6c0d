"""The demo as a newcomer runs it: one call, calls to paste, a clean end."""

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from gpuproxy.demo import snippets
from gpuproxy.demo.tour import DemoError, serving

DEMO = [sys.executable, "-m", "gpuproxy.cli", "demo"]
WAIT_S = 60


def is_refused(url: str) -> bool:
    """Tell whether nobody listens at the URL."""
    try:
        requests.get(f"{url}/health", timeout=5)
    except requests.ConnectionError:
        return True
    return False


def gateway_url(output: str) -> str:
    found = re.search(r"^Gateway +(http://\S+)$", output, re.MULTILINE)
    assert found, output
    return found[1]


def test_once_makes_one_streamed_call_and_leaves_nothing(tmp_path: Path) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path), "GPUPROXY_SERVER__WORKERS": "nonsense"}
    command = [*DEMO, "--once", "--port", "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == 0, done.stderr
    assert "Why does streaming make an answer feel fast?" in done.stdout
    answered, stored = re.findall(r"(\d+) tokens in, (\d+) out", done.stdout)
    assert answered == stored
    assert "\x1b" not in done.stdout
    assert is_refused(gateway_url(done.stdout))
    assert list(tmp_path.iterdir()) == []


def test_a_taken_port_is_told_with_the_remedy() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [*DEMO, "--once", "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}: address already in use; choose another with --port" in done.stderr


def test_a_gateway_that_does_not_start_is_told_with_its_last_words(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("[server]\nprot = 1\n")
    with pytest.raises(DemoError, match='unknown key "prot"'), serving(config, tmp_path / "log"):
        pass


def _heed_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell lets what it runs in the background ignore it


@contextmanager
def staying_demo() -> Iterator["tuple[subprocess.Popen[str], str]"]:
    """Run a demo that stays up; yields it and what it printed until it waits."""
    process = subprocess.Popen(
        [*DEMO, "--port", "0"], stdout=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=_heed_ctrl_c
    )
    try:
        yield process, _said_until(process, "Ctrl-C stops it.")
    finally:
        process.terminate()
        process.wait(WAIT_S)
        assert process.stdout is not None
        process.stdout.close()


def _said_until(process: "subprocess.Popen[str]", mark: str) -> str:
    assert process.stdout is not None
    said, deadline = "", time.monotonic() + WAIT_S
    while mark not in said:
        readable, _, _ = select.select([process.stdout], [], [], deadline - time.monotonic())
        data = os.read(process.stdout.fileno(), 65_536) if readable else b""
        assert data, said
        said += data.decode()
    return said


def test_what_it_prints_can_be_pasted_and_ctrl_c_ends_all() -> None:
    with staying_demo() as (process, said):
        answers = {title: run_snippet(said, title) for title in snippets.TITLES}
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(WAIT_S) == 0
        assert is_refused(gateway_url(said))
    streamed, openai, mcp, infer, envelope, rent, usage = answers.values()
    assert "[DONE]" in streamed
    assert "What does a gateway do?" in openai
    assert "'add'" in mcp
    assert "structured_content={'sum': 5}" in mcp
    assert json.loads(infer)["outputs"][0]["data"] == ["setosa"]
    assert json.loads(envelope)["data"]["choices"][0]["message"]["content"].startswith("Hello!")
    assert "USD an hour is running\n" in rent
    assert '"chat.completion"' in rent
    assert rent.endswith("\n200\ndestroyed\n")
    assert json.loads(usage)["data"]["requests"] >= 1


def run_snippet(said: str, title: str) -> str:
    """Run what stands under a title, in a shell or in Python."""
    _, _, rest = said.partition(f"# {title}\n")
    text = re.split(r"\n(?:# |\nThe gateway stays up)", rest, maxsplit=1)[0]
    command = [sys.executable, "-c", text] if title.startswith("Python") else ["sh", "-ec", text]
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == 0, f"{title}: {done.stderr}"
    return done.stdout
