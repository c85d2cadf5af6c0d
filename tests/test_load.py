"""The mixed load for locust: every call of it succeeds against a gateway as it is served."""

import ast
import asyncio
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from served import served, store_url

from gpuproxy.access.accounts import create_key, create_user
from gpuproxy.store.engine import open_store
from gpuproxy.store.migrate import upgrade

FILE = Path(__file__).parent.parent / "benchmarks/locustfile.py"
NAMES = {"chat", "chat, stream", "chat, first event", "envelope", "models", "mcp, initialize", "mcp, tool", "credits"}
LOAD = ("--headless", "-u", "9", "-r", "9", "-t", "3s", "--stop-timeout", "15", "--json", "--loglevel", "WARNING")


async def make_key(url: str) -> str:
    store = open_store(url)
    await upgrade(store)
    await create_user(store, "ann@example.com")
    secret, _ = await create_key(store, "ann@example.com", rpm=0)
    await store.close()
    return secret


def test_the_options_that_are_told_of_are_there() -> None:
    calls = [each for each in ast.walk(ast.parse(FILE.read_text())) if isinstance(each, ast.Call)]
    named = {ast.literal_eval(each.args[0]) for each in calls if ast.unparse(each.func) == "parser.add_argument"}
    written = FILE.with_name("README.md").read_text().partition("## Mixed load")[2]
    assert named == {"--key", "--model", "--tools", "--target"}
    assert all(option in written for option in named)


@pytest.mark.skipif(find_spec("locust") is None, reason="locust is not installed; pip install -e '.[load]'")
def test_every_call_of_the_mixed_load_succeeds(tmp_path: Path) -> None:
    key = asyncio.run(make_key(store_url(tmp_path)))
    with served(tmp_path) as gateway:
        where = ("--host", gateway.url, "--target", gateway.upstream, "--key", key)
        command = [sys.executable, "-m", "locust", "-f", str(FILE), *LOAD, *where]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert {each["name"] for each in told} >= NAMES
    assert sum(each["num_failures"] for each in told) == 0
