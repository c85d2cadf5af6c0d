"""Structured log lines on standard error, one way for every process and every library.

structlog imports rich if it is there, for coloured tracebacks nobody reads in a daemon's log: 5 MB and 60 ms
in each process. It is kept out.
"""

import logging
import os
import sys
import threading
from collections.abc import Iterable, Mapping
from types import TracebackType

from gpuproxy import config
from gpuproxy.errors import ConfigError

_hides_rich = "rich" not in sys.modules
if _hides_rich:
    sys.modules["rich"] = None  # type: ignore[assignment]
import structlog  # noqa: E402

if _hides_rich:
    del sys.modules["rich"]

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
FORMATS = ("text", "json")
CHATTY = ("alembic", "aiosqlite", "stripe")  # these tell their whole start as news, statements with values, bodies


def configure_logs(log: config.Log, environment: Mapping[str, str] = os.environ) -> None:
    """Send every log line of this process to standard error in the wished form, from `level` up.

    LOG_LEVEL and LOG_FORMAT in the environment win over `log`. What nobody catches is a line too. Raises ConfigError
    for an unknown value.
    """
    level = environment.get("LOG_LEVEL") or log.level
    form = _form(log, environment)
    _check(level, form)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_formatter(form))
    logging.basicConfig(handlers=[handler], level=LEVELS[level.lower()], force=True)
    logging.captureWarnings(True)
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *_shared(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    sys.excepthook = _uncaught
    threading.excepthook = lambda told: _uncaught(told.exc_type, told.exc_value, told.exc_traceback)
    sys.unraisablehook = lambda told: _uncaught(told.exc_type, told.exc_value, told.exc_traceback)


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """Return the logger of a module; lines go nowhere special until `configure_logs` ran."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger


def is_json(log: config.Log, environment: Mapping[str, str] = os.environ) -> bool:
    """Tell whether lines are JSON."""
    return _form(log, environment) == "json"


def log_faults(faults: Iterable[str], environment: Mapping[str, str] = os.environ) -> bool:
    """Write what is wrong with a configuration as lines if they are to be JSON; tell whether that was done.

    Only LOG_FORMAT can say so: the configuration is what cannot be read.
    """
    if not is_json(config.Log(), environment):
        return False
    configure_logs(config.Log(format="json"), {})
    for fault in faults:
        get_logger(__name__).critical("the configuration is refused", fault=fault)
    return True


def _form(log: config.Log, environment: Mapping[str, str]) -> str:
    return (environment.get("LOG_FORMAT") or log.format).lower()


def _uncaught(kind: type[BaseException], error: BaseException | None, traceback: TracebackType | None) -> None:
    if not issubclass(kind, SystemExit):
        get_logger(__name__).critical("uncaught", exc_info=(kind, error or kind(), traceback))


def _check(level: str, form: str) -> None:
    faults = []
    if level.lower() not in LEVELS:
        faults.append(f"log level {level!r} is unknown; known: {', '.join(LEVELS)}")
    if form not in FORMATS:
        faults.append(f"log format {form!r} is unknown; known: {', '.join(FORMATS)}")
    if faults:
        raise ConfigError(faults)


def _shared() -> list[structlog.typing.Processor]:
    return [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.stdlib.PositionalArgumentsFormatter(),
    ]


def _in_order(_logger: object, _name: str, fields: structlog.typing.EventDict) -> structlog.typing.EventDict:
    head = {
        "level": fields.pop("level"),
        "timestamp": fields.pop("timestamp"),
        "message": fields.pop("event"),
    }
    return {**head, **fields}


def _formatter(form: str) -> logging.Formatter:
    last: list[structlog.typing.Processor]
    if form == "json":
        last = [
            structlog.processors.format_exc_info,
            _in_order,
            structlog.processors.JSONRenderer(sort_keys=False),
        ]
    else:
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
        last = [renderer]
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=_shared(),
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
    )
