"""Jobs over the bus: a real server and planner, and runners without processes."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from corral.cli.local.server import EmbeddedServer
from corral.client.health import ask_health
from corral.planner.limits import Limits
from corral.schemas import codec, subjects
from corral.schemas.work.jobs import JobEvent, JobState, JobTask
from nats.aio.client import Client as Bus
from support.fake_runner import FakeRunner
from support.local_cluster import invoke
from support.planner_rig import FakeHosts, PlannerProcess, ask, running, until_ready

STATES = ("starting", "running", "stopping", "ended")


@pytest.fixture
async def hosts(nc: Bus) -> AsyncIterator[FakeHosts]:
    made = FakeHosts(nc, hosts=2, devices=2)
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
async def runners(nc: Bus, hosts: FakeHosts) -> AsyncIterator[list[FakeRunner]]:
    made = [FakeRunner(nc, name) for name in hosts.names]
    for runner in made:
        await runner.start()
    yield made
    for runner in made:
        await runner.stop()


async def submit(nc: Bus, command: str, gpus: int = 1, **fields: Any) -> dict[str, Any]:
    """Submit a job of ann's, and return it."""
    request = {"owner": "ann", "gpus": gpus, **fields.pop("request", {})}
    answer = await ask(nc, "submit", {"request": request, "command": command.split(), **fields})
    assert answer["type"] == "job", answer
    return answer


async def listed(nc: Bus, job_id: str, tasks: bool = True) -> dict[str, Any]:
    """A job with its tasks."""
    return (await ask(nc, "jobs", {"job_ids": [job_id], "tasks": tasks}))["jobs"][0]


