"""Configures the log of a service with structlog: JSON lines for machines, or lines of text for people.

Parts log only with the standard library's `logging.getLogger("corral.…")`, so that they print nothing when another
program imports them. The format of their records is set here, at the entry points. Records of nats-py and other
libraries are formatted in the same way. A record about a message of the bus carries the message's place as
`extra={"subject": …, "stream": …, "sequence": …}`.
"""

from __future__ import annotations

import json
import logging
import socket
import sys
import time
from collections import OrderedDict
from enum import StrEnum
from typing import Annotated, Any, Final, TextIO

import typer

PANEL: Final = "Service"


class LogFormat(StrEnum):
    """Format of log records."""

    AUTO = "auto"
    """`console` on a terminal, `json` elsewhere."""
    JSON = "json"
    """One JSON object a line: `timestamp`, `level`, `event`, `logger`, `service`, `instance`, `host`, and more."""
    CONSOLE = "console"


class LogLevel(StrEnum):
    """Minimum level of records to write."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


LogFormatOption = Annotated[
    LogFormat,
    typer.Option(
        "--log-format",
        envvar="CORRAL_LOG_FORMAT",
        help="auto is text on a terminal, JSON otherwise.",
        rich_help_panel=PANEL,
    ),
]
LogLevelOption = Annotated[
    LogLevel,
    typer.Option("--log-level", envvar="CORRAL_LOG_LEVEL", help="Minimum level of log records.", rich_help_panel=PANEL),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Same as --log-level debug.", rich_help_panel=PANEL)]

BURST: Final = 20
"""Maximum number of records of one kind within `WINDOW_SECONDS`; further ones are only counted."""
WINDOW_SECONDS: Final = 60.0
MAX_CHARACTERS: Final = 4096
"""Maximum length of a value in a record, since it may contain data from untrusted messages."""
_MAX_KINDS: Final = 1024
_FIRST: Final = ("timestamp", "level", "event", "logger", "service", "instance", "host")
_PLAIN: Final = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


class RepeatLimit(logging.Filter):
    """Rate limit: passes the first records of a kind and counts the rest, so that bad messages don't flood the log.

    A kind is a logger, a level and the message text before its values are filled in. When the window of a kind is
    over, the next record of any kind triggers an additional record with the number of suppressed ones.

    Args:
        burst: maximum number of records of one kind in a window.
        window_seconds: length of a window, which begins with the first record of a kind.
    """

    def __init__(self, burst: int = BURST, window_seconds: float = WINDOW_SECONDS) -> None:
        super().__init__()
        self._burst = burst
        self._window = window_seconds
        self._kinds: OrderedDict[tuple[str, int, str], list[float]] = OrderedDict()
        self.handler: logging.Handler | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        """True if a record is to be written. Records below `INFO` always are."""
        if record.levelno < logging.INFO:
            return True
        now = time.monotonic()
        self._tell(now)
        key = (record.name, record.levelno, str(record.msg)[:256])
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = [now, 0]
            if len(self._kinds) > _MAX_KINDS:
                self._report(*self._kinds.popitem(last=False))
        kind[1] += 1
        return kind[1] <= self._burst

    def _tell(self, now: float) -> None:
        """Report the kinds whose window is over; they come first, since kinds are ordered by the start of windows."""
        while self._kinds:
            key, kind = next(iter(self._kinds.items()))
            if now - kind[0] < self._window:
                return
            del self._kinds[key]
            self._report(key, kind)

    def _report(self, key: tuple[str, int, str], kind: list[float]) -> None:
        left_out = int(kind[1]) - self._burst
        if left_out <= 0 or self.handler is None:
            return
        name, level, text = key
        record = logging.LogRecord(
            name, level, "", 0, "%d more like this within %.0f s: %s", (left_out, self._window, text), None
        )
        record.__dict__["repeated"] = left_out
        self.handler.emit(record)


class Identity:
    """Service, instance and host, which are added to each record. The instance may be set after logging has begun.

    Attributes:
        service: name of the service, such as `planner`.
        instance: instance, as in the service's health checks; empty until it is known.
        host: name of the host.
    """

    def __init__(self, service: str, instance: str = "") -> None:
        self.service = service
        self.instance = instance
        self.host = socket.gethostname()

    def named(self, instance: str) -> None:
        """Set the instance."""
        self.instance = instance

    def __call__(self, _logger: Any, _method: str, event: dict[str, Any]) -> dict[str, Any]:
        """Add service, instance and host to a record, as a structlog processor."""
        event["service"] = self.service
        if self.instance:
            event["instance"] = self.instance
        event["host"] = self.host
        return event


def configure(
    service: str,
    format: LogFormat = LogFormat.AUTO,
    level: LogLevel = LogLevel.INFO,
    *,
    verbose: bool = False,
    stream: TextIO | None = None,
) -> Identity:
    """Configure the root logger of this process.

    Args:
        service: name of the service, such as `planner`.
        format: see `LogFormat`.
        level: see `LogLevel`.
        verbose: log at level `debug`, whatever `level` is.
        stream: stream to write to; stderr by default.

    Returns:
        The identity in the records; call `named` once the instance is known.
    """
    import structlog

    out = stream or sys.stderr
    as_json = format is LogFormat.JSON or (format is LogFormat.AUTO and not out.isatty())
    identity = Identity(service)
    # These run before the renderers, so that both formats have their results.
    shared: list[Any] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        _extras,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="timestamp"),
        _cut,
    ]
    if as_json:
        rendering: list[Any] = [
            identity,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(serializer=_to_json),
        ]
    else:
        # Plain: rich tracebacks show the values of local variables, and secrets may be among them.
        plain = structlog.dev.plain_traceback
        rendering = [
            _printable,
            structlog.dev.ConsoleRenderer(colors=out.isatty(), pad_event_to=0, exception_formatter=plain),
        ]
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    limit = RepeatLimit()
    limit.handler = handler
    handler.addFilter(limit)
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.DEBUG if verbose else level.value.upper())
    # The debug records of asyncio don't concern Corral.
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    logging.captureWarnings(True)
    return identity


def _extras(_logger: Any, _method: str, event: dict[str, Any]) -> dict[str, Any]:
    """Copy the values of a call's `extra`, such as subject, stream and sequence of a message, to the record."""
    record: logging.LogRecord | None = event.get("_record")
    if record is not None:
        for name, value in record.__dict__.items():
            if name not in _PLAIN and name not in event:
                event[name] = value
    return event


def _cut(_logger: Any, _method: str, event: dict[str, Any]) -> dict[str, Any]:
    for name, value in event.items():
        if isinstance(value, str) and len(value) > MAX_CHARACTERS:
            event[name] = f"{value[:MAX_CHARACTERS]}… ({len(value)} characters)"
    return event


def _printable(_logger: Any, _method: str, event: dict[str, Any]) -> dict[str, Any]:
    """Escape unprintable characters, so that a value can't forge log lines or send control codes to a terminal."""
    for name, value in event.items():
        if isinstance(value, str) and not value.isprintable():
            event[name] = "".join(each if each.isprintable() else repr(each)[1:-1] for each in value)
    return event


def _to_json(event: dict[str, Any], **_: Any) -> str:
    first = {name: event.pop(name) for name in _FIRST if name in event}
    # The standard library encodes texts that msgspec refuses, such as half of a surrogate pair in a file name.
    return json.dumps(first | event, default=str)
