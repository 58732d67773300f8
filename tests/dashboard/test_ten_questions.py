"""The ten questions of `docs/ten-questions.md`, answered in a browser and by command in as many steps as stated."""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from corral.client import SyncClient
from support.browser import DashboardProcess, Tab, open_tab, settled
from support.local_cluster import CORRAL, LocalCluster, corral, environment, wait_for

pytestmark = pytest.mark.long
PAGE = Path(__file__).parents[2] / "docs" / "ten-questions.md"
ROWS = [
    [cell.strip() for cell in line.split("|")[1:-1]]
    for line in PAGE.read_text().splitlines()
    if re.match(r"\| \d+ \|", line)
]


class Steps:
    """A browser in the hands of somebody who counts."""

    def __init__(self, tab: Tab) -> None:
        self.page = tab.go("/")
        self.tab = tab
        self.taken = 0

    def page_named(self, name: str) -> None:
        self.click(f".nav-item:has-text('{name}')")

    def click(self, selector: str) -> None:
        self.page.click(selector)
        self.taken += 1

    def fill(self, selector: str, text: str) -> None:
        self.page.fill(selector, text)
        self.taken += 1

    def point(self, x: float, y: float) -> None:
        self.page.mouse.move(x, y)
        self.taken += 1

    def see(self, selector: str) -> None:
        self.page.wait_for_selector(selector)


@pytest.fixture(scope="module")
def client(cluster: LocalCluster) -> Iterator[SyncClient]:
    with SyncClient(cluster.url) as made:
        yield made


@pytest.fixture(scope="module")
def lease(client: SyncClient, cluster: LocalCluster) -> Iterator[str]:
    """Rita holds the first GPU, waits for more than there are, and had another lease, which was evicted."""
    first = next(device for device in client.devices() if (device.host, device.index) == ("sim-0001", 0))
    held = client.request(gpus=1, devices=[first.uuid], owner="rita", name="notebook", ttl="10m").lease.lease_id
    ended = client.request(gpus=1, owner="rita", name="probe", ttl="10m").lease.lease_id
    client.evict(ended, reason="the fan is loud")
    waiting = subprocess.Popen(
        [*CORRAL, "request", "--gpus", "8", "--placement", "fewest_hosts", "--wait", "5m", "--name", "big"],
        env=environment(CORRAL_NATS_URL=cluster.url, CORRAL_OWNER="rita"), stdout=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for(lambda: client.queue())
    wait_for(lambda: client.query(f"SELECT count(*) FROM leases WHERE lease_id = '{held}'").scalar())
    yield held
    waiting.terminate()
    waiting.wait(30)
    with contextlib.suppress(Exception):
        client.release(held, owner="rita")


def who_is_on_it(steps: Steps) -> None:
    steps.tab.until("document.querySelector('.heat')?.dataset.devices === '8'")
    box = steps.page.locator(".heat-cells").bounding_box()
    steps.point(box["x"] + 12, box["y"] + 40)
    steps.see(".heat-tip:has-text('sim-0001 · GPU 0'):has-text('rita: notebook')")


def what_is_free(steps: Steps) -> None:
    steps.see(".tile:has-text('Free GPUs'):has-text('7')")
    steps.see(".heat-key:has-text('free 7')")


def why_it_waits(steps: Steps) -> None:
    steps.page_named("Leases")
    steps.see("tr:has-text('big'):has-text('8')")


def whether_it_would_fit(steps: Steps) -> None:
    steps.page_named("Request")
    steps.fill("[name=gpus]", "2")
    steps.fill("[name=memory]", "1GiB")
    steps.see(".verdict")


def keep_it(steps: Steps) -> None:
    steps.page_named("Leases")
    steps.click("tr:has-text('notebook') button:has-text('Renew')")
    steps.fill(".q-dialog input", "2h")
    steps.click(".q-dialog button:has-text('Renew')")
    steps.see("tr:has-text('notebook') :text('in 2.0 h')")


def my_usage(steps: Steps) -> None:
    steps.page_named("Usage")
    steps.click("[data-value=mine]")
    steps.see("text=owner rita")
    steps.see(".tile:has-text('Leases')")  # other tests of this cluster may be Rita, too


def who_left_it_idle(steps: Steps) -> None:
    steps.page_named("Analytics")
    steps.click(".question:has-text('Who held GPUs idle')")
    steps.click("[data-value='7d']")
    steps.see("th:has-text('idle_gpu_hours')")


def faults(steps: Steps) -> None:
    steps.page_named("Events")
    steps.click("[data-value=faults]")
    settled(lambda: steps.page.locator("table, .empty").count())


def changes(steps: Steps) -> None:
    steps.page_named("Events")
    steps.click("[data-value=hosts]")
    steps.see("tr:has-text('agent started')")


def why_it_ended(steps: Steps) -> None:
    steps.page_named("Events")
    steps.fill("input[type=search]", "probe")
    steps.see("tr:has-text('evicted'):has-text('the fan is loud')")


WAYS: list[Callable[[Steps], None]] = [
    who_is_on_it, what_is_free, why_it_waits, whether_it_would_fit, keep_it, my_usage, who_left_it_idle, faults,
    changes, why_it_ended,
]  # fmt: skip
SAID = [
    *("rita", "sim-0002", "big", "sim-0", "", "GPU-hours granted", "idle GPU-h", "severity", "before"),
    "the fan is loud",
]
"""A word of each command's answer."""


def test_each_is_answered_in_the_dashboard(dashboard: DashboardProcess, browser: Any, lease: str) -> None:
    assert len(WAYS) == len(ROWS) == 10
    with dashboard.logged_in("rita") as session:
        tab = open_tab(browser, dashboard, session)
        for way, row in zip(WAYS, ROWS, strict=True):
            steps = Steps(tab)
            way(steps)
            assert steps.taken == int(row[4]), row[1]
        assert tab.complaints == []
        tab.page.context.close()


def test_each_is_answered_by_command(cluster: LocalCluster, lease: str) -> None:
    for said, row in zip(SAID, ROWS, strict=True):
        commands = re.findall(r"`(corral [^`]*)`", row[5])
        assert row[7] == "SQL" or len(commands) == int(row[7]), row[1]
        for command in commands:
            words = shlex.split(command.replace("LEASE", lease))[1:]
            done = corral(*words, url=cluster.url, CORRAL_OWNER="rita")
            assert done.returncode == 0, done.stderr
        assert said in done.stdout, (row[1], done.stdout)
