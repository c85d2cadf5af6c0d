"""The control process as the supervisor starts it: sockets by descriptor, ready byte, graceful stop."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gpuproxy import config
from gpuproxy.codec.key import digest_of
from gpuproxy.link.messages import (
    Authorize,
    Authorized,
    FrameReader,
    Hello,
    Prices,
    Revoke,
    Routing,
    SealKeys,
    decode_from_control,
    frame,
)
from gpuproxy.process import Boot
from gpuproxy.proxy.journal import frame as journal_frame
from gpuproxy.types import Receipt

WAIT_S = 20


class Control:
    """A running control process."""

    def __init__(self, directory: Path, database: str = "") -> None:
        self.directory = directory
        self.log = directory / "log"
        self.settings = config.Config(
            server=config.Server(data_dir=str(directory / "data"), drain_s=5),
            store=config.Store(url=f"sqlite:///{database or directory / 'gpuproxy.db'}"),
        )
        self._listener = self._listen("control.sock")
        self._link_listener = self._listen("link.sock")
        self._lifeline, self.lifeline = os.pipe()
        ready, self._ready = os.pipe()
        self.process = self._start()
        os.close(self._ready)
        with os.fdopen(ready, "rb") as pipe:
            self.was_ready = pipe.read(1) == b"1"

    def get(self, path: str, key: str = "") -> dict[str, Any]:
        """GET over the Unix socket and return the JSON body."""
        connection = HTTPConnection("control", timeout=WAIT_S)
        connection.sock = self.connect("control.sock")
        connection.request("GET", path, headers={"X-API-Key": key} if key else {})
        body: dict[str, Any] = json.loads(connection.getresponse().read())
        connection.close()
        return body

    def connect(self, name: str) -> socket.socket:
        """Connect to one of its sockets."""
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(WAIT_S)
        connection.connect(str(self.directory / name))
        return connection

    def command(self, *words: str) -> str:
        """Run a gpuproxy command on the same store, as an operator would beside the daemon."""
        environment = {**os.environ, "GPUPROXY_STORE__URL": self.settings.store.url}
        done = subprocess.run(
            [sys.executable, "-m", "gpuproxy.cli", *words],
            capture_output=True, text=True, check=True, env=environment, cwd=self.directory,
        )  # fmt: skip
        return done.stdout.strip()

    def close(self) -> None:
        """End it, hard if need be."""
        self.process.kill()
        self.process.wait()
        for descriptor in (self._lifeline, self.lifeline):
            os.close(descriptor)
        self._listener.close()
        self._link_listener.close()

    def _listen(self, name: str) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.directory / name))
        listener.listen()
        return listener

    def _start(self) -> "subprocess.Popen[bytes]":
        reading, writing = os.pipe()
        boot = Boot(
            self.settings, -1, self._listener.fileno(), self._link_listener.fileno(),
            str(self.directory / "link.sock"), str(self.directory / "control.sock"), self._ready, self._lifeline,
        )  # fmt: skip
        os.write(writing, msgspec.msgpack.encode(boot))
        os.close(writing)
        handed = (reading, boot.listen_fd, boot.link_fd, boot.report_fd, boot.lifeline_fd)
        line = [sys.executable, "-W", "error", "-m", "gpuproxy.control.app", str(reading)]
        with self.log.open("wb") as errors:
            process = subprocess.Popen(line, pass_fds=handed, stderr=errors)
        os.close(reading)
        return process


@pytest.fixture
def control(tmp_path: Path) -> Iterator[Control]:
    started = Control(tmp_path)
    yield started
    started.close()


def receive(link: socket.socket) -> Any:
    """Return the next message that tells neither prices nor routing nor keys."""
    reader = FrameReader()
    while True:
        for body in reader.feed(link.recv(65_536)):
            message = decode_from_control(body)
            if not isinstance(message, Prices | Routing | SealKeys):
                return message


def test_control_serves_answers_and_stops_with_everything_ingested(control: Control) -> None:
    assert control.was_ready
    assert control.get("/health")["status"] == "ok"

    user_id = control.command("user", "create", "ann@example.com")
    key = control.command("key", "create", "--user", "ann@example.com")
    assert control.get("/api/v1/user/usage", key)["requests"] == 0

    link = control.connect("link.sock")
    link.sendall(frame(Hello(0, 1)) + frame(Authorize(1, digest_of(key.encode()))))
    answer = receive(link)
    assert isinstance(answer, Authorized)
    assert answer.grant is not None
    assert answer.grant.user_id == user_id

    control.command("key", "revoke", answer.grant.key_id)
    assert receive(link) == Revoke((answer.grant.key_id,))
    link.close()

    journal = control.directory / "data" / "journal"
    journal.mkdir(parents=True)
    (journal / "late.log").write_bytes(journal_frame([_receipt(user_id)]))
    control.process.send_signal(signal.SIGTERM)
    assert control.process.wait(WAIT_S) == 0
    assert not list(journal.iterdir())


def test_control_stops_when_its_supervisor_is_gone(control: Control) -> None:
    os.close(control.lifeline)
    control.lifeline = os.dup(0)
    assert control.process.wait(WAIT_S) == 0


def test_a_store_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    control = Control(tmp_path, f"{tmp_path}/file/g.db")
    try:
        assert not control.was_ready
        assert control.process.wait(WAIT_S) == 1
        (line,) = control.log.read_text().splitlines()
    finally:
        control.close()
    assert "the store cannot be used; see [store] url" in line
    assert "cause=" in line


def _receipt(user_id: str) -> Receipt:
    return Receipt(
        "r1", "q", 10**18, 1, 1, user_id, "k", "https", "", "m1", "POST", "/x", 200, "ok", "", 1, 1, -1, -1, -1,
        "none", 1, False,
    )  # fmt: skip


def test_a_secret_that_can_be_guessed_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "jwt.key").write_text("secret")
    (tmp_path / "data" / "jwt.key").chmod(0o600)
    started = Control(tmp_path)
    assert started.process.wait(WAIT_S) == 1
    assert not started.was_ready
    (line,) = started.log.read_text().splitlines()
    assert "too short" in line
    started.close()


def test_control_keeps_its_secret_to_itself(control: Control) -> None:
    path = control.directory / "data" / "jwt.key"
    assert path.stat().st_mode & 0o777 == 0o600
