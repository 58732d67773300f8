"""The log of a service: JSON lines for machines, a line of text for people, by structlog.

Parts log with the standard library's `logging.getLogger("corral.…")` and nothing else, so that they are quiet inside
somebody else's program; what their records look like is decided here, at the entry points. What nats-py and other
libraries log goes the same way. Where a message of the bus is at fault its place goes along as
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
    """How a record is written."""

    AUTO = "auto"
    """`console` on a terminal, `json` elsewhere."""
    JSON = "json"
    """One JSON object a line: `timestamp`, `level`, `event`, `logger`, `service`, `instance`, `host`, and more."""
    CONSOLE = "console"


class LogLevel(StrEnum):
    """Records below it are left out."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


LogFormatOption = Annotated[
    LogFormat,
    typer.Option(
        "--log-format", envvar="CORRAL_LOG_FORMAT", help="auto: text on a terminal, else JSON.", rich_help_panel=PANEL
    ),
]
LogLevelOption = Annotated[
    LogLevel,
    typer.Option("--log-level", envvar="CORRAL_LOG_LEVEL", help="Leave out what is below.", rich_help_panel=PANEL),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="As --log-level debug.", rich_help_panel=PANEL)]

BURST: Final = 20
"""Records of one kind that are written within `WINDOW_SECONDS`; of more only the count is."""
WINDOW_SECONDS: Final = 60.0
MOST_CHARACTERS: Final = 4096
"""Of one record: what strangers sent may be in it."""
_MOST_KINDS: Final = 1024
_FIRST: Final = ("timestamp", "level", "event", "logger", "service", "instance", "host")
_PLAIN: Final = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


class RepeatLimit(logging.Filter):
    """Lets the first records of a kind through and counts the rest, so that a flood of bad messages is no flood of log.

    A kind is a logger with a level and the text before its values are filled in. When a kind's window is over, the next
    record of any kind brings the count of those that were left out as a record of its own.

    Args:
        burst: of one kind in one window.
        window_seconds: length of a window, from the first record of a kind on.
    """

    def __init__(self, burst: int = BURST, window_seconds: float = WINDOW_SECONDS) -> None:
        super().__init__()
        self._burst = burst
        self._window = window_seconds
        self._kinds: OrderedDict[tuple[str, int, str], list[float]] = OrderedDict()
        self.handler: logging.Handler | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to write a record. Whoever debugs wants all."""
        if record.levelno < logging.INFO:
            return True
        now = time.monotonic()
        self._tell(now)
        key = (record.name, record.levelno, str(record.msg)[:256])
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = [now, 0]
            if len(self._kinds) > _MOST_KINDS:
                self._report(*self._kinds.popitem(last=False))
        kind[1] += 1
        return kind[1] <= self._burst

    def _tell(self, now: float) -> None:
        """Windows begin in the order of the kinds, so that those that are over come first."""
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
    """Who logs; a service learns its instance after its log has begun.

    Attributes:
        service: such as `planner`.
        instance: as in its answers about its health.
        host: name of the machine.
    """

    def __init__(self, service: str, instance: str = "") -> None:
        self.service = service
        self.instance = instance
        self.host = socket.gethostname()

    def named(self, instance: str) -> None:
        """The instance is known now."""
        self.instance = instance

    def __call__(self, _logger: Any, _method: str, event: dict[str, Any]) -> dict[str, Any]:
        """Add them to a record."""
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
    """Let everything that this process logs be written, to stderr unless told otherwise.

    Args:
        service: such as `planner`.
        format: see `LogFormat`.
        level: see `LogLevel`.
        verbose: `debug`, whatever the level says.
        stream: where to.

    Returns:
        Who logs: call `named` once the instance is known.
    """
    import structlog

    out = stream or sys.stderr
    as_json = format is LogFormat.JSON or (format is LogFormat.AUTO and not out.isatty())
    identity = Identity(service)
    # Before the formatter runs, so that both kinds of output have them.
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
    # Its debug lines say what asyncio does, not what Corral does.
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    logging.captureWarnings(True)
    return identity


def _extras(_logger: Any, _method: str, event: dict[str, Any]) -> dict[str, Any]:
    """What a call gave as `extra`: the subject, stream and sequence of a message, say."""
    record: logging.LogRecord | None = event.get("_record")
    if record is not None:
        for name, value in record.__dict__.items():
            if name not in _PLAIN and name not in event:
                event[name] = value
    return event


def _cut(_logger: Any, _method: str, event: dict[str, Any]) -> dict[str, Any]:
    for name, value in event.items():
        if isinstance(value, str) and len(value) > MOST_CHARACTERS:
            event[name] = f"{value[:MOST_CHARACTERS]}… ({len(value)} characters)"
    return event


def _printable(_logger: Any, _method: str, event: dict[str, Any]) -> dict[str, Any]:
    """No message can write a line of its own, or move the cursor of whoever reads the log on a terminal."""
    for name, value in event.items():
        if isinstance(value, str) and not value.isprintable():
            event[name] = "".join(each if each.isprintable() else repr(each)[1:-1] for each in value)
    return event


def _to_json(event: dict[str, Any], **_: Any) -> str:
    first = {name: event.pop(name) for name in _FIRST if name in event}
    # The standard library writes what msgspec refuses, such as half of a surrogate pair from a file name.
    return json.dumps(first | event, default=str)
