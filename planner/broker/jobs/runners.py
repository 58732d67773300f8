"""The runners of the hosts: which were heard lately, what they were told, and the orders for them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from typing import Final

from msgspec.structs import replace
from nats.aio.client import Client

from ....bus.tasks import BackgroundTasks
from ....schemas import codec, subjects
from ....schemas.work.runs import REPORT_SECONDS, Run, RunnerReport, RunOrders
from ...fleet.fleet import Fleet, RunnerGone, RunnerSeen, RunnerUnready, apply

log = logging.getLogger("corral.planner.broker.jobs.runners")

ORDERS_BYTES: Final = 512 * 1024
"""Size of one message of orders: what is beyond goes in further ones."""
UNKNOWN_REPORTS: Final = 3
"""Complete reports without a run that the runner was told of, after which it knows nothing of it."""
_STEP_SECONDS: Final = 2.0
"""Time that counts at most between two ticks: the rest was a pause of the planner."""


class Runner:
    """A runner of a host.

    Attributes:
        report: its last report, without runs.
        heard_at: when that came, on the clock of `Runners`.
        lacking: runs that it was told of in a complete answer: when, and how many complete reports lacked them since.
    """

    __slots__ = ("heard_at", "lacking", "report")

    def __init__(self, report: RunnerReport) -> None:
        self.report = report
        self.heard_at = 0.0
        self.lacking: dict[str, tuple[float, int]] = {}


class Runners:
    """Runners of one term.

    Args:
        nc: connection of the planner.
        fleet: whose hosts get the label of those that have a runner.
        planner: id of this planner.
        term: revision of the leader's key.
        lost_seconds: a host whose runner is not heard for so long gets no more jobs.
        changed: called when a host gets a runner, or has none any more, or one that starts no jobs for now.
        runs_for: returns the runs for a host about some tasks, without those of which it shall know nothing.

    Attributes:
        hosts: runners that were heard lately, by host.
    """

    def __init__(
        self,
        nc: Client,
        fleet: Fleet,
        planner: str,
        term: int,
        lost_seconds: float,
        changed: Callable[[], None],
        runs_for: Callable[[str, Iterable[tuple[str, int]]], list[Run]],
    ) -> None:
        self.hosts: dict[str, Runner] = {}
        self._nc = nc
        self._fleet = fleet
        self._planner = planner
        self._term = term
        self._lost_seconds = lost_seconds
        self._changed = changed
        self._runs_for = runs_for
        self._clock = 0.0
        self._ticked_at: float | None = None
        self._orders: dict[str, dict[tuple[str, int], None]] = {}
        self._pushing = False
        self._tasks = BackgroundTasks()
        for host in [*fleet.runners, *fleet.unready_runners]:  # of an earlier term
            apply(fleet, RunnerGone(host))

    def heard(self, report: RunnerReport) -> Runner:
        """Note a report."""
        runner = self.hosts.get(report.host)
        if runner is None:
            runner = self.hosts[report.host] = Runner(report)
            log.info("host %s has a runner (%s)", report.host, ", ".join(report.executors) or "no executor")
            self._label(report)
        elif runner.report.unready != report.unready:
            self._label(report)
        runner.report = replace(report, runs=[])
        runner.heard_at = self._clock
        return runner

    def _label(self, report: RunnerReport) -> None:
        """Have jobs placed on a host, or not while its runner can't start any."""
        host = report.host
        if report.unready:
            log.warning("the runner of host %s starts no jobs for now: %s", host, report.unready)
        apply(self._fleet, RunnerUnready(host, report.unready) if report.unready else RunnerSeen(host))
        self._changed()

    def tick(self, now: float) -> None:
        """Forget runners that were not heard for long, by a monotonic clock; to be called while they can be heard."""
        if self._ticked_at is not None:
            self._clock += min(now - self._ticked_at, _STEP_SECONDS)
        self._ticked_at = now
        for host, runner in list(self.hosts.items()):
            if self._clock - runner.heard_at > self._lost_seconds:
                log.warning("host %s has no runner: silent for %.0f s", host, self._lost_seconds)
                del self.hosts[host]
                apply(self._fleet, RunnerGone(host))
                self._changed()

    def unknown(self, report: RunnerReport) -> list[str]:
        """Runs that a runner was told of, and that its complete reports lack again and again."""
        runner = self.hosts[report.host]
        there = {run.run_id for run in report.runs}
        now = time.monotonic()
        found: list[str] = []
        for run_id, (since, lacked) in list(runner.lacking.items()):
            if run_id in there:
                runner.lacking[run_id] = (now, 0)
            elif lacked + 1 >= UNKNOWN_REPORTS and now - since >= 2 * REPORT_SECONDS:
                found.append(run_id)
            else:
                runner.lacking[run_id] = (since, lacked + 1)
        return found

    def orders(self, host: str, runs: list[Run], known: list[str], *, complete: bool) -> RunOrders:
        """Orders for a host as a message."""
        token = self.hosts[host].report.token
        return RunOrders(planner=self._planner, term=self._term, token=token, runs=runs, complete=complete, known=known)

    def answer(self, host: str, runs: list[Run], known: list[str]) -> RunOrders:
        """Complete orders for a host; jobs that are too much for one message are sent after it."""
        runner = self.hosts[host]
        now = time.monotonic()
        runner.lacking = {run.run_id: runner.lacking.get(run.run_id, (now, 0)) for run in runs}
        fitting: list[Run] = []
        later: list[Run] = []
        size = 0
        for run in runs:
            size += len(codec.encode(run)) if run.spec is not None else 0
            if size > ORDERS_BYTES and run.spec is not None and fitting:
                later.append(run)
                fitting.append(replace(run, spec=None))
            else:
                fitting.append(run)
        if later:
            self._tasks.start(self._send(host, later))
        return self.orders(host, fitting, known, complete=True)

    def order(self, host: str, keys: Iterable[tuple[str, int]]) -> None:
        """Send a runner its orders about some tasks, with others that come in the same moment."""
        self._orders.setdefault(host, {}).update(dict.fromkeys(keys))
        if not self._pushing:
            self._pushing = True
            self._tasks.start(self._push())

    def take_orders(self, host: str) -> list[Run]:
        """Orders for a host that have not been sent, to be sent now."""
        return self._runs_for(host, self._orders.pop(host, ()))

    async def _push(self) -> None:
        await asyncio.sleep(0)  # the others of this moment
        self._pushing = False
        orders, self._orders = self._orders, {}
        for host, keys in orders.items():
            # One that was not heard gets its orders with the answer to its report.
            runs = self._runs_for(host, keys) if host in self.hosts else []
            if runs:
                await self._send(host, runs)

    async def _send(self, host: str, runs: list[Run]) -> None:
        batch: list[Run] = []
        size = 0
        for run in runs:
            each = len(codec.encode(run))
            if batch and size + each > ORDERS_BYTES:
                await self._publish(host, batch)
                batch, size = [], 0
            batch.append(run)
            size += each
        await self._publish(host, batch)

    async def _publish(self, host: str, runs: list[Run]) -> None:
        if host not in self.hosts:
            return
        data = codec.encode(self.orders(host, runs, [], complete=False))
        headers = {codec.CONTENT_TYPE_HEADER: codec.MSGPACK}
        try:
            await self._nc.publish(subjects.runs_subject(subjects.host_token(host)), data, headers=headers)
        except Exception as error:  # the bus is away, say: the next report is answered with all orders
            log.debug("orders for %s were not sent: %r", host, error)

    async def close(self) -> None:
        """End what is in flight."""
        await self._tasks.cancel()
