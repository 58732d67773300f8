"""The pages in a real browser, on a real cluster of simulated GPUs."""

from __future__ import annotations

import contextlib
import io
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from corral.cli.local.server import EmbeddedServer
from corral.client import SyncClient
from corral.schemas.requests import LeaseState
from corral.schemas.work.groups import Group, GroupTree, Resources
from corral.schemas.work.windows import Repeat, Window
from support.browser import DashboardProcess, Tab, open_tab, settled
from support.local_cluster import CORRAL, LocalCluster, environment, wait_for

pytestmark = pytest.mark.long


def check(tab: Tab) -> None:
    """Nothing was fetched from elsewhere, and nothing went wrong (a refused script would be a complaint)."""
    assert tab.asked <= {tab.origin, tab.origin.replace("http", "ws"), "data://", "blob://"}, tab.asked
    assert tab.complaints == []


def check_on_a_phone(page: Any) -> None:
    """Nothing is cut off on the right; the page is as wide as before afterwards."""
    before = page.viewport_size
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_function("document.documentElement.scrollWidth <= 390")
    page.set_viewport_size(before)


@contextlib.contextmanager
def visit(browser: Any, dashboard: DashboardProcess, user: str) -> Iterator[Tab]:
    """A tab that a user has logged in to; it is checked at the end, and closed."""
    with dashboard.logged_in(user) as session:
        tab = open_tab(browser, dashboard, session)
        yield tab
        check(tab)
        tab.page.context.close()


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[SyncClient]:
    """Of the cluster: what the browser did is asked of the planner. (It has a loop of its own; Playwright is one.)"""
    with SyncClient(cluster.url) as made:
        yield made


def test_the_fleet_is_seen_and_leads_to_a_device(client: SyncClient, dashboard: DashboardProcess, browser: Any) -> None:
    with visit(browser, dashboard, "vera") as tab:
        page = tab.go("/")
        tab.until("document.querySelector('.heat')?.dataset.devices === '8'")
        page.wait_for_selector(".heat-key:has-text('free 8')")  # the first map is the state
        page.click("[data-value=utilization]")
        tab.until("location.search === '?metric=utilization'")
        settled(lambda: tab.painted(".heat-cells") > 5)
        assert len(page.screenshot()) > 20_000
        page.click("[data-value=health]")
        page.wait_for_selector(".heat-key:has-text('free 8')")
        client.drain(hosts=["sim-0002"], reason="new fan")
        page.wait_for_selector("td:has-text('sim-0002 · 4 GPUs') + td:has-text('drained: new fan')")
        assert page.locator("tbody tr").count() == 1, "a host is one line"
        client.undrain(hosts=["sim-0002"])
        held = client.request(gpus=3, owner="follower", ttl="5m", name="work").lease
        page.wait_for_selector(".heat-key:has-text('leased 3')")  # it follows the fleet
        held_page = tab.page.context.new_page()
        held_page.goto(f"{tab.origin}/device/{held.grants[0].device}")
        held_page.wait_for_selector(".fact-name:has-text('Held by') + .fact-value:has-text('follower: work')")
        held_page.close()
        client.release(held.lease_id, owner="follower")
        page.wait_for_selector(".heat-key:has-text('free 8')")
        page.click("text=Temperature")
        page.click("[data-value=model]")
        tab.until("location.search === '?metric=temperature&group=model'")
        page.fill("input[type=search]", "sim-0002")
        tab.until("document.querySelector('.heat').dataset.devices === '4'")
        shared = page.url
        page.goto(shared)  # as somebody would whom the link was sent to
        tab.until("document.querySelector('.heat')?.dataset.devices === '4'")
        box = page.locator(".heat-cells").bounding_box()
        page.mouse.move(box["x"] + 12, box["y"] + 40)
        page.wait_for_selector(".heat-tip-row:has-text('State')")
        page.mouse.click(box["x"] + 12, box["y"] + 40)
        page.wait_for_url("**/device/GPU-*")
        assert page.inner_text("h1").startswith("sim-0002")
        page.click("[data-value='5m']")
        tab.until("Number(document.querySelector('.timeline')?.dataset.points) > 5")
        assert tab.painted(".timeline canvas") > 5
        page.click("text=24 h")
        tab.until("location.search === '?range=24h'")
        settled(lambda: "rollup_1m" in page.inner_text("body"))
        page.select_option("select[aria-label='Add a metric']", "sm_clock_megahertz")
        tab.until("new URLSearchParams(location.search).get('m')?.endsWith('sm_clock_megahertz')")
        assert page.locator("text=Drain").count() == 0, "a viewer drains nothing"


