"""Metrics that services report about themselves. Health replies, series and the reference derive from one table.

A service answers `corral.v1.health.…` with the values of its instruments (see `health.py`), and `corral export` shows
them to Prometheus as `corral_<service>_<name>`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from enum import StrEnum
from typing import Final

from msgspec import Struct


class ServiceKind(StrEnum):
    """The services of a cluster."""

    COLLECTOR = "collector"
    RUNNER = "runner"
    PROCESSOR = "processor"
    PLANNER = "planner"
    EXPORTER = "exporter"
    DASHBOARD = "dashboard"
    NOTIFIER = "notifier"
    LOGIN = "login"
    GATEWAY = "gateway"


class InstrumentKind(StrEnum):
    """Kind of an instrument: a current level, a count since the service's start, or a distribution of values."""

    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"


class Instrument(Struct, frozen=True, kw_only=True):
    """One gauge, counter or histogram of a service.

    Attributes:
        name: name, with the unit at the end.
        kind: see `InstrumentKind`.
        help: one sentence.
        labels: names of the labels of its values, in the order in which a service gives them.
        bounds: bucket bounds of a histogram, ascending; a value at a bound counts below it.
    """

    name: str
    kind: InstrumentKind
    help: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()


class Histogram:
    """Counts observed values by size, in buckets.

    Args:
        bounds: ascending; a value counts at the first bound that it does not exceed, or beyond the last.

    Attributes:
        counts: one for each bound, and one for what is beyond.
        total: sum of all values.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Bucket bounds for waiting times."""
FAST_SECONDS: Final = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5)
SIZES: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)
ROWS: Final = (10.0, 100.0, 1e3, 1e4, 3e4, 1e5, 3e5, 1e6, 3e6)


def _gauge(name: str, help: str, *labels: str) -> Instrument:
    return Instrument(name=name, kind=InstrumentKind.GAUGE, help=help, labels=labels)


def _counter(name: str, help: str, *labels: str) -> Instrument:
    return Instrument(name=name, kind=InstrumentKind.COUNTER, help=help, labels=labels)


def _histogram(name: str, help: str, bounds: tuple[float, ...], *labels: str) -> Instrument:
    return Instrument(name=name, kind=InstrumentKind.HISTOGRAM, help=help, labels=labels, bounds=bounds)


COMMON: Final = (
    _gauge("start_timestamp_seconds", "Start of the service, seconds since the epoch."),
    _counter("cpu_seconds", "User and system time of the process."),
    _gauge("resident_bytes", "Resident memory of the process."),
)
"""Instruments that every service has."""

_PLANNER: Final = (
    _gauge("leading", "1 while this planner leads."),
    _gauge("term", "Current term of leadership, a revision that only grows; 0 while this planner is a standby."),
    _counter("requests", "Work requests by their first outcome.", "outcome"),
    _histogram(
        "grant_seconds",
        "Time from a request's arrival to its durable assignment, without queueing.",
        SECONDS,
    ),
    _histogram("decision_seconds", "Time to decide on one request.", FAST_SECONDS),
    _histogram("loop_lag_seconds", "Delay of timers on the planner's event loop.", SECONDS),
    _counter("dear_questions", "Expensive requests answered by a copy of the process, by outcome.", "outcome"),
    _gauge("dear_questions_running", "Expensive requests being computed."),
    _gauge("dear_questions_waiting", "Expensive requests waiting for a copy."),
    _counter(
        "large_requests",
        "Large requests read or distributed by a copy of the process, by outcome.",
        "outcome",
    ),
    _histogram("fork_seconds", "Time for which the event loop is blocked while the process is copied.", FAST_SECONDS),
    _gauge("queue_length", "Queued requests."),
    _gauge("queue_longest_wait_seconds", "Time that the oldest queued request has waited."),
    _gauge("active_leases", "Active leases."),
    _counter("lease_changes", "Durable changes of leases.", "kind"),
    _gauge("jobs", "Jobs that have not been forgotten, by state: ended ones for a day.", "state"),
    _gauge("tasks", "Tasks of these jobs, by state.", "state"),
    _gauge("runners", "Hosts that start jobs, since their runner has been heard and can."),
    _counter("event_bytes", "Bytes of lease events that were published."),
    _counter("renewals_merged", "Renewal events left out because a later one was published."),
    _histogram("write_seconds", "Time from sending a write to the bucket to its acknowledgment.", SECONDS),
    _histogram("write_group", "Writes in flight when one more is sent; one sync of the disk serves them all.", SIZES),
    _gauge("writes_in_flight", "Writes not acknowledged yet."),
    _counter("write_failures", "Writes that the bucket refused."),
    _gauge("bucket_bytes", "Size of the planner's bucket, as the leader last measured it."),
    _gauge(
        "bucket_max_bytes",
        "Limit of that size; 0 for none. Beyond 85 % of it nothing new is granted.",
    ),
    _gauge("hosts", "Known hosts."),
    _gauge("devices", "Known devices."),
    _counter("telemetry_ignored", "Telemetry messages that could not be decoded or applied."),
    _gauge("telemetry_waiting", "Telemetry messages not applied yet; of samples only a host's newest counts."),
    _gauge("telemetry_age_seconds", "Time since the last telemetry message of any host was applied."),
)

