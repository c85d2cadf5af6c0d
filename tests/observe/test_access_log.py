"""A line for every ended call: what happened, and nothing that is nobody's business."""

import io
import json
import logging
import sys
from typing import Any, ClassVar

import pytest
from observe.test_traffic import CALL, like

from gpuproxy.observe.access_log import JSON, REMEMBERED_MAX, TEXT, Form, Lines, access_log, whole_lines

TEXT_LINE = (
    b"2001-09-09T01:46:42.000Z [info     ] call                           request_id=q1 user_id=u1 key_id=k1 "
    b"protocol=openinference upstream=llm model=m method=POST path=/v1/chat/completions status=200 outcome=ok "
    b"duration_ms=2000.0 request_bytes=100 response_bytes=900 attempts=1 first_byte_ms=500.0 input_tokens=7 "
    b"cached_tokens=3 output_tokens=4 usage_source=provider"
)
JSON_LINE = (
    b'{"level":"info","timestamp":"2001-09-09T01:46:42.000Z","message":"call","request_id":"q1","user_id":"u1",'
    b'"key_id":"k1","protocol":"openinference","upstream":"llm","model":"m","method":"POST",'
    b'"path":"/v1/chat/completions","status":200,"outcome":"ok","duration_ms":2000.0,"request_bytes":100,'
    b'"response_bytes":900,"attempts":1,"first_byte_ms":500.0,"input_tokens":7,"cached_tokens":3,"output_tokens":4,'
    b'"usage_source":"provider"}'
)


def lines(capfdbinary: pytest.CaptureFixture[bytes]) -> list[bytes]:
    return capfdbinary.readouterr().err.splitlines()


@pytest.fixture(autouse=True)
def _at_info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def test_json_lines_have_the_shape_of_the_others(
    capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    access_log(is_json=True)([CALL, like(output_tokens=-1, error="UPSTREAM_TIMEOUT", status=504)])
    first, second = map(json.loads, lines(capfdbinary))
    assert list(first)[:3] == ["level", "timestamp", "message"]
    assert (first["level"], first["message"], first["timestamp"]) == ("info", "call", "2001-09-09T01:46:42.000Z")
    assert (first["user_id"], first["model"], first["status"], first["output_tokens"]) == ("u1", "m", 200, 4)
    assert (first["duration_ms"], first["first_byte_ms"]) == (2000.0, 500.0)
    assert second["error"] == "UPSTREAM_TIMEOUT"
    assert "output_tokens" not in second


def test_text_lines_cannot_be_forged(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    access_log(is_json=False)([like(model="m\n2026-01-01 [info] call", path="/v1/a b")])
    (line,) = lines(capfdbinary)
    assert b"model='m\\n2026-01-01 [info] call'" in line
    assert b"path='/v1/a b'" in line
    assert b"status=200 outcome=ok" in line


def test_nothing_is_written_above_level_info(
    capfdbinary: pytest.CaptureFixture[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    access_log(is_json=True)([CALL])
    assert lines(capfdbinary) == []


@pytest.mark.parametrize(("is_json", "wanted"), [(False, TEXT_LINE), (True, JSON_LINE)], ids=["text", "json"])
def test_a_line_is_this_to_the_byte_however_often_it_comes(
    capfdbinary: pytest.CaptureFixture[bytes], is_json: bool, wanted: bytes
) -> None:
    write = access_log(is_json)
    write([CALL, CALL])
    write([CALL])
    assert lines(capfdbinary) == [wanted] * 3


@pytest.mark.parametrize(("is_json", "wanted"), [(False, TEXT_LINE), (True, JSON_LINE[:-1])], ids=["text", "json"])
def test_the_trace_is_told_if_there_is_one(
    capfdbinary: pytest.CaptureFixture[bytes], is_json: bool, wanted: bytes
) -> None:
    access_log(is_json)([like(trace_id="ab")])
    end = b',"trace_id":"ab"}' if is_json else b" trace_id=ab"
    assert lines(capfdbinary) == [wanted + end]


@pytest.mark.parametrize("form", [TEXT, JSON], ids=["text", "json"])
def test_an_id_made_here_is_told_as_one_that_was_given(form: Form) -> None:
    line = Lines(form)
    assert line.of(like(id="q1")) == line.of(CALL)


def test_lines_are_dated_by_the_end_of_their_call(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    access_log(is_json=True)([like(duration_us=us) for us in (0, 999, 1_000, 999_999, 1_000_001)])
    told = [json.loads(line) for line in lines(capfdbinary)]
    assert [each["timestamp"][18:] for each in told] == ["0.000Z", "0.000Z", "0.001Z", "0.999Z", "1.000Z"]
    assert [each["duration_ms"] for each in told] == [0.0, 0.999, 1.0, 999.999, 1000.001]


def test_callers_without_end_fill_no_memory(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    line = Lines(TEXT)
    told = [line.of(like(path=f"/{number}")) for number in range(REMEMBERED_MAX + 9)]
    assert [f"path=/{number} " in each for number, each in enumerate(told)] == [True] * len(told)
    assert len(line._labels) <= REMEMBERED_MAX


def test_a_call_of_a_tool_names_it_and_what_became_of_it(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    called = like(rpc_method="tools/call", rpc_name="a\nb", rpc_outcome="tool_error")
    access_log(is_json=True)([called])
    access_log(is_json=False)([called, like(rpc_method="ping")])
    as_json, as_text, ping = lines(capfdbinary)
    told = json.loads(as_json)
    assert (told["rpc_method"], told["rpc_name"], told["rpc_outcome"]) == ("tools/call", "a\nb", "tool_error")
    assert as_text.endswith(b"rpc_method=tools/call rpc_name='a\\nb' rpc_outcome=tool_error")
    assert ping.endswith(b" rpc_method=ping")


def test_no_line_of_another_process_can_stand_within_one() -> None:
    """A pipe takes up to 4,096 bytes at once; what is longer it may take in parts, with others' between them."""
    lines = b"".join(b"%d%s\n" % (number, b"x" * (number * 7 % 900)) for number in range(500))
    pieces = list(whole_lines(lines + b"y" * 5_000 + b"\n" + lines))
    assert b"".join(pieces) == lines + b"y" * 5_000 + b"\n" + lines
    assert all(piece.endswith(b"\n") for piece in pieces)
    assert [len(piece) for piece in pieces if len(piece) > 4_096] == [5_001]
    assert len(pieces) < 2 * len(lines) / 3_000 + 3


def test_many_lines_are_written_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    class Written(io.RawIOBase):
        sizes: ClassVar[list[int]] = []

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            self.sizes.append(len(data))
            return len(data)

    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BufferedWriter(Written())))
    access_log(is_json=True)([CALL] * 100)
    assert max(Written.sizes) <= 4_096
    assert len(Written.sizes) < 25
