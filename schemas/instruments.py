"""Instruments with which services measure themselves. Health answers, series and the reference derive from one table.

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
    PROCESSOR = "processor"
    PLANNER = "planner"
    EXPORTER = "exporter"
    DASHBOARD = "dashboard"


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
    _gauge("start_timestamp_seconds", "When the service started, seconds since the epoch."),
    _counter("cpu_seconds", "User and system time of the process."),
    _gauge("resident_bytes", "Resident memory of the process."),
)
"""Instruments that every service has."""

_PLANNER: Final = (
    _gauge("leading", "1 while this planner leads."),
    _gauge("term", "The term in which it leads, a revision that only grows; 0 while it stands by."),
    _counter("requests", "Work requests by what became of them at first.", "outcome"),
    _histogram("grant_seconds", "From the arrival of a request to its durable assignment, waiting left out.", SECONDS),
    _histogram("decision_seconds", "Time to decide on one request.", FAST_SECONDS),
    _histogram("loop_lag_seconds", "How late the planner's loop comes to what is due.", SECONDS),
    _counter("dear_questions", "Questions that a copy of the planner answered, by outcome.", "outcome"),
    _gauge("dear_questions_running", "Of these, such that are being worked on."),
    _gauge("dear_questions_waiting", "Of these, such that wait for their turn."),
    _counter("large_requests", "Copies that read a large request or distributed its work, by outcome.", "outcome"),
    _histogram("fork_seconds", "For how long the loop stands still to make such a copy.", FAST_SECONDS),
    _gauge("queue_length", "Requests that wait."),
    _gauge("queue_longest_wait_seconds", "How long the one that waits longest has waited."),
    _gauge("active_leases", "Leases that hold something."),
    _counter("lease_changes", "Changes of leases that are durable.", "kind"),
    _counter("event_bytes", "Bytes of lease events that were published."),
    _counter("renewals_merged", "Renewals that were not told, since a later one was."),
    _histogram("write_seconds", "From sending a write to the bucket to its acknowledgement.", SECONDS),
    _histogram("write_group", "Writes on their way when one more is sent: what one sync of the disk serves.", SIZES),
    _gauge("writes_in_flight", "Writes whose fate is not known yet."),
    _counter("write_failures", "Writes that the bucket refused."),
    _gauge("bucket_bytes", "What the planner's bucket holds, as the leader measured last."),
    _gauge("bucket_max_bytes", "What it takes; 0 where it has no limit. Nothing new is granted beyond 85 % of it."),
    _gauge("hosts", "Hosts that it knows."),
    _gauge("devices", "Devices that it knows."),
    _counter("telemetry_ignored", "Messages that could not be decoded or folded in."),
    _gauge("telemetry_waiting", "Messages that are not folded in yet; of samples only a host's newest counts."),
    _gauge("telemetry_age_seconds", "Since the last message of any host was folded in."),
)

_PROCESSOR: Final = (
    _gauge(
        "lag_messages",
        "Messages in the stream that have not come yet; of a lake's origin: are not copied yet.",
        "stream",
    ),
    _gauge("lag_seconds", "How old what is stored is by the server's clock, while more waits.", "stream"),
    _counter("messages", "Messages stored.", "stream"),
    _counter("samples", "Device samples stored."),
    _counter("duplicates", "Messages that came again and changed nothing.", "stream"),
    _counter("impossible_values", "Values that their metric can't have: stored as null.", "metric"),
    _counter("dead_letters", "Messages refused."),
    _counter("dead_letters_unpublished", "Of these, such that the bus did not take either."),
    _histogram("batch_messages", "Messages in one transaction.", SIZES, "stream"),
    _histogram("batch_samples", "Device samples in one transaction that has any.", ROWS),
    _histogram("commit_seconds", "Time of one transaction.", SECONDS, "stream"),
    _counter("decode_cpu_seconds", "CPU time spent decoding.", "stream"),
    _counter("write_cpu_seconds", "CPU time spent in transactions, the database's own threads left out.", "stream"),
    _gauge("paused", "1 while nothing can be stored."),
    _gauge("database_bytes", "Size of the database on disk."),
    _counter("queries", "Queries by how they ended.", "outcome"),
    _gauge("queries_running", "Queries that run."),
    _gauge("queries_waiting", "Queries that wait for their turn."),
)

_COLLECTOR: Final = (
    _counter("ticks", "Ticks read."),
    _counter("late_ticks", "Ticks left out, since an earlier one was still being read."),
    _counter("read_errors", "Calls of the driver that failed."),
    _counter("impossible_values", "Values of the driver that their metric can't have: published as null.", "metric"),
    _counter("published_messages", "Messages that the bus has acknowledged."),
    _gauge("acknowledged_seconds", "Since the bus last acknowledged a message."),
    _gauge("buffered_messages", "Messages waiting for the bus, in memory and on disk."),
    _gauge("buffered_bytes", "Bytes of these."),
    _counter(
        "dropped_messages", "Messages lost: the buffer was full, the disk spoilt them, or the bus takes none so large."
    ),
    _counter("dropped_samples", "Device samples in lost messages."),
    _gauge("processes_identified", "0 where it can't tell whose the processes on the devices are."),
)

_EXPORTER: Final = (
    _counter("scrapes", "Pages that were written."),
    _histogram("scrape_seconds", "Time to write a page, waiting for the services left out.", SECONDS),
)

INSTRUMENTS: Final[dict[ServiceKind, dict[str, Instrument]]] = {
    kind: {instrument.name: instrument for instrument in (*COMMON, *own)}
    for kind, own in (
        (ServiceKind.COLLECTOR, _COLLECTOR),
        (ServiceKind.PROCESSOR, _PROCESSOR),
        (ServiceKind.PLANNER, _PLANNER),
        (ServiceKind.EXPORTER, _EXPORTER),
        (ServiceKind.DASHBOARD, ()),
    )
}
"""Every instrument, by service and name."""
