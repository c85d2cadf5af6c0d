"""What the scripts in this directory share: virtual environments, servers, and a gateway before them."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

VENVS = Path(__file__).parents[2] / "build" / "venvs"
GPUPROXY = Path(sys.executable).parent / "gpuproxy"
START_S = 120.0  # a model takes its time to load
_STOP_S = 15.0
_POLL_S = 0.1


class Gateway(NamedTuple):
    """A running gateway and one caller's key."""

    url: str
    key: str


def environment_python(name: str, requirements: Sequence[str]) -> Path:
    """Return the interpreter of a virtual environment that has `requirements`; made when it is missing."""
    directory = VENVS / name
    marker, wanted = directory / "requirements.txt", "\n".join(requirements)
    python = directory / "bin" / "python"
    if marker.exists() and marker.read_text() == wanted:
        return python
    print(f"making {directory}: {', '.join(requirements)}; this takes some minutes", flush=True)
    shutil.rmtree(directory, ignore_errors=True)
    venv.create(directory, with_pip=True)
    subprocess.run([python, "-m", "pip", "install", "-q", *requirements], check=True)
    marker.write_text(wanted)
    return python


def free_port() -> int:
    """Return a port of the loopback interface that was free just now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def server(
    command: Sequence[str | Path], ready_url: str, environment: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Run a server until the block ends; the block starts when `ready_url` answers 200."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}
        )
        try:
            _wait_for(ready_url, process)
            yield
        except BaseException:
            log.seek(0)
            print(log.read(), file=sys.stderr)
            raise
        finally:
            _end(process)


def _wait_for(url: str, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + START_S
    while not _answers(url):
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"no answer from {url}")
        time.sleep(_POLL_S)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def gateway(upstreams: Mapping[str, Mapping[str, object]]) -> Iterator[Gateway]:
    """Run a gateway before `upstreams` (name to settings), with one user and key."""
    with tempfile.TemporaryDirectory() as place:
        config = Path(place) / "config.toml"
        config.write_text(_config(place, upstreams))
        _gpuproxy(config, "user", "create", "caller@example.com")
        key = _gpuproxy(config, "key", "create", "--user", "caller@example.com", "--rpm", "0")
        process = subprocess.Popen([GPUPROXY, "serve", "-c", config], stdout=subprocess.PIPE, cwd=place)
        try:
            assert process.stdout is not None
            said = process.stdout.readline().decode()
            found = re.search(r"listening on (http://\S+)", said)
            if not found:
                raise SystemExit(f"the gateway said {said!r}")
            yield Gateway(found[1], key)
        finally:
            _end(process)


def _config(place: str, upstreams: Mapping[str, Mapping[str, object]]) -> str:
    tables = [("[server]", {"port": 0, "workers": 1, "data_dir": f"{place}/data"})]
    tables.append(("[store]", {"url": f"sqlite:///{place}/gpuproxy.db"}))
    tables += [("[[upstreams]]", {"name": name, **settings}) for name, settings in upstreams.items()]
    lines = [[head, *(f"{key} = {json.dumps(value)}" for key, value in table.items())] for head, table in tables]
    return "\n".join(line for table in lines for line in table)


def _gpuproxy(config: Path, *words: str) -> str:
    done = subprocess.run([GPUPROXY, *words, "-c", config], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()
