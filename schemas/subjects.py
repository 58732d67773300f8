"""The bus: every subject, stream and bucket, named and bounded in one place, and how to reach it.

Subjects carry the version of the schema, the kind and the host, so that a server can tell by the subject alone who may
publish what. Streams are declared as data (`STREAMS`, `BUCKETS`) and made by `ensure_layout`, which any part may call
at any time: it creates what is missing and widens nothing that an operator has narrowed.
"""

from __future__ import annotations

import re
from typing import Final

from msgspec import Struct

PREFIX: Final = "corral.v1"

# Telemetry: collector → stream. The last token is the host.
SAMPLES: Final = f"{PREFIX}.samples"
PROCESSES: Final = f"{PREFIX}.processes"
AGENTS: Final = f"{PREFIX}.agents"
# Facts: rare, and kept longer.
INVENTORY: Final = f"{PREFIX}.inventory"
EVENTS: Final = f"{PREFIX}.events"
LEASE_EVENTS: Final = f"{PREFIX}.leases"
"""`corral.v1.leases.<kind>.<lease id>`, published by the planner."""
REQUEST_EVENTS: Final = f"{PREFIX}.requests"
"""`corral.v1.requests.<planner>`, published by the planner."""
JOB_EVENTS: Final = f"{PREFIX}.jobs"
"""`corral.v1.jobs.<job id>`, published by the planner."""
REPORTS: Final = f"{PREFIX}.reports"
"""`corral.v1.reports.<name>`: a scheduled report was written, published by processors."""
LOGS: Final = f"{PREFIX}.logs"
"""`corral.v1.logs.<host>.<job id>.<index>.<part>.<owner>`, published by runners; the owner may contain dots."""
RUNS: Final = f"{PREFIX}.runs"
"""`corral.v1.runs.<host>`: orders of the planner for the runner of a host."""
ATTACH: Final = f"{PREFIX}.attach"
"""Sessions inside jobs, answered by runners: `corral.v1.attach.open.<host>.<owner>` and `….step.<host>.<owner>`; for
operators `….override.<host>.<operator>` and `….override_step.<host>.<operator>`. A server that checks permissions
vouches for the owner, or that it is an operator. Both may contain dots."""
NOTIFY: Final = f"{PREFIX}.notify"
NOTIFY_RULES: Final = f"{NOTIFY}.rules"
"""Rules for notifications of one's own, answered by the notifier: also `corral.v1.notify.rules.<owner>`."""
NOTIFY_OVERRIDE: Final = f"{NOTIFY}.override"
"""Commands of operators about all rules for notifications: also `corral.v1.notify.override.<operator>`."""
DEAD_LETTERS: Final = f"{PREFIX}.dead"
"""`corral.v1.dead.<code>`, published by processors."""

# Services: request/reply. The planner is the micro service `corral-planner`, the processor `corral-history`.
PLAN: Final = f"{PREFIX}.plan"
QUERY: Final = f"{PREFIX}.query"
"""Also `corral.v1.query.<user>`: a server that checks permissions vouches for the user then. So for snapshots below."""
QUERY_CANCEL: Final = f"{PREFIX}.history.cancel"
SNAPSHOT: Final = f"{PREFIX}.history.snapshot"
SNAPSHOT_READ: Final = f"{PREFIX}.history.read"
HISTORY_STATUS: Final = f"{PREFIX}.history.status"
DURATIONS: Final = f"{PREFIX}.history.durations"
"""Digest of the durations of past leases, for the planner; see `schemas/values/durations.py`."""
QUERY_ACK: Final = f"{PREFIX}.history.ack"
"""`corral.v1.history.ack.<processor>.<query>`: clients acknowledge parts of an answer here (`QueryRequest.window`)."""
HEALTH: Final = f"{PREFIX}.health"
"""Health check of services: also `….<service>` and `….<service>.<instance>`; see `schemas/health.py`."""
PLANNER_SERVICE: Final = "corral-planner"
HISTORY_SERVICE: Final = "corral-history"


class PlanSubject:
    """Subjects of the planner.

    It answers `request`, `withdraw`, `renew`, `release`, `checkpoint`, `resize`, `submit` and `job` on
    `<subject>.<owner>`, too: a server that lets a client publish only under its own name vouches for the owner then,
    and a body that names another is refused.
    It answers `explain` on `<subject>.<user>`, too, and counts the requests of each user. It answers `drain`, `evict`,
    `preempt` and `set_groups` on `<subject>.<operator>`, too.
    """

    REQUEST: Final = f"{PLAN}.request"
    EXPLAIN: Final = f"{PLAN}.explain"
    WITHDRAW: Final = f"{PLAN}.withdraw"
    RENEW: Final = f"{PLAN}.renew"
    RELEASE: Final = f"{PLAN}.release"
    CHECKPOINT: Final = f"{PLAN}.checkpoint"
    RESIZE: Final = f"{PLAN}.resize"
    LEASES: Final = f"{PLAN}.leases"
    DEVICES: Final = f"{PLAN}.devices"
    FLEET: Final = f"{PLAN}.fleet"
    QUEUE: Final = f"{PLAN}.queue"
    DRAIN: Final = f"{PLAN}.drain"
    EVICT: Final = f"{PLAN}.evict"
    PREEMPT: Final = f"{PLAN}.preempt"
    GROUPS: Final = f"{PLAN}.groups"
    SET_GROUPS: Final = f"{PLAN}.set_groups"
    WINDOWS: Final = f"{PLAN}.windows"
    MOVES: Final = f"{PLAN}.moves"
    BOOK: Final = f"{PLAN}.book"
    SUBMIT: Final = f"{PLAN}.submit"
    JOBS: Final = f"{PLAN}.jobs"
    JOB: Final = f"{PLAN}.job"
    """Commands about a job of one's own: `<subject>.<owner>`."""
    JOB_OVERRIDE: Final = f"{PLAN}.job_override"
    """Commands of operators about any job: `<subject>.<operator>`."""
    RUNNER: Final = f"{PLAN}.runner"
    """Reports of runners, which are answered with orders: `<subject>.<host>`."""


