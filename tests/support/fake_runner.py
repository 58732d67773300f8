"""The runner of a host as the planner sees it: real messages on the bus, and no processes.

What a run does is its command: `true` ends with 0 at once, `exit N` with N, `sleep SECONDS` with 0 after that time,
`forever` when it is stopped, `refuse` can't be started, `progress P` says how far it is and goes on for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from datetime import UTC, datetime
from typing import Any

from corral.bus.tasks import BackgroundTasks
from corral.schemas import codec, subjects
from corral.schemas.work.jobs import FINAL, JobState, TaskPart
from corral.schemas.work.runs import Run, RunnerReport, RunOrders, RunReport, RunVerb
from msgspec.structs import replace
from nats.aio.client import Client
from nats.aio.msg import Msg


class FakeRun:
    """A run of the fake: what was ordered, and what is reported of it."""

    def __init__(self, run: Run) -> None:
        self.order = run
        self.report = RunReport(
            run_id=run.run_id, lease_id=run.lease_id, part=TaskPart(host="", rank=run.rank, executor="process")
        )
        self.started = False
        self.stopping = False
        self.notices: list[tuple[int, int]] = []

    @property
    def is_final(self) -> bool:
        return self.report.part.state in FINAL


class FakeRunner:
    """A runner without processes.

    Attributes:
        runs: that it knows, by id.
        gone: those whose end the planner has stored.
        starts: how often each run was started.
        ended: what became of each run that has ended.
        deaf: true if it takes no orders that are pushed.
        mute: true if it reports nothing.
        unready: why it starts no jobs, in its reports.
        faults: number of runs that it can't start since its host can't.
        stop_seconds: time that a run takes to end once it is stopped.
    """

    def __init__(self, nc: Client, host: str, interval: float = 0.5) -> None:
        self.nc = nc
        self.host = host
        self.interval = interval
        self.runs: dict[str, FakeRun] = {}
        self.gone: dict[str, FakeRun] = {}
        self.starts: Counter[str] = Counter()
        self.start_times: dict[str, float] = {}
        self.ended: dict[str, TaskPart] = {}
        self.deaf = self.mute = False
        self.unready = ""
        self.faults = 0
        self.stop_seconds = 0.0
        self.term = 0
        self._changed: dict[str, None] = {}
        self._wake = asyncio.Event()
        self._tasks = BackgroundTasks()

    async def start(self) -> None:
        self._subscription = await self.nc.subscribe(subjects.runs_subject(self.host), cb=self._pushed)
        self._tasks.start(self._report_on())

    async def stop(self) -> None:
        """Vanish, without a word."""
        await self._subscription.unsubscribe()
        await self._tasks.cancel()

    async def _pushed(self, message: Msg) -> None:
        if not self.deaf:
            self._take(codec.decode(message.data, RunOrders, codec.content_type(message.headers)), frozenset())

    def _take(self, orders: RunOrders, asked: frozenset[str]) -> None:
        assert orders.token == self.host
        if orders.term < self.term:
            return
        self.term = orders.term
        for run_id in orders.known:
            if (known := self.runs.get(run_id)) is not None and known.is_final:
                self.gone[run_id] = self.runs.pop(run_id)
        for run in orders.runs:
            self._obey(run)
        if orders.complete:
            there = {run.run_id for run in orders.runs}
            for run in list(self.runs.values()):
                # As of the real runner: an order that was pushed may overtake an answer that does not have it yet.
                if run.order.run_id in asked - there and not run.is_final:
                    self._tasks.start(self._stop(run, 15))

    def _obey(self, order: Run) -> None:
        run = self.runs.get(order.run_id)
        if run is None:
            if order.run_id in self.ended or (order.spec is None and order.verb is not RunVerb.STOP):
                return
            run = self.runs[order.run_id] = FakeRun(order)
        if run.is_final:
            return
        if order.spec is not None:
            run.order = order
        if order.verb is RunVerb.PREPARE:
            self._prepare(run)
        elif order.verb is RunVerb.START:
            if not run.started:
                self._start(run)
            elif order.notice > len(run.notices):
                run.notices.append((order.notice, order.signal))
        elif not run.started:
            self._end(run, state=JobState.CANCELLED)
        elif not run.stopping:
            self._tasks.start(self._stop(run, order.signal or 15))

    def _words(self, run: FakeRun) -> list[str]:
        assert run.order.spec is not None
        return run.order.spec.command

    def _prepare(self, run: FakeRun) -> None:
        if self._words(run) == ["refuse", self.host]:
            self._end(run, state=JobState.FAILED, message="no such account")
        elif not run.report.prepared:
            run.report = replace(run.report, prepared=True)
            self._say(run)

    def _start(self, run: FakeRun) -> None:
        if self.faults:
            self.faults -= 1
            run.report = replace(run.report, host_fault=True)
            self._end(run, state=JobState.FAILED, message="no space left on device")
            return
        run.started = True
        self.starts[run.order.run_id] += 1
        self.start_times[run.order.run_id] = time.perf_counter()
        words = self._words(run)
        self._set(run, state=JobState.RUNNING, started_at=datetime.now(UTC))
        if words[0] == "refuse":
            self._end(run, state=JobState.FAILED, message="no such account")
        elif words[0] == "true":
            self._end(run, exit_code=0)
        elif words[0] == "exit":
            self._end(run, exit_code=int(words[1]))
        elif words[0] == "sleep":
            self._tasks.start(self._sleep(run, float(words[1])))
        elif words[0] == "progress":
            run.report = replace(run.report, progress=float(words[1]))

    async def _sleep(self, run: FakeRun, seconds: float) -> None:
        await asyncio.sleep(seconds)
        if not run.is_final and not run.stopping:
            self._end(run, exit_code=0)

    async def _stop(self, run: FakeRun, number: int) -> None:
        run.stopping = True
        await asyncio.sleep(self.stop_seconds)
        if not run.is_final:
            self._end(run, signal=number)

    def finish(self, run_id: str, exit_code: int = 0) -> None:
        """Have a run end."""
        self._end(self.runs[run_id], exit_code=exit_code)

    def _end(self, run: FakeRun, **fields: Any) -> None:
        done = fields.get("exit_code") == 0
        state = fields.pop("state", JobState.DONE if done else JobState.FAILED)
        self._set(run, state=state, ended_at=datetime.now(UTC), **fields)
        self.ended[run.order.run_id] = run.report.part

    def _set(self, run: FakeRun, **fields: Any) -> None:
        run.report = replace(run.report, part=replace(run.report.part, host=self.host, **fields))
        self._say(run)

    def _say(self, run: FakeRun) -> None:
        self._changed[run.order.run_id] = None
        self._wake.set()

    async def _report_on(self) -> None:
        complete_at = 0.0
        while True:
            now = asyncio.get_running_loop().time()
            complete = now >= complete_at
            changed, self._changed = self._changed, {}
            if (complete or changed) and not self.mute:
                if complete:
                    complete_at = now + self.interval
                chosen = self.runs if complete else [run_id for run_id in changed if run_id in self.runs]
                try:
                    await self._report([self.runs[run_id].report for run_id in chosen], complete)
                except Exception:  # no planner, say: the next report has all
                    complete_at = 0.0
                    await asyncio.sleep(0.05)
            self._wake.clear()
            if not self._changed:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(0.001, complete_at - asyncio.get_running_loop().time())):
                        await self._wake.wait()
                await asyncio.sleep(0.005)

    async def say(self, unready: str) -> None:
        """Report at once why it starts no jobs; empty if it does."""
        self.unready = unready
        await self._report([], False)

    async def _report(self, runs: list[RunReport], complete: bool) -> None:
        asked = frozenset(self.runs)
        report = RunnerReport(
            host=self.host,
            runner="fake",
            token=self.host,
            executors=["process"],
            unready=self.unready,
            runs=runs,
            complete=complete,
        )
        reply = await self.nc.request(
            subjects.runner_subject(self.host),
            codec.encode(report),
            timeout=2.0,
            headers={codec.CONTENT_TYPE_HEADER: codec.MSGPACK},
        )
        self._take(codec.decode(reply.data, RunOrders, codec.content_type(reply.headers)), asked)