def test_times_are_in_the_zone_of_the_reader(client: SyncClient, dashboard: DashboardProcess, browser: Any) -> None:
    lease = client.request(gpus=1, owner="traveler", ttl="5m").lease
    with dashboard.logged_in("vera") as viewer:
        tab = open_tab(browser, dashboard, viewer, timezone_id="Asia/Kolkata")
        page = tab.go("/leases?q=traveler")
        there = lease.granted_at.astimezone(ZoneInfo("Asia/Kolkata"))
        page.wait_for_selector(f"td:has-text('{there:%d %b %H:%M} IST')")
        page.click("button:has-text('Times in IST'):visible")
        page.wait_for_selector(f"td:has-text('{lease.granted_at.astimezone(UTC):%d %b %H:%M} UTC')")
        check(tab)
        page.context.close()
    client.release(lease.lease_id, owner="traveler")


def test_light_and_dark_and_on_a_phone(dashboard: DashboardProcess, browser: Any) -> None:
    with dashboard.logged_in("vera") as client:
        tab = open_tab(browser, dashboard, client, 390, 844)
        device = client.get("/").text  # the layout is the same for any device
        assert device
        pages = (
            "/",
            "/jobs",
            "/leases",
            "/reports",
            "/events",
            "/host/sim-0001",
            "/analytics",
            "/groups",
            "/analytics?view=console",
            "/request",
            "/fit",
            "/login",
        )
        for path in pages:
            page = tab.go(path)
            page.wait_for_selector("main")
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, path
        tab.page.set_viewport_size({"width": 1280, "height": 900})
        page = tab.go("/")
        seen = set()
        for _ in range(3):
            seen.add(page.evaluate("getComputedStyle(document.body).backgroundColor + document.cookie"))
            page.click("[title^='Dark, light']")
            page.wait_for_timeout(300)
        assert len(seen) == 3, seen
        assert "corral_theme" in page.evaluate("document.cookie")
        assert "corral_session" not in page.evaluate("document.cookie")
        check(tab)
        page.context.close()


def test_a_request_is_explained_granted_and_released(
    client: SyncClient, dashboard: DashboardProcess, browser: Any
) -> None:
    with visit(browser, dashboard, "rita") as tab:
        page = tab.go("/request?gpus=5&memory=1GiB&ttl=5m")
        page.wait_for_selector("text=too few together")
        page.fill("[name=memory]", "lots")
        page.wait_for_selector("text=no amount of memory")
        page.fill("[name=memory]", "1GiB")
        page.fill("[name=gpus]", "2")
        page.fill("[name=name]", "<b>mine</b>")
        page.wait_for_selector("text=Granted at once")
        tab.until("location.search.includes('gpus=2')")
        page.click("button:has-text('Request')")
        page.wait_for_selector("text=CUDA_VISIBLE_DEVICES")
        (lease,) = client.leases(owner="rita")
        assert len(lease.grants) == 2
        assert lease.name == "<b>mine</b>"
        page = tab.go("/leases?q=rita&range=1h")
        page.wait_for_selector("td:has-text('<b>mine</b>')")
        tab.until("document.querySelector('.lanes')?.dataset.bars === '2'")
        assert tab.painted(".lanes canvas") > 5
        page.click("button:has-text('Release')")
        page.click(".q-dialog button:has-text('Release')")
        settled(lambda: not client.leases(owner="rita"))
        page.wait_for_selector("text=No lease matches")