def unnamed(subject: str) -> str:
    """Subject of a request that comes from another account, without the name that must end its subject.

    The server maps the request to this subject. The service answers there only with the name that is missing; a
    service of an earlier version does not listen there, and so gets no such request.
    """
    for service in (PLAN, NOTIFY):
        if subject.startswith(f"{service}."):
            return f"{service}.unnamed.{subject.removeprefix(service + '.')}"
    return f"{PREFIX}.history.unnamed.{subject.rpartition('.')[2]}"


TELEMETRY_STREAM: Final = "CORRAL_TELEMETRY"
INVENTORY_STREAM: Final = "CORRAL_INVENTORY"
FACTS_STREAM: Final = "CORRAL_FACTS"
REQUESTS_STREAM: Final = "CORRAL_REQUESTS"
JOBS_STREAM: Final = "CORRAL_JOBS"
LOGS_STREAM: Final = "CORRAL_LOGS"
REPORTS_STREAM: Final = "CORRAL_REPORTS"
DEAD_STREAM: Final = "CORRAL_DEAD"

PLANNER_BUCKET: Final = "corral_planner"
"""The planner's durable state: leader, leases, answers, drains, windows, groups.

One bucket, so that one revision can fence them all.
"""
HOSTS_BUCKET: Final = "corral_hosts"
"""The agent that speaks for each host; an entry expires unless its agent renews it."""
NOTIFY_BUCKET: Final = "corral_notify"
"""State of the notifier, which makes it: rules of owners, what waits to be sent, and what was sent lately."""

_GIB: Final = 2**30
_DAY: Final = 86400.0
DUPLICATES_SECONDS: Final = 120.0


class Stream(Struct, frozen=True, kw_only=True):
    """A stream with its limits: whichever is reached first drops the oldest messages.

    Attributes:
        name: name of the stream.
        subjects: subjects that it stores.
        max_age_seconds: older messages are dropped.
        max_bytes: size on disk, per replica.
        duplicate_window_seconds: a message id that comes again within it is stored once.
        max_message_bytes: larger messages are refused; -1 for no limit.
        max_messages_per_subject: older messages of the same subject are dropped; -1 keeps them.
        description: for people.
        optional: true if all parts go on without it, where the server's configuration is of an earlier version and
            does not permit it.
    """

    name: str
    subjects: tuple[str, ...]
    max_age_seconds: float
    max_bytes: int
    description: str
    duplicate_window_seconds: float = 120.0
    max_message_bytes: int = -1
    max_messages_per_subject: int = -1
    optional: bool = False


class Bucket(Struct, frozen=True, kw_only=True):
    """A key-value bucket with its limits.

    Attributes:
        name: name of the bucket.
        max_bytes: size on disk, per replica.
        description: for people.
        ttl_seconds: entries that are not written again expire after it; 0 keeps them.
        history: values kept per key.
        rollup: True if a write may purge other entries; the server allows that for any key of the bucket.
    """

    name: str
    max_bytes: int
    description: str
    ttl_seconds: float = 0.0
    history: int = 1
    rollup: bool = True


