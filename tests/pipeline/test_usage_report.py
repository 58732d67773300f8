"""The usage report over a history of known use: cut at the period's ends, exact to the cent, the same each time."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from corral.cli.exits import USAGE, CommandError
from corral.cli.local.server import EmbeddedServer
from corral.cli.operate.report import report as command
from corral.client.reports.asking import queries, scope_of
from corral.client.reports.periods import between, period_of, slices
from corral.client.reports.prices import parse_prices
from corral.client.reports.text import as_csv, as_json, markdown
from corral.client.reports.usage import Answers, Scope, UsageReport, usage_report
from corral.client.reports.usage_sql import By, Filters
from corral.processors.query.service import QueryService
from corral.processors.storage import Database
from duckdb import DuckDBPyConnection
from msgspec.structs import replace
from nats.aio.client import Client
from support.usage_history import PRICES, usage_history
from typer.testing import CliRunner

NOW = datetime(2026, 11, 30, tzinfo=UTC)
EVERY = [[By.GROUP], [By.OWNER, By.MODEL], list(By)]
SUMS = (
    "granted_gpu_hours", "active_gpu_hours", "idle_gpu_hours", "unknown_gpu_hours", "energy_kwh", "gpu_cost",
    "energy_cost", "cost", "requests", "rejected", "preemptions", "lost_gpu_hours",
)  # fmt: skip


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    made = usage_history(tmp_path_factory.mktemp("usage"))
    yield made
    made.close()


def scope(by: list[By], filters: Filters | None = None) -> Scope:
    return scope_of(period_of("2026-01", "Europe/Berlin", NOW), by, filters or Filters(), NOW)


def report(asked: Database | DuckDBPyConnection, by: list[By], filters: Filters | None = None) -> UsageReport:
    about, found = scope(by, filters), dict[str, list[dict[str, Any]]]()
    cursor = asked if isinstance(asked, DuckDBPyConnection) else asked.cursor()
    for name, sql in queries(about).items():
        cursor.execute(sql)
        names = [column[0] for column in cursor.description]
        found[name] = [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
    return usage_report(about, parse_prices(PRICES), Answers(**found))


async def test_the_command_asks_the_history_over_the_bus(
    server: EmbeddedServer, nc: Client, database: Database, tmp_path: Path
) -> None:
    (tmp_path / "prices.toml").write_text(PRICES)
    service = QueryService(nc, database.cursor)
    await service.start()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "corral.cli.main", "--nats", server.url, "report", "usage", "--period", "2026-01",
        "--zone", "Europe/Berlin", "--by", "owner,model", "--prices", "prices.toml", "--format", "json",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, cwd=tmp_path,
    )  # fmt: skip
    out, err = await asyncio.wait_for(process.communicate(), 90)
    await service.stop()
    assert process.returncode == 0, err
    assert "no price for GB10 (2.000 GPU-hours)" in err.decode()
    assert out == as_json(report(database, [By.OWNER, By.MODEL]))
    assert json.loads(out)["total"]["cost"] == 8.4


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--by", "owner,color"], "one or more of group, owner, model"),
        (["--period", "october"], "is no period"),
        (["--period", "2026-10", "--from", "2026-10-01"], "exclude each other"),
        (["--from", "2026-10-02", "--to", "2026-10-01"], "is empty"),
        (["--prices", "/nowhere"], "--prices /nowhere"),
        (["--mine", "--owner", "ann"], "exclude each other"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], error: str) -> None:
    refused = CliRunner().invoke(command, ["usage", *arguments]).exception
    assert isinstance(refused, CommandError)
    assert refused.code == USAGE
    assert error in str(refused)


def test_every_form_has_the_same_bytes_each_time_and_shows_names_as_they_are(database: Database) -> None:
    page, paper = pytest.importorskip("corral.client.reports.page"), pytest.importorskip("corral.client.reports.pdf")
    made, again = (report(database, [By.OWNER, By.MODEL]) for _ in range(2))
    for render in (markdown, as_csv, as_json, page.html, paper.pdf):
        assert render(made) == render(again)
    hostile = replace(made, rows=[replace(row, owner="<b>|Жанна") for row in made.rows])
    assert "&lt;b&gt;|Жанна" in page.html(hostile)
    assert "<b>" not in page.html(hostile)
    assert r"| \<b\>\|Жанна |" in markdown(hostile)
    assert paper.pdf(hostile).startswith(b"%PDF-")
    rows = list(csv.DictReader(io.StringIO(as_csv(hostile))))
    assert rows[0]["owner"] == "<b>|Жанна"
    assert sum(Decimal(row["cost"] or 0) for row in rows) == made.total.cost
    empty = usage_report(made.scope, None, Answers(usage=[], leases=[], requests=[], preemptions=[], waste=[]))
    shown = page.html(empty)
    assert "No leases in this period." in shown
    assert "<svg" not in shown
    assert paper.pdf(empty).startswith(b"%PDF-")


def test_each_row_is_what_its_leases_used(database: Database) -> None:
    found = report(database, [By.GROUP, By.OWNER, By.MODEL])
    rows = {(row.group, row.owner, row.model): row for row in found.rows}
    h100 = rows["lab/vision", "ann", "NVIDIA H100 80GB HBM3"]
    # l1 has two boards for 1.5 h of the period, one of them idle; l4 has one for an hour without samples.
    assert h100.leases == 2
    assert [h100.granted_gpu_hours, h100.active_gpu_hours, h100.idle_gpu_hours, h100.unknown_gpu_hours] == [
        Decimal(amount) for amount in ("4.000", "1.500", "1.500", "1.000")
    ]
    # Half an hour at 360 W is 0.18 kWh.
    assert h100.energy_kwh == Decimal("1.080")
    assert (h100.gpu_cost, h100.energy_cost, h100.cost) == (Decimal("8.02"), Decimal("0.32"), Decimal("8.34"))
    assert (h100.requests, h100.granted, h100.asked_gpu_hours, h100.open_ended) == (2, 2, Decimal("2.000"), 1)
    assert (h100.wait_mean_seconds, h100.wait_p95_seconds) == (Decimal("30.0"), Decimal("60.0"))
    assert (h100.preemptions, h100.lost_gpu_hours) == (1, Decimal("4.000"))
    t4 = rows["lab/nlp", "ben", "Tesla T4"]
    # A third of an hour of half a board is 0.167 GPU-hours, and these are 0.059 EUR.
    assert (t4.granted_gpu_hours, t4.unknown_gpu_hours, t4.gpu_cost) == (
        Decimal("0.167"), Decimal("0.167"), Decimal("0.06"),
    )  # fmt: skip
    asked_in_vain = rows["lab/nlp", "ben", "*H100*"]
    assert (asked_in_vain.requests, asked_in_vain.timed_out, asked_in_vain.asked_gpu_hours) == (1, 1, Decimal("4.000"))
    # A model without a price has no cost, and is named.
    assert rows["", "ann", "GB10"].cost is None
    assert [(one.model, one.granted_gpu_hours) for one in found.unpriced] == [("GB10", Decimal("2.000"))]
    assert [(one.lease_id, one.enough_gpus, one.enough_memory_bytes, one.idle_cost) for one in found.waste] == [
        ("l1", 1, 11 * 2**30, Decimal("3.01"))
    ]
    bars = {bar.name: bar.active_gpu_hours + bar.idle_gpu_hours + bar.unknown_gpu_hours for bar in found.bars}
    assert len(bars) == 31
    assert {name: hours for name, hours in bars.items() if hours} == {
        "2026-01-01": Decimal("5.000"), "2026-01-31": Decimal("1.167"),
    }  # fmt: skip


def test_rows_add_up_to_the_same_total_whatever_they_are_by(database: Database) -> None:
    reports = [report(database, by) for by in EVERY]
    for found in reports:
        assert found.total == reports[0].total
        for name in SUMS:
            values = [getattr(row, name) for row in found.rows]
            assert sum(value for value in values if value is not None) == getattr(found.total, name), name
    assert reports[0].total.cost == Decimal("8.40")
    assert report(database, EVERY[-1]) == reports[-1]
    mine = report(database, [By.OWNER], Filters(owner="ben", group="lab"))
    assert [(row.owner, row.cost) for row in mine.rows] == [("ben", Decimal("0.06"))]
    assert (report(database, [By.MODEL], Filters(model="t4"))).total.granted_gpu_hours == Decimal("0.167")


def test_hours_answer_for_minutes_that_are_not_kept(database: Database) -> None:
    cursor = database.cursor()
    cursor.begin()
    for table in ("rollup_1m", "rollup_1m_open"):
        cursor.execute(f"DELETE FROM store.{table}")
    assert cursor.execute("SELECT count(*) FROM rollup_1m").fetchone() == (0,)
    found = report(cursor, [By.OWNER])
    cursor.rollback()
    assert found.total == report(database, [By.OWNER]).total


def test_days_follow_the_zone() -> None:
    october = period_of("last-month", "Europe/Berlin", datetime(2026, 10, 31, 23, 30, tzinfo=UTC))
    assert (october.name, october.start, october.end) == (
        "2026-10", datetime(2026, 9, 30, 22, tzinfo=UTC), datetime(2026, 10, 31, 23, tzinfo=UTC),
    )  # fmt: skip
    days = slices(october)
    assert len(days) == 31
    assert {day.end - day.start for day in days[:24]} == {days[0].end - days[0].start}
    assert (days[24].end - days[24].start).total_seconds() == 25 * 3600
    week = period_of("2026-W53", "Asia/Kathmandu", NOW)
    assert week.start == datetime(2026, 12, 27, 18, 15, tzinfo=UTC)
    some = between("2026-10-01", "2026-10-02", "UTC", NOW)
    assert (some.start, some.end) == (datetime(2026, 10, 1, tzinfo=UTC), datetime(2026, 10, 3, tzinfo=UTC))
    with pytest.raises(ValueError, match="is no period"):
        period_of("october", "UTC", NOW)
    with pytest.raises(ValueError, match="has not begun"):
        scope_of(period_of("2027-01", "UTC", NOW), [By.OWNER], Filters(), NOW)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('currency = "EUR"', "gpu_hour"),
        ('currency = "EUR"\n[gpu_hour]\na = -1', "'a'"),
        ('currency = "EUR"\n[gpu_hours]\na = 1', "gpu_hour"),
        ("currency", "Expected"),
    ],
)
def test_wrong_prices_are_refused(text: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        parse_prices(text)
