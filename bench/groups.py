"""How fast do groups share a full fleet through a real planner, durably, over the bus?

    python bench/groups.py                    # Kueue's `baseline`, about 80 s
    python bench/groups.py --load large-scale
    python bench/groups.py --load kai         # KAI-Scheduler's scale tests, about 30 s
    python bench/groups.py --load plain       # a plain request with and without groups
    python bench/groups.py --load line        # decisions alone, without a bus: a lease ends, and others start

The loads `baseline` and `large-scale` are those of Kueue's performance tests (`groups_loads.py`). Kueue's figures are
its own, measured on its CI with an API server, so that they are an anchor and no race. The floor is the same load under
a scheduler that takes no time, first-fit by priority and age, computed here.

`kai` is what KAI-Scheduler's scale tests measure (`docs/scale-tests/example-results.json`, July 2026; on its CI with
an API server): 500 nodes of 8 GPUs, filled with single-GPU jobs; the verdict on a job that does not fit; one GPU, and
all, taken back for a group that is guaranteed them. Its anchors are printed beside.

Work may be preempted without grace; a client whose work was preempted asks again with `requeue_of`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import heapq
import json
import multiprocessing
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import uvloop
from corral.bus.connect import connect
from corral.bus.layout import until_laid_out
from corral.planner.fleet.fleet import free, hold
from corral.planner.groups.state import GroupState, amounts_of
from corral.planner.placement.decide import Policies
from corral.planner.placement.policies import DEFAULT
from corral.planner.queue.durations import given
from corral.planner.queue.line import Entry, Line
from corral.planner.simulation.simulate import fleet_of
from corral.planner.simulation.timed import grants_of
from corral.planner.simulation.trace import Node
from corral.schemas import subjects
from corral.schemas.requests import Placement, WorkRequest
from corral.schemas.work.groups import GroupTree
from granting import HEADER, drive, grant_and_release, start_planner, until_usable
from groups_loads import LOADS, QUOTA, Kind, Load, floor, groups, without_priorities, workloads
from msgspec import convert
from servers import cpu_seconds, start

PLAIN_TURNS = 10
MOST_WAITING = 9_000
"""Workloads that a client has in the planner's queue, which takes 10,000 at most; the rest is submitted as these start.