STREAMS: Final = (
    Stream(
        name=TELEMETRY_STREAM,
        subjects=(f"{SAMPLES}.*", f"{PROCESSES}.*", f"{AGENTS}.*"),
        max_age_seconds=_DAY,
        max_bytes=2 * _GIB,
        description="Samples, processes and agent reports on their way to the history",
    ),
    Stream(
        name=FACTS_STREAM,
        subjects=(f"{EVENTS}.*", f"{LEASE_EVENTS}.>"),
        max_age_seconds=30 * _DAY,
        max_bytes=_GIB // 2,
        description="Device events and lease events",
    ),
    Stream(
        name=REQUESTS_STREAM,
        subjects=(f"{REQUEST_EVENTS}.*",),
        max_age_seconds=30 * _DAY,
        max_bytes=_GIB // 4,
        description="Work requests with their outcomes",
        optional=True,
    ),
    Stream(
        name=JOBS_STREAM,
        subjects=(f"{JOB_EVENTS}.*",),
        max_age_seconds=30 * _DAY,
        max_bytes=_GIB // 4,
        description="Changes of jobs",
        optional=True,
    ),
    # Each piece has a subject of its own: begin and end of each output are kept, and the rest is replaced.
    Stream(
        name=LOGS_STREAM,
        subjects=(f"{LOGS}.>",),
        max_age_seconds=30 * _DAY,
        max_bytes=_GIB // 2,
        max_messages_per_subject=1,
        description="Begin and end of what jobs print",
        optional=True,
    ),
    Stream(
        name=REPORTS_STREAM,
        subjects=(f"{REPORTS}.*",),
        max_age_seconds=7 * _DAY,
        max_bytes=_GIB // 16,
        description="Scheduled reports that were written, on their way to people",
        optional=True,
    ),
    # Each host publishes its inventory every minute: only the last few are of use.
    Stream(
        name=INVENTORY_STREAM,
        subjects=(f"{INVENTORY}.*",),
        max_age_seconds=30 * _DAY,
        max_bytes=_GIB // 4,
        max_messages_per_subject=8,
        description="What each host has",
    ),
    Stream(
        name=DEAD_STREAM,
        subjects=(f"{DEAD_LETTERS}.*",),
        max_age_seconds=7 * _DAY,
        max_bytes=_GIB // 8,
        description="Messages that could not be stored, with the reason",
    ),
)

BUCKETS: Final = (
    Bucket(
        name=PLANNER_BUCKET,
        max_bytes=_GIB // 2,
        description="Leader, leases, answers and drains of the planner",
    ),
    # Each host writes its own entry, and shall not purge another's.
    Bucket(
        name=HOSTS_BUCKET,
        max_bytes=_GIB // 64,
        ttl_seconds=15.0,
        description="Which agent speaks for a host",
        rollup=False,
    ),
)

_HOST_UNSAFE: Final = re.compile(r"[^A-Za-z0-9_-]+")


def person_token(name: str) -> str:
    """Encode a person's name as one token of a subject; different names give different tokens."""
    return re.sub(r"[^A-Za-z0-9_-]", lambda found: "".join(f"={byte:02x}" for byte in found[0].encode()), name) or "="


def host_token(name: str) -> str:
    """Convert a host name to a subject token: dots, wildcards, spaces and the like become `-`.

    Raises:
        ValueError: nothing is left of it.
    """
    token = _HOST_UNSAFE.sub("-", name.strip()).strip("-")[:128].rstrip("-")
    if not token:
        raise ValueError(f"{name!r} is no host name: it needs at least one letter or digit")
    return token


def samples_subject(host: str) -> str:
    """Subject of a host's samples."""
    return f"{SAMPLES}.{host}"


def processes_subject(host: str) -> str:
    """Subject of a host's processes."""
    return f"{PROCESSES}.{host}"


def agent_subject(host: str) -> str:
    """Subject of a collector's reports on itself."""
    return f"{AGENTS}.{host}"


def inventory_subject(host: str) -> str:
    """Subject of a host's inventory."""
    return f"{INVENTORY}.{host}"


def events_subject(host: str) -> str:
    """Subject of a host's events."""
    return f"{EVENTS}.{host}"


def request_events_subject(planner: str) -> str:
    """Subject of the events of work requests."""
    return f"{REQUEST_EVENTS}.{planner}"


def job_events_subject(job_id: str) -> str:
    """Subject of the events of a job."""
    return f"{JOB_EVENTS}.{job_id}"


def report_subject(name: str) -> str:
    """Subject of the event that a scheduled report was written."""
    return f"{REPORTS}.{name}"


def runs_subject(host: str) -> str:
    """Subject of the orders for the runner of a host."""
    return f"{RUNS}.{host}"


def runner_subject(host: str) -> str:
    """Subject of the reports of the runner of a host."""
    return f"{PlanSubject.RUNNER}.{host}"


def log_subject(host: str, job_id: str, index: int, part: str, owner: str, attempt: int = 1) -> str:
    """Subject of a piece of a run's output.

    Args:
        host: of the run.
        job_id: of the job.
        index: of the task; 0 without an array.
        part: `h0` and so on for the pieces of the begin, `t0` and so on for those of the end; `*` for any.
        owner: of the job.
        attempt: of the task: those after the first have its number before the part, as in `2-h0`.
    """
    return f"{LOGS}.{host}.{job_id}.{index}.{part if attempt <= 1 else f'{attempt}-{part}'}.{owner}"


def attach_subject(host: str, name: str, *, step: bool, override: bool) -> str:
    """Subject of a session inside a job.

    Args:
        host: of the job.
        name: of the job's owner; with `override`, of the operator.
        step: of an open session.
        override: by an operator.
    """
    verb = ("override_step" if step else "override") if override else ("step" if step else "open")
    return f"{ATTACH}.{verb}.{host}.{name}"


def lease_subject(kind: str, lease_id: str) -> str:
    """Subject of a lease event."""
    return f"{LEASE_EVENTS}.{kind}.{lease_id}"
