"""How a gateway starts, how it stops, and what it refuses to start with."""

import asyncio
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from callers import HELD, Caller, ClosedError, CutError
from clients.gateway import GPUPROXY
from conftest import MakeCaller, MakePlace
from gateways import STOP_S, Gateway, Place, children, is_alive, process, running, until
from inference import STREAM_BODY, Inference

COLD_START_CPU_S = 6.0  # of all processes: on a crowded machine the time by the wall says nothing
WORKER_BYTES = 64 << 20


def run(place: Place, *words: str) -> "subprocess.CompletedProcess[str]":
    """Run a command that must end by itself."""
    line = [str(GPUPROXY), *words, "-c", str(place.config)]
    return subprocess.run(line, cwd=place.directory, capture_output=True, text=True, timeout=STOP_S, check=False)


async def test_a_cold_start_is_short_and_a_worker_small(
    place: MakePlace, new_caller: MakeCaller, capsys: pytest.CaptureFixture[str]
) -> None:
    here = place()
    begun_s = time.monotonic()
    with process(here) as started:
        gateway = Gateway.announced(here, started)
        caller = new_caller(gateway)
        answer = await caller.post()
        took_s = time.monotonic() - begun_s
        cpu_s = sum(map(used_cpu_s, [started.pid, *children(started.pid)]))
        sizes = {pid: resident_bytes(pid) for pid in children(started.pid)}
        workers = [sizes[pid] for pid in gateway.workers()]
        assert gateway.stop() == 0
    with capsys.disabled():
        mib = ", ".join(f"{size / 2**20:.1f}" for size in workers)
        print(f"\nfirst proxied 200 after {took_s:.2f} s and {cpu_s:.2f} s of CPU; workers: {mib} MiB resident")
    assert answer.status == 200
    assert cpu_s < COLD_START_CPU_S
    assert len(workers) == 2
    assert max(workers) < WORKER_BYTES


def used_cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_stop_lets_calls_finish_and_takes_no_more(
    place: MakePlace, new_caller: MakeCaller, inference: Inference, number: signal.Signals
) -> None:
    here = place()
    inference.hold()
    with running(here) as gateway:
        idle, streaming = new_caller(gateway), new_caller(gateway)
        await idle.post()
        stream = asyncio.create_task(streaming.post(HELD))
        await until(lambda: inference.held_count == 1, 5, "the stream reaches the upstream")
        pids = children(gateway.process.pid)
        os.killpg(gateway.process.pid, number) if number == signal.SIGINT else gateway.process.send_signal(number)
        async with asyncio.timeout(5):
            assert await (await idle.connect()).read() == b""
        await until_refused(gateway.port)
        assert not stream.done()
        assert gateway.process.poll() is None
        inference.release()
        answer = await stream
        assert (answer.status, answer.body) == (200, STREAM_BODY)
        assert await asyncio.to_thread(gateway.process.wait, STOP_S) == 0
    assert len(pids) == 3
    assert not any(is_alive(pid) for pid in pids)
    assert sorted(receipt.outcome for receipt in here.receipts()) == ["ok", "ok"]
    assert not any(here.segments().values())


async def until_refused(port: int) -> None:
    """Wait until nothing listens on the port any more."""
    for _ in range(500):
        caller = Caller(port, "none")
        try:
            await caller.connect()
        except ClosedError:
            return
        await caller.close()
        await asyncio.sleep(0.01)
    raise AssertionError("5 s after the signal new connections are still taken, though nobody will serve them")


async def test_a_stream_longer_than_the_drain_is_cut_visibly(
    place: MakePlace, new_caller: MakeCaller, inference: Inference
) -> None:
    here = place(server={"drain_s": 0.3})
    inference.hold()
    with running(here) as gateway:
        caller = new_caller(gateway)
        stream = asyncio.create_task(caller.post(HELD))
        await until(lambda: inference.held_count == 1, 5, "the stream reaches the upstream")
        gateway.process.terminate()
        with pytest.raises(CutError):
            await stream
        assert await asyncio.to_thread(gateway.process.wait, STOP_S) == 0
    assert len(here.receipts()) == 1


