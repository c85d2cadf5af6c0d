"""What systemd hears from a gateway, and the socket it hands over (sd_notify(3), sd_listen_fds(3))."""

import asyncio
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from callers import Caller
from clients.gateway import GPUPROXY
from conftest import MakeCaller, MakePlace
from gateways import kill, process, running, until


class Notices:
    """The receiving end of NOTIFY_SOCKET."""

    def __init__(self, path: Path) -> None:
        self.heard: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(str(path))

    def hear(self) -> list[str]:
        """Return everything heard so far."""
        while True:
            try:
                self.heard += self._socket.recv(4096).decode().splitlines()
            except BlockingIOError:
                return self.heard

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def notices(tmp_path: Path) -> Iterator[Notices]:
    ear = Notices(tmp_path / "notify")
    yield ear
    ear.close()


async def test_the_service_manager_hears_of_every_state(place: MakePlace, notices: Notices, tmp_path: Path) -> None:
    here = place(server={"workers": 1})
    with running(here, environment={"NOTIFY_SOCKET": str(tmp_path / "notify")}) as gateway:
        await until(lambda: notices.hear() == ["READY=1"], 2, "it is told that the gateway is ready")
        kill(gateway.process.pid, signal.SIGHUP)
        await until(lambda: len(notices.hear()) == 4, 10, "it is told of the reload and its end")
        assert gateway.stop() == 0
    said = [word for word in notices.hear() if not word.startswith("MONOTONIC_USEC=")]
    assert said == ["READY=1", "RELOADING=1", "READY=1", "STOPPING=1"]
    assert len(notices.heard) == 5


async def test_a_socket_of_the_service_manager_is_served_and_outlives_the_gateway(
    place: MakePlace, new_caller: MakeCaller
) -> None:
    here = place()
    line = ["/bin/sh", "-c", f"LISTEN_PID=$$ LISTEN_FDS=1 exec {GPUPROXY} serve -c {here.config}"]
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        port = listener.getsockname()[1]

        def hand_over() -> None:
            os.dup2(listener.fileno(), 3)

        caller = Caller(port, here.key)
        early = asyncio.create_task(caller.post())
        for _ in range(2):
            with running(here, line=line, pass_fds=[3], preexec_fn=hand_over) as gateway:
                assert gateway.port == port
                assert (await early).status == 200
                assert gateway.stop() == 0
            early = asyncio.create_task(caller.post())
        early.cancel()
        await asyncio.gather(early, return_exceptions=True)
        await caller.close()


def test_a_gateway_that_cannot_start_is_never_reported_ready(
    place: MakePlace, notices: Notices, tmp_path: Path
) -> None:
    here = place()
    here.configure(store={"url": "sqlite:////proc/nowhere/g.db"})
    with process(here, environment={"NOTIFY_SOCKET": str(tmp_path / "notify")}) as started:
        assert started.wait(15) == 1
    assert "READY=1" not in notices.hear()
