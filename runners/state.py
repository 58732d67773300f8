"""The runs of a host as the runner knows them: orders and facts go in, actions and reports come out. Without I/O."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final, NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from ..schemas.work.jobs import JobState, TaskPart
from ..schemas.work.runs import RUNNER_LOST_SECONDS, Run, RunOrders, RunReport, RunVerb
from .status import Status

MOST_ENDED: Final = 1000
"""Ended runs in one report."""


class Verb(StrEnum):
    """Action for the service."""

    PREPARE = "prepare"
    """Keep the order, and check whether the run could be started."""
    LAUNCH = "launch"
    """Keep the order, make it durable, and start the run's supervisor."""
    TELL = "tell"
    """Tell the supervisor what is wanted."""
    CLOSE = "close"
    """The end is reported: keep only the output, and that the run has been."""


class Action(NamedTuple):
    """Something to do for a run."""

    verb: Verb
    key: str
    run: Run


class EarlyEnd(Struct, frozen=True, kw_only=True):
    """End of a run that no supervisor has reported.

    Attributes:
        state: final.
        message: why.
        exit_code: as a shell's, where the command could not be executed.
        host_fault: true if the host is why, and no command was executed.
    """

    state: JobState
    message: str
    exit_code: int | None = None
    host_fault: bool = False


class Stop(NamedTuple):
    """An order to end a run."""

    signal: int
    grace_seconds: float
    reason: str


class KnownRun(Struct, kw_only=True):
    """A run.

    Attributes:
        key: name of the run on this host.
        run: the order, with the job.
        launched: true once its start was ordered.
        prepared: true once it was found that it could be started.
        status: from its supervisor; None before it has one.
        final: its end, if there was no supervisor to say it.
        stop: order to end it.
        notice: number of the last notice.
        signal: of the last notice.
        executor: what confines it.
        unconfined: what it is not kept from, where the executor should; empty for nothing.
        progress: 0 to 1, as it says; None if it doesn't.
        log_bytes: size of its output.
    """

    key: str
    run: Run
    launched: bool = False
    prepared: bool = False
    status: Status | None = None
    final: EarlyEnd | None = None
    stop: Stop | None = None
    notice: int = 0
    signal: int = 0
    executor: str = ""
    unconfined: str = ""
    progress: float | None = None
    log_bytes: int = 0

    @property
    def over(self) -> bool:
        """True if nothing is left of it, or if it never began."""
        return self.final is not None or (self.status is not None and self.status.ended_at is not None)

    @property
    def wanted(self) -> dict[str, Any]:
        """Instruction for its supervisor; see `runners/supervisor.py`."""
        ends_at = self.run.ends_at
        stop = self.stop
        return {
            "ends_at": None if ends_at is None else ends_at.timestamp(),
            "notice": self.notice,
            "signal": self.signal,
            "stop": None if stop is None else {"signal": stop.signal, "grace_seconds": stop.grace_seconds},
        }


