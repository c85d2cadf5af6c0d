"""Log lines: their form, their level, and what importing them costs."""

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import datetime

import pytest
import structlog

from gpuproxy.config import Log
from gpuproxy.errors import ConfigError
from gpuproxy.observe.logs import configure_logs, get_logger


@pytest.fixture(autouse=True)
def logging_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put the process's logging back."""
    for module, hook in ((sys, "excepthook"), (sys, "unraisablehook"), (threading, "excepthook")):
        monkeypatch.setattr(module, hook, getattr(module, hook))
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.reset_defaults()


def _log(capsys: pytest.CaptureFixture[str], log: Log, environment: dict[str, str]) -> list[str]:
    configure_logs(log, environment)
    logger = get_logger("gpuproxy.test")
    logger.debug("quiet")
    logger.info("Instance created", user_id="u1", provider="vast.ai")
    logging.getLogger("aiohttp").warning("from %s", "outside")
    return capsys.readouterr().err.splitlines()


def test_json_lines_have_the_form_of_the_guide(capsys: pytest.CaptureFixture[str]) -> None:
    own, foreign = map(json.loads, _log(capsys, Log(format="json"), {}))
    assert list(own) == ["level", "timestamp", "message", "user_id", "provider"]
    assert (own["level"], own["message"], own["user_id"]) == ("info", "Instance created", "u1")
    assert own["timestamp"].endswith("Z")
    assert datetime.fromisoformat(own["timestamp"]).tzinfo is not None
    assert (foreign["level"], foreign["message"]) == ("warning", "from outside")


def test_text_lines_carry_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    own, foreign = _log(capsys, Log(), {})
    assert "Instance created" in own
    assert "provider=vast.ai" in own
    assert "from outside" in foreign


def test_the_environment_wins(capsys: pytest.CaptureFixture[str]) -> None:
    lines = _log(capsys, Log(level="error", format="text"), {"LOG_LEVEL": "DEBUG", "LOG_FORMAT": "json"})
    assert [json.loads(line)["message"] for line in lines] == ["quiet", "Instance created", "from outside"]


def test_lines_below_the_level_are_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(_log(capsys, Log(level="warning"), {})) == 1


@pytest.mark.parametrize("form", ["json", "text"])
def test_an_exception_is_written_with_its_traceback(capsys: pytest.CaptureFixture[str], form: str) -> None:
    configure_logs(Log(format=form), {})
    try:
        raise RuntimeError("broken")
    except RuntimeError:
        get_logger("gpuproxy.test").exception("failed")
    told = capsys.readouterr().err
    assert "RuntimeError: broken" in told
    assert (len(told.splitlines()) == 1) is (form == "json")


@pytest.mark.parametrize("where", ["thread", "process", "destructor"])
def test_what_nobody_catches_is_one_line_too(where: str) -> None:
    wrong = {
        "process": "1 / 0",
        "thread": "import threading; thread = threading.Thread(target=lambda: 1 / 0); thread.start(); thread.join()",
        "destructor": "it = type('It', (), {'__del__': lambda self: 1 / 0})(); del it",
    }
    code = f"""
from gpuproxy.config import Log
from gpuproxy.observe.logs import configure_logs
configure_logs(Log(format="json"), {{}})
{wrong[where]}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == (where == "process")
    (line,) = done.stderr.splitlines()
    told = json.loads(line)
    assert (told["level"], told["message"]) == ("critical", "uncaught")
    assert "ZeroDivisionError: division by zero" in told["exception"]


def test_the_form_may_be_written_in_any_case(capsys: pytest.CaptureFixture[str]) -> None:
    (line, _) = _log(capsys, Log(), {"LOG_FORMAT": "JSON"})
    assert json.loads(line)["level"] == "info"


def test_unknown_settings_are_refused_together_with_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        configure_logs(Log(), {"LOG_LEVEL": "loud", "LOG_FORMAT": "xml"})
    assert len(caught.value.faults) == 2
    assert "known: debug, info" in caught.value.faults[0]


def test_logging_loads_neither_rich_nor_a_server_nor_a_database() -> None:
    code = (
        "import sys, gpuproxy.observe.logs; print([m for m in ('rich', 'aiohttp', 'sqlalchemy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
