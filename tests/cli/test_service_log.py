"""The log of a service: one line per record, whatever the record contains."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
from corral.cli.services import logs
from corral.cli.services.logs import LogFormat, RepeatLimit, configure


@pytest.fixture(autouse=True)
def root_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def records(out: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_a_record_says_who_where_and_which_message() -> None:
    out = io.StringIO()
    identity = configure("processor", LogFormat.AUTO, stream=out)
    identity.named("abc123")
    place = {"subject": "corral.v1.samples.h1", "stream": "CORRAL_TELEMETRY", "sequence": 7}
    logging.getLogger("corral.ingest").warning("refused %d messages", 3, extra=place)
    logging.getLogger("nats.aio.client").error("a library's")
    try:
        raise OSError("disk gone")
    except OSError:
        logging.getLogger("corral.storage").exception("failed")
    mine, library, failed = records(out)
    assert mine.items() >= place.items()
    assert (mine["service"], mine["instance"], mine["level"]) == ("processor", "abc123", "warning")
    assert mine["event"] == "refused 3 messages"
    assert {"timestamp", "host", "logger"} <= mine.keys()
    assert library["service"] == "processor"
    assert "disk gone" in str(failed["exception"])


@pytest.mark.parametrize("format", [LogFormat.JSON, LogFormat.CONSOLE])
def test_what_a_stranger_sent_writes_no_line_of_its_own(format: LogFormat) -> None:
    out = io.StringIO()
    configure("planner", format, stream=out)
    hostile = "x\n2026-01-01T00:00:00Z [error] forged\x1b[2J\r\u2028\ud800" + "y" * 100_000
    logging.getLogger("corral.planner").warning("ignored: %s", hostile, extra={"subject": hostile})
    text = out.getvalue()
    assert len(text.splitlines()) == 1
    assert "\x1b" not in text
    assert len(text) < 40_000


def test_a_flood_is_counted_and_everything_else_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    configure("processor", LogFormat.JSON, stream=out)
    clock = 1000.0
    monkeypatch.setattr(logs.time, "monotonic", lambda: clock)
    log = logging.getLogger("corral.ingest")
    for number in range(5000):
        log.warning("refused %d", number)
    log.error("another kind")
    assert len(records(out)) == logs.BURST + 1
    clock += logs.WINDOW_SECONDS
    log.info("much later")
    told = records(out)[-2]
    assert told["repeated"] == 5000 - logs.BURST
    assert "refused %d" in str(told["event"])


def test_kinds_without_end_take_bounded_memory() -> None:
    limit = RepeatLimit()
    for number in range(20_000):
        limit.filter(logging.LogRecord("a", logging.ERROR, "", 0, f"unique {number}", None, None))
    assert len(limit._kinds) <= 1024