_PROCESSOR: Final = (
    _gauge(
        "lag_messages",
        "Messages of the stream not received yet; for a lake's origin: not copied yet.",
        "stream",
    ),
    _gauge("lag_seconds", "Age of the newest stored message by the server's clock, while more are waiting.", "stream"),
    _counter("messages", "Messages stored.", "stream"),
    _counter("samples", "Device samples stored."),
    _counter("duplicates", "Messages delivered again, which changed nothing.", "stream"),
    _counter("impossible_values", "Values out of the range of their metric, stored as null.", "metric"),
    _counter("dead_letters", "Messages refused."),
    _counter("dead_letters_unpublished", "Refused messages that could not be published as dead letters either."),
    _histogram("batch_messages", "Messages in one transaction.", SIZES, "stream"),
    _histogram("batch_samples", "Device samples in one transaction, where it has any.", ROWS),
    _histogram("commit_seconds", "Time of one transaction.", SECONDS, "stream"),
    _counter("decode_cpu_seconds", "CPU time spent decoding.", "stream"),
    _counter("write_cpu_seconds", "CPU time spent in transactions, without the database's own threads.", "stream"),
    _gauge("paused", "1 while nothing can be stored."),
    _gauge("database_bytes", "Size of the database on disk."),
    _counter("queries", "Finished queries by outcome.", "outcome"),
    _gauge("queries_running", "Running queries."),
    _gauge("queries_waiting", "Queued queries."),
)

_COLLECTOR: Final = (
    _counter("ticks", "Ticks read."),
    _counter("late_ticks", "Ticks skipped because an earlier one was still being read."),
    _counter("read_errors", "Failed calls of the driver."),
    _counter("impossible_values", "Values out of the range of their metric, published as null.", "metric"),
    _counter("published_messages", "Messages acknowledged by the bus."),
    _gauge("acknowledged_seconds", "Time since the bus last acknowledged a message."),
    _gauge("buffered_messages", "Messages waiting for the bus, in memory and on disk."),
    _gauge("buffered_bytes", "Bytes of buffered messages."),
    _counter(
        "dropped_messages",
        "Messages lost: full buffer, damage on disk, or too large for the bus.",
    ),
    _counter("dropped_samples", "Device samples in lost messages."),
    _gauge("processes_identified", "0 if the collector can't attribute processes to leases."),
)

_RUNNER: Final = (
    _gauge("runs", "Runs whose end is not known to be stored, by state.", "state"),
    _histogram("start_seconds", "Time from an order to the start of the run's supervisor.", SECONDS),
    _gauge("answered_seconds", "Time since a planner last answered a report."),
    _counter("log_bytes", "Bytes of output that were published."),
    _gauge("unconfined", "1 if nothing keeps jobs without an image from devices that they were not granted."),
)

_EXPORTER: Final = (
    _counter("scrapes", "Pages written."),
    _histogram("scrape_seconds", "Time to write a page, without waiting for services.", SECONDS),
    _counter("otlp_points", "Data points for the OTLP receiver, by outcome: sent or failed.", "outcome"),
    _gauge(
        "otlp_success_timestamp_seconds",
        "Last time when an OTLP receiver took everything, seconds since the epoch; 0 before the first.",
    ),
    _histogram("otlp_seconds", "Time to make and send all metrics over OTLP.", SECONDS),
)

_NOTIFIER: Final = (
    _gauge("active", "1 while this notifier sends; 0 while it stands by for another."),
    _counter("news", "News that matched a rule, by kind; each cause once.", "kind"),
    _counter("sent_messages", "Messages that were taken by their target's service.", "target"),
    _counter("failed_attempts", "Attempts to send that failed; they are repeated.", "target"),
    _counter("given_up_messages", "Messages that could not be sent for too long, and were given up.", "target"),
    _gauge("waiting_messages", "Messages that wait to be sent, including those of quiet times.", "target"),
    _gauge("failing_seconds", "Time for which nothing could be sent; 0 while sending works.", "target"),
    _counter("lost_causes", "Messages that could not be kept, since the bucket is full or the bus refused them."),
    _histogram("send_seconds", "Time of an attempt to send.", SECONDS),
    _gauge("rules", "Rules in force."),
    _gauge("unusable_rules", "Rules that name a target which is not there."),
)

_LOGIN: Final = (
    _counter("logins", "Logins that came to an end, by outcome: issued, refused or failed.", "outcome"),
    _gauge("logins_running", "Logins in progress: the code has not been confirmed yet."),
)

_GATEWAY: Final = (
    _counter("requests", "Answered HTTP requests by status.", "status"),
    _histogram("answer_seconds", "Time to the begin of an answer, without requests that wait in the queue.", SECONDS),
    _gauge("requests_running", "HTTP requests that are not answered yet, and streams."),
    _gauge("callers", "Connections to the bus, one for each token in use."),
    _counter("refused_tokens", "Requests with a token that the bus does not know, or that is damaged."),
)

INSTRUMENTS: Final[dict[ServiceKind, dict[str, Instrument]]] = {
    kind: {instrument.name: instrument for instrument in (*COMMON, *own)}
    for kind, own in (
        (ServiceKind.COLLECTOR, _COLLECTOR),
        (ServiceKind.RUNNER, _RUNNER),
        (ServiceKind.PROCESSOR, _PROCESSOR),
        (ServiceKind.PLANNER, _PLANNER),
        (ServiceKind.EXPORTER, _EXPORTER),
        (ServiceKind.DASHBOARD, ()),
        (ServiceKind.NOTIFIER, _NOTIFIER),
        (ServiceKind.LOGIN, _LOGIN),
        (ServiceKind.GATEWAY, _GATEWAY),
    )
}
"""Every instrument, by service and name."""
