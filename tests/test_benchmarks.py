"""The parts of the benchmarks that need neither nginx nor wrk: fake upstream, CPU reader, arithmetic."""

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import compare  # noqa: E402
import comparison  # noqa: E402
import contenders  # noqa: E402
import fake_upstream  # noqa: E402
import load  # noqa: E402
import proc_cpu  # noqa: E402
import programs  # noqa: E402

PATH = "/v1/chat/completions"
CPU = min(os.sched_getaffinity(0))


@pytest.fixture(scope="module")
def upstream_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with contenders.fake_upstream(CPU, tmp_path_factory.mktemp("upstream")) as port:
        yield port


def exchange(port: int, sent: list[bytes], until: bytes) -> bytes:
    """Send pieces over one raw connection, then read until the bytes that end the last answer."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        for piece in sent:
            connection.sendall(piece)
        while not received.endswith(until):
            data = connection.recv(65_536)
            assert data, received
            received += data
    return received


def post(body: str, path: str = PATH) -> bytes:
    return b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (
        path.encode(),
        len(body),
        body.encode(),
    )


# The fake upstream


def test_a_plain_call_gets_one_small_completion_with_usage(upstream_port: int) -> None:
    answer = json.loads(load.call_once(load.JSON, upstream_port, ""))
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["usage"]["prompt_tokens"] == fake_upstream.PROMPT_TOKENS
    assert 300 <= len(fake_upstream.JSON_BODY) <= 400


@pytest.mark.parametrize("kind", [load.SSE, load.SSE_BURST], ids=lambda kind: kind.name)
def test_a_streamed_call_gets_34_events_the_last_with_usage_then_done(upstream_port: int, kind: load.Load) -> None:
    events = load.call_once(kind, upstream_port, "").split(b"\n\n")
    assert events.pop() == b""
    assert len(events) == 34
    assert all(event.startswith(b"data: ") for event in events)
    assert events[-1] == b"data: [DONE]"
    chunks = [json.loads(event.removeprefix(b"data: ")) for event in events[:-1]]
    assert chunks[-1]["usage"]["completion_tokens"] == fake_upstream.COMPLETION_TOKENS
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


def test_each_event_is_a_chunk_of_its_own(upstream_port: int) -> None:
    received = exchange(upstream_port, [post('{"stream":true}')], b"0\r\n\r\n")
    framed = received.partition(b"\r\n\r\n")[2]
    count = 0
    while (size := int(framed.partition(b"\r\n")[0], 16)) > 0:
        framed = framed.partition(b"\r\n")[2]
        assert framed[size - 2 : size + 2] == b"\n\n\r\n"
        framed = framed[size + 2 :]
        count += 1
    assert count == fake_upstream.EVENT_COUNT


def test_events_in_steps_come_one_by_one(upstream_port: int) -> None:
    reads = 0
    with socket.create_connection(("127.0.0.1", upstream_port), timeout=5) as connection:
        connection.sendall(post('{"stream": true}'))
        received = b""
        while not received.endswith(b"0\r\n\r\n"):
            received += connection.recv(65_536)
            reads += 1
    assert reads > fake_upstream.EVENT_COUNT // 2  # a laden test machine may merge some


def test_a_connection_takes_one_call_after_the_other(upstream_port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", upstream_port, timeout=5)
    for expected in (fake_upstream.JSON_BODY, fake_upstream.STREAM_BODY, fake_upstream.JSON_BODY):
        is_stream = expected is fake_upstream.STREAM_BODY
        connection.request("POST", PATH, json.dumps({"stream": is_stream}))
        assert connection.getresponse().read() == expected
    connection.close()


def test_calls_sent_ahead_are_answered_in_order(upstream_port: int) -> None:
    received = exchange(upstream_port, [post('{"stream":true,"user":"burst"}') + post("{}")], fake_upstream.JSON_BODY)
    assert received.index(b"[DONE]") < received.index(b'"chat.completion"')


def test_a_call_in_pieces_is_put_together(upstream_port: int) -> None:
    call = post('{"stream": false}')
    pieces = [call[at : at + 7] for at in range(0, len(call), 7)]
    received = exchange(upstream_port, pieces, fake_upstream.JSON_BODY)
    assert received.startswith(b"HTTP/1.1 200 OK\r\n")


def test_any_other_path_is_not_found(upstream_port: int) -> None:
    assert load.request(upstream_port, "POST", "/v1/other", {}, "{}")[0] == 404
    assert load.request(upstream_port, "GET", PATH, {})[0] == 404


def test_a_call_without_a_length_is_refused(upstream_port: int) -> None:
    received = exchange(upstream_port, [b"POST %b HTTP/1.1\r\n\r\n" % PATH.encode()], b"}}")
    assert received.startswith(b"HTTP/1.1 411 ")


# CPU from /proc


def busy(seconds: float) -> str:
    return f"import time\nwhile time.process_time() < {seconds}: pass\n"


def test_the_cpu_time_of_a_busy_process_is_read() -> None:
    then_wait = "print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", busy(0.3) + then_wait], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert 0.25 <= proc_cpu.own_cpu_s(process.pid) <= 0.6
        process.communicate(b"\n")


def test_the_cpu_time_of_a_tree_counts_children_alive_and_ended() -> None:
    child = f"import subprocess, sys; command = [sys.executable, '-c', {busy(0.2)!r}]; subprocess.run(command)\n"
    alive = f"child = subprocess.Popen([sys.executable, '-c', {busy(0.2) + 'print(flush=True); input()'!r}],"
    alive += " stdin=subprocess.PIPE, stdout=subprocess.PIPE); child.stdout.readline()\n"
    end = "print(flush=True); input(); child.communicate(b'\\n')"
    with subprocess.Popen(
        [sys.executable, "-c", child + alive + end], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert len(proc_cpu.tree(process.pid)) == 2
        assert proc_cpu.tree_cpu_s(process.pid) >= 0.35
        assert proc_cpu.tree_cpu_s(process.pid) >= proc_cpu.own_cpu_s(process.pid) + 0.3
        process.communicate(b"\n")


def test_a_process_that_is_gone_is_an_error() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    with pytest.raises(OSError):
        proc_cpu.own_cpu_s(process.pid)


def test_a_command_line_is_read() -> None:
    assert proc_cpu.command_line(os.getpid()).split() == " ".join(sys.orig_argv).split()


# Processes


def test_a_started_process_stays_on_its_processor_and_ends_with_the_block(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    with programs.started([sys.executable, "-c", "input()"], CPU, tmp_path / "log") as process:
        assert os.sched_getaffinity(process.pid) == {CPU}
        assert os.sched_getaffinity(0) == before
    assert process.returncode is not None


def test_what_a_started_process_left_behind_is_ended_too(tmp_path: Path) -> None:
    leave = "import subprocess; print(subprocess.Popen(['sleep', '60']).pid)"
    with programs.started([sys.executable, "-c", leave], CPU, tmp_path / "log") as process:
        assert process.stdout is not None
        left_pid = int(process.stdout.readline())
        process.wait()
    deadline = time.monotonic() + 5
    while is_running(left_pid):
        assert time.monotonic() < deadline


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_process_that_dies_at_start_shows_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with (
        programs.started([sys.executable, "-c", "raise SystemExit('no such port')"], CPU, log) as process,
        pytest.raises(programs.BenchmarkError, match=r"proxy ended with 1:\nno such port"),
    ):
        programs.wait_until(lambda: False, process, log, "proxy")


# What wrk tells


def told(**changes: int) -> str:
    fields = {"calls": 10, "duration_us": 2_000_000, "connect": 0, "read": 0, "write": 0, "status": 0}
    return "Running 2s test\n" + json.dumps({**fields, "timeout": 0, "p50_us": 5, "p99_us": 9, **changes}) + "\n"


def test_the_last_line_of_wrk_is_the_result() -> None:
    assert load.parse(told()) == load.Result(10, 2_000_000, 5, 9)


@pytest.mark.parametrize("kind", ["connect", "read", "write", "status", "timeout"])
def test_a_failed_call_fails_the_run(kind: str) -> None:
    with pytest.raises(programs.BenchmarkError, match=kind):
        load.parse(told(**{kind: 1}))


def test_a_run_without_answers_fails() -> None:
    with pytest.raises(programs.BenchmarkError, match="no complete answer"):
        load.parse(told(calls=0))
    with pytest.raises(programs.BenchmarkError, match="no result"):
        load.parse("unable to connect\n")


# Arithmetic


def one(worker_us: float, *, all_us: float = 0.0, calls_per_s: float = 1.0, busy: float = 0.0) -> comparison.Sample:
    return comparison.Sample(worker_us, all_us, calls_per_s, p50_us=worker_us, p99_us=worker_us, busy=busy)


def test_cpu_is_divided_by_the_answered_calls() -> None:
    sample = comparison.sample(100_000, 4.0, 2.0, 3.0, 50, 90)
    assert sample.worker_us == pytest.approx(20)
    assert sample.all_us == pytest.approx(30)
    assert sample.calls_per_s == 25_000
    assert sample.busy == 0.75


def test_the_best_of_each_is_compared() -> None:
    rounds = [one(20, all_us=25, calls_per_s=9, busy=0.9), one(18, all_us=26, calls_per_s=8, busy=0.8)]
    best = comparison.best(rounds)
    assert (best.worker_us, best.all_us, best.calls_per_s, best.busy) == (18, 25, 9, 0.9)
    assert (best.p50_us, best.p99_us) == (18, 18)


def test_figures_are_ratios_to_the_worker_of_nginx() -> None:
    worker, everything = comparison.figures("json", one(10, all_us=11), one(15, all_us=23))
    assert (worker.ratio, worker.is_reached) == (1.5, True)
    assert (everything.ratio, everything.is_reached) == (2.3, False)
    assert [figure.ratio_max for figure in comparison.figures("sse", one(10), one(10))] == [1.3]


def test_every_kind_of_call_has_its_figures() -> None:
    assert set(comparison.RATIO_MAX) == {kind.name for kind in load.LOADS}


@pytest.mark.parametrize(("receipts", "is_exact"), [(101, False), (102, True), (166, True), (167, False)], ids=str)
def test_receipts_may_exceed_answered_calls_by_those_cut_in_flight(receipts: int, is_exact: bool) -> None:
    assert comparison.is_exact(100, 2, receipts, 64) is is_exact


def test_the_table_shows_ratios() -> None:
    result = load.Result(1000, 1_000_000, 5, 9)
    measured = compare.Measured(load.JSON, result, [one(10, all_us=10)], [one(14, all_us=18)])
    console = compare.Console(width=100)
    with console.capture() as shown:
        compare.report([measured], compare.Exactness(calls=10, probes=1, receipts=11), console)
    assert "1.40 x nginx, at most 1.5: reached" in shown.get()
    assert "exact" in shown.get()


def test_a_missing_program_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compare.PACKAGES, "no-such-program", "its-package")
    with pytest.raises(programs.BenchmarkError, match=r"no program named .*; on Debian: apt-get install .*"):
        compare.check_programs()
