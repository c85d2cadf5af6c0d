"""The load: the same calls for every contender, made by wrk."""

import http.client
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from programs import BenchmarkError, on_cpu, program

CONNECTION_COUNT = 64
ANSWER_TIMEOUT_S = 10
_SCRIPT = Path(__file__).with_name("call.lua")
_PATH = "/v1/chat/completions"
_ERROR_FIELDS = ("connect", "read", "write", "status", "timeout")


@dataclass(frozen=True)
class Load:
    """One kind of call."""

    name: str
    title: str
    body: str


def _chat(user: str, *, is_stream: bool) -> str:
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "Hello!"},
    ]
    body = {"model": "mock-model", "messages": messages, "max_tokens": 30, "user": user, "stream": is_stream}
    return json.dumps(body)


JSON = Load("json", "small JSON call", _chat("small", is_stream=False))
SSE = Load("sse", "34-event SSE stream, in steps", _chat("steps", is_stream=True))
SSE_BURST = Load("sse_burst", "34-event SSE stream, in a burst", _chat("burst", is_stream=True))
LOADS = (JSON, SSE, SSE_BURST)


@dataclass(frozen=True)
class Result:
    """What wrk saw: complete answers, and latency of a call from its first byte out to its last byte in."""

    calls: int
    duration_us: int
    p50_us: int
    p99_us: int


def run_wrk(load: Load, port: int, key: str, seconds: int, cpu: int) -> Result:
    """Send the load for some seconds over 64 connections. Raises BenchmarkError on any failed call."""
    command = [
        program("wrk"),
        "-t1",
        f"-c{CONNECTION_COUNT}",
        f"-d{seconds}s",
        "--timeout",
        f"{ANSWER_TIMEOUT_S}s",
    ]
    command += ["-s", str(_SCRIPT), f"http://127.0.0.1:{port}{_PATH}"]
    environment = {**os.environ, "BENCH_BODY": load.body, "BENCH_KEY": key}
    limit_s = seconds + 2 * ANSWER_TIMEOUT_S
    try:
        with on_cpu(cpu):
            wrk = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired as error:
        raise BenchmarkError(f"wrk did not end within {limit_s} s") from error
    if wrk.returncode:
        raise BenchmarkError(f"wrk ended with {wrk.returncode}: {wrk.stderr or wrk.stdout}")
    return parse(wrk.stdout)


def parse(output: str) -> Result:
    """Read wrk's output, which ends with the line that call.lua writes. Raises BenchmarkError on errors."""
    try:
        told: dict[str, int] = json.loads(output.strip().rpartition("\n")[2])
    except ValueError as error:
        raise BenchmarkError(f"wrk wrote no result: {output!r}") from error
    errors = {name: told[name] for name in _ERROR_FIELDS if told[name]}
    if errors:
        raise BenchmarkError(f"{told['calls']} calls answered, but wrk counted errors: {errors}")
    if not told["calls"]:
        raise BenchmarkError("wrk got no complete answer")
    return Result(told["calls"], told["duration_us"], told["p50_us"], told["p99_us"])


def call_once(load: Load, port: int, key: str) -> bytes:
    """Make one call as wrk makes it and return the answer's body. Raises BenchmarkError unless it is 200."""
    headers = {"Content-Type": "application/json", "X-API-Key": key}
    status, body = request(port, "POST", _PATH, headers, load.body)
    if status != 200:
        raise BenchmarkError(f"the {load.title} was answered with {status}: {body[:500]!r}")
    return body


def request(port: int, method: str, path: str, headers: dict[str, str], body: str = "") -> tuple[int, bytes]:
    """Return status and body of one HTTP call to the loopback interface. Raises OSError, HTTPException."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_TIMEOUT_S)
    try:
        connection.request(method, path, body or None, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()
