"""The pages of jobs in a real browser."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from corral.cli.local.server import EmbeddedServer
from corral.client import SyncClient
from corral.schemas.work.jobs import JobState, JobTask, JobVerb
from support.browser import DashboardProcess, Tab, open_tab, settled
from support.fake_jobs import FILE, InThread, fake_jobs
from support.local_cluster import LocalCluster

SECRET = "s3cret-token"


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InThread]:
    """A bus with a planner's side of jobs."""
    server = EmbeddedServer(tmp_path_factory.mktemp("nats"))
    server.start()
    with fake_jobs(server.url) as made:
        yield made
    server.kill()


@pytest.fixture(scope="module")
def jobs_dashboard(planner: InThread, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DashboardProcess]:
    """On that bus."""
    url = planner.fake.nc.connected_url
    assert url is not None
    made = DashboardProcess(tmp_path_factory.mktemp("dashboard") / "state", url.geturl())
    for name, role in (("olga", "operator"), ("rita", "requester"), ("vera", "viewer")):
        made.user(name, role)
    yield made
    made.stop()


@contextlib.contextmanager
def visit(browser: Any, dashboard: DashboardProcess, user: str) -> Iterator[Tab]:
    """A tab that a user has logged in to; nothing may have gone wrong in it."""
    with dashboard.logged_in(user) as session:
        tab = open_tab(browser, dashboard, session)
        yield tab
        assert tab.complaints == []
        tab.page.context.close()


def given(planner: InThread, verb: JobVerb) -> list[tuple[str, list[int], str]]:
    """Commands of a kind: the operator, the indexes and the reason."""
    return [(by, one.indexes, one.reason) for by, one in planner.fake.given if one.verb is verb]


def test_jobs_are_seen_with_their_tasks_and_output_and_cancelled_by_their_owner(
    planner: InThread, jobs_dashboard: DashboardProcess, browser: Any
) -> None:
    planner.do(lambda fake: fake.submit("zoe", name="other"))
    job_id = planner.do(lambda fake: fake.submit("rita", name="<b>sweep</b>", array="0-99", command=["train"]))
    ended = [JobTask(index=at, attempt=1, state=JobState.DONE) for at in range(10)]
    planner.do(lambda fake: fake.change(job_id, *ended, JobTask(index=10, attempt=1, state=JobState.FAILED)))
    planner.do(lambda fake: fake.run(job_id, 11))
    planner.do(lambda fake: fake.prints(job_id, "h0", 0, b"epoch 1 <i>\n", index=11))
    planner.do(lambda fake: fake.prints(job_id, "t0", 4096, b"epoch 9\n", index=11))
    with visit(browser, jobs_dashboard, "rita") as tab:
        page = tab.go("/jobs")
        mine = page.locator("section:has(h2:has-text('My work'))")
        mine.locator("td:has-text('<b>sweep</b>')").wait_for()
        assert "1 lease (1 of jobs)" in mine.inner_text()
        assert mine.locator("td:has-text('other')").count() == 0
        row = page.locator("section:has(h2:has-text('All jobs')) tr:has-text('sweep')")
        assert "rita" in row.inner_text()
        row.locator("[aria-label='100 tasks: 10 done, 1 running, 88 pending, 1 failed']").wait_for()
        page.fill("input[placeholder=Owner]", "zoe")
        row.wait_for(state="detached")
        tab.until("location.search === '?owner=zoe'")
        assert page.input_value("input[placeholder=Owner]") == "zoe", "an update of the page keeps what is typed"
        page.fill("input[placeholder=Owner]", "")
        page.select_option("select[aria-label=State]", "running")
        row.locator("a").click()
        page.wait_for_url(f"**/job/{job_id}")
        tab.until("document.querySelector('.tasks')?.dataset.tasks === '100'")
        assert tab.painted(".tasks-cells") > 4
        page.wait_for_selector("h2:has-text('Task 2_10')")  # one that failed is worth a look
        page.click("[data-state=running]")
        page.wait_for_selector("h2:has-text('Task 2_11')")
        page.wait_for_selector("pre:has-text('epoch 1 <i>')")
        page.wait_for_selector(f".output-hole:has-text('4.0 KiB are missing here'):has-text('{FILE}')")
        planner.do(lambda fake: fake.prints(job_id, "t1", 4104, b"epoch 10\n", index=11))
        page.wait_for_selector("pre:has-text('epoch 10')")
        assert page.locator("a:has-text('node1 · GPU 0')").get_attribute("href") == "/device/GPU-node1-0"
        page.click("text=Show command")
        page.wait_for_selector("pre[aria-label=Command]:has-text('train')")
        page.click("button:has-text('Cancel task')")
        page.click(".q-dialog button:has-text('Cancel it')")
        settled(lambda: given(planner, JobVerb.CANCEL) == [("", [11], "")])
        page.wait_for_selector("[data-state=cancelled]:has-text('1')")


