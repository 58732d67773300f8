"""Makes reports of a schedule from a processor's own history, each once, and those that were missed.

That one was written is published on the bus, where the notifier sends it to people. A report counts as made after that:
a processor that is killed in between publishes it again, under the same id.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nats.aio.client import Client
from nats.errors import Error as NatsError

from ...bus.permissions import NotAllowed, request
from ...client.reports import tables
from ...client.reports.asking import queries, scope_of
from ...client.reports.forms import Form, renderer
from ...client.reports.periods import period_of
from ...client.reports.prices import Prices
from ...client.reports.schedule import Planned, Schedule, due, parse_schedule
from ...client.reports.usage import Answers, UsageReport, usage_report
from ...schemas import codec, subjects
from ...schemas.work.reports import MAX_FILES_BYTES, ReportFile, ReportWritten
from ..exits import USAGE, CommandError
from ..price_list import read_prices

if TYPE_CHECKING:
    from ...processors.service import History

log = logging.getLogger("corral.reports")

LEDGER: Final = ".corral-reports.json"
"""File in the folder that says what was made, so that a report whose file was moved away is not made again."""
_PAUSE_SECONDS: Final = 60.0
_ACK_SECONDS: Final = 10.0


def read_schedule(file: Path) -> tuple[Schedule, Prices | None]:
    """Read a schedule and its price list; libraries that its formats need are loaded, so that none is missing at night.

    Raises:
        CommandError: a file can't be read or is wrong, or a library is missing.
    """
    try:
        schedule = parse_schedule(file.read_text(encoding="utf-8"), file.absolute().parent)
    except (OSError, ValueError) as error:
        raise CommandError(f"--reports {file}: {error}", USAGE) from None
    try:
        for form in {form for one in schedule.report for form in one.formats}:
            renderer(form)
    except ModuleNotFoundError:
        raise CommandError(f"--reports {file}: HTML and PDF need pip install 'corral[report]'", USAGE) from None
    return schedule, None if schedule.prices is None else read_prices(Path(schedule.prices))


async def make_when_due(history: History, schedule: Schedule, prices: Prices | None, nc: Client) -> None:
    """Make the reports that are due, now and once a minute, until cancelled. What fails is logged and tried again."""
    while True:
        await make_due(history, schedule, prices, nc, datetime.now(UTC))
        await asyncio.sleep(_PAUSE_SECONDS)


async def make_due(history: History, schedule: Schedule, prices: Prices | None, nc: Client, now: datetime) -> None:
    """Make the reports that are due at a time."""
    folder = Path(schedule.folder)
    for planned in schedule.report:
        try:
            for name in await asyncio.to_thread(_due, folder, planned, schedule, now):
                async with history.reading():
                    report = await asyncio.to_thread(_report, history, planned, schedule, prices, name, now)
                files = await asyncio.to_thread(_written, folder, f"{planned.name}-{name}", planned.formats, report)
                event = await asyncio.to_thread(_event, folder, planned, schedule, name, report)
                await _publish(nc, event)
                await asyncio.to_thread(_record, folder, planned.name, name)
                log.info("report %s of %s: %s", planned.name, name, ", ".join(files) or "its files were there")
        except Exception as error:
            log.warning("report %s can't be made now: %s: %s", planned.name, type(error).__name__, error)


def _due(folder: Path, planned: Planned, schedule: Schedule, now: datetime) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    return due(planned, schedule, _done(folder).get(planned.name, ()), now)


def _report(
    history: History, planned: Planned, schedule: Schedule, prices: Prices | None, name: str, now: datetime
) -> UsageReport:
    scope = scope_of(period_of(name, schedule.zone, now), planned.by, planned.filters, now)
    found: dict[str, list[dict[str, Any]]] = {}
    cursor = history.cursor()
    try:
        for field, sql in queries(scope).items():
            cursor.execute(sql)
            columns = [column[0] for column in cursor.description]
            found[field] = [dict(zip(columns, row, strict=True)) for row in cursor.fetchall()]
    finally:
        cursor.close()
    return usage_report(scope, prices, Answers(**found))


def _written(folder: Path, stem: str, forms: Sequence[Form], report: UsageReport) -> list[str]:
    """Write the forms of a report; a file that is there is never overwritten. Returns the names of those written."""
    made: list[str] = []
    for form in forms:
        target = folder / f"{stem}.{form}"
        if not target.exists() and _appears(target, renderer(form)(report)):
            made.append(target.name)
    return made


def _event(folder: Path, planned: Planned, schedule: Schedule, name: str, report: UsageReport) -> ReportWritten:
    """Event that a report was written, with those of its files that fit a message, the smallest first.

    Its id is that of what is in the folder: two processors that write the same folder publish the same event.
    """
    contents: dict[str, bytes] = {}
    for form in planned.formats:
        with contextlib.suppress(FileNotFoundError):
            contents[f"{planned.name}-{name}.{form}"] = (folder / f"{planned.name}-{name}.{form}").read_bytes()
    digest = hashlib.blake2b(f"{folder.absolute()}\n{planned.name}\n{name}".encode(), digest_size=16)
    left, fitting = MAX_FILES_BYTES, set[str]()
    for file, data in sorted(contents.items(), key=lambda item: len(item[1])):
        digest.update(data)
        if len(data) <= left:
            left -= len(data)
            fitting.add(file)
    period = report.scope.period
    return ReportWritten(
        report_id=digest.hexdigest(),
        name=planned.name,
        period=name,
        start=period.start,
        end=period.end,
        written_at=datetime.now(UTC),
        zone=schedule.zone,
        title=tables.title(report),
        facts=[("Period", tables.subtitle(report)), *tables.summary(report)],
        owner=planned.owner,
        group=planned.group,
        url=schedule.url or "",
        files=[
            ReportFile(name=file, size_bytes=len(data), data=data if file in fitting else None)
            for file, data in contents.items()
        ],
    )


async def _publish(nc: Client, event: ReportWritten) -> None:
    """Publish that a report was written.

    Raises:
        nats.errors.Error, TimeoutError: the stream did not take it.
    """
    headers = {codec.CONTENT_TYPE_HEADER: codec.JSON, "Nats-Msg-Id": event.report_id}
    subject = subjects.report_subject(event.name)
    try:
        ack = await request(nc, subject, codec.encode(event, codec.JSON), timeout=_ACK_SECONDS, headers=headers)
    except NotAllowed as refused:
        log.warning("%s: reports are not sent to people until `corral auth apply`", refused)
        return
    if b'"error"' in ack.data:
        raise NatsError(f"the stream {subjects.REPORTS_STREAM} refuses it: {ack.data.decode(errors='replace')}")


def _appears(target: Path, data: bytes) -> bool:
    """Write a file that appears as a whole; false if it is there meanwhile."""
    return _whole(target, data, os.link)


def _whole(target: Path, data: bytes, place: Callable[[str, Path], None]) -> bool:
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o644)
        place(name, target)
    except FileExistsError:
        return False
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
    return True


def _done(folder: Path) -> dict[str, list[str]]:
    try:
        found = json.loads((folder / LEDGER).read_text())
    except FileNotFoundError:
        return {}
    except ValueError:
        log.warning("%s can't be read: what has its files is not made again", folder / LEDGER)
        return {}
    return found if isinstance(found, dict) else {}


def _record(folder: Path, planned: str, name: str) -> None:
    done = _done(folder)
    done[planned] = sorted({*done.get(planned, ()), name})
    _whole(folder / LEDGER, json.dumps(done, indent=1).encode(), os.replace)
