"""Usage reports in the dashboard: the same numbers as `corral report`, live and as files, and one's own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from corral.cli.local.server import EmbeddedServer
from corral.client import SyncClient
from corral.client.errors import CorralError
from corral.client.reports.usage_sql import By
from corral.dashboard import periods
from corral.dashboard.period_usage import QUESTIONS
from corral.dashboard.security.accounts import Role
from corral.dashboard.security.sessions import GUEST_ID, Session
from corral.dashboard.usage_reports import asked_of, report_scope
from msgspec.structs import replace
from support.browser import DashboardProcess, open_tab
from support.local_cluster import CORRAL, environment, wait_for
from support.usage_history import PRICES, usage_history

BERLIN = ZoneInfo("Europe/Berlin")
JANUARY = "period=2026-01&zone=Europe/Berlin"


def test_own_usage_is_that_of_whoever_has_logged_in() -> None:
    ann = Session(id="a", name="ann", stamp="", expires=0, role=Role.VIEWER)
    now = datetime(2026, 2, 1, 12, tzinfo=UTC)
    asked = asked_of({"who": "mine", "owner": "ben", "by": "owner,color", "period": "last-month"}, mine=False)
    scope = report_scope(asked, ann, now, BERLIN)
    assert scope.filters.owner == "ann"
    assert scope.by == [By.OWNER]
    assert (scope.period.name, scope.period.start) == ("2026-01", datetime(2025, 12, 31, 23, tzinfo=UTC))
    with pytest.raises(ValueError, match="needs a login"):
        report_scope(asked, replace(ann, id=GUEST_ID), now, BERLIN)
    with pytest.raises(ValueError, match="is no period"):
        report_scope(asked_of({"period": "soon"}, mine=False), ann, now, BERLIN)
    assert asked_of(asked.query, mine=True).query == asked.query


def test_views_of_usage_count_what_is_within_a_period_and_compare_it_with_the_time_before(tmp_path: Path) -> None:
    database = usage_history(tmp_path)
    cursor = database.cursor()
    now = datetime(2026, 2, 10, tzinfo=UTC)
    period = periods.period_of("2026-01", now, BERLIN)
    assert period is not None

    def asked(view: str, **filters: str) -> list[dict[str, Any]]:
        cursor.execute(QUESTIONS[view].sql(period, filters))
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    # An hour and a half of two devices, of which one is idle; two hours of one that is unknown; an hour of another.
    ann, ben = asked("usage_by_owner")
    assert (ann["owner"], ann["leases"], ann["gpu_hours"], ann["gpu_hours_before"]) == ("ann", 3, 6.0, 1.0)
    assert (ann["active_gpu_hours"], ann["idle_gpu_hours"], ann["unknown_gpu_hours"]) == (1.5, 1.5, 3.0)
    assert (ann["idle_percent"], ann["energy_kwh"], ann["change_percent"]) == (50.0, 1.08, 500.0)
    assert (ben["gpu_hours"], ben["gpu_hours_before"], ben["change_percent"]) == (0.167, 0.0, None)
    (idle, *_) = asked("idle_while_leased", group="lab")
    assert (idle["lease_id"], idle["device"], idle["idle_gpu_hours"]) == ("l1", "d4", 1.5)
    assert [row["lease_id"] for row in asked("lease_usage", model="h100", host="H1")] == ["l1", "l4"]
    assert asked("group_usage", host="h%") == []
    database.close()


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DashboardProcess]:
    """A dashboard with prices on a bus with nothing but the history of known use."""
    folder = tmp_path_factory.mktemp("usage")
    database = usage_history(folder)
    file = database.path
    database.close()
    (folder / "prices.toml").write_text(PRICES)
    server = EmbeddedServer(folder / "nats")
    server.start()
    processor = subprocess.Popen(
        [*CORRAL, "process", "--db", str(file)], env=environment(CORRAL_NATS_URL=server.url),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    made = DashboardProcess(folder / "state", server.url, "--prices", str(folder / "prices.toml"))
    for name, role in (("ann", "viewer"), ("olga", "operator")):
        made.user(name, role)

    def answers() -> bool:
        try:
            with SyncClient(server.url) as client:
                return client.query("SELECT 1").scalar() == 1
        except CorralError:
            return False

    wait_for(answers)
    yield made
    made.stop()
    processor.terminate()
    processor.wait(30)
    server.stop()


@pytest.mark.long
def test_a_report_is_seen_filtered_and_taken_away(dashboard: DashboardProcess, browser: Any) -> None:
    pytest.importorskip("reportlab")
    with dashboard.logged_in("olga") as olga, dashboard.logged_in("ann") as ann:
        whole = json.loads(olga.get(f"/reports/usage.json?{JANUARY}&who=all&by=owner,model").content)
        assert whole["total"]["cost"] == 8.4
        own = json.loads(ann.get(f"/reports/usage.json?{JANUARY}&who=mine&owner=ben&by=owner").content)
        assert [row["owner"] for row in own["rows"]] == ["ann"]
        assert ann.get("/reports/usage.exe").status_code == 404
        assert ann.get("/reports/usage.csv?period=soon").status_code == 400

        tab = open_tab(browser, dashboard, ann, timezone_id="Europe/Berlin")
        page = tab.go("/reports?period=2026-01")
        page.wait_for_selector("text=2026-01-01 00:00 to 2026-02-01 00:00 (Europe/Berlin), owner ann")
        page.wait_for_selector(".tile:has-text('GPU-hours granted'):has-text('6.000')")
        page.wait_for_selector(".tile:has-text('+500% on as long a time before')")
        tab.until("document.querySelectorAll('.chart')[1]?.dataset.points === '2'")
        assert tab.painted(".chart canvas") > 3
        assert page.locator("td:has-text('ben')").count() == 0
        page.click("[data-value=all]")
        page.wait_for_selector("td:has-text('ben')")
        page.fill("[placeholder='Model has']", "H100")
        tab.until("new URLSearchParams(location.search).get('model') === 'H100'")
        page.wait_for_selector("td:has-text('Tesla T4')", state="detached")
        page.click("[data-by=model]")
        page.wait_for_selector("h2:has-text('GPU-hours by group, owner')")
        files: dict[str, bytes] = {}
        for word, begins in (
            ("HTML", b"<!doctype html>"),
            ("PDF", b"%PDF-"),
            ("CSV", b"group,owner,"),
            ("Markdown", b"# GPU"),
        ):
            with page.expect_download() as download:
                page.click(f".btn:has(span:text-is('{word}'))")
            assert (
                download.value.suggested_filename == f"gpu-usage-2026-01.{'md' if word == 'Markdown' else word.lower()}"
            )
            files[word] = Path(download.value.path()).read_bytes()
            assert files[word].startswith(begins)
        assert b"lab/vision,ann," in files["CSV"]
        assert b"Tesla T4" not in files["HTML"]
        page.set_viewport_size({"width": 390, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert tab.complaints == []
        page.context.close()