async def test_each_process_asks_name_servers_again_in_time(gateway: Gateway) -> None:
    for pid in children(gateway.process.pid):
        assert b"RES_OPTIONS=timeout:1 attempts:2\0" in Path(f"/proc/{pid}/environ").read_bytes()


async def test_who_says_stop_again_waits_no_longer(
    place: MakePlace, new_caller: MakeCaller, inference: Inference
) -> None:
    here = place()
    inference.hold()
    with running(here) as gateway:
        caller = new_caller(gateway)
        stream = asyncio.create_task(caller.post(HELD))
        await until(lambda: inference.held_count == 1, 5, "the stream reaches the upstream")
        begun_s = time.monotonic()
        gateway.process.terminate()
        gateway.process.terminate()  # as timeout(1) does: this is one word
        while not stream.done():
            await asyncio.sleep(0.05)
            gateway.process.send_signal(signal.SIGINT)
        with pytest.raises(CutError):
            await stream
        assert 1.0 < time.monotonic() - begun_s < 5.0
        assert await asyncio.to_thread(gateway.process.wait, STOP_S) == 0
    assert len(here.receipts()) == 1


async def test_a_second_gateway_on_the_port_is_refused(place: MakePlace, new_caller: MakeCaller) -> None:
    here = place()
    with running(here) as gateway:
        here.configure(server={"port": gateway.port})
        second = await asyncio.to_thread(run, here, "serve")
        assert second.returncode == 1
        assert second.stdout == ""
        assert "cannot listen; set another [server] host or port" in second.stderr
        assert f"127.0.0.1:{gateway.port}" in second.stderr
        assert "Address already in use" in second.stderr
        caller = new_caller(gateway)
        assert (await caller.post()).status == 200


async def test_a_second_gateway_on_the_data_directory_is_refused(place: MakePlace) -> None:
    here = place()
    with running(here) as gateway:
        second = await asyncio.to_thread(run, here, "serve")
        assert second.returncode == 1
        assert second.stdout == ""
        assert "another gateway uses the data directory; set another [server] data_dir" in second.stderr
        assert f"{here.directory}/data" in second.stderr
        assert gateway.stop() == 0


@pytest.mark.parametrize("command", ["serve", "check-config"])
def test_a_faulty_configuration_starts_nothing(tmp_path: Path, command: str) -> None:
    config = tmp_path / "config.toml"
    config.write_text(
        '[server]\nport = "high"\nworker = 2\n[[upstreams]]\nname = "a"\nprotocol = "https"\nurls = ["x"]\n'
    )
    line = [str(GPUPROXY), command, "-c", str(config)]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=STOP_S, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert [fault.removeprefix(f"{config}:")[:1] for fault in done.stderr.splitlines()] == ["2", "3", "7"]
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]


def test_refusals_to_start_are_json_lines_where_logs_are(place: MakePlace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOG_FORMAT", "json")
    here = place(plugins={"enabled": ["https", "mcp", "openinference", "telex"]})
    (told,) = map(json.loads, run(here, "serve").stderr.splitlines())
    assert (told["level"], "telex" in told["fault"]) == ("critical", True)
    here = place(server={"data_dir": "/proc/nowhere"})
    (told,) = map(json.loads, run(here, "serve").stderr.splitlines())
    assert (told["level"], "[server] data_dir" in told["message"], "/proc/nowhere" in told["cause"]) == (
        "critical",
        True,
        True,
    )


def test_an_unknown_plugin_starts_nothing(place: MakePlace) -> None:
    here = place(plugins={"enabled": ["https", "mcp", "openinference", "telex"]})
    done = run(here, "serve")
    assert (done.returncode, done.stdout) == (2, "")
    assert "telex" in done.stderr
    assert not here.journal.exists()


def test_a_store_that_cannot_be_opened_ends_the_start(place: MakePlace) -> None:
    here = place()
    here.configure(store={"url": "sqlite:////proc/nowhere/g.db"})
    done = run(here, "serve")
    assert (done.returncode, done.stdout) == (1, "")
    assert "child did not start" in done.stderr
    assert "control" in done.stderr
    assert "Traceback" not in done.stderr