@pytest.mark.long
def test_only_the_owner_and_operators_see_what_a_job_executes_and_prints(
    planner: InThread, jobs_dashboard: DashboardProcess, browser: Any
) -> None:
    environ = {"TOKEN": SECRET}
    job_id = planner.do(lambda fake: fake.submit("rita", name="quiet", command=["train"], environment=environ))
    planner.do(lambda fake: fake.run(job_id))
    planner.do(lambda fake: fake.prints(job_id, "h0", 0, SECRET.encode()))
    with visit(browser, jobs_dashboard, "vera") as tab:
        sent: list[str] = []
        tab.page.on("websocket", lambda socket: socket.on("framereceived", lambda frame: sent.append(str(frame))))
        page = tab.go(f"/job/{job_id}")
        page.wait_for_selector("td:has-text('node1')")
        for words in ("h2:has-text('Output')", "text=Show command", "button:has-text('Cancel job')"):
            assert not page.is_visible(words), words
        page.wait_for_timeout(1000)  # two refreshes and more
        assert not any(SECRET in one for one in [*sent, page.content()])
        page = tab.go("/jobs?name=quiet")
        page.wait_for_selector("td:has-text('quiet')")
        assert page.input_value("input[placeholder=Name]") == "quiet"
        assert not page.is_visible("h2:has-text('My work')")
        planner.fake.given.clear()
    with visit(browser, jobs_dashboard, "olga") as tab:
        page = tab.go(f"/job/{job_id}")
        page.wait_for_selector(f"pre:has-text('{SECRET}')")
        page.click("text=Show command")
        page.wait_for_selector(f"td:has-text('{SECRET}')")
        page.click("button:has-text('Cancel job')")
        page.click(".q-dialog button:has-text('Cancel it')")
        page.wait_for_selector("text=Reason is needed")
        page.fill(".q-dialog input", "tests need it")
        # What counts is the role at the moment of the press; and the output goes with it.
        jobs_dashboard.assign("olga", "viewer")
        page.click(".q-dialog button:has-text('Cancel it')")
        page.wait_for_selector("text=This requires the role operator")
        page.wait_for_selector("h2:has-text('Output')", state="hidden")
        assert planner.fake.given == []
        jobs_dashboard.assign("olga", "operator")
        page.click(".q-dialog button:has-text('Cancel it')")
        settled(lambda: given(planner, JobVerb.CANCEL) == [("olga", [], "tests need it")])
        page.wait_for_selector("h1 ~ .chip:has-text('cancelled')")
    with visit(browser, jobs_dashboard, "rita") as tab:
        page = tab.go(f"/job/{job_id}")
        page.click("button:has-text('Resubmit')")
        page.click(".q-dialog button:has-text('Resubmit')")
        page.wait_for_selector("h1 ~ .chip:has-text('pending')")
        page.click("button:has-text('Hold')")
        page.click(".q-dialog button:has-text('Hold')")
        page.click("button:has-text('Unhold')")
        page.click(".q-dialog button:has-text('Unhold')")
        settled(lambda: [one.verb for _, one in planner.fake.given][1:] == ["resubmit", "hold", "release"])


@pytest.mark.long
def test_a_hundred_thousand_tasks_by_keyboard_on_a_phone_and_where_jobs_are_linked(
    planner: InThread, jobs_dashboard: DashboardProcess, browser: Any
) -> None:
    job_id = planner.do(lambda fake: fake.submit("rita", name="big", array="0-99999"))
    lease = planner.do(lambda fake: fake.run(job_id, 99_999))
    with visit(browser, jobs_dashboard, "vera") as tab:
        page = tab.go(f"/job/{job_id}?task=3")
        tab.until("document.querySelector('.tasks')?.dataset.tasks === '100000'")
        page.focus(".tasks-cells")
        page.keyboard.press("End")
        page.wait_for_selector(".tasks-tip:has-text('Task 99999: running')")
        page.keyboard.press("Enter")
        page.wait_for_selector(f"h2:has-text('Task {job_id}_99999')")
        tab.until("document.querySelector('.tasks').dataset.selected === '99999'")
        tab.until("location.search === '?task=99999'")
        page.fill("input[aria-label='Select a task by its index']", "500")
        page.wait_for_selector(f"h2:has-text('Task {job_id}_500')")
        done = [JobTask(index=at, attempt=1, state=JobState.DONE) for at in range(2000)]
        planner.do(lambda fake: fake.change(job_id, *done))
        page.wait_for_selector("[data-state=done]:has-text('2,000')")
        for path, link in (
            ("/leases", f"a:has-text('big · {job_id}_99999')"),
            (f"/device/{lease.grants[0].device}", f"a:has-text('big · {job_id}_99999')"),
        ):
            page = tab.go(path)
            page.wait_for_selector(link)
        page.click(link)
        page.wait_for_url(f"**/job/{job_id}?task=99999")
        page = tab.go("/")
        page.wait_for_selector("a.tile:has-text('Jobs'):has-text('running')")
        page.set_viewport_size({"width": 390, "height": 844})
        for path in ("/jobs", f"/job/{job_id}"):
            page = tab.go(path)
            page.wait_for_selector("table.rows" if path == "/jobs" else "[data-tasks='100000']")
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, path


@pytest.mark.long
def test_a_job_on_a_real_fleet(cluster: LocalCluster, dashboard: DashboardProcess, browser: Any) -> None:
    script = "#!/bin/sh\nfor at in $(seq 600); do echo ::progress 0.$at; echo line $at; sleep 0.1; done\n"
    dashboard.user("ruth", "requester")
    with SyncClient(cluster.url, owner="ruth") as client, visit(browser, dashboard, "ruth") as tab:
        job_id = client.jobs.submit(script, gpus=1, name="steps").job_id
        page = tab.go(f"/job/{job_id}")
        page.wait_for_selector("pre:has-text('line 7')")
        page.click("button:has-text('Cancel job')")
        page.click(".q-dialog button:has-text('Cancel it')")
        page.wait_for_selector("h1 ~ .chip:has-text('cancelled')")
        assert client.jobs.get(job_id).tasks[0].state is JobState.CANCELLED
        page.wait_for_selector("section:has(h2:has-text('What it used')) td:has-text('time')")
        page.click("button:has-text('Resubmit')")
        page.click(".q-dialog button:has-text('Resubmit')")
        page.wait_for_selector(".note:has-text('attempt 2')")
        page.wait_for_selector("pre:has-text('line 3')")
        client.jobs.cancel(job_id)
        client.jobs.wait(job_id, timeout=60)