async def until(nc: Bus, job_id: str, met: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The job with its tasks, once it meets a condition."""
    found: dict[str, Any] = {}
    deadline = time.monotonic() + 30.0
    while time.monotonic() < deadline:
        found = await listed(nc, job_id)
        if met(found):
            return found
        await asyncio.sleep(0.02)
    raise TimeoutError(f"job {job_id} never was as expected: {found}")


async def until_state(nc: Bus, job_id: str, *states: str) -> dict[str, Any]:
    """The job with its tasks, once it is in one of some states."""
    return await until(nc, job_id, lambda found: found["job"]["state"] in states)


async def until_counts(nc: Bus, job_id: str, **counts: int) -> None:
    """Wait until a job has so many tasks in each state."""
    await until(nc, job_id, lambda found: found["job"]["counts"] == counts)


def starts_of(runners: Iterable[FakeRunner]) -> Counter[str]:
    """How often each run was started on each host."""
    return Counter({f"{runner.host} {name}": times for runner in runners for name, times in runner.starts.items()})


def again(task: dict[str, Any]) -> bool:
    """True if the second attempt of a task runs."""
    return task["attempt"] == 2 and task["state"] == "running"


async def act(nc: Bus, job_id: str, verb: str, **fields: Any) -> dict[str, Any]:
    """A command of ann's about a job."""
    return await ask(nc, "job", {"job_id": job_id, "owner": "ann", "verb": verb, **fields})


async def no_leases(nc: Bus) -> None:
    """Wait until no lease is active."""
    for _ in range(600):
        if not (await ask(nc, "leases", {"states": ["active"]}))["leases"]:
            return
        await asyncio.sleep(0.02)
    raise TimeoutError("leases stay")


async def test_tasks_run_and_end_as_their_processes_do(
    server: EmbeddedServer, nc: Bus, runners: list[FakeRunner]
) -> None:
    async with running(server.url):
        await until_ready(nc, 4)
        done = await submit(nc, "true", array="0-9")
        failed = await submit(nc, "exit 3")
        kept = await submit(nc, "forever", request={"name": "kept"})
        found = await until_state(nc, done["job_id"], "done")
        assert found["job"]["counts"] == {"done": 10}
        assert [task["attempt"] for task in found["tasks"]] == [1] * 10
        task = (await until_state(nc, failed["job_id"], "failed"))["tasks"][0]
        assert (task["exit_code"], task["message"]) == (3, "exit code 3")
        await until_state(nc, kept["job_id"], "running")
        cancelled = await act(nc, kept["job_id"], "cancel", reason="enough")
        assert cancelled["changed"] == 1
        found = await until_state(nc, kept["job_id"], "cancelled")
        assert found["job"]["message"] == "cancelled by ann: enough"
        assert found["tasks"][0]["parts"][0]["signal"] == 15
        await no_leases(nc)
        assert set(starts_of(runners).values()) == {1}
        [planner] = [one for one in await ask_health(nc, "planner") if one.role == "leader"]
        measured = {(one.name, one.labels.get("state", "")): one.value for one in planner.measures}
        assert [measured["jobs", state] for state in ("done", "failed", "cancelled", "running")] == [1, 1, 1, 0]
        assert (measured["tasks", "done"], measured["runners", ""]) == (10, 2)
        newest = await ask(nc, "jobs", {"owner": "ann"})
        assert [each["job"]["job_id"] for each in newest["jobs"]] == [
            kept["job_id"],
            failed["job_id"],
            done["job_id"],
        ]


async def test_a_planner_that_is_killed_loses_no_task_and_starts_none_twice(
    server: EmbeddedServer, nc: Bus, tmp_path: Path
) -> None:
    """By kill -9, with tasks in every state; the next one goes on with what is durable, and what runners report."""
    hosts = FakeHosts(nc, hosts=4, devices=2)
    await hosts.start()
    runners = {state: FakeRunner(nc, name) for name, state in zip(hosts.names, STATES, strict=True)}
    for runner in runners.values():
        await runner.start()
    planner = PlannerProcess(server.url, tmp_path / "planner.log")
    planner.start()
    await until_ready(nc, 8)
    for runner in runners.values():  # the planner has heard each
        await until_state(nc, (await submit(nc, "true", request={"hosts": [runner.host]}))["job_id"], "done")
    runners["starting"].deaf = runners["starting"].mute = True
    runners["stopping"].stop_seconds = 1.0
    jobs = {
        state: (await submit(nc, "forever", array="0-2", request={"hosts": [runner.host]}))["job_id"]
        for state, runner in runners.items()
    }
    dependent = (await submit(nc, "true", after=[{"job_id": jobs["ended"], "condition": "any"}]))["job_id"]
    for state, job in jobs.items():
        await until_counts(nc, job, **{"starting" if state == "starting" else "running": 2, "pending": 1})
    assert (await act(nc, jobs["stopping"], "cancel", indexes=[0, 1]))["changed"] == 2
    runners["ended"].mute = True
    for run_id in list(runners["ended"].runs):
        runners["ended"].finish(run_id, 1)
    planner.kill()
    for runner in runners.values():
        runner.deaf = runner.mute = False
    planner.start()
    await until_ready(nc, 8)
    await until_counts(nc, jobs["starting"], running=2, pending=1)
    await until_counts(nc, jobs["running"], running=2, pending=1)
    await until_counts(nc, jobs["stopping"], running=1, cancelled=2)
    await until_counts(nc, jobs["ended"], running=1, failed=2)
    for state, changed in {"starting": 3, "running": 3, "stopping": 1, "ended": 1}.items():
        assert (await act(nc, jobs[state], "cancel"))["changed"] == changed
        await until_state(nc, jobs[state], "cancelled", "failed")
    await until_state(nc, dependent, "done")
    await no_leases(nc)
    starts = starts_of(runners.values())
    assert set(starts.values()) == {1}
    assert all(name.endswith(".1") for name in starts)
    planner.stop()
    for runner in runners.values():
        await runner.stop()
    await hosts.stop()


async def test_versions_of_a_job_grow_from_planner_to_planner(
    server: EmbeddedServer, nc: Bus, runners: list[FakeRunner], tmp_path: Path
) -> None:
    """The history keeps what has the greatest version, so that one that comes again would hide what is later."""
    planner = PlannerProcess(server.url, tmp_path / "planner.log")
    planner.start()
    await until_ready(nc, 4)
    job_id = (await submit(nc, "forever"))["job_id"]
    await until_state(nc, job_id, "running")
    events = await nc.jetstream().pull_subscribe(
        subjects.job_events_subject(job_id), "versions", stream=subjects.JOBS_STREAM
    )
    [message] = await events.fetch(1, timeout=30)
    await message.ack()
    first = codec.decode(message.data, JobEvent, codec.JSON)
    versions, planners = [first.version], {first.planner}
    for _ in range(3):  # each publishes the job once more
        planner.kill()
        planner.start()
        await until_ready(nc, 4)
        [message] = await events.fetch(1, timeout=30)
        event = codec.decode(message.data, JobEvent, codec.JSON)
        await message.ack()  # else it comes again after 30 s
        while message.metadata.num_pending or event.planner in planners:
            versions.append(event.version)
            [message] = await events.fetch(1, timeout=30)
            await message.ack()
            event = codec.decode(message.data, JobEvent, codec.JSON)
        versions.append(event.version)
        planners.add(event.planner)
    assert versions == sorted(set(versions))
    assert len(versions) > 3
    planner.stop()


async def test_on_two_hosts_all_start_or_none_and_one_that_fails_ends_the_others(
    server: EmbeddedServer, nc: Bus, runners: list[FakeRunner]
) -> None:
    async with running(server.url):
        await until_ready(nc, 4)
        refused = (await submit(nc, "refuse node1", gpus=4, hosts=2))["job_id"]
        task = (await until_state(nc, refused, "failed"))["tasks"][0]
        assert task["message"] == "no such account on node1"
        assert {part["host"]: part["state"] for part in task["parts"]} == {"node0": "cancelled", "node1": "failed"}
        assert not starts_of(runners)
        job = (await submit(nc, "forever", gpus=4, hosts=2))["job_id"]
        task = (await until_state(nc, job, "running"))["tasks"][0]
        assert sorted(part.get("rank", 0) for part in task["parts"]) == [0, 1]
        runners[1].finish(f"{job}_0.1", 7)
        found = await until_state(nc, job, "failed")
        task = found["tasks"][0]
        assert (task["exit_code"], task["message"]) == (7, "exit code 7 on node1")
        assert {part["host"]: part.get("signal") for part in task["parts"]} == {"node0": 15, "node1": None}
        await no_leases(nc)


async def test_held_tasks_do_not_start_and_those_that_ended_run_again_when_resubmitted(
    server: EmbeddedServer, nc: Bus, runners: list[FakeRunner]
) -> None:
    async with running(server.url):
        await until_ready(nc, 4)
        job = (await submit(nc, "exit 2", array="1-3", held=True, retries=1))["job_id"]
        other = (await submit(nc, "true"))["job_id"]
        await until_state(nc, other, "done")
        found = await listed(nc, job)
        assert (found["job"]["counts"], found["job"]["message"]) == ({"pending": 3}, "held")
        assert (await act(nc, job, "hold", indexes=[2]))["changed"] == 1
        assert (await act(nc, job, "release", indexes=[2]))["changed"] == 1
        assert (await act(nc, job, "release"))["changed"] == 3
        found = await until_state(nc, job, "failed")
        assert [task["attempt"] for task in found["tasks"]] == [2, 2, 2]
        assert (await act(nc, job, "resubmit", indexes=[3]))["changed"] == 1
        await until(nc, job, lambda found: [task["attempt"] for task in found["tasks"]] == [2, 2, 4])
        assert set(starts_of(runners).values()) == {1}


async def test_a_preempted_task_gets_its_signal_and_is_queued_again_and_one_at_its_limit_fails(
    server: EmbeddedServer, nc: Bus, runners: list[FakeRunner]
) -> None:
    async with running(server.url):
        await until_ready(nc, 4)
        events = await nc.subscribe(subjects.job_events_subject("*"))
        request = {"preemptible": True, "grace_seconds": 0.5}
        job = (await submit(nc, "forever", request=request, requeue=True, preempt_signal="USR1"))["job_id"]
        lease = (await until_state(nc, job, "running"))["tasks"][0]["lease_id"]
        await ask(nc, "preempt", {"lease_id": lease, "reason": "for a test"})
        task = (await until(nc, job, lambda found: again(found["tasks"][0])))["tasks"][0]
        assert task["lease_id"] != lease
        signals = {name: run.notices for runner in runners for name, run in {**runner.gone, **runner.runs}.items()}
        assert signals[f"{job}_0.1"] == [(1, 10)]
        leases = (await ask(nc, "leases", {"lease_id": task["lease_id"]}))["leases"]
        assert leases[0]["requeued"]
        # The end of the first attempt is published, though the task waits again at once.
        ended: list[JobTask] = []
        async with asyncio.timeout(20):
            while not ended:
                event = codec.decode((await events.next_msg(20)).data, JobEvent, codec.JSON)
                ended = [task for task in event.tasks if task.state is JobState.PREEMPTED]
        assert (ended[0].attempt, ended[0].lease_id, ended[0].parts[0].signal) == (1, lease, 15)
        limited = (await submit(nc, "forever", request={"max_seconds": 1}))["job_id"]
        task = (await until_state(nc, limited, "failed"))["tasks"][0]
        assert task["message"] == "time limit of 1 s"
        await act(nc, job, "cancel")
        await no_leases(nc)
        # What waits says why: for devices, or for what quotas allow.
        request = {"owner": "bob", "gpus": 4, "placement": "fewest_hosts"}
        held = (await ask(nc, "request", request))["lease"]["lease_id"]
        small = (await submit(nc, "forever", request={"gpus": 1}))["job_id"]
        await until(nc, small, lambda found: found["job"].get("message", "").startswith("0/4 devices: 4 leased"))
        await act(nc, small, "cancel")
        await ask(nc, "release", {"owner": "bob", "lease_id": held})
        await ask(nc, "set_groups", {"set": [{"name": "lab", "members": ["ann"], "limit": {"gpus": {"*": 1}}}]})
        large = (await submit(nc, "forever", request={"gpus": 2}))["job_id"]
        words = "group lab uses 0 devices of '*', and 1 are its limit, less than the 2 asked for"
        await until(nc, large, lambda found: found["job"].get("message", "") == words)
        await act(nc, large, "cancel")


async def test_a_host_that_vanishes_loses_its_tasks_and_one_without_a_runner_gets_none(
    server: EmbeddedServer, nc: Bus, hosts: FakeHosts
) -> None:
    async with running(server.url, runner_lost_seconds=1.0, lost_after_seconds=1.5):
        await until_ready(nc, 4)
        job = (await submit(nc, "forever", requeue=True))["job_id"]
        await until(nc, job, lambda found: found["job"].get("message") == "no host has a runner")
        first, second = FakeRunner(nc, "node0"), FakeRunner(nc, "node1")
        await first.start()
        await until_state(nc, job, "running")
        fleet = await ask(nc, "fleet", {})
        assert (fleet["runner_hosts"], fleet["without_runner"]) == (1, ["node1"])
        done = await asyncio.to_thread(lambda: invoke("doctor", "--json", url=server.url))
        [found] = [one for one in json.loads(done.stdout)["findings"] if one["what"] == "runners"]
        assert (found["level"], "from node1" in found["detail"]) == ("note", True)
        await second.start()
        # The runner of one can't write: its job goes on, others wait for it or are placed elsewhere.
        await first.say("/state: no space left on device")
        fleet = await ask(nc, "fleet", {})
        assert fleet["unready_runners"] == {"node0": "/state: no space left on device"}
        assert (fleet["runner_hosts"], fleet["without_runner"]) == (1, [])
        done = await asyncio.to_thread(lambda: invoke("doctor", "--json", url=server.url))
        [found] = [one for one in json.loads(done.stdout)["findings"] if one["what"] == "runners"]
        assert (found["level"], "node0: /state: no space left" in found["detail"]) == ("problem", True)
        only = (await submit(nc, "true", request={"hosts": ["node0"]}))["job_id"]
        await until_state(nc, (await submit(nc, "true"))["job_id"], "done")
        assert (await listed(nc, only))["job"]["state"] == "pending"
        await first.say("")
        await until_state(nc, only, "done")
        # A run that it gives back is started again, at no cost.
        first.faults = 1
        given_back = (await submit(nc, "true", request={"hosts": ["node0"]}))["job_id"]
        assert (await until_state(nc, given_back, "done"))["tasks"][0]["attempt"] == 2
        hosts.silent.add("node0")
        await first.stop()
        task = (await until(nc, job, lambda found: again(found["tasks"][0])))["tasks"][0]
        assert (task["attempt"], task["parts"][0]["host"]) == (2, "node1")
        await act(nc, job, "cancel")
        await until_state(nc, job, "cancelled")
        await second.stop()


async def test_bad_messages_are_refused_with_the_field(
    server: EmbeddedServer, nc: Bus, runners: list[FakeRunner]
) -> None:
    async with running(server.url, limits=Limits(jobs=2)):
        await until_ready(nc, 4)
        base: dict[str, Any] = {"request": {"gpus": 1}, "command": ["forever"]}
        cases: list[tuple[str, str, dict[str, Any]]] = [
            ("invalid", "$.command", {"command": []}),
            ("not_found", "$.after[0].job_id", {"after": [{"job_id": "77"}]}),
            ("impossible", "$.request", {"request": {"gpus": 3}}),
            ("refused", "$.request.owner", {"request": {"owner": "bob"}}),
            ("invalid", "$.comand", {"comand": ["true"]}),
        ]
        for code, field, fields in cases:
            answer = await ask(nc, "submit.ann", {**base, **fields})
            assert (answer["type"], answer.get("code"), answer.get("field")) == ("error", code, field), answer
        once = {**base, "submit_id": "s1", "environment": {"SECRET": "x"}, "group": "lab"}
        job = await ask(nc, "submit.ann", once)
        assert (job["group"], job["warnings"]) == ("", ["There are no groups: the job is not charged to 'lab'"])
        assert (await ask(nc, "submit.ann", once))["job_id"] == job["job_id"]
        assert (await ask(nc, "submit.ann", {**once, "command": ["true"]}))["code"] == "conflict"
        assert "SECRET" not in str(await ask(nc, "jobs"))
        spec = (await ask(nc, "job.ann", {"job_id": job["job_id"], "verb": "show"}))["spec"]
        assert spec["environment"] == {"SECRET": "x"}
        refused = await ask(nc, "job.bob", {"job_id": job["job_id"], "verb": "show"})
        assert refused["code"] == "not_owner"
        assert (await ask(nc, "job.ann", {"job_id": job["job_id"], "verb": "cancel", "indexes": [4]}))["code"] == (
            "not_found"
        )
        await ask(nc, "set_groups", {"set": [{"name": "lab/vision", "members": ["ann"]}, {"name": "lab/nlp"}]})
        refused = await ask(nc, "submit.ann", {**base, "group": "lab/nlp"})
        assert (refused["field"], refused["message"]) == (
            "$.group",
            "'ann' is not a member of group 'lab/nlp', but of 'lab/vision'",
        )
        charged = await ask(nc, "submit.ann", {**base, "group": "lab"})
        assert (charged["group"], charged["warnings"]) == ("lab/vision", [])
        assert (await ask(nc, "submit.ann", base))["code"] == "too_many_requests"
        shown = await ask(nc, "job_override.opal", {"action": {"job_id": job["job_id"], "verb": "cancel"}})
        assert shown["changed"] == 1


async def test_a_job_gets_the_devices_that_it_names_once_all_of_them_are_free(
    server: EmbeddedServer, nc: Bus, runners: list[FakeRunner]
) -> None:
    three = ["GPU-node0-1", "GPU-node0-0", "GPU-node1-1"]
    named: dict[str, Any] = {"request": {"gpus": 3, "devices": three, "placement": "fewest_hosts"}, "hosts": 2}
    async with running(server.url):
        await until_ready(nc, 4)
        first = await submit(nc, "forever", gpus=3, **named)
        job = await until_state(nc, first["job_id"], "running")
        [lease] = (await ask(nc, "leases", {"states": ["active"]}))["leases"]
        assert [grant["device"] for grant in lease["grants"]] == three
        assert [(part["host"], part.get("rank", 0)) for part in job["tasks"][0]["parts"]] == [
            ("node0", 0),
            ("node1", 1),
        ]
        second = await submit(nc, "true", gpus=3, **named)
        waits = await until(nc, second["job_id"], lambda found: "GPU-node0-1: leased" in found["job"]["message"])
        assert waits["job"]["state"] == "pending"
        # The rest of the fleet is for others meanwhile, also those behind it.
        await until_state(nc, (await submit(nc, "true"))["job_id"], "done")
        await act(nc, first["job_id"], "cancel")
        await until_state(nc, second["job_id"], "done")
        await no_leases(nc)
        refused = {"owner": "ann", "gpus": 1, "devices": ["GPU-x"], "placement": "fewest_hosts"}
        for request, hosts, said in (
            (refused, 1, "no device GPU-x"),
            (named["request"] | {"owner": "ann"}, 3, "on 2 hosts"),
        ):
            answer = await ask(nc, "submit", {"request": request, "command": ["true"], "hosts": hosts})
            assert said in answer["message"]