The wait of each counts from its time in the schedule, whenever it was submitted.
"""


ASK_AGAIN_SECONDS = 30.0
"""Silence of the planner about a request after which it is sent again, as Corral's client does: what is under way over
a connection that breaks is lost, and the planner then knows nothing of it."""


class Client:
    """Submits all workloads, runs them, and asks again for those that were preempted."""

    def __init__(self, nc: Any, load: Load) -> None:
        self.nc = nc
        self.works = workloads(load)
        self.left = len(self.works)
        self.over = asyncio.Event()
        self.waits: dict[str, list[float]] = {kind.name: [] for kind in load.kinds}
        self.asked: dict[str, float] = {}
        self.leases: dict[str, tuple[int, asyncio.TimerHandle]] = {}
        self.preempted = self.refused = self.waiting = self.ended_before = 0
        self.started_one = asyncio.Event()
        self.gone: set[str] = set()
        self.heard: dict[int, tuple[float, str]] = {}
        """When the planner last said something of a request that waits, by number, with the lease before it."""
        self.again = 0
        self.inbox = f"_INBOX.bench{id(self)}"
        self.started = 0.0
        self.loop = asyncio.get_running_loop()

    async def run(self) -> float:
        await self.nc.subscribe(f"{self.inbox}.*", cb=self._answered)
        await self.nc.subscribe(f"{subjects.LEASE_EVENTS}.evicted.*", cb=self._evicted)
        self.started = time.perf_counter()
        for number, work in enumerate(self.works):
            late = work.at - (time.perf_counter() - self.started)
            if late > 0.001:
                await asyncio.sleep(late)
            while self.waiting >= MOST_WAITING:
                self.started_one.clear()
                await self.started_one.wait()
            await self._ask(number)
            if number % 64 == 0:
                await asyncio.sleep(0)
        await self.over.wait()
        return time.perf_counter() - self.started

    async def report(self, planner: int) -> None:
        """Print the progress every 5 s, until cancelled."""
        while True:
            await asyncio.sleep(5)
            seconds = time.perf_counter() - self.started
            print(
                f"  {seconds:3.0f} s: {self.left:6,} left, {self.waiting:5,} wait, {len(self.leases):5,} run, "
                f"{self.refused:,} refused, {self.again:,} sent again, planner {cpu_seconds(planner):.0f} CPU-seconds",
                flush=True,
            )

    async def ask_again(self) -> None:
        """Send those again that the planner has been silent about, until cancelled."""
        while True:
            await asyncio.sleep(ASK_AGAIN_SECONDS / 3)
            silent = self.loop.time() - ASK_AGAIN_SECONDS
            for number, (heard, requeue_of) in list(self.heard.items()):
                if heard < silent and number in self.heard:
                    self.again += 1
                    await self._send(number, requeue_of)

    async def _ask(self, number: int, requeue_of: str = "") -> None:
        self.waiting += 1
        await self._send(number, requeue_of)

    async def _send(self, number: int, requeue_of: str) -> None:
        self.heard[number] = (self.loop.time(), requeue_of)
        work = self.works[number]
        kind = work.kind
        body: dict[str, Any] = {
            "owner": work.owner,
            "request_id": work.request_id + (f"-{requeue_of}" if requeue_of else ""),
            "gpus": kind.units,
            "placement": "fewest_hosts",
            "priority": kind.priority,
            "expected_seconds": max(1.0, kind.seconds),
            "wait_seconds": 3600,
            "ttl_seconds": 300,
            "preemptible": True,
            "grace_seconds": 0,
        }
        if requeue_of:
            body["requeue_of"] = requeue_of
        await self.nc.publish(subjects.PlanSubject.REQUEST, json.dumps(body).encode(), reply=f"{self.inbox}.{number}")

    async def _answered(self, message: Any) -> None:
        token = message.subject.rpartition(".")[2]
        if not message.data:  # the planner asks whether this client is there
            if token.isdecimal() and int(token) in self.heard:
                self.heard[int(token)] = (self.loop.time(), self.heard[int(token)][1])
            return
        answer = json.loads(message.data)
        if token == "release":
            if answer["type"] == "lease":
                return
            self.ended_before += answer["code"] == "ended"  # preempted just then
            if answer["code"] != "ended":
                print(answer, flush=True)
            return
        number = int(token)
        if number not in self.heard:  # the second answer to a request that was sent again
            return
        requeue_of = self.heard.pop(number)[1]
        self.waiting -= 1
        self.started_one.set()
        if answer["type"] != "assignment":
            self.refused += 1
            if self.refused <= 3:
                print(answer, flush=True)
            after = answer.get("retry_after_seconds") or 0.2
            self.loop.call_later(after, lambda: asyncio.ensure_future(self._ask(number, requeue_of)))
            return
        work, lease = self.works[number], answer["lease"]["lease_id"]
        if lease in self.gone:  # its end came before its grant
            self.preempted += 1
            await self._ask(number, lease)
            return
        waited = time.perf_counter() - self.started - work.at
        self.asked.setdefault(work.request_id, waited)
        timer = self.loop.call_later(work.kind.seconds, lambda: asyncio.ensure_future(self._done(number, lease)))
        self.leases[lease] = (number, timer)

    async def _done(self, number: int, lease: str) -> None:
        if self.leases.pop(lease, None) is None:
            return
        work = self.works[number]
        self.waits[work.kind.name].append(self.asked[work.request_id])
        body = json.dumps({"lease_id": lease, "owner": work.owner}).encode()
        await self.nc.publish(subjects.PlanSubject.RELEASE, body, reply=f"{self.inbox}.release")
        self.left -= 1
        if not self.left:
            self.over.set()

    async def _evicted(self, message: Any) -> None:
        lease = message.subject.rpartition(".")[2]
        found = self.leases.pop(lease, None)
        if found is None:
            self.gone.add(lease)
        else:
            self.preempted += 1
            found[1].cancel()
            await self._ask(found[0], lease)


async def kai(nc: Any, planner: int) -> None:
    """Fill 500 × 8 GPUs, ask for what does not fit, and take one and then all back.

    Args:
        nc: connection to the bus.
        planner: id of the planner's process, whose processor time is printed.
    """
    gpus = 4000
    tree = {
        "replace": {
            "groups": [
                {"name": "lender", "guarantee": {"gpus": {"*": gpus}}, "members": ["lender"]},
                {"name": "borrower", "members": ["borrower"]},
            ]
        }
    }
    answer = await nc.request(subjects.PlanSubject.SET_GROUPS, json.dumps(tree).encode(), timeout=30)
    assert json.loads(answer.data)["type"] == "groups", answer.data
    inbox, granted = f"_INBOX.kai{time.time_ns()}", asyncio.Event()
    counts: dict[str, int] = {}
    wanted = {"borrower": gpus, "lender": 1}
    leases: dict[str, str] = {}
    notices: list[str] = []
    bodies: dict[str, bytes] = {}
    refused, loop = 0, asyncio.get_running_loop()

    async def send(reply: str) -> None:
        owner = reply.rpartition(".")[2].rstrip("0123456789")
        await nc.publish(subjects.PlanSubject.REQUEST, bodies[owner], reply=reply)

    async def answered(message: Any) -> None:
        nonlocal refused
        if not message.data:
            return
        answer = json.loads(message.data)
        if answer["type"] != "assignment":  # a planner that has too little of a core may refuse some: they ask again
            refused += 1
            if refused <= 3:
                print(answer, flush=True)
            after = answer.get("retry_after_seconds") or 0.2
            loop.call_later(after, lambda: asyncio.ensure_future(send(message.subject)))
            return
        lease = answer["lease"]
        leases[lease["lease_id"]] = lease["owner"]
        counts[lease["owner"]] = counts.get(lease["owner"], 0) + 1
        if counts[lease["owner"]] >= wanted[lease["owner"]]:
            granted.set()

    async def told(message: Any) -> None:
        """A job that gets notice ends at once, as one that was killed: grace aside."""
        lease = message.subject.rpartition(".")[2]
        notices.append(lease)
        body = json.dumps({"lease_id": lease, "owner": "borrower"}).encode()
        await nc.publish(subjects.PlanSubject.RELEASE, body, reply=f"{inbox}x.release")

    await nc.subscribe(f"{inbox}.*", cb=answered)
    await nc.subscribe(f"{subjects.LEASE_EVENTS}.preempting.*", cb=told)

    async def ask(owner: str, count: int, **fields: Any) -> float:
        granted.clear()
        wanted[owner] = counts.get(owner, 0) + count
        bodies[owner] = json.dumps({"owner": owner, "ttl_seconds": 3600, "wait_seconds": 600, **fields}).encode()
        started = time.perf_counter()
        for number in range(count):
            await send(f"{inbox}.{owner}{number}")
            if number % 256 == 0:
                await asyncio.sleep(0)
        while not granted.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(granted.wait(), 5)
            if time.perf_counter() - started > 5:
                print(f"  {owner} has {counts.get(owner, 0):,} of {wanted[owner]:,}", flush=True)
        return time.perf_counter() - started

    filled = await ask("borrower", gpus, preemptible=True, grace_seconds=5)
    verdicts: list[float] = []
    wide = json.dumps({"owner": "lender", "gpus": 80, "placement": "fewest_hosts"}).encode()
    for _ in range(100):
        started = time.perf_counter()
        answer = json.loads((await nc.request(subjects.PlanSubject.REQUEST, wide, timeout=10)).data)
        verdicts.append(time.perf_counter() - started)
        assert answer["type"] == "rejection"
    print(f"filled in {filled:.2f} s", flush=True)
    ones = [await ask("lender", 1) for _ in range(20)]
    print("one by one", [round(one, 3) for one in ones], flush=True)
    before, noticed = cpu_seconds(planner), len(notices)
    rest = await ask("lender", gpus - 20)
    used, noticed = cpu_seconds(planner) - before, len(notices) - noticed
    print(f"{'500 nodes of 8 GPUs':44}{'Corral':>12}{'KAI, its CI':>14}")
    print(f"{'4,000 single-GPU jobs':44}{filled:>10.2f} s{'398 s':>14}")
    print(
        f"{'verdict on 80 GPUs that are not free, p50':44}{statistics.median(verdicts) * 1e3:>9.2f} ms{'249.5 s':>14}"
    )
    print(f"{'verdict, longest of 100':44}{max(verdicts) * 1e3:>9.2f} ms")
    print(f"{'one GPU taken back, p50 of 20':44}{statistics.median(ones) * 1e3:>9.1f} ms{'13.9 s':>14}")
    print(f"{'one GPU taken back, longest of 20':44}{max(ones) * 1e3:>9.1f} ms")
    print(f"{'3,980 GPUs taken back one by one':44}{rest:>10.2f} s{'694 s':>14}")
    print(f"for these, {noticed:,} notices, and {1e3 * used / (gpus - 20):.2f} ms of the planner's processor for each")
    print(f"last verdict: {answer['message']}")


def line_alone(name: str, load: Load, steps: int = 500, waiting: int = 10) -> None:
    """Processor time of the decisions after the end of a lease on a full fleet, where all groups wait."""
    fleet = fleet_of(
        [Node(f"n{at:04d}", 10**9, 10**9, 8, "H100") for at in range(load.cohorts * load.queues * QUOTA // 8)]
    )
    state = GroupState(convert(groups(load)["replace"], GroupTree), 1)
    line = Line(fleet, Policies(DEFAULT), groups=state)
    draw, now, running = random.Random(1), 1000.0, list[tuple[float, str, Entry]]()

    def ask(owner: str, kind: Kind) -> None:
        request = WorkRequest(
            owner=owner,
            gpus=kind.units,
            placement=Placement.FEWEST_HOSTS,
            priority=kind.priority,
            preemptible=True,
        )
        line.arrive(request, given(kind.seconds), now, payload=kind)

    def serve() -> None:
        for found in line.serve(now):
            lease, owner, grants = str(found.entry.number), found.entry.request.owner, grants_of(found.picks)
            hold(fleet, lease, grants)
            amounts = amounts_of(fleet, grants)
            state.use.hold(lease, owner, amounts, preemptible=True)
            state.usage.starts(lease, owner, amounts, now)
            line.started(lease, found.entry, now)
            ends_at = now + found.entry.payload.seconds * draw.uniform(0.9, 1.1)
            heapq.heappush(running, (ends_at, lease, found.entry))

    for cohort in range(load.cohorts):
        for queue in range(load.queues):
            for kind in load.kinds:
                for _ in range(waiting):
                    ask(f"c{cohort}q{queue}", kind)
    serve()
    took: list[float] = []
    for _ in range(steps):
        now, lease, entry = heapq.heappop(running)
        line.ended(lease, now)
        free(fleet, lease)
        state.use.drop(lease)
        state.usage.ends(lease, now)
        ask(entry.request.owner, entry.payload)
        began = time.process_time()
        serve()
        took.append(1e3 * (time.process_time() - began))
    took.sort()
    kinds = load.cohorts * load.queues * len(load.kinds)
    print(
        f"{name}: {kinds:,} kinds of requests; median {took[steps // 2]:.2f} ms, p99 {took[int(0.99 * steps)]:.2f} ms"
    )


async def plain(url: str, nc: Any, planner: int) -> None:
    """A plain request by one client, and by 64, with and without groups, in turns.

    The processor time of the planner counts, since it hardly depends on other load: the median over the turns, and
    that of the ratios of two turns that follow each other.

    Args:
        url: of the bus.
        nc: connection to it.
        planner: id of the planner's process.
    """
    print(HEADER)
    used: dict[tuple[int, bool], list[float]] = {}
    for turn in range(2 * PLAIN_TURNS):
        groups_on = turn % 4 in (1, 2)  # off, on, on, off: neither is always the first of two
        tree = {"replace": {"groups": _teams() if groups_on else []}}
        await nc.request(subjects.PlanSubject.SET_GROUPS, json.dumps(tree).encode(), timeout=30)
        label = "100 groups" if groups_on else "no groups"
        for clients in (1, 64):
            before, started = _thread_seconds(planner), time.perf_counter()
            rate, _, _ = await drive(f"grant and release, {label}, {turn}", url, clients, 1.5, grant_and_release)
            requests = rate * (time.perf_counter() - started)
            used.setdefault((clients, groups_on), []).append(1e6 * (_thread_seconds(planner) - before) / requests)
    for clients in (1, 64):
        off, on = used[clients, False], used[clients, True]
        ratios = statistics.quantiles([with_groups / without for with_groups, without in zip(on, off, strict=True)])
        print(
            f"processor time of the planner for each request or release, {clients} clients: "
            f"{statistics.median(off):.0f} µs without groups, {statistics.median(on):.0f} with 100; "
            f"ratio {ratios[1]:.3f}, quartiles "
            f"{ratios[0]:.3f} and {ratios[2]:.3f}"
        )


def _thread_seconds(pid: int) -> float:
    """Time on the processor of a process's main thread, to the nanosecond."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def _teams() -> list[dict[str, Any]]:
    return [
        {"name": f"team{number}", "guarantee": {"gpus": {"*": 4}}, "members": [f"owner{number}", f"bench{number}"]}
        for number in range(100)
    ]


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", choices=[*LOADS, "kai", "plain", "line"], default="baseline")
    parser.add_argument("--no-priorities", action="store_true", help="all workloads of Kueue's loads have priority 0")
    parser.add_argument("--queues", type=int, help="so many queues in each cohort: a part of the load")
    parser.add_argument("--profile", default="", help="write the planner's profile to this file")
    options = parser.parse_args()
    if options.load == "line":
        for name, load in LOADS.items():
            line_alone(name, load)
        return
    load = LOADS.get(options.load)
    if load is not None and options.queues:
        load = load._replace(queues=options.queues)
    if load is not None and options.no_priorities:
        load = without_priorities(load)
    gpus = 4000 if load is None else load.cohorts * load.queues * QUOTA
    with tempfile.TemporaryDirectory() as folder:
        servers = start(Path(folder), 1)
        url = servers[0].url
        stop = multiprocessing.get_context("spawn").Event()
        nc = await connect(url)
        await until_laid_out(nc.jetstream())
        parts = start_planner(url, gpus, stop, options.profile)
        try:
            await until_usable(nc, gpus)
            if load is None:
                planner = parts[0].pid or 0
                await (kai(nc, planner) if options.load == "kai" else plain(url, nc, planner))
                return
            await nc.request(subjects.PlanSubject.SET_GROUPS, json.dumps(groups(load)).encode(), timeout=30)
            client = Client(nc, load)
            planner, bus = parts[0].pid or 0, int(servers[0].pid_file.read_text())
            before = [cpu_seconds(pid) for pid in (planner, bus)] + [time.process_time()]
            beside = [asyncio.create_task(client.report(planner)), asyncio.create_task(client.ask_again())]
            wall = await client.run()
            for task in beside:
                task.cancel()
            after = [cpu_seconds(pid) for pid in (planner, bus)] + [time.process_time()]
            used = [late - early for early, late in zip(before, after, strict=True)]
        finally:
            stop.set()
            await nc.close()
            for part in parts[::-1]:
                part.terminate()
                part.join()
            for server in servers:
                server.stop()
    least, waits = floor(load)
    names = " / ".join(kind.name for kind in load.kinds)
    print(f"{options.load}: {len(client.works):,} workloads, {gpus:,} units; time to admission of {names}, mean")
    print(f"  Kueue, on its CI        {load.kueue}")
    for label, seconds, found in (("no time for decisions", least, waits), ("Corral", wall, client.waits)):
        means = " / ".join(f"{statistics.fmean(found[kind.name]):.2f}" for kind in load.kinds)
        print(f"  {label:23} {seconds:.1f} s; {means} s")
    print(f"  preempted {client.preempted:,}, refused and asked again {client.refused:,}")
    each = ", ".join(
        f"{name} {seconds:.1f} s ({1e3 * seconds / len(client.works):.2f} ms for each workload)"
        for name, seconds in zip(("planner", "bus", "client"), used, strict=True)
    )
    print(f"  processor: {each}")


if __name__ == "__main__":
    uvloop.run(main())
