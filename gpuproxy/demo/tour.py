"""The walk through the demo: start everything in a temporary directory, make one call, show how to go on.

The inference server runs in a thread of this process, the gateway as the daemon people run, in a process of
its own. Both end with the demo, and the directory goes with them.
"""

import asyncio
import os
import re
import secrets
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
from types import FrameType
from typing import Any, NamedTuple

import httpx
import orjson
from rich.console import Console

from gpuproxy.access.accounts import create_key, create_user
from gpuproxy.access.logins import set_password
from gpuproxy.demo import snippets
from gpuproxy.demo.upstream import MODELS, running
from gpuproxy.ledger.book import credit, parse_usd
from gpuproxy.store.engine import open_store
from gpuproxy.store.migrate import upgrade

EMAIL, CREDIT_USD = "demo@example.com", "10.00"
PASSWORD_BYTES = 12
QUESTION = "Why does streaming make an answer feel fast?"
HOST = "127.0.0.1"
START_S, STOP_S, CALL_S, RECEIPT_S = 40.0, 35.0, 30.0, 10.0
LOOK_S = 0.2  # how often the gateway's log is looked at while it runs
CONFIG = """\
[server]
host = "{host}"
port = {port}
data_dir = "{directory}/data"
drain_s = 2.0

[store]
url = "sqlite:///{directory}/gpuproxy.db"

[plugins]
enabled = ["https", "mcp", "openinference", "simulated"]

[egress]
allow = ["{host}/32"]

[fleet]
poll_s = 1.0

[[providers]]
name = "simulated"
options = {{ boot_s = "2", file = "{directory}/rented.json", 8000 = "{rented}" }}

[[upstreams]]
name = "demo-llm"
protocol = "openinference"
urls = ["{upstream}"]
models = {models}

[[upstreams]]
name = "demo-tools"
protocol = "mcp"
urls = ["{upstream}/mcp"]
"""


class DemoError(Exception):
    """A step that failed, in words for the person in front of the screen."""


class Gateway(NamedTuple):
    """The running daemon, and where it writes its log."""

    url: str
    process: "subprocess.Popen[str]"
    log: Path


