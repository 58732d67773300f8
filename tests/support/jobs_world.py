"""A world of jobs in which everything that may happen does, in any order: grants, lost orders, crashes, evictions.

The table of jobs is real. The queue, the bucket, the leases and the runners around it are as simple as can be.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from datetime import UTC, datetime, timedelta

from corral.planner.broker.jobs.records import FoundJobs, encoded
from corral.planner.jobs.changes import Changes, Release
from corral.planner.jobs.job import Job
from corral.planner.jobs.orders import run_of
from corral.planner.jobs.records import (
    StoredJob,
    job_key,
    request_id,
    state_key,
    task_key,
)
from corral.planner.jobs.table import JobTable
from corral.schemas.requests import Grant, Lease, LeaseState, Preemption, WorkRequest
from corral.schemas.work.jobs import (
    FINAL,
    Attempt,
    Condition,
    Dependency,
    JobSpec,
    JobState,
    TaskPart,
    attempt_of_request,
    submitted,
)
from corral.schemas.work.runs import Run, RunReport, RunVerb
from msgspec.structs import replace

HOSTS = ("a", "b", "c")


class FakeProcess:
    """A run on a host of the world."""

    def __init__(self, order: Run) -> None:
        self.order = order
        self.prepared = self.started = self.stopping = self.host_fault = False
        self.part = TaskPart(host="", rank=order.rank)

    @property
    def is_final(self) -> bool:
        return self.part.state in FINAL


class World:
    """A planner with its bucket, and the hosts.

    Attributes:
        starts: how often each run was started on each host.
        allowed: starts that a task may have.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 1_700_000_000.0
        self.table = JobTable()
        self.durable: dict[str, bytes] = {}
        self.unsaved: dict[str, None] = {}
        self.releases: list[Release] = []
        self.leases: dict[str, Lease] = {}
        self.queue: dict[str, Attempt] = {}
        self.runs: dict[str, dict[str, FakeProcess]] = {host: {} for host in HOSTS}
        self.starts: Counter[tuple[str, str]] = Counter()
        self.allowed: Counter[tuple[str, int]] = Counter()
        self.finals: dict[tuple[str, int], list[JobState]] = defaultdict(list)
        self.calm = False
        self.known: dict[tuple[str, int], JobState] = {}

    # The planner's side

    def carry_out(self) -> None:
        """Carry out what follows of changes, as the broker does; writes take some time."""
        changes, self.table.changes = self.table.changes, Changes()
        for job_id in changes.states:
            self.unsaved[state_key(job_id)] = None
        for job_id, index in changes.tasks:
            self.unsaved[task_key(job_id, index)] = None
        if self.random.random() < 0.3:
            self.unsaved.update({task_key(*key): None for key in changes.later})
        for _, name in changes.leave:
            self.queue.pop(name, None)
        self.releases += changes.releases
        for job_id in changes.refill:
            self.refill(self.table.jobs[job_id])
        if changes.refill:
            self.carry_out()
        for job in self.table.jobs.values():
            for index, task in job.tasks.items():
                self.note_state((job.job_id, index), task.state)

    def note_state(self, key: tuple[str, int], state: JobState) -> None:
        if self.known.get(key) is not state:
            self.known[key] = state
            if state in FINAL:
                self.finals[key].append(state)

    def refill(self, job: Job) -> None:
        for index in job.take_waiting(max(0, job.room())):
            attempt = job.attempt(index)
            name = request_id(attempt)
            lease = next((lease for lease in self.leases.values() if lease.request_id == name), None)
            if lease is None:
                self.queue[name] = attempt
            elif lease.state is LeaseState.ACTIVE:
                self.table.granted(attempt, lease, self.now)
            else:
                self.table.spent(attempt)

    def save(self, key: str) -> None:
        """Have a write succeed."""
        del self.unsaved[key]
        kind, _, rest = key.partition(".")
        job_id, _, index = rest.partition(".")
        job = self.table.jobs[job_id]
        self.durable[key] = encoded(job.to_store() if kind == "job_state" else job.tasks[int(index)].stored())

    def release_some(self, chance: float = 0.7) -> None:
        for release in list(self.releases):
            if release.after is not None and task_key(*release.after) in self.unsaved:
                continue
            if self.random.random() < chance:
                self.releases.remove(release)
                self.end_lease(release.lease_id, LeaseState.RELEASED, release.reason)
                if release.after is not None:
                    self.table.released(*release.after)

    def end_lease(self, lease_id: str, state: LeaseState, reason: str = "", **fields: object) -> None:
        lease = self.leases[lease_id]
        if lease.state is not LeaseState.ACTIVE:
            return
        lease = replace(lease, state=state, reason=reason, ended_at=self.time(), **fields)
        self.leases[lease_id] = lease
        attempt = attempt_of_request(lease.request_id)
        assert attempt is not None
        self.table.lease_ended(lease, attempt, self.now)
        self.carry_out()

    def crash(self) -> None:
        """Kill the planner: another one begins with what is durable."""
        found = FoundJobs()
        for key, value in self.durable.items():
            found.take(key, value)
        self.table = JobTable()
        self.queue, self.unsaved, self.releases = {}, {}, []
        jobs, _ = found.decode()
        for job in jobs:
            self.table.add(job)
        for lease in list(self.leases.values()):
            attempt = attempt_of_request(lease.request_id)
            assert attempt is not None
            self.table.restore_lease(lease, attempt, self.now)
        for job in jobs:
            self.table.wait_for_others(job, self.now)
        self.known = {}
        self.finals = defaultdict(list)
        self.carry_out()

    def time(self) -> datetime:
        return datetime.fromtimestamp(self.now, UTC)

    # What happens

    def submit(self) -> None:
        dice = self.random
        hosts = dice.choice([1, 1, 1, 2])
        after = [
            Dependency(job_id=job_id, condition=dice.choice(list(Condition)))
            for job_id in dice.sample(sorted(self.table.jobs), min(len(self.table.jobs), dice.choice([0, 0, 1, 2])))
        ]
        spec = JobSpec(
            request=WorkRequest(owner="ann", gpus=hosts),
            command=["x"],
            array=dice.choice(["", "0-3", "1,5,7-9%2", "0-19%1"]),
            retries=dice.choice([0, 0, 1, 2]),
            requeue=dice.random() < 0.5,
            hosts=hosts,
            after=after,
            held=dice.random() < 0.1,
        )
        job_id = str(self.table.last_id + 1)
        stored = StoredJob(job_id=job_id, spec=submitted(spec), submitted_at=self.now)
        self.durable[job_key(job_id)] = encoded(stored)
        job = self.table.submit(stored, 1, self.now)
        for index in job.indexes:
            self.allowed[job_id, index] = 1 + spec.retries

    def grant(self) -> None:
        if not self.queue:
            return
        name = self.random.choice(list(self.queue))
        attempt = self.queue.pop(name)
        job = self.table.jobs[attempt.job_id]
        lease = Lease(
            lease_id=f"l{len(self.leases)}",
            owner="ann",
            state=LeaseState.ACTIVE,
            granted_at=self.time(),
            expires_at=self.time() + timedelta(seconds=600),
            ttl_seconds=600,
            grants=[Grant(host=host) for host in self.random.sample(HOSTS, job.stored.spec.hosts)],
            request_id=name,
            ends_at=self.time() + timedelta(seconds=50) if self.random.random() < 0.1 else None,
        )
        self.leases[lease.lease_id] = lease
        if self.random.random() < 0.05 and not self.calm:
            self.crash()  # the lease is durable, and nobody knows of it
        else:
            self.table.granted(attempt, lease, self.now)

    def end_some_lease(self) -> None:
        active = [lease for lease in self.leases.values() if lease.state is LeaseState.ACTIVE]
        if not active:
            return
        lease = self.random.choice(active)
        attempt = attempt_of_request(lease.request_id)
        assert attempt is not None
        key = attempt.job_id, attempt.task
        state = self.random.choice([LeaseState.EVICTED, LeaseState.LOST, LeaseState.EXPIRED])
        notice = None
        if state is LeaseState.EVICTED and self.random.random() < 0.5:
            notice = Preemption(notified_at=self.time(), ends_at=self.time())
        job = self.table.jobs[attempt.job_id]
        self.allowed[key] += job.stored.spec.requeue + job.stored.spec.retries
        self.end_lease(lease.lease_id, state, "for a test", preemption=notice)

    def command(self) -> None:
        if not self.table.jobs:
            return
        job = self.random.choice(list(self.table.jobs.values()))
        some = self.random.sample(job.indexes, min(2, len(job.indexes))) if self.random.random() < 0.5 else []
        verb = self.random.choice(["cancel", "hold", "unhold", "unhold", "resubmit"])
        if verb == "cancel":
            self.table.cancel(job, some, "for a test", 0, self.now)
        elif verb == "hold":
            self.table.hold(job, some)
        elif verb == "unhold":
            self.table.unhold(job, some)
        else:
            for index in some or job.indexes:
                if job.state_of(index) in FINAL:
                    self.allowed[job.job_id, index] += 1 + job.stored.spec.retries
            self.table.resubmit(job, some, self.now)
        # A command is answered once it is durable.
        self.carry_out()
        for key in [key for key in self.unsaved if key.partition(".")[2].partition(".")[0] == job.job_id]:
            self.save(key)

    def orders(self, host: str) -> list[Run]:
        found: list[Run] = []
        for job_id, index in self.table.on_host(host):
            job = self.table.jobs[job_id]
            task = job.tasks[index]
            run = run_of(job, task, host, self.leases[task.lease_id])
            if run is not None:
                found.append(run)
        return found

    def push(self, host: str) -> None:
        """Orders that come, or get lost."""
        for order in self.orders(host):
            if self.random.random() < 0.5:
                self.obey(host, order)

    def obey(self, host: str, order: Run) -> None:
        run = self.runs[host].get(order.run_id)
        if run is None:
            if (order.run_id, host) in self.starts:
                return  # it has ended and was reported: a runner keeps a journal
            run = self.runs[host][order.run_id] = FakeProcess(order)
        if run.is_final:
            return
        if order.verb is not RunVerb.STOP and not run.started and not self.calm and self.random.random() < 0.1:
            run.host_fault = True
            self.end_run(run, JobState.FAILED)
        elif order.verb is RunVerb.PREPARE:
            run.prepared = True
        elif order.verb is RunVerb.START and not run.started:
            run.started = True
            self.starts[order.run_id, host] += 1
            run.part = replace(run.part, state=JobState.RUNNING, started_at=self.time())
        elif order.verb is RunVerb.STOP:
            run.stopping = True
            if not run.started:
                self.end_run(run, JobState.CANCELLED)

    def end_run(self, run: FakeProcess, state: JobState, exit_code: int | None = None) -> None:
        run.part = replace(run.part, state=state, exit_code=exit_code, ended_at=self.time())

    def work(self, host: str) -> None:
        """Processes end, or can't be started."""
        for run in self.runs[host].values():
            if run.is_final or self.random.random() < 0.5:
                continue
            if run.started:
                code = 9 if run.stopping else self.random.choice([0, 0, 0, 1])
                self.end_run(run, JobState.FAILED if code else JobState.DONE, code)
            elif run.prepared and self.random.random() < 0.2:
                self.end_run(run, JobState.FAILED)

    def report(self, host: str) -> None:
        """A complete report, and its answer, which may get lost."""
        reported = dict(self.runs[host])
        finals: list[tuple[str, str]] = []
        for run_id, run in reported.items():
            report = RunReport(
                run_id=run_id,
                lease_id=run.order.lease_id,
                part=run.part,
                prepared=run.prepared,
                host_fault=run.host_fault,
            )
            key = self.table.reported(host, report, self.now)
            if run.is_final:
                finals.append((run_id, "" if key is None else task_key(*key)))
        self.carry_out()
        if self.random.random() < 0.3:
            return
        for run_id, key in finals:
            if key not in self.unsaved and run_id in self.runs[host]:
                del self.runs[host][run_id]
        orders = self.orders(host)
        for order in orders:
            self.obey(host, order)
        wanted = {order.run_id for order in orders}
        for run_id, run in self.runs[host].items():
            if run_id not in wanted and not run.is_final:
                if run.started:
                    run.stopping = True
                else:
                    self.end_run(run, JobState.CANCELLED)

    def step(self) -> None:
        """Something happens."""
        dice = self.random.random()
        host = self.random.choice(HOSTS)
        if dice < 0.06:
            self.submit()
        elif dice < 0.3:
            self.grant()
        elif dice < 0.45:
            self.push(host)
        elif dice < 0.6:
            self.work(host)
        elif dice < 0.75:
            self.report(host)
        elif dice < 0.79:
            self.end_some_lease()
        elif dice < 0.83:
            self.command()
        elif dice < 0.85:
            self.crash()
        elif dice < 0.93:
            for key in list(self.unsaved):
                if self.random.random() < 0.7:
                    self.save(key)
            self.release_some()
        else:
            self.now += self.random.choice([1.0, 10.0, 60.0])
            self.table.tick(self.now)
        self.carry_out()
        self.check()

    def settle(self) -> None:
        """Have all that waits happen, until nothing does any more."""
        self.calm = True
        for job in self.table.jobs.values():
            self.table.unhold(job, [])
        for _ in range(2000):
            self.carry_out()
            for _ in range(20):
                self.grant()
            for host in HOSTS:
                self.push(host)
                self.work(host)
                self.report(host)
            for key in list(self.unsaved):
                self.save(key)
            self.release_some(1.0)
            self.now += 5.0
            self.table.tick(self.now)
            self.carry_out()
            self.check()
            if all(job.is_final for job in self.table.jobs.values()) and not self.releases and not self.unsaved:
                return
        raise AssertionError("jobs do not end")

    # What must hold

    def check(self) -> None:
        owned: dict[str, tuple[str, int]] = {}
        for job in self.table.jobs.values():
            counts = Counter(job.state_of(index) for index in job.indexes)
            assert +job.counts == counts, (job.job_id, job.counts, counts)
            assert job.live == {index for index, task in job.tasks.items() if task.is_live}
            if job.most_running:
                assert len(job.live) <= job.most_running
            assert not (job.live and not job.eligible), "it started before those that it waits for had ended"
            for index in job.live:
                owned[job.tasks[index].lease_id] = (job.job_id, index)
            for index in job.in_line:
                assert job.state_of(index) is JobState.PENDING
        pending = {release.lease_id for release in self.releases}
        for lease in self.leases.values():
            if lease.state is LeaseState.ACTIVE:
                assert lease.lease_id in owned or lease.lease_id in pending, f"nobody has lease {lease}"
        for (run_id, host), times in self.starts.items():
            assert times == 1, f"{run_id} was started {times} times on {host}"
        for key, states in self.finals.items():
            assert len(states) <= self.allowed[key], f"task {key} ended as {states}"
        attempts: dict[tuple[str, int], set[int]] = defaultdict(set)
        for run_id, _ in self.starts:
            name, _, number = run_id.partition(".")
            job_id, _, index = name.partition("_")
            attempts[job_id, int(index)].add(int(number))
        for key, numbers in attempts.items():
            assert len(numbers) <= self.allowed[key], f"task {key} was started {len(numbers)} times"
