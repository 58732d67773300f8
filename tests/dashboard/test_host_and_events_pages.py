"""What happened, and where: the events page, the page of a host, and what its users do there."""

from __future__ import annotations

import time
from typing import Any

import pytest
from corral.client import SyncClient
from corral.dashboard.event_log import KINDS, sql
from corral.dashboard.history import Window
from support.browser import DashboardProcess, open_tab, press, settled
from support.local_cluster import LocalCluster, wait_for

pytestmark = pytest.mark.long


def test_events_are_seen_as_they_happen_and_lead_to_their_host(
    cluster: LocalCluster, dashboard: DashboardProcess, browser: Any
) -> None:
    with SyncClient(cluster.url) as client, dashboard.logged_in("vera") as session:
        for kind, _ in KINDS:  # each is a question that the history answers
            client.query(sql(Window(seconds=3600), kind, "o'neill 100%", "sim-0001"))
        tab = open_tab(browser, dashboard, session)
        page = tab.go("/events?q=eve")
        page.wait_for_selector("text=Nothing happened in this time that matches")
        lease = client.request(gpus=1, owner="eve", name="<i>work", ttl="5m", hosts="sim-0002").lease
        row = "tr:has-text('granted'):has-text('eve: <i>work')"
        page.wait_for_selector(row)
        client.evict(lease.lease_id, reason="maintenance at 8")
        page.wait_for_selector("tr:has-text('evicted'):has-text('maintenance at 8')")
        page.click("[data-value=faults]")
        tab.until("location.search === '?kind=faults&q=eve'")
        page.wait_for_selector("text=Nothing happened in this time that matches")
        page.click("[data-value=leases]")
        page.click(f"{row} a:text-is('sim-0002')")
        page.wait_for_url("**/host/sim-0002")
        page.wait_for_selector("h1:text-is('sim-0002')")
        settled(lambda: page.locator("td .chip:text-is('free')").count() == 4)
        page.wait_for_selector(".fact-name:text-is('Driver') + .fact-value:has-text('570')")
        page.wait_for_selector("tr:has-text('evicted'):has-text('maintenance at 8')")
        assert page.locator("button:has-text('Drain')").count() == 0, "a viewer drains nothing"
        page.set_viewport_size({"width": 390, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        tab.go("/events")
        page.wait_for_selector("table")
        for service in ("planner", "processor", "dashboard"):
            page.wait_for_selector(f"section:has(h2:text-is('Services')) tr:has(td:text-is('{service}')) .chip.good")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page = tab.go("/host/nowhere")
        page.wait_for_selector("text=no host of this name is in the fleet or in the history")
        assert tab.complaints == []
        page.context.close()


def test_an_operator_drains_a_host_on_its_page(
    cluster: LocalCluster, dashboard: DashboardProcess, browser: Any
) -> None:
    with SyncClient(cluster.url) as client, dashboard.logged_in("olga") as session:
        tab = open_tab(browser, dashboard, session)
        page = tab.go("/host/sim-0001")
        press(page, "button:has-text('Drain')", ".q-dialog input")
        page.fill(".q-dialog input", "new switch")
        page.click(".q-dialog button:has-text('Drain')")
        wait_for(lambda: [d.host for d in client.devices() if "new switch" in d.drain_reason] == ["sim-0001"] * 4)
        page.click("button:has-text('Undrain')")
        wait_for(lambda: not any(device.drain_reason for device in client.devices()))
        page.context.close()


def test_a_lease_is_renewed_by_its_owner_for_a_length_of_time(
    cluster: LocalCluster, dashboard: DashboardProcess, browser: Any
) -> None:
    with SyncClient(cluster.url) as client, dashboard.logged_in("rita") as session:
        mine = client.request(gpus=1, owner="rita", name="mine", ttl="5m").lease
        other = client.request(gpus=1, owner="somebody", name="theirs", ttl="5m").lease
        try:
            tab = open_tab(browser, dashboard, session, permissions=["clipboard-read"])
            page = tab.go("/leases")
            page.click("tr:has-text('mine') button:text-is('Copy id')")
            page.wait_for_selector("button:text-is('Copied')")
            assert page.evaluate("navigator.clipboard.readText()") == mine.lease_id
            assert page.locator("tr:has-text('theirs') button:has-text('Renew')").count() == 0
            press(page, "tr:has-text('mine') button:has-text('Renew')", ".q-dialog input")
            assert page.input_value(".q-dialog input") == "5m"
            page.fill(".q-dialog input", "soon")
            page.click(".q-dialog button:has-text('Renew')")
            page.wait_for_selector(".q-notification:has-text('soon')")
            page.fill(".q-dialog input", "2h")
            page.click(".q-dialog button:has-text('Renew')")
            wait_for(lambda: client.leases(lease_id=mine.lease_id)[0].expires_at.timestamp() > time.time() + 7000)
            page.wait_for_selector("tr:has-text('mine') :text('in 2.0 h')")
            page.context.close()
        finally:
            for lease in (mine, other):
                client.release(lease.lease_id, owner=lease.owner)
