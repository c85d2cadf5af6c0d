"""SIGHUP under load: nobody's call fails, whether the new configuration is good or not."""

import asyncio
import signal
import subprocess

import pytest
from callers import HELD, Answer, Caller, CutError, Load
from clients.gateway import GPUPROXY, upstream
from conftest import MakeCaller, MakePlace
from gateways import MODEL, STOP_S, children, is_alive, kill, running, until
from inference import STREAM_BODY, Inference


async def health(caller: Caller) -> Answer:
    return await caller.get("/health")


async def test_no_call_fails_while_the_configuration_is_read_anew(
    place: MakePlace, inference: Inference, new_caller: MakeCaller
) -> None:
    here = place()
    inference.hold()
    with running(here) as gateway:
        streaming, asking = new_caller(gateway), new_caller(gateway)
        stream = asyncio.create_task(streaming.post(HELD))
        await until(lambda: inference.held_count == 1, 5, "the stream reaches the upstream")
        first = children(gateway.process.pid)
        files = gateway.open_files()
        assert (await asking.post({"model": "new-model"})).status == 404
        async with Load(gateway.port, here.key) as load:
            load.add(6, pause_s=0.001)
            load.add(4, is_kept_alive=False, pause_s=0.001)
            load.add(1, health, pause_s=0.001)
            load.add(1, health, is_kept_alive=False, pause_s=0.001)
            await until(lambda: len(load.answers) > 100, 5, "the load runs")
            here.configure("new-model")
            kill(gateway.process.pid, signal.SIGHUP)
            await until(lambda: gateway.logged().count("configuration taken") == 1, 15, "the reload is over")
            second = [pid for pid in children(gateway.process.pid) if pid not in first]
            assert (await asking.post({"model": "new-model"})).status == 200
            here.configure(tail="[sever]\nworkers = 3\n")
            kill(gateway.process.pid, signal.SIGHUP)
            await until(lambda: "configuration refused" in gateway.logged(), 5, "the fault is told")
            served = len(load.answers)
            await until(lambda: len(load.answers) > served + 100, 5, "the load goes on")
        inference.release()
        assert (await stream).body == STREAM_BODY
        await until(lambda: children(gateway.process.pid) == second, 5, "only the second generation is left")
        await until(lambda: gateway.open_files() == files, 5, "the supervisor keeps no files of the first generation")
        assert gateway.stop() == 0
    assert load.faults == {}
    assert len(second) == 3
    assert "sever" in here.log.read_text()
    calls = [answer.request_id for answer in load.answers if b"chat.completion" in answer.body]
    told = [receipt.request_id for receipt in here.receipts()]
    assert len(told) == len(set(told))
    assert set(calls) <= set(told)
    assert "ingest failed" not in here.log.read_text()


async def test_a_reload_cuts_no_call_that_lasts_longer_than_a_stop_would_wait(
    place: MakePlace, inference: Inference, new_caller: MakeCaller
) -> None:
    here = place(server={"drain_s": 0.3})
    inference.hold()
    with running(here) as gateway:
        several = [new_caller(gateway) for _ in range(2)]
        streams = [asyncio.create_task(caller.post(HELD)) for caller in several]
        await until(lambda: inference.held_count == 2, 5, "the streams reach the upstream")
        kill(gateway.process.pid, signal.SIGHUP)
        await until(lambda: "configuration taken" in gateway.logged(), 15, "the reload is over")
        await asyncio.sleep(1)
        assert not any(stream.done() for stream in streams)
        gateway.process.terminate()
        for stream in streams:
            with pytest.raises(CutError):
                await stream
        assert await asyncio.to_thread(gateway.process.wait, STOP_S) == 0
    assert len(here.receipts()) == 2


async def test_changes_of_the_server_section_wait_for_a_restart(place: MakePlace, new_caller: MakeCaller) -> None:
    here = place()
    with running(here) as gateway:
        first = children(gateway.process.pid)
        here.configure("new-model", server={"workers": 3, "port": 1})
        kill(gateway.process.pid, signal.SIGHUP)
        await until(lambda: not any(map(is_alive, first)), 15, "the children are replaced")
        assert "changes of [server] need a restart" in gateway.logged()
        assert len(gateway.workers()) == 2
        assert {(await new_caller(gateway).post({"model": name})).status for name in (MODEL, "new-model")} == {200}
        assert gateway.stop() == 0


async def test_a_changed_file_is_taken_by_itself_and_a_wrong_one_is_not(
    place: MakePlace, new_caller: MakeCaller
) -> None:
    here = place()
    with running(here) as gateway:
        caller = new_caller(gateway)
        assert (await caller.post({"model": "new-model"})).status == 404
        here.configure("new-model")
        await until(lambda: "configuration taken" in gateway.logged(), 20, "the change is taken")
        assert (await new_caller(gateway).post({"model": "new-model"})).status == 200
        here.configure(tail="[[models]]\nname = 'x'\n")
        await until(lambda: "configuration refused" in gateway.logged(), 20, "the fault is told")
        assert (await new_caller(gateway).post({"model": "new-model"})).status == 200
        assert gateway.stop() == 0
    assert 'no upstream serves "x"' in here.log.read_text()
    assert here.log.read_text().count("configuration taken") == 1


async def test_a_configuration_no_control_starts_with_is_not_taken(place: MakePlace, new_caller: MakeCaller) -> None:
    here = place()
    with running(here) as gateway:
        first = children(gateway.process.pid)
        here.configure("new-model", store={"url": "postgresql://nobody@127.0.0.1:1/gone"})
        kill(gateway.process.pid, signal.SIGHUP)
        await until(lambda: "configuration refused" in gateway.logged(), 30, "the fault is told")
        assert "the store cannot be used" in gateway.logged()
        assert children(gateway.process.pid) == first
        kill(gateway.control())
        await until(lambda: gateway.control() not in (0, *first), 20, "control is started again")
        assert (await health(new_caller(gateway))).status == 200
        assert gateway.stop() == 0
    assert "configuration taken" not in here.log.read_text()


async def test_a_command_reloads_the_gateway_that_runs(place: MakePlace, new_caller: MakeCaller) -> None:
    here = place(server={"watch_config": False})
    with running(here) as gateway:
        here.configure("new-model", log={"format": "json"})
        told = await asyncio.to_thread(here.command, "reload")
        assert told == f"gateway {gateway.process.pid} was told to take the configuration"
        await until(
            lambda: '"message": "configuration taken"' in gateway.logged(), 20, "the change is taken, of logs too"
        )
        assert (await new_caller(gateway).post({"model": "new-model"})).status == 200
        here.configure(tail=upstream("odd", "nope", here.upstream_url))
        line = [str(GPUPROXY), "reload", "-c", str(here.config)]
        done = await asyncio.to_thread(subprocess.run, line, capture_output=True, text=True, timeout=20)
        assert (done.returncode, "no plugin speaks 'nope'" in done.stderr) == (2, True), done.stderr
        assert gateway.stop() == 0


def test_nothing_is_reloaded_where_no_gateway_runs(place: MakePlace) -> None:
    here = place()
    done = subprocess.run([str(GPUPROXY), "reload", "-c", str(here.config)], capture_output=True, text=True, timeout=20)
    assert (done.returncode, "no gateway runs" in done.stderr) == (1, True)