class Screen:
    """What the person sees: colours on a terminal, the same plain words in a pipe; never wraps a line."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)

    def say(self, text: str = "", style: str = "", end: str = "\n") -> None:
        """Print and flush."""
        self._console.print(text, style=style or None, end=end)


def run(once: bool, port: int) -> int:
    """Run the demo on `port` (0: a free one) until Ctrl-C, or `once` through. Return the exit code."""
    screen = Screen()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        _check_port(port)
        with tempfile.TemporaryDirectory(prefix="gpuproxy-demo-") as directory, running() as upstream:
            _tour(screen, Path(directory), upstream, once, port)
    except KeyboardInterrupt:
        screen.say("\nStopped; nothing is left running.")
        return 130 if once else 0
    except DemoError as error:
        print(f"gpuproxy demo: {error}", file=sys.stderr)
        return 1
    return 0


def _tour(screen: Screen, directory: Path, upstream: str, once: bool, port: int) -> None:
    config = directory / "config.toml"
    models = str(list(MODELS)).replace("'", '"')
    rented = upstream.removeprefix("http://")  # what a rented machine's port 8000 leads to
    config.write_text(
        CONFIG.format(host=HOST, port=port, directory=directory, upstream=upstream, models=models, rented=rented)
    )
    password = secrets.token_urlsafe(PASSWORD_BYTES)
    key = asyncio.run(_open_account(f"sqlite:///{directory}/gpuproxy.db", password))
    screen.say(f"Inference server  {upstream}  ({', '.join(MODELS)}, an MCP server)", "dim")
    with serving(config, directory / "gateway.log") as gateway:
        screen.say(f"Gateway           {gateway.url}", "bold")
        screen.say(f"Dashboard         {gateway.url}/dashboard", "dim")
        screen.say(f"Account           {EMAIL}, password {password}, {CREDIT_USD} USD credit", "dim")
        screen.say(f"API key           {key}\n", "dim")
        _first_call(screen, gateway.url, key)
        if not once:
            _show_snippets(screen, gateway.url, key, upstream)
            _follow(screen, gateway)


def _show_snippets(screen: Screen, url: str, key: str, upstream: str) -> None:
    for title, text in snippets.all_of(url, key, upstream).items():
        screen.say(f"\n# {title}", "bold cyan")
        screen.say(text)
    screen.say("\nThe gateway stays up; its log follows. Ctrl-C stops it.", "bold")


async def _open_account(store_url: str, password: str) -> str:
    """Create store, user, credit and key; return the key. The user is an admin, who sees all of the dashboard."""
    store = open_store(store_url)
    try:
        await upgrade(store)
        user = await create_user(store, EMAIL, is_admin=True)
        await set_password(store, EMAIL, password)
        await credit(store, user.id, parse_usd(CREDIT_USD), "demo")
        secret, _ = await create_key(store, EMAIL, "demo", rpm=0)
    finally:
        await store.close()
    return secret


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            reason = os.strerror(error.errno or 0).lower()
            remedy = "choose another with --port N, or --port 0 for any free one"
            raise DemoError(f"cannot listen on {HOST}:{port}: {reason}; {remedy}") from error


@contextmanager
def serving(config: Path, log: Path) -> Iterator[Gateway]:
    """Run ``gpuproxy serve`` until the block ends. Raises DemoError with the end of its log if it fails."""
    command = [sys.executable, "-m", "gpuproxy.cli", "serve", "-c", str(config)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GPUPROXY_")}
    with log.open("wb") as errors:
        process = subprocess.Popen(  # noqa: S603 (our own interpreter and module)
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,  # Ctrl-C is for the demo alone, which then stops the gateway
        )
    try:
        yield Gateway(_announced_url(process, log), process, log)
    finally:
        _stop(process)


def _announced_url(process: "subprocess.Popen[str]", log: Path) -> str:
    assert process.stdout is not None
    deadline = time.monotonic() + START_S
    while (left_s := deadline - time.monotonic()) > 0:
        readable, _, _ = select.select([process.stdout], [], [], left_s)
        line = process.stdout.readline() if readable else ""
        if found := re.search(r"listening on (http://\S+)", line):
            return found[1]
        if not line:
            break
    raise DemoError(f"the gateway did not start. Its last words:\n{_last_words(log)}")


def _stop(process: "subprocess.Popen[str]") -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # an impatient second Ctrl-C must not leave it behind
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()  # its children end with it
        process.wait()
    finally:
        assert process.stdout is not None
        process.stdout.close()
        signal.signal(signal.SIGINT, before)


def _first_call(screen: Screen, url: str, key: str) -> None:
    """Ask the model through the gateway and show each token as it arrives, then what was counted."""
    screen.say(f"> {QUESTION}", "bold green")
    started_s = time.monotonic()
    first_s, usage = 0.0, None
    try:
        for chunk in _chat(url, key):
            first_s = first_s or time.monotonic() - started_s
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                screen.say(choice["delta"].get("content") or "", end="")
    except httpx.HTTPError as error:
        raise DemoError(f"the call through the gateway failed: {error}") from error
    if usage is None:
        raise DemoError("the answer broke off before it told its usage")
    took_s = time.monotonic() - started_s
    counted = f"{usage['prompt_tokens']} tokens in, {usage['completion_tokens']} out"
    screen.say(f"\n\nAnswer    {counted}; first after {first_s * 1000:.0f} ms, last after {took_s:.2f} s", "dim")
    row = _receipt(url, key)
    counted = f"{row['input_tokens']} tokens in, {row['output_tokens']} out"
    screen.say(f"Receipt   {counted}; {row['requests']} call on the account", "dim")


def _chat(url: str, key: str) -> Iterator[dict[str, Any]]:
    body = {
        "model": MODELS[0],
        "messages": [{"role": "user", "content": QUESTION}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    headers = {"Authorization": f"Bearer {key}"}
    call = httpx.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers, timeout=CALL_S)
    with call as response:
        if response.status_code != 200:
            raise DemoError(f"the gateway answered {response.status_code}: {response.read().decode()}")
        for line in response.iter_lines():
            data = line.removeprefix("data:").strip()
            if line.startswith("data:") and data != "[DONE]":
                yield orjson.loads(data)


def _receipt(url: str, key: str) -> dict[str, Any]:
    """Return the account's usage as soon as the gateway has stored the call."""
    deadline = time.monotonic() + RECEIPT_S
    while time.monotonic() < deadline:
        response = httpx.get(f"{url}/api/v1/user/usage", headers={"X-API-Key": key}, timeout=CALL_S)
        if response.status_code != 200:
            raise DemoError(f"the account's usage answered {response.status_code}: {response.text}")
        usage: dict[str, Any] = response.json()["data"]
        if usage["requests"]:
            return usage
        time.sleep(0.05)
    raise DemoError(f"the gateway stored no receipt of the call within {RECEIPT_S:.0f} s")


def _follow(screen: Screen, gateway: Gateway) -> None:
    """Show what the gateway logs until Ctrl-C. Raises DemoError if it ends by itself."""
    with gateway.log.open() as lines, _end_of(gateway.process) as end:
        lines.seek(0, os.SEEK_END)
        while not select.select([end], [], [], LOOK_S)[0]:
            for line in lines:
                screen.say(line, end="", style="dim")
    raise DemoError(f"the gateway ended. Its last words:\n{_last_words(gateway.log)}")


@contextmanager
def _end_of(process: "subprocess.Popen[str]") -> Iterator[int]:
    """Yield a descriptor that is readable once the process has ended.

    Popen's own waiting takes a lock that an interrupt can leave taken, and the next wait would never end.
    """
    descriptor = os.pidfd_open(process.pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _last_words(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-12:]) or "(none)"


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