def test_only_operators_take_leases_of_others_and_only_while_they_are(
    client: SyncClient, dashboard: DashboardProcess, browser: Any
) -> None:
    dashboard.user("otto", "operator")
    first, second = (
        client.request(gpus=1, owner="holder", ttl="10m", name=name).lease.lease_id for name in ("first", "second")
    )
    try:
        with dashboard.logged_in("vera") as viewer, dashboard.logged_in("otto") as operator:
            look = open_tab(browser, dashboard, viewer)
            look.go("/leases?q=holder").wait_for_selector("td:has-text('first')")
            assert look.page.locator("button:has-text('Evict'), button:has-text('Drain')").count() == 0
            look.page.context.close()

            tab = open_tab(browser, dashboard, operator)
            page = tab.go("/leases?q=holder")
            page.click("tr:has-text('first') button:has-text('Evict')")
            page.click(".q-dialog button:has-text('Evict')")
            page.wait_for_selector("text=Reason is needed")
            page.fill(".q-dialog input", "tests need it")
            page.click(".q-dialog button:has-text('Evict')")
            settled(lambda: [one.lease_id for one in client.leases(owner="holder")] == [second])
            (ended,) = client.leases(lease_id=first, states=[LeaseState.EVICTED])
            assert "tests need it" in ended.reason

            # A request of somebody else's leaves the queue.
            waiting = subprocess.Popen(
                [*CORRAL, "request", "--gpus", "8", "--placement", "fewest_hosts", "--wait", "2m", "--name", "third"],
                env=environment(CORRAL_NATS_URL=dashboard.bus, CORRAL_OWNER="holder"), stdout=subprocess.DEVNULL,
            )  # fmt: skip
            page.wait_for_selector(".q-dialog", state="detached")
            page.click("tr:has-text('third') button:has-text('Withdraw')")
            page.click(".q-dialog button:has-text('Withdraw')")
            assert waiting.wait(60) == 4
            page.wait_for_selector(".q-dialog", state="detached")
            # The page with its button stays open; what counts is the role at the moment of the press.
            page.wait_for_selector("tr:has-text('second') button:has-text('Evict')")
            page.click("tr:has-text('second') button:has-text('Evict')")
            page.fill(".q-dialog input", "too late")
            dashboard.assign("otto", "viewer")
            page.wait_for_selector("tr:has-text('second') button:has-text('Evict')", state="detached")
            page.click(".q-dialog button:has-text('Evict')")
            page.wait_for_selector("text=This requires the role operator")
            assert [one.lease_id for one in client.leases(owner="holder")] == [second]
            page.context.close()
    finally:
        for lease in client.leases(owner="holder"):
            client.release(lease.lease_id, owner="holder")


def test_questions_are_answered_drawn_and_taken_away(
    client: SyncClient, dashboard: DashboardProcess, browser: Any
) -> None:
    held = client.request(gpus=1, owner="analyst", ttl="5m").lease.lease_id
    wait_for(lambda: client.query(f"SELECT count(*) FROM lease_spans WHERE lease_id = '{held}'").scalar())
    client.release(held, owner="analyst")
    with dashboard.logged_in("vera") as session:
        tab = open_tab(browser, dashboard, session)
        page = tab.go("/analytics?view=devices_now")
        tab.until("document.querySelector('[data-rows]')?.dataset.rows === '8'")
        page.wait_for_selector("text=What is each device doing right now?")
        # A period and filters narrow the question, and are in the URL.
        page = tab.go("/analytics?view=usage_by_owner&owner=nobody-at-all")
        tab.until("document.querySelector('[data-rows]')?.dataset.rows === '0'")
        page.wait_for_selector("text=Nothing in this period with these filters.")
        page = tab.go("/analytics?view=usage_by_owner&owner=nobody-at-all&period=next-year")
        page.wait_for_selector("text=is no period, or has not begun: this is the whole history.")
        page.click("[data-value='24h']")
        tab.until("new URLSearchParams(location.search).get('period') === '24h'")
        page.wait_for_selector("text=leases are cut at its ends")
        page.fill("[placeholder=Owner]", "")
        page.wait_for_selector("th:has-text('gpu_hours_before')")
        tab.until("location.search === '?view=usage_by_owner&period=24h'")
        tab.until("Number(document.querySelector('[data-rows]')?.dataset.rows) > 0")
        page.emulate_media(color_scheme="dark")
        page = tab.go("/analytics?sql=SELECT host, count(*) AS n FROM devices GROUP BY host ORDER BY host")
        tab.until("document.querySelector('[data-rows]')?.dataset.rows === '2'")
        tab.until("document.querySelector('.chart')?.dataset.points === '2'")
        settled(lambda: page.evaluate("getComputedStyle(document.querySelector('.cm-editor')).backgroundColor")
                == "rgb(30, 30, 30)")  # fmt: skip
        saved: dict[str, bytes] = {}
        for kind in ("CSV", "Parquet", "Arrow"):
            with page.expect_download() as download:
                page.click(f"button:has(span:text-is('{kind}'))")
            saved[kind] = Path(download.value.path()).read_bytes()
        assert saved["CSV"].decode().replace('"', "").split() == ["host,n", "sim-0001,4", "sim-0002,4"]
        import pyarrow.ipc
        import pyarrow.parquet

        for table in (
            pyarrow.parquet.read_table(io.BytesIO(saved["Parquet"])),
            pyarrow.ipc.open_stream(saved["Arrow"]).read_all(),
        ):
            assert table.to_pydict() == {"host": ["sim-0001", "sim-0002"], "n": [4, 4]}
        page.click(".cm-content")
        page.keyboard.press("Control+A")
        page.keyboard.type("DROP TABLE devices")
        page.keyboard.press("Control+Enter")
        page.wait_for_selector("[role=alert]:visible")
        check(tab)
        with dashboard.logged_in("olga") as other:
            ticket = download.value.url.split("/export/")[1]
            assert session.get(f"/export/{ticket}").status_code == 200
            assert other.get(f"/export/{ticket}").status_code == 404
        page.context.close()