class HostRuns:
    """All runs of a host whose end is not known to be stored.

    Args:
        host: name of the host.
        boot_id: of the machine.

    Attributes:
        runs: by key.
        closed: keys of runs whose end is stored: they are not started again, however late an order comes.
    """

    def __init__(self, host: str, boot_id: str) -> None:
        self.host = host
        self.boot_id = boot_id
        self.runs: dict[str, KnownRun] = {}
        self.closed: set[str] = set()
        self._term = 0
        self._term_at = float("-inf")

    # Orders

    def apply(
        self, orders: RunOrders, keyed: Iterable[tuple[str, Run]], asked: Collection[str], now: float
    ) -> list[Action]:
        """Apply orders.

        Args:
            orders: the orders.
            keyed: their runs, by key.
            asked: keys of the runs that were known when the report was sent which the orders answer; none for orders
                that answer no report. Only these can be meant by their absence: a later one was not known then.
            now: time of a monotonic clock, in seconds.
        """
        if orders.term < self._term and now - self._term_at < RUNNER_LOST_SECONDS:
            return []
        self._term, self._term_at = orders.term, now
        actions: list[Action] = []
        ordered: set[str] = set()
        for key, run in keyed:
            ordered.add(key)
            actions += self._order(key, run)
        if orders.complete:
            for key in set(asked) - ordered:
                known = self.runs.get(key)
                if known is not None and not known.over:
                    actions += self._stop(known, Stop(0, known.run.grace_seconds, "the planner does not know it"))
        for run_id in orders.known:
            actions += self._stored(run_id)
        return actions

    def _order(self, key: str, run: Run) -> list[Action]:
        known = self.runs.get(key)
        if known is None:
            return [] if key in self.closed else self._new(key, run)
        if known.over:
            return []
        if run.verb is RunVerb.STOP:
            return self._stop(known, Stop(run.signal, run.grace_seconds, run.reason))
        changed = known.run.ends_at != run.ends_at or run.notice > known.notice
        if run.notice > known.notice:
            known.notice, known.signal = run.notice, run.signal
        known.run = replace(run, spec=run.spec or known.run.spec)
        if run.verb is RunVerb.START and not known.launched:
            known.launched = True
            return [Action(Verb.LAUNCH, key, known.run)]
        if run.verb is RunVerb.PREPARE and not known.launched and not known.prepared:
            # An earlier start of the runner has kept the order, and may have ended before it had said so.
            return [Action(Verb.PREPARE, key, known.run)]
        return [Action(Verb.TELL, key, known.run)] if changed and known.launched else []

    def _new(self, key: str, run: Run) -> list[Action]:
        known = self.runs[key] = KnownRun(key=key, run=run, notice=run.notice, signal=run.signal)
        if run.verb is RunVerb.STOP:
            known.final = EarlyEnd(state=JobState.CANCELLED, message="it was ended before it was started")
            return [Action(Verb.PREPARE, key, run)]
        if run.spec is None:
            known.final = EarlyEnd(state=JobState.LOST, message=f"the runner of {self.host} knows nothing of it")
            return []
        if run.verb is RunVerb.START:
            known.launched = True
            return [Action(Verb.LAUNCH, key, known.run)]
        return [Action(Verb.PREPARE, key, run)]

    def _stop(self, known: KnownRun, stop: Stop) -> list[Action]:
        if not known.launched:
            known.final = EarlyEnd(
                state=JobState.CANCELLED, message=stop.reason or "it was ended before it was started"
            )
            return []
        if known.stop == stop:
            return []
        known.stop = stop
        return [Action(Verb.TELL, known.key, known.run)]

    def _stored(self, run_id: str) -> list[Action]:
        found = [known for known in self.runs.values() if known.run.run_id == run_id and known.over]
        for known in found:
            del self.runs[known.key]
            self.closed.add(known.key)
        return [Action(Verb.CLOSE, known.key, known.run) for known in found]

    # Facts

    def prepared(self, key: str, executor: str) -> None:
        """A run could be started."""
        self.runs[key].prepared = True
        self.runs[key].executor = executor

    def failed(self, key: str, message: str, *, host_fault: bool = False) -> None:
        """A run could not be started."""
        self.runs[key].final = EarlyEnd(state=JobState.FAILED, message=message, host_fault=host_fault)

    def observed(self, key: str, status: Status) -> bool:
        """A supervisor's status. Returns true if it is news."""
        known = self.runs.get(key)
        if known is None or known.status == status:
            return False
        known.status = status
        known.executor = status.executor or known.executor
        return True

    def vanished(self, key: str) -> None:
        """The supervisor of a run has ended without saying how the run ended, and nothing is left of it."""
        known = self.runs[key]
        if known.status is not None and known.status.boot_id != self.boot_id:
            message = "its host has restarted"
        else:
            message = "its supervisor was killed"
        known.final = EarlyEnd(state=JobState.LOST, message=message)

    # Reports

    def report(self, keys: Iterable[str] | None = None) -> tuple[list[RunReport], bool]:
        """Reports of runs, and whether these are all.

        Args:
            keys: of the runs; None for all.
        """
        chosen = self.runs.values() if keys is None else [self.runs[key] for key in keys if key in self.runs]
        ended = [known for known in chosen if known.over]
        found = [known for known in chosen if not known.over] + ended[:MOST_ENDED]
        return [self._report(known) for known in found], keys is None and len(ended) <= MOST_ENDED

    def _report(self, known: KnownRun) -> RunReport:
        final, status = known.final, known.status
        return RunReport(
            run_id=known.run.run_id,
            lease_id=known.run.lease_id,
            part=part_of(self.host, known),
            prepared=known.prepared,
            progress=known.progress,
            host_fault=final.host_fault if final is not None else status is not None and status.host_fault,
        )


def part_of(host: str, known: KnownRun) -> TaskPart:
    """A run as its report shows it."""
    part = TaskPart(host=host, rank=known.run.rank, executor=known.executor, log_bytes=known.log_bytes)
    status, final = known.status, known.final
    if status is not None:
        part = replace(
            part,
            exit_code=status.exit_code,
            signal=status.signal,
            started_at=_time(status.started_at),
            ended_at=_time(status.ended_at),
            peak_memory_bytes=status.peak_memory_bytes,
            cpu_seconds=status.cpu_seconds,
            log_file=status.output,
            message=status.message,
        )
    if final is not None:
        return replace(part, state=final.state, message=final.message, exit_code=final.exit_code)
    return replace(part, state=_state(status, known.stop), message=part.message or _message(known))


def _state(status: Status | None, stop: Stop | None) -> JobState:
    if status is None or (status.started_at is None and not status.failed):
        return JobState.STARTING
    if status.ended_at is None:
        return JobState.RUNNING if status.exited_at is None else JobState.COMPLETING
    if status.exit_code == 0:
        return JobState.DONE
    return JobState.CANCELLED if stop is not None and not status.failed else JobState.FAILED


def _message(known: KnownRun) -> str:
    status = known.status
    if status is not None and status.expired:
        return "its time limit has ended it"
    if known.stop is not None:
        return known.stop.reason
    return f"not confined: {known.unconfined}" if known.unconfined else ""


def _time(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
