"""Permission matrix: every subject that can be published on or subscribed to, and the roles that may.

Anything else is refused.

The server's configuration, the table in docs/security.md and what `corral auth show` prints derive from it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from ...schemas import subjects as bus
from ...schemas.subjects import PlanSubject
from .roles import ASKING, EVERYBODY, ON_HOSTS, PEOPLE, SERVICES, Access, Account, Role, Verb

_LOOKING: Final = EVERYBODY - ON_HOSTS - {Role.GATEWAY}
"""Roles that may look for services and at the state of streams."""

_TELEMETRY: Final = (bus.SAMPLES, bus.PROCESSES, bus.AGENTS)
_FACTS: Final = (bus.INVENTORY, bus.EVENTS)
_STREAM_OF: Final = {
    bus.SAMPLES: bus.TELEMETRY_STREAM,
    bus.PROCESSES: bus.TELEMETRY_STREAM,
    bus.AGENTS: bus.TELEMETRY_STREAM,
    bus.INVENTORY: bus.INVENTORY_STREAM,
    bus.EVENTS: bus.FACTS_STREAM,
}
_PARTITIONS: Final = "CORRAL_PARTITIONS"
_OWNERS: Final = "corral_processors"
_READ_BY_PROCESSORS: Final = (
    bus.TELEMETRY_STREAM,
    bus.INVENTORY_STREAM,
    bus.FACTS_STREAM,
    bus.REQUESTS_STREAM,
    bus.JOBS_STREAM,
    _PARTITIONS,
)
_READ_BY_PLANNERS: Final = (
    bus.TELEMETRY_STREAM,
    bus.INVENTORY_STREAM,
    bus.FACTS_STREAM,
    f"KV_{bus.PLANNER_BUCKET}",
)
_READ_BY_NOTIFIERS: Final = (bus.FACTS_STREAM, bus.JOBS_STREAM, bus.REPORTS_STREAM, f"KV_{bus.NOTIFY_BUCKET}")
_STREAMS: Final = tuple(stream.name for stream in bus.STREAMS)
_KEPT: Final = (*_STREAMS, *(f"KV_{bucket.name}" for bucket in bus.BUCKETS))
_WAITS_SECONDS: Final = 25 * 3600.0
"""A request may wait in the queue for a day, and the answer gets an hour more."""
_QUERY_SECONDS: Final = 3600.0
_OWN_LOGS: Final = f"{bus.LOGS}.*.*.*.*.{{owner}}"
_ALL_LOGS: Final = f"{bus.LOGS}.*.*.*.*.>"
"""As an account imports the other: with two imports that overlap, a subscriber would get each message twice."""
_FLEET_WIDE: Final = (
    PlanSubject.LEASES,
    PlanSubject.DEVICES,
    PlanSubject.FLEET,
    PlanSubject.QUEUE,
    PlanSubject.JOBS,
    PlanSubject.GROUPS,
    PlanSubject.WINDOWS,
    PlanSubject.MOVES,
)
"""Subjects with the same answer for every user. A name at their end is allowed, and changes nothing."""


def _api(*endpoints: str) -> tuple[str, ...]:
    return tuple(f"$JS.API.{endpoint}" for endpoint in endpoints)


def _consuming(streams: Iterable[str]) -> tuple[str, ...]:
    """Subjects for reading streams by consumers.

    A user that may create a consumer may also have it deliver to any subject of the account.
    """
    return tuple(
        subject
        for stream in streams
        for subject in _api(
            f"CONSUMER.CREATE.{stream}",
            f"CONSUMER.CREATE.{stream}.>",
            f"CONSUMER.DURABLE.CREATE.{stream}.*",
            f"CONSUMER.INFO.{stream}.*",
            f"CONSUMER.DELETE.{stream}.*",
            f"CONSUMER.MSG.NEXT.{stream}.*",
        )
    )


def _may(
    verb: Verb,
    what: str,
    roles: Iterable[Role],
    *subjects: str,
    many: bool = False,
    answer_seconds: float = 120.0,
    follows_leases: bool = False,
    serves: bool = False,
    speaks_for_others: bool = False,
    within: bool = False,
    asked_of: tuple[Account, ...] = (Account.CORE,),
    renamed: bool = False,
) -> Access:
    return Access(
        verb=verb,
        subjects=subjects,
        roles=frozenset(roles),
        what=what,
        many=many,
        answer_seconds=answer_seconds,
        follows_leases=follows_leases,
        serves=serves,
        speaks_for_others=speaks_for_others,
        within=within,
        asked_of=asked_of,
        renamed=renamed,
    )


_PUB, _SUB = Verb.PUBLISH, Verb.SUBSCRIBE

MATRIX: Final[tuple[Access, ...]] = (
    # Telemetry
    _may(
        _PUB,
        "a host's telemetry",
        [Role.COLLECTOR],
        *(f"{prefix}.{{host}}" for prefix in (*_TELEMETRY, *_FACTS)),
    ),
    _may(_PUB, "claim of a host's collector", [Role.COLLECTOR], f"$KV.{bus.HOSTS_BUCKET}.{{host}}"),
    _may(
        _PUB,
        "stored messages of its own host",
        [Role.COLLECTOR],
        f"$JS.API.STREAM.INFO.KV_{bus.HOSTS_BUCKET}",
        f"$JS.API.DIRECT.GET.KV_{bus.HOSTS_BUCKET}.$KV.{bus.HOSTS_BUCKET}.{{host}}",
        *(f"$JS.API.DIRECT.GET.{stream}.{prefix}.{{host}}" for prefix, stream in _STREAM_OF.items()),
    ),
    _may(
        _PUB,
        "past leases (simulated GPUs)",
        [Role.COLLECTOR],
        f"$JS.API.DIRECT.GET.{bus.FACTS_STREAM}",
        many=True,
        follows_leases=True,
    ),
    _may(_SUB, "lease events, to join processes to leases", [Role.COLLECTOR], f"{bus.LEASE_EVENTS}.>"),
    _may(_PUB, "the leases on a host", [Role.COLLECTOR], PlanSubject.LEASES),
    _may(
        _SUB,
        "the fleet's telemetry, live",
        [Role.PLANNER, *PEOPLE],
        *(f"{prefix}.*" for prefix in (*_TELEMETRY, *_FACTS)),
        # What enters an account by a service is not visible to a stream import there: import it from its source.
        asked_of=(Account.HOSTS,),
    ),
    _may(_SUB, "lease events, live", PEOPLE, f"{bus.LEASE_EVENTS}.>"),
    _may(_PUB, "lease events", [Role.PLANNER], f"{bus.LEASE_EVENTS}.*.*"),
    _may(_PUB, "work requests with their outcomes", [Role.PLANNER], f"{bus.REQUEST_EVENTS}.*"),
    _may(_SUB, "work requests with their outcomes, live", [Role.OPERATOR], f"{bus.REQUEST_EVENTS}.*"),
    _may(_PUB, "durations of past leases", [Role.PLANNER], bus.DURATIONS),
    _may(_PUB, "scheduled reports, for the notifier", [Role.PROCESSOR], f"{bus.REPORTS}.*"),
    _may(_PUB, "messages that could not be stored", [Role.PROCESSOR], f"{bus.DEAD_LETTERS}.*"),
    _may(_SUB, "messages that could not be stored, live", [Role.OPERATOR], f"{bus.DEAD_LETTERS}.*"),
    # Jobs
    _may(_PUB, "reports of a host's runner", [Role.RUNNER], f"{PlanSubject.RUNNER}.{{host}}"),
    _may(_PUB, "what the jobs of a host print", [Role.RUNNER], f"{bus.LOGS}.{{host}}.>"),
    _may(_SUB, "orders for a host's runner", [Role.RUNNER], f"{bus.RUNS}.{{host}}"),
    _may(_PUB, "orders for runners", [Role.PLANNER], f"{bus.RUNS}.*"),
    _may(_PUB, "changes of jobs", [Role.PLANNER], f"{bus.JOB_EVENTS}.*"),
    _may(_SUB, "changes of jobs, live", PEOPLE, f"{bus.JOB_EVENTS}.*"),
    _may(
        _PUB,
        "jobs under its own name",
        ASKING,
        f"{PlanSubject.SUBMIT}.{{owner}}",
        f"{PlanSubject.JOB}.{{owner}}",
    ),
    _may(
        _PUB,
        "commands about anybody's jobs, under its own name",
        [Role.OPERATOR],
        f"{PlanSubject.JOB_OVERRIDE}.{{operator}}",
    ),
    _may(_SUB, "what its own jobs print, live", [Role.REQUESTER], _OWN_LOGS, asked_of=(Account.HOSTS,)),
    _may(_SUB, "what all jobs print, live", [Role.OPERATOR], _ALL_LOGS, asked_of=(Account.HOSTS,)),
    _may(
        _PUB,
        "what its own jobs have printed",
        [Role.REQUESTER],
        f"$JS.API.DIRECT.GET.{bus.LOGS_STREAM}.{_OWN_LOGS}",
    ),
    _may(_PUB, "what all jobs have printed", [Role.OPERATOR], f"$JS.API.DIRECT.GET.{bus.LOGS_STREAM}.{_ALL_LOGS}"),
    _may(
        _PUB,
        "sessions inside its own jobs",
        ASKING,
        f"{bus.ATTACH}.open.*.{{owner}}",
        f"{bus.ATTACH}.step.*.{{owner}}",
        asked_of=(Account.HOSTS,),
    ),
    _may(
        _PUB,
        "sessions inside anybody's jobs, under its own name",
        [Role.OPERATOR],
        f"{bus.ATTACH}.override.*.{{operator}}",
        f"{bus.ATTACH}.override_step.*.{{operator}}",
        asked_of=(Account.HOSTS,),
    ),
    _may(_SUB, "sessions inside the jobs of a host", [Role.RUNNER], f"{bus.ATTACH}.*.{{host}}.>", within=True),
    # Asking the planner
    _may(
        _PUB,
        "requests under its own name",
        ASKING,
        f"{PlanSubject.REQUEST}.{{owner}}",
        answer_seconds=_WAITS_SECONDS,
    ),
    _may(
        _PUB,
        "its own leases and requests",
        ASKING,
        f"{PlanSubject.RENEW}.{{owner}}",
        f"{PlanSubject.RELEASE}.{{owner}}",
        f"{PlanSubject.CHECKPOINT}.{{owner}}",
        f"{PlanSubject.RESIZE}.{{owner}}",
        f"{PlanSubject.WITHDRAW}.{{owner}}",
    ),
    _may(
        _PUB,
        "the fleet as the planner sees it",
        PEOPLE,
        f"{PlanSubject.EXPLAIN}.{{user}}",
        *(f"{subject}{rest}" for subject in _FLEET_WIDE for rest in ("", ".>")),
    ),
    _may(
        _PUB,
        "drains, booked windows, evictions, preemptions and changes of groups, under its own name",
        [Role.OPERATOR],
        f"{PlanSubject.DRAIN}.{{operator}}",
        f"{PlanSubject.BOOK}.{{operator}}",
        f"{PlanSubject.EVICT}.{{operator}}",
        f"{PlanSubject.PREEMPT}.{{operator}}",
        f"{PlanSubject.SET_GROUPS}.{{operator}}",
    ),
    _may(
        _PUB,
        "leases, devices, the queue and groups, for notifications",
        [Role.NOTIFIER],
        PlanSubject.LEASES,
        PlanSubject.DEVICES,
        PlanSubject.QUEUE,
        PlanSubject.GROUPS,
        PlanSubject.JOBS,
    ),
    _may(_SUB, "requests to the planner", [Role.PLANNER], f"{bus.PLAN}.>"),
    _may(_PUB, "requests forwarded to another planner", [Role.PLANNER], f"{bus.PLAN}.>"),
    # Asking the history
    _may(
        _PUB,
        "SQL over the history, under its own name",
        [Role.NOTIFIER, *PEOPLE],
        f"{bus.QUERY}.{{user}}",
        many=True,
        answer_seconds=_QUERY_SECONDS,
    ),
    _may(
        _PUB,
        "SQL and explanations for people who have logged in to it",
        PEOPLE,
        f"{bus.QUERY}.{{user}}.*",
        f"{PlanSubject.EXPLAIN}.{{user}}.*",
        many=True,
        answer_seconds=_QUERY_SECONDS,
        speaks_for_others=True,
    ),
    _may(
        _PUB,
        "canceling a query, by an id that only its user knows",
        [Role.NOTIFIER, *PEOPLE],
        bus.QUERY_CANCEL,
        f"{bus.QUERY_CANCEL}.>",
    ),
    _may(_PUB, "status of the history", [Role.PROCESSOR, *PEOPLE], bus.HISTORY_STATUS, f"{bus.HISTORY_STATUS}.>"),
    # Without a name in the subject the user is not known. The server maps these subjects to endpoints that change
    # nothing, and only answer which subject to use.
    _may(
        _PUB,
        "only errors, which name the subject with the user's name",
        PEOPLE,
        PlanSubject.REQUEST,
        PlanSubject.RENEW,
        PlanSubject.RELEASE,
        PlanSubject.CHECKPOINT,
        PlanSubject.RESIZE,
        PlanSubject.WITHDRAW,
        PlanSubject.EXPLAIN,
        PlanSubject.DRAIN,
        PlanSubject.BOOK,
        PlanSubject.EVICT,
        PlanSubject.PREEMPT,
        PlanSubject.SET_GROUPS,
        PlanSubject.SUBMIT,
        PlanSubject.JOB,
        PlanSubject.JOB_OVERRIDE,
        bus.QUERY,
        bus.SNAPSHOT,
        bus.SNAPSHOT_READ,
        bus.NOTIFY_RULES,
        bus.NOTIFY_OVERRIDE,
        renamed=True,
    ),
    # Never use a subject without a wildcard that only some users of an account may publish on: another user could
    # name it as reply subject, and the answer would be imported as a request of that account.
    _may(
        _PUB,
        "copies of the history",
        [Role.OPERATOR],
        f"{bus.SNAPSHOT}.{{user}}",
        f"{bus.SNAPSHOT_READ}.{{user}}",
        answer_seconds=_QUERY_SECONDS,
    ),
    _may(_SUB, "requests to the history", [Role.PROCESSOR], bus.QUERY, f"{bus.QUERY}.>", f"{bus.PREFIX}.history.>"),
    # Notifications
    _may(
        _PUB,
        "its own rules for notifications, with tests of them",
        ASKING,
        f"{bus.NOTIFY_RULES}.{{owner}}",
        answer_seconds=300.0,
    ),
    _may(
        _PUB,
        "anybody's rules for notifications, under its own name",
        [Role.OPERATOR],
        f"{bus.NOTIFY_OVERRIDE}.{{operator}}",
        answer_seconds=300.0,
    ),
    _may(_SUB, "commands to the notifier", [Role.NOTIFIER], f"{bus.NOTIFY}.>"),
    # Services
    _may(
        _PUB,
        "discovery of services",
        _LOOKING,
        "$SRV.PING",
        "$SRV.PING.>",
        "$SRV.INFO",
        "$SRV.INFO.>",
        "$SRV.STATS",
        "$SRV.STATS.>",
        many=True,
    ),
    _may(_SUB, "answering discovery", SERVICES, "$SRV.>"),
    _may(_SUB, "health checks", SERVICES, bus.HEALTH, f"{bus.HEALTH}.>"),
    _may(
        _SUB,
        "health checks of itself (a collector)",
        [Role.COLLECTOR],
        bus.HEALTH,
        f"{bus.HEALTH}.collector",
        f"{bus.HEALTH}.collector.{{host}}",
        within=True,
    ),
    _may(
        _SUB,
        "health checks of itself (a runner)",
        [Role.RUNNER],
        bus.HEALTH,
        f"{bus.HEALTH}.runner",
        f"{bus.HEALTH}.runner.{{host}}",
        within=True,
    ),
    _may(
        _SUB,
        "health checks of itself (a gateway)",
        [Role.GATEWAY],
        bus.HEALTH,
        f"{bus.HEALTH}.gateway",
        f"{bus.HEALTH}.gateway.>",
        within=True,
    ),
    _may(
        _SUB,
        "health checks of itself (an exporter, a dashboard, a login service)",
        [Role.VIEWER, Role.OPERATOR],
        bus.HEALTH,
        *(f"{bus.HEALTH}.{kind}{rest}" for kind in ("exporter", "dashboard", "login") for rest in ("", ".>")),
        serves=True,
        within=True,
    ),
    _may(
        _SUB,
        "health checks of itself (a notifier)",
        [Role.NOTIFIER],
        bus.HEALTH,
        f"{bus.HEALTH}.notifier",
        f"{bus.HEALTH}.notifier.>",
    ),
    _may(
        _PUB,
        "health of the services",
        [*SERVICES, Role.NOTIFIER, *PEOPLE],
        bus.HEALTH,
        f"{bus.HEALTH}.>",
        many=True,
        asked_of=(Account.CORE, Account.HOSTS),
    ),
    _may(_PUB, "its own health (a collector)", [Role.COLLECTOR], f"{bus.HEALTH}.collector.{{host}}", within=True),
    _may(_PUB, "its own health (a runner)", [Role.RUNNER], f"{bus.HEALTH}.runner.{{host}}", within=True),
    _may(_SUB, "answers to its own requests", EVERYBODY, "_INBOX.{user}.>", within=True),
    _may(_PUB, "answers to requests", [*SERVICES, Role.NOTIFIER], "_INBOX.*.>", "_R_.>", within=True),
    _may(_PUB, "answers to health checks and sessions", ON_HOSTS, "_INBOX.{user}.>", "_R_.>", within=True),
    _may(_PUB, "acknowledging parts of an answer", PEOPLE, "_R_.>", within=True),
    _may(_PUB, "acknowledging parts of an answer (a notifier)", [Role.NOTIFIER], f"{bus.QUERY_ACK}.>"),
    # JetStream
    _may(_PUB, "whether JetStream is enabled", EVERYBODY - {Role.GATEWAY}, "$JS.API.INFO"),
    _may(
        _PUB,
        "state of the streams",
        _LOOKING,
        *_api(*(f"STREAM.INFO.{name}" for name in _STREAMS)),
    ),
    _may(
        _PUB,
        "stored facts and reports",
        PEOPLE,
        f"$JS.API.DIRECT.GET.{bus.TELEMETRY_STREAM}.{bus.AGENTS}.*",
        f"$JS.API.DIRECT.GET.{bus.INVENTORY_STREAM}",
        f"$JS.API.DIRECT.GET.{bus.FACTS_STREAM}",
        many=True,
    ),
    _may(
        _PUB,
        "creating missing streams and buckets",
        SERVICES,
        *_api(*(f"STREAM.CREATE.{name}" for name in _KEPT)),
        *_api(*(f"STREAM.INFO.KV_{bucket.name}" for bucket in bus.BUCKETS)),
    ),
    _may(_PUB, "reading telemetry and facts", [Role.PROCESSOR], *_consuming(_READ_BY_PROCESSORS)),
    _may(
        _PUB,
        "acknowledging telemetry and facts",
        [Role.PROCESSOR],
        *(f"$JS.ACK.{stream}.>" for stream in _READ_BY_PROCESSORS),
    ),
    _may(
        _PUB,
        "sharing the work with other processors",
        [Role.PROCESSOR],
        f"$KV.{_OWNERS}.>",
        *_api(*(f"STREAM.{verb}.{name}" for name in (_PARTITIONS, f"KV_{_OWNERS}") for verb in ("INFO", "CREATE"))),
        f"$JS.API.STREAM.UPDATE.{_PARTITIONS}",
        *_api(*(f"STREAM.MSG.GET.{name}" for name in (bus.TELEMETRY_STREAM, _PARTITIONS, f"KV_{_OWNERS}"))),
        f"$JS.API.DIRECT.GET.KV_{_OWNERS}.>",
        *_consuming([f"KV_{_OWNERS}"]),
        f"$JS.FC.KV_{_OWNERS}.>",
    ),
    _may(
        _PUB,
        "the notifier's state, and reading it with lease events, changes of jobs and reports",
        [Role.NOTIFIER],
        f"$KV.{bus.NOTIFY_BUCKET}.>",
        *_api(*(f"STREAM.{verb}.KV_{bus.NOTIFY_BUCKET}" for verb in ("INFO", "CREATE", "MSG.GET"))),
        f"$JS.API.DIRECT.GET.KV_{bus.NOTIFY_BUCKET}.>",
        *_consuming(_READ_BY_NOTIFIERS),
    ),
    _may(_PUB, "the planner's state", [Role.PLANNER], f"$KV.{bus.PLANNER_BUCKET}.>"),
    _may(
        _PUB,
        "reading it, and telemetry and facts",
        [Role.PLANNER],
        f"$JS.API.STREAM.UPDATE.KV_{bus.PLANNER_BUCKET}",
        f"$JS.API.STREAM.PURGE.KV_{bus.PLANNER_BUCKET}",
        f"$JS.API.STREAM.UPDATE.{bus.FACTS_STREAM}",
        f"$JS.API.STREAM.MSG.GET.KV_{bus.PLANNER_BUCKET}",
        f"$JS.API.STREAM.MSG.GET.{bus.FACTS_STREAM}",
        f"$JS.API.STREAM.MSG.GET.{bus.JOBS_STREAM}",
        *_consuming(_READ_BY_PLANNERS),
    ),
    # Emergencies
    _may(_PUB, "anything in the account CORRAL", [Role.ADMIN], ">"),
    _may(_SUB, "anything in the account CORRAL", [Role.ADMIN], ">"),
)
"""Rows by topic, in the order of the documents."""