def test_groups_are_seen_with_what_they_lend_and_owe(
    client: SyncClient, dashboard: DashboardProcess, browser: Any
) -> None:
    with visit(browser, dashboard, "vera") as tab:
        page = tab.go("/groups")
        page.wait_for_selector("h2:has-text('No groups')")
        assert page.locator("table").count() == 0
        try:
            client.set_groups(
                Group(name="lab", limit=Resources(gpus={"*": 8})),
                Group(name="lab/vision", guarantee=Resources(gpus={"*": 4}), members=["ann"]),
                Group(name="lab/nlp", guarantee=Resources(gpus={"*": 3}), members=["bob"]),
            )
            client.request(gpus=1, owner="zoe", ttl="10m")
            for _ in range(4):
                lease = client.request(owner="bob", name="sweep", ttl="10m", preemptible=True, grace="1s").lease
                assert lease.group == "lab/nlp"
            page.wait_for_selector(
                ".quota[aria-label='lab/nlp: 3 within its guarantee of 3, 1 borrowed, 0 owed, no limit']"
            )
            for _ in range(4):  # for the last of them one of bob's ends
                client.request(owner="ann", ttl="10m", wait="60s")
            page.wait_for_selector(".quota[aria-label='lab: 7 within its guarantee of 7, 0 borrowed, 0 owed, limit 8']")
            settled(lambda: client.query("SELECT count(*) FROM preemptions WHERE outcome = 'evicted'").rows[0][0] == 1)
            page = tab.go("/groups?group=lab&range=1h")
            page.wait_for_selector("td:has-text('bob (lab/nlp)')")
            page.wait_for_selector("td:has-text('ann (lab/vision)')")
            tab.until("Number(document.querySelector('.chart')?.dataset.points) >= 1")
            assert tab.painted(".chart canvas") > 3
            check_on_a_phone(page)
            used = "SELECT sum(leases), sum(gpu_seconds) > 0 FROM group_usage WHERE group_name = 'lab/vision'"
            assert list(client.query(used).rows[0]) == [4, True]
        finally:
            for lease in client.leases():
                client.release(lease.lease_id, owner=lease.owner)
            client.set_groups(replace=GroupTree())
        page.wait_for_selector("h2:has-text('No groups')")


