"""Which message goes where: the bus as a table, from which the AsyncAPI document and the message reference derive."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from . import bus, codec, health, operations, query, requests, telemetry

Message = type[Struct]


class Channel(Struct, frozen=True, kw_only=True):
    """A subject with what travels on it.

    Attributes:
        name: of the channel in documents.
        subject: with `{parameters}` for tokens that vary.
        parameters: each with its meaning.
        publisher: the part that publishes, or asks.
        subscriber: the part that listens, or answers.
        message: what is published or asked; None for an empty body.
        replies: what may come back; empty for events.
        content_types: the default first.
        summary: one sentence.
        stream: the stream that keeps it; empty for request/reply.
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


_HOST: Final = {"host": "name of the host, letters, digits, `-` and `_`"}
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


def _plan(name: str, subject: str, message: Message | None, replies: tuple[Message, ...], summary: str) -> Channel:
    return Channel(
        name=name,
        subject=subject,
        publisher="client",
        subscriber="planner",
        message=message,
        replies=(*replies, requests.Error),
        content_types=_JSON_FIRST,
        summary=summary,
    )


CHANNELS: Final[tuple[Channel, ...]] = (
    _telemetry(
        "samples", bus.SAMPLES, telemetry.SampleBatch, bus.TELEMETRY_STREAM, "A host's devices over one or more ticks."
    ),
    _telemetry(
        "processes", bus.PROCESSES, telemetry.ProcessBatch, bus.TELEMETRY_STREAM, "The processes on a host's devices."
    ),
    _telemetry("agents", bus.AGENTS, telemetry.AgentReport, bus.TELEMETRY_STREAM, "A collector on itself."),
    _telemetry(
        "inventory", bus.INVENTORY, telemetry.Inventory, bus.INVENTORY_STREAM, "A host, its devices, their links."
    ),
    _telemetry("events", bus.EVENTS, telemetry.DeviceEvent, bus.FACTS_STREAM, "Something happened on a host."),
    Channel(
        name="lease_events",
        subject=f"{bus.LEASE_EVENTS}.{{kind}}.{{lease}}",
        parameters={"kind": "what happened: granted, renewed, expiring, …", "lease": "id of the lease"},
        publisher="planner",
        subscriber="processor, collector, client",
        message=requests.LeaseEvent,
        summary="A lease changed.",
        content_types=(codec.JSON,),
        stream=bus.FACTS_STREAM,
    ),
    Channel(
        name="dead_letters",
        subject=f"{bus.DEAD_LETTERS}.{{code}}",
        parameters={"code": "why: undecodable, invalid, out_of_range, future, …"},
        publisher="processor",
        subscriber="operator",
        message=telemetry.DeadLetter,
        summary="A message that could not be stored.",
        stream=bus.DEAD_STREAM,
    ),
    _plan(
        "request",
        bus.PlanSubject.REQUEST,
        requests.WorkRequest,
        (requests.Assignment, requests.Rejection),
        "Ask for devices. Also on `corral.v1.plan.request.{owner}`.",
    ),
    _plan(
        "explain",
        bus.PlanSubject.EXPLAIN,
        operations.ExplainRequest,
        (operations.Explanation,),
        "What would become of a request, without granting it. Also on `corral.v1.plan.explain.{user}`.",
    ),
    _plan(
        "withdraw",
        bus.PlanSubject.WITHDRAW,
        requests.WithdrawAction,
        (requests.Rejection, requests.Assignment),
        "Take a request back that waits. Also on `corral.v1.plan.withdraw.{owner}`.",
    ),
    _plan(
        "renew",
        bus.PlanSubject.RENEW,
        requests.LeaseAction,
        (requests.Lease,),
        "Keep a lease. Also on `corral.v1.plan.renew.{owner}`.",
    ),
    _plan(
        "release",
        bus.PlanSubject.RELEASE,
        requests.LeaseAction,
        (requests.Lease,),
        "Give a lease back. Also on `corral.v1.plan.release.{owner}`.",
    ),
    _plan("leases", bus.PlanSubject.LEASES, operations.LeaseFilter, (operations.Leases,), "List leases."),
    _plan("devices", bus.PlanSubject.DEVICES, operations.DeviceFilter, (operations.Devices,), "List devices."),
    _plan(
        "fleet", bus.PlanSubject.FLEET, operations.DeviceFilter, (operations.FleetSummary,), "Aggregates of the fleet."
    ),
    _plan("queue", bus.PlanSubject.QUEUE, operations.QueueFilter, (operations.Queue,), "Who waits."),
    _plan("drain", bus.PlanSubject.DRAIN, operations.DrainAction, (operations.Drains,), "Keep new work off devices."),
    _plan("evict", bus.PlanSubject.EVICT, operations.EvictAction, (requests.Lease,), "Take a lease back."),
    Channel(
        name="query",
        subject=bus.QUERY,
        publisher="client",
        subscriber="processor",
        message=query.QueryRequest,
        replies=(requests.Error,),
        content_types=(codec.JSON,),
        summary="SQL over the history; the rows come in parts as `schemas/query.py` says. Also on "
        "`corral.v1.query.{user}`.",
    ),
    Channel(
        name="query_cancel",
        subject=bus.QUERY_CANCEL,
        publisher="client",
        subscriber="processor",
        message=query.CancelRequest,
        replies=(query.Cancelled, requests.Error),
        content_types=(codec.JSON,),
        summary="Cancel a query.",
    ),
    Channel(
        name="snapshot",
        subject=bus.SNAPSHOT,
        publisher="client",
        subscriber="processor",
        message=query.SnapshotRequest,
        replies=(query.Snapshot, requests.Error),
        content_types=(codec.JSON,),
        summary="Make a consistent copy of the history, to be read in pieces. Also on "
        "`corral.v1.history.snapshot.{user}`.",
    ),
    Channel(
        name="snapshot_read",
        subject=bus.SNAPSHOT_READ,
        publisher="client",
        subscriber="processor",
        message=query.SnapshotRead,
        content_types=(codec.JSON,),
        summary="Read a piece of a copy; the answer is its bytes. Also on `corral.v1.history.read.{user}`.",
    ),
    Channel(
        name="history_status",
        subject=bus.HISTORY_STATUS,
        publisher="client",
        subscriber="processor",
        message=None,
        replies=(query.ProcessorStatus,),
        content_types=(codec.JSON,),
        summary="How far the history is.",
    ),
    Channel(
        name="health",
        subject=bus.HEALTH,
        publisher="client",
        subscriber="planner, processor, collector, exporter, dashboard",
        message=None,
        replies=(health.ServiceHealth,),
        content_types=(codec.JSON,),
        summary="How services are: each answers. Also on `corral.v1.health.{service}` and "
        "`corral.v1.health.{service}.{instance}`.",
    ),
)
