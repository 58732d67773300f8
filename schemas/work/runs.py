"""Runs: what the planner orders of the runner of a host, what that reports, and what the processes print.

A run is what runs of one attempt of a task on one host. Orders are levels, not edges: each answer to a report has all
runs that the host shall have, so that an order that was lost comes again, and one that comes twice changes nothing.
Orders are valid only with the token of the runner that they are for.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final

from msgspec import Meta, Struct

from ..requests import Grant, Identifier, OwnerName, ShortText, Time
from .jobs import JobState, SubmittedSpec, TaskPart

REPORT_SECONDS: Final = 5.0
"""Time between the reports of a runner that has nothing new to say."""
RUNNER_LOST_SECONDS: Final = 30.0
"""A runner that was not heard for so long gets no new work."""
RUNNER_LABEL: Final = "corral.runner"
"""Label of the hosts that have a runner: its value is `yes`."""

LOG_CHUNK_BYTES: Final = 64 * 1024
LOG_HEAD_CHUNKS: Final = 4
"""Chunks that are kept of the begin of a run's output."""
LOG_TAIL_CHUNKS: Final = 16
"""Chunks that are kept of its end, in turns: the next one takes the place of the oldest."""

RunId = Annotated[str, Meta(min_length=1, max_length=64)]
"""`<job>_<index>.<attempt>`, such as `1234_7.1`; the same on all hosts of a task."""


def run_id(job_id: str, index: int, attempt: int) -> str:
    """Id of a run."""
    return f"{job_id}_{index}.{attempt}"


class RunVerb(StrEnum):
    """Order to a runner about a run."""

    PREPARE = "prepare"
    """Check that it could start it: account, directory, image, executor. For tasks on several hosts, before `start`."""
    START = "start"
    """Start it, unless it has been started before."""
    STOP = "stop"
    """End it: signal, then SIGKILL after the grace."""


class Run(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A run that the host shall have.

    Attributes:
        run_id: id of the run.
        verb: what to do with it.
        owner: of job and lease.
        job_id: id of the job.
        index: of the task; null for a job without an array.
        attempt: from 1.
        lease_id: of the attempt; its devices on this host are `grants`.
        grants: the devices of the lease on this host.
        lease_environment: variables that select the devices, as in the lease.
        spec: the job; null where the runner has reported the run already. Its `array` and `after` are left out.
        hosts: names of all hosts of the task, in the order of their ranks.
        addresses: of these hosts, in the same order, where known; empty texts otherwise.
        rank: of this host.
        first_index: smallest index of the array.
        last_index: greatest index of the array.
        tasks: number of tasks of the array.
        ends_at: time at which the lease ends however often it is renewed; null for no limit.
        signal: for `stop` and for a notice: signal to send, once for each `notice`; 0 for SIGTERM.
        notice: number of a notice of preemption or of a signal of the owner's: a run gets each once; 0 for none.
        grace_seconds: for `stop`: time until SIGKILL.
        reason: of a stop or a notice.
    """

    run_id: RunId
    verb: RunVerb
    owner: OwnerName
    job_id: str
    index: int | None = None
    attempt: int = 1
    lease_id: Identifier
    grants: list[Grant] = []
    lease_environment: dict[str, str] = {}
    spec: SubmittedSpec | None = None
    hosts: list[str] = []
    addresses: list[str] = []
    rank: int = 0
    first_index: int = 0
    last_index: int = 0
    tasks: int = 1
    ends_at: Time | None = None
    signal: int = 0
    notice: int = 0
    grace_seconds: float = 30.0
    reason: str = ""


class RunOrders(Struct, frozen=True, kw_only=True, tag="run_orders", tag_field="type"):
    """Orders for the runner of one host.

    Attributes:
        planner: id of the planner.
        term: of the planner; a runner ignores orders of an earlier term than it has seen.
        token: that of the runner's last report. A runner ignores orders with another one, since a host can have an
            answer to a request of its own delivered to the subject of any other's orders.
        runs: runs with what to do.
        complete: true if these are all runs that the host shall have: any other one is stopped. False for orders
            between reports, which only add to the last complete ones.
        known: ids of final reports that are stored, and need not come again.
        warnings: fields of the report that this planner does not know and has ignored.
    """

    planner: str
    term: int
    token: str = ""
    runs: list[Run] = []
    complete: bool = False
    known: list[RunId] = []
    warnings: list[str] = []


class RunReport(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """State of a run on a host.

    Attributes:
        run_id: id of the run.
        lease_id: of the run.
        part: its state, with exit code, times and use. `lost` if the runner knows nothing of a run that it was ordered
            to start before, such as after its disk was replaced; `failed` with a message if it could not be started.
        prepared: true if it could be started.
        progress: 0 to 1, as the command says; null if it doesn't.
        host_fault: true if the host is why it failed, such as by a full disk, and no command of it was executed.
    """

    run_id: RunId
    lease_id: Identifier
    part: TaskPart
    prepared: bool = False
    progress: float | None = None
    host_fault: bool = False


class RunnerReport(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Report of a runner: all its runs, or those that have changed since its last complete report.

    Attributes:
        host: name of the host, as its collector gives it.
        runner: id of this start of the runner.
        token: secret of this start of the runner, 128 bits or more at random, which nothing else may show.
        boot_id: of the host's start: runs of an earlier one are over.
        version: of Corral.
        executors: what can confine jobs here, best first: `systemd`, `podman`, `docker`, `process`.
        unready: why it can't start jobs for now, such as a full disk; empty if it can. What runs goes on.
        runs: runs that have not been reported as ended, or whose report is not known to be stored.
        complete: true if these are all.
    """

    host: ShortText
    runner: ShortText
    token: ShortText = ""
    boot_id: ShortText = ""
    version: ShortText = ""
    executors: Annotated[list[ShortText], Meta(max_length=16)] = []
    unready: ShortText = ""
    runs: list[RunReport] = []
    complete: bool = True


class LogChunk(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="log_chunk", tag_field="type"):
    """A piece of what a run has printed. What lies between two pieces is in the file on the host alone.

    Attributes:
        run_id: id of the run.
        time: when it was read.
        offset: of its first byte in the output.
        data: bytes, at most `LOG_CHUNK_BYTES`; in JSON as base64 with padding.
        ended: true if nothing follows.
    """

    run_id: RunId
    time: Time
    offset: int
    data: bytes = b""
    ended: bool = False


__all__ = [
    "JobState",
    "LogChunk",
    "Run",
    "RunOrders",
    "RunReport",
    "RunVerb",
    "RunnerReport",
    "run_id",
]
