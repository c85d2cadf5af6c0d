"""A line for every ended call: what happened, and nothing that is nobody's business."""

import json
import logging

import pytest
from observe.test_traffic import CALL, like

from gpuproxy.observe.access_log import access_log


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