def test_booked_windows_are_seen_and_what_they_are_short_of(
    client: SyncClient, dashboard: DashboardProcess, browser: Any
) -> None:
    with visit(browser, dashboard, "vera") as tab:
        page = tab.go("/groups")
        page.wait_for_selector("h2:has-text('No groups')")
        assert not page.is_visible("h2:has-text('Booked windows')")
        begin = datetime(2031, 1, 6, 8, tzinfo=UTC)
        weeks = {"repeat": Repeat.WEEKLY, "repeat_until": begin + timedelta(days=14)}
        window = Window(
            starts_at=begin, ends_at=begin + timedelta(hours=4), window_id="course", owners=["ann"], gpus=2,
            hosts=["sim-0001"], reason="<b>course</b>", **weeks,
        )  # fmt: skip
        chosen = client.book(window).window.devices
        try:
            page.wait_for_selector("h2:has-text('Booked windows')")
            row = page.locator("tr:has(td:has-text('course'))")
            for words in ("ann", "2", "sim-0001", "Mon 06 Jan 08:00", "12:00", "weekly, 3 left", "booked", "<b>course"):
                settled(lambda words=words: words in row.inner_text())
            # One of its GPUs is drained: another of the host takes its place. With all drained it is short.
            client.drain(devices=chosen[:1], reason="fans")
            page.wait_for_selector(f"text=in place of {chosen[0]}: drained: fans")
            client.drain(hosts=["sim-0001"], reason="move")
            page.wait_for_selector("td:has-text('0 of 2')")
            page.wait_for_selector("text=on sim-0001: drained: move")
            check_on_a_phone(page)
        finally:
            client.undrain(devices=chosen[:1])
            client.undrain(hosts=["sim-0001"])
            client.cancel_window("course")
        page.wait_for_selector("h2:has-text('Booked windows')", state="hidden")


def test_a_page_says_what_is_missing_and_what_to_do(server: EmbeddedServer, tmp_path: Path, browser: Any) -> None:
    lone = DashboardProcess(tmp_path / "state", server.url, "--no-login", "--role", "viewer")
    planner = collector = None

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        log = (tmp_path / f"{arguments[0]}.log").open("wb")
        return subprocess.Popen(
            [*CORRAL, *arguments], env=environment(CORRAL_NATS_URL=server.url), stdout=log, stderr=log
        )

    try:
        tab = Tab(browser.new_context(viewport={"width": 1280, "height": 900}).new_page(), lone.origin)
        page = tab.go("/analytics")
        page.wait_for_selector("text=corral process")
        page = tab.go("/")
        page.wait_for_selector("text=No planner")
        planner = start("plan")
        page.wait_for_selector("text=No devices yet")
        collector = start("collect", "--source", "simulated", "--hosts", "625", "--devices", "8", "--interval", "10s",
                          "--processes", "0", "--state", str(tmp_path / "collector"))  # fmt: skip
        tab.until("document.querySelector('.heat')?.dataset.devices === '5000'")
        page.click("[data-value=health]")
        page.click("[data-value=model]")
        tab.until("document.querySelector('.heat .heat-key')")
        page.fill("input[type=search]", "sim-0625")
        tab.until("document.querySelector('.heat').dataset.devices === '8'")
        server.kill()
        page.wait_for_selector(".banner:has-text('No bus')")
        assert tab.until("document.querySelector('.heat').dataset.devices === '8'"), "what was seen last stays"
        check(tab)
        page.context.close()
    finally:
        for process in (planner, collector):
            if process is not None:
                process.kill()
                process.wait()
        lone.stop()


def test_a_cluster_on_one_machine_says_where_its_dashboard_is(tmp_path: Path) -> None:
    log = tmp_path / "up.log"
    with log.open("wb") as out:
        up = subprocess.Popen(
            [*CORRAL, "up", "--data", str(tmp_path / "data"), "--port", "0", "--source", "none"],
            env=environment(HOME=str(tmp_path), CORRAL_CONFIG=str(tmp_path / "config.toml")),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )
    try:
        wait_for(lambda: "Dashboard: http://127.0.0.1:" in log.read_text() or up.poll() is not None, 60)
        state = tmp_path / "data" / "dashboard"
        assert (state / "link").read_text() not in log.read_text()
        url = (state / "url").read_text()
        import httpx

        assert httpx.get(f"{url}login").status_code == 200
        assert httpx.get(url, headers={"Accept": "*/*"}).status_code == 401
    finally:
        up.terminate()
        assert up.wait(40) == 0
    with pytest.raises(FileNotFoundError):
        (state / "url").read_text()
