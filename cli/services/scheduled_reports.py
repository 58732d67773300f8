"""Makes reports of a schedule from a processor's own history, each once, and those that were missed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ...client.reports.asking import queries, scope_of
from ...client.reports.forms import Form, renderer
from ...client.reports.periods import period_of
from ...client.reports.prices import Prices
from ...client.reports.schedule import Planned, Schedule, due, parse_schedule
from ...client.reports.usage import Answers, UsageReport, usage_report
from ..exits import USAGE, CommandError
from ..price_list import read_prices

if TYPE_CHECKING:
    from ...processors.service import History

log = logging.getLogger("corral.reports")

LEDGER: Final = ".corral-reports.json"
"""File in the folder that says what was made, so that a report whose file was moved away is not made again."""
_PAUSE_SECONDS: Final = 60.0


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


async def make_when_due(history: History, schedule: Schedule, prices: Prices | None) -> None:
    """Make the reports that are due, now and once a minute, until cancelled. What fails is logged and tried again."""
    while True:
        await make_due(history, schedule, prices, datetime.now(UTC))
        await asyncio.sleep(_PAUSE_SECONDS)


async def make_due(history: History, schedule: Schedule, prices: Prices | None, now: datetime) -> None:
    """Make the reports that are due at a time."""
    folder = Path(schedule.folder)
    for planned in schedule.report:
        try:
            for name in await asyncio.to_thread(_due, folder, planned, schedule, now):
                async with history.reading():
                    report = await asyncio.to_thread(_report, history, planned, schedule, prices, name, now)
                files = await asyncio.to_thread(_written, folder, f"{planned.name}-{name}", planned.formats, report)
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
