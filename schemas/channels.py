"""Table of the bus: each subject with its messages. The AsyncAPI document and the message reference derive from it."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from . import codec, health, operations, query, request_events, requests, subjects, telemetry
from .values import durations
from .work import attach, groups, jobs, moves, notifications, reports, runs, windows

Message = type[Struct]


class Channel(Struct, frozen=True, kw_only=True):
    """A subject with the messages on it.

    Attributes:
        name: name of the channel in documents.
        subject: with `{parameters}` for tokens that vary.
        parameters: each with its meaning.
        publisher: the part that publishes the message or sends the request.
        subscriber: the part that subscribes, or answers.
        message: type of the event or request; None for an empty body.
        replies: types that may come back; empty for events.
        content_types: the default first.
        summary: one sentence.
        stream: the stream that keeps it; empty for request/reply.
        said_by_subject: message field whose value the subject carries, so that the body may leave it out.
        name_optional: True if a client may append a name to the subject; it changes nothing.
    """

    name: str
    subject: str
    publisher: str
    subscriber: str
    message: Message | None
    summary: str
    parameters: dict[str, str] = {}
    replies: tuple[Message, ...] = ()
    content_types: tuple[str, ...] = (codec.MSGPACK,)
    stream: str = ""
    said_by_subject: str = ""
    name_optional: bool = False


_HOST: Final = {"host": "name of the host, letters, digits, `-` and `_`"}
_JOB: Final = "id of the job, a decimal number"
_JSON_FIRST: Final = (codec.JSON, codec.MSGPACK)


def _telemetry(name: str, prefix: str, message: Message, stream: str, summary: str) -> Channel:
    return Channel(
        name=name,
        subject=f"{prefix}.{{host}}",
        parameters=_HOST,
        publisher="collector",
        subscriber="processor, planner",
        message=message,
        summary=summary,
        stream=stream,
    )


_NAMES: Final = {
    "owner": "owner of the request, as in the credentials (`CORRAL_OWNER`); it may contain dots",
    "user": "user of the credentials, as in the inbox (`CORRAL_INBOX_PREFIX` without `_INBOX.`)",
    "operator": "user of the credentials, recorded as the operator who gave the command",
}


def _plan(
    name: str,
    subject: str,
    message: Message | None,
    replies: tuple[Message, ...],
    summary: str,
    who: str = "",
    said: str | None = None,
) -> Channel:
    return Channel(
        name=name,
        subject=f"{subject}.{{{who}}}" if who else subject,
        parameters={who: _NAMES[who]} if who else {},
        said_by_subject=said if said is not None else "" if who == "user" else who,
        name_optional=not who,
        publisher="client",
        subscriber="planner",
        message=message,
        replies=(*replies, requests.Error),
        content_types=_JSON_FIRST,
        summary=summary,
    )


def _attach(name: str, verb: str, message: Message, reply: Message, summary: str, who: str) -> Channel:
    return Channel(
        name=name,
        subject=f"{subjects.ATTACH}.{verb}.{{host}}.{{{who}}}",
        parameters={**_HOST, who: _NAMES[who]},
        publisher="client",
        subscriber="runner",
        message=message,
        replies=(reply, requests.Error),
        content_types=(codec.MSGPACK, codec.JSON),
        summary=summary,
    )


_HEALTH: Final = {
    "service": "`planner`, `processor`, `collector`, `runner`, `exporter`, `dashboard`, `gateway`, `login` or "
    "`notifier`",
    "instance": "id of the instance, as its health reply gives it",
}


def _health(name: str, summary: str, *tokens: str) -> Channel:
    return Channel(
        name=name,
        subject=".".join([subjects.HEALTH, *(f"{{{token}}}" for token in tokens)]),
        parameters={token: _HEALTH[token] for token in tokens},
        publisher="client",
        subscriber="planner, processor, collector, runner, exporter, dashboard, gateway, login, notifier",
        message=None,
        replies=(health.ServiceHealth,),
        content_types=_JSON_FIRST,
        summary=summary,
    )


CHANNELS: Final[tuple[Channel, ...]] = (
    _telemetry(
        "samples",
        subjects.SAMPLES,
        telemetry.SampleBatch,
        subjects.TELEMETRY_STREAM,
        "Samples of a host's devices over one or more ticks.",
    ),
    _telemetry(
        "processes",
        subjects.PROCESSES,
        telemetry.ProcessBatch,
        subjects.TELEMETRY_STREAM,
        "Processes on a host's devices.",
    ),
    _telemetry("agents", subjects.AGENTS, telemetry.AgentReport, subjects.TELEMETRY_STREAM, "Report on a collector."),
    _telemetry(
        "inventory",
        subjects.INVENTORY,
        telemetry.Inventory,
        subjects.INVENTORY_STREAM,
        "Inventory of a host: its devices and their links.",
    ),
    _telemetry(
        "events",
        subjects.EVENTS,
        telemetry.DeviceEvent,
        subjects.FACTS_STREAM,
        "Event on a host, such as an Xid.",
    ),
    Channel(
        name="lease_events",
        subject=f"{subjects.LEASE_EVENTS}.{{kind}}.{{lease}}",
        parameters={"kind": "kind of the event: granted, renewed, expiring, …", "lease": "id of the lease"},
        publisher="planner",
        subscriber="processor, collector, client, notifier",
        message=requests.LeaseEvent,
        summary="Change of a lease.",
        content_types=(codec.JSON,),
        stream=subjects.FACTS_STREAM,
    ),
    Channel(
        name="request_events",
        subject=f"{subjects.REQUEST_EVENTS}.{{planner}}",
        parameters={"planner": "id of the planner"},
        publisher="planner",
        subscriber="processor",
        message=request_events.RequestEvents,
        summary="Work requests that wait, final answers to work requests, and drains.",
        content_types=(codec.JSON,),
        stream=subjects.REQUESTS_STREAM,
    ),
    Channel(
        name="job_events",
        subject=f"{subjects.JOB_EVENTS}.{{job}}",
        parameters={"job": _JOB},
        publisher="planner",
        subscriber="processor, client, notifier",
        message=jobs.JobEvent,
        summary="Change of a job, with its tasks that have changed.",
        content_types=(codec.JSON,),
        stream=subjects.JOBS_STREAM,
    ),
    Channel(
        name="reports",
        subject=f"{subjects.REPORTS}.{{name}}",
        parameters={"name": "name of the report in its schedule"},
        publisher="processor",
        subscriber="notifier",
        message=reports.ReportWritten,
        summary="A scheduled report was written.",
        content_types=(codec.JSON,),
        stream=subjects.REPORTS_STREAM,
    ),
    Channel(
        name="runs",
        subject=f"{subjects.RUNS}.{{host}}",
        parameters=_HOST,
        publisher="planner",
        subscriber="runner",
        message=runs.RunOrders,
        summary="Orders for the runner of a host, between those that answer its reports.",
    ),
    Channel(
        name="runner",
        subject=f"{subjects.PlanSubject.RUNNER}.{{host}}",
        parameters=_HOST,
        publisher="runner",
        subscriber="planner",
        message=runs.RunnerReport,
        replies=(runs.RunOrders, requests.Error),
        content_types=(codec.MSGPACK, codec.JSON),
        summary="Report of a host's runner; the reply has all runs that the host shall have.",
    ),
    Channel(
        name="logs",
        subject=f"{subjects.LOGS}.{{host}}.{{job}}.{{index}}.{{part}}.{{owner}}",
        parameters={
            **_HOST,
            "job": _JOB,
            "index": "index of the task; 0 for a job without an array",
            "part": "`h0` to `h3` for the pieces of the begin, `t0` to `t15` for those of the end, in turns",
            "owner": _NAMES["owner"],
        },
        publisher="runner",
        subscriber="client",
        message=runs.LogChunk,
        summary="Piece of what a run prints.",
        stream=subjects.LOGS_STREAM,
    ),
    _attach(
        "attach", "open", attach.AttachOpen, attach.AttachOpened, "Start a command inside a job of one's own.", "owner"
    ),
    _attach("attach_step", "step", attach.AttachStep, attach.AttachNews, "Input and output of that command.", "owner"),
    _attach(
        "attach_override",
        "override",
        attach.AttachOpen,
        attach.AttachOpened,
        "Start a command inside a job of anybody.",
        "operator",
    ),
    _attach(
        "attach_override_step",
        "override_step",
        attach.AttachStep,
        attach.AttachNews,
        "Input and output of that command.",
        "operator",
    ),
    Channel(
        name="dead_letters",
        subject=f"{subjects.DEAD_LETTERS}.{{code}}",
        parameters={"code": "reason: undecodable, invalid, out_of_range, future, …"},
        publisher="processor",
        subscriber="operator",
        message=telemetry.DeadLetter,
        summary="Message that could not be stored.",
        stream=subjects.DEAD_STREAM,
    ),
    _plan(
        "request",
        subjects.PlanSubject.REQUEST,
        requests.WorkRequest,
        (requests.Assignment, requests.Rejection),
        "Request devices.",
        "owner",
    ),
    _plan(
        "explain",
        subjects.PlanSubject.EXPLAIN,
        operations.ExplainRequest,
        (operations.Explanation,),
        "Explain the decision on a request, without granting it.",
        "user",
    ),
    _plan(
        "withdraw",
        subjects.PlanSubject.WITHDRAW,
        requests.WithdrawAction,
        (requests.Rejection, requests.Assignment),
        "Withdraw a queued request.",
        "owner",
    ),
    _plan(
        "renew",
        subjects.PlanSubject.RENEW,
        requests.LeaseAction,
        (requests.Lease,),
        "Renew a lease.",
        "owner",
    ),
    _plan(
        "release",
        subjects.PlanSubject.RELEASE,
        requests.LeaseAction,
        (requests.Lease,),
        "Release a lease.",
        "owner",
    ),
    _plan(
        "checkpoint",
        subjects.PlanSubject.CHECKPOINT,
        requests.CheckpointAction,
        (requests.Lease,),
        "Say that the work of a lease is saved, or answer the notice of a preemption.",
        "owner",
    ),
    _plan(
        "resize",
        subjects.PlanSubject.RESIZE,
        requests.ResizeAction,
        (requests.Lease,),
        "Answer the notice that an elastic lease may have more devices or shall give some back.",
        "owner",
    ),
    _plan("submit", subjects.PlanSubject.SUBMIT, jobs.JobSpec, (jobs.Job,), "Queue a job.", "owner", said=""),
    _plan(
        "job",
        subjects.PlanSubject.JOB,
        jobs.JobAction,
        (jobs.JobDetails,),
        "Cancel, hold, release, resubmit or show a job of one's own.",
        "owner",
    ),
    _plan(
        "job_override",
        subjects.PlanSubject.JOB_OVERRIDE,
        jobs.OverrideAction,
        (jobs.JobDetails,),
        "Cancel, hold, release, resubmit or show a job of anybody.",
        "operator",
    ),
    _plan("jobs", subjects.PlanSubject.JOBS, jobs.JobFilter, (jobs.Jobs,), "List jobs, with their tasks if asked."),
    _plan("leases", subjects.PlanSubject.LEASES, operations.LeaseFilter, (operations.Leases,), "List leases."),
    _plan("devices", subjects.PlanSubject.DEVICES, operations.DeviceFilter, (operations.Devices,), "List devices."),
    _plan(
        "fleet",
        subjects.PlanSubject.FLEET,
        operations.DeviceFilter,
        (operations.FleetSummary,),
        "Totals over the fleet.",
    ),
    _plan("queue", subjects.PlanSubject.QUEUE, operations.QueueFilter, (operations.Queue,), "List queued requests."),
    _plan(
        "drain",
        subjects.PlanSubject.DRAIN,
        operations.DrainAction,
        (operations.Drains,),
        "Drain devices: they take no new work.",
        "operator",
    ),
    _plan("windows", subjects.PlanSubject.WINDOWS, windows.WindowFilter, (windows.Windows,), "List booked windows."),
    _plan(
        "moves",
        subjects.PlanSubject.MOVES,
        moves.MovesQuery,
        (moves.Moves,),
        "Plan the fewest leases to preempt so that hosts become free, or a waiting request can start.",
    ),
    _plan(
        "book",
        subjects.PlanSubject.BOOK,
        windows.WindowAction,
        (windows.Windows, requests.Rejection),
        "Book devices, or maintenance, for a time; or cancel that.",
        "operator",
    ),
    _plan("evict", subjects.PlanSubject.EVICT, operations.EvictAction, (requests.Lease,), "Evict a lease.", "operator"),
    _plan(
        "preempt",
        subjects.PlanSubject.PREEMPT,
        operations.PreemptAction,
        (requests.Lease,),
        "Preempt a lease that is preemptible.",
        "operator",
    ),
    _plan("groups", subjects.PlanSubject.GROUPS, groups.GroupFilter, (groups.Groups,), "List groups with their state."),
    _plan(
        "set_groups",
        subjects.PlanSubject.SET_GROUPS,
        groups.GroupChange,
        (groups.Groups,),
        "Change the groups: their quotas, weights and members.",
        "operator",
    ),
    Channel(
        name="notify_rules",
        subject=f"{subjects.NOTIFY_RULES}.{{owner}}",
        parameters={"owner": _NAMES["owner"]},
        said_by_subject="owner",
        publisher="client",
        subscriber="notifier",
        message=notifications.NotifyAction,
        replies=(notifications.Notifications, requests.Error),
        content_types=_JSON_FIRST,
        summary="List, change or test the rules for notifications of an owner.",
    ),
    Channel(
        name="notify_override",
        subject=f"{subjects.NOTIFY_OVERRIDE}.{{operator}}",
        parameters={"operator": _NAMES["operator"]},
        said_by_subject="operator",
        publisher="client",
        subscriber="notifier",
        message=notifications.NotifyOverride,
        replies=(notifications.Notifications, requests.Error),
        content_types=_JSON_FIRST,
        summary="List, change or test the rules for notifications of anybody.",
    ),
    Channel(
        name="query",
        subject=f"{subjects.QUERY}.{{user}}",
        parameters={"user": _NAMES["user"]},
        publisher="client",
        subscriber="processor",
        message=query.QueryRequest,
        replies=(query.QueryResult, requests.Error),
        content_types=_JSON_FIRST,
        summary="Query the history in SQL; a result that does not fit in one message comes in parts.",
    ),
    Channel(
        name="query_cancel",
        subject=subjects.QUERY_CANCEL,
        name_optional=True,
        publisher="client",
        subscriber="processor",
        message=query.CancelRequest,
        replies=(query.Cancelled, requests.Error),
        content_types=_JSON_FIRST,
        summary="Cancel a query.",
    ),
    Channel(
        name="snapshot",
        subject=f"{subjects.SNAPSHOT}.{{user}}",
        parameters={"user": _NAMES["user"]},
        publisher="client",
        subscriber="processor",
        message=query.SnapshotRequest,
        replies=(query.Snapshot, requests.Error),
        content_types=_JSON_FIRST,
        summary="Make a consistent snapshot of the history, to be read in pieces.",
    ),
    Channel(
        name="snapshot_read",
        subject=f"{subjects.SNAPSHOT_READ}.{{user}}",
        parameters={"user": _NAMES["user"]},
        publisher="client",
        subscriber="processor",
        message=query.SnapshotRead,
        replies=(requests.Error,),
        content_types=_JSON_FIRST,
        summary="Read a piece of a snapshot; the reply is its bytes (`application/octet-stream`), or an error.",
    ),
    Channel(
        name="history_status",
        subject=subjects.HISTORY_STATUS,
        name_optional=True,
        publisher="client",
        subscriber="processor",
        message=None,
        replies=(query.ProcessorStatus,),
        content_types=_JSON_FIRST,
        summary="State of the history: how recent it is, and how much it holds.",
    ),
    Channel(
        name="durations",
        subject=subjects.DURATIONS,
        publisher="planner",
        subscriber="processor",
        message=durations.DurationsRequest,
        replies=(durations.DurationDigest, requests.Error),
        content_types=_JSON_FIRST,
        summary="Durations of past leases, by owner, workload and shape.",
    ),
    _health("health", "Health of all services; each replies."),
    _health("health_of_kind", "Health of the services of a kind; each replies.", "service"),
    _health("health_of_one", "Health of one service.", "service", "instance"),
)
