"""Protocol between ingest and a storage. `embedded/database.py` and `lake/lake.py` implement it."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol, TypeAlias

from msgspec import Struct

from ...schemas.request_events import RequestEvent, RequestEvents
from ...schemas.requests import LeaseEvent
from ...schemas.telemetry import Inventory
from ...schemas.work.jobs import JobEvent

ROW_GROUP_ROWS: Final = 122_880
"""Rows in a row group of DuckDB."""

ArrowTable: TypeAlias = Any
"""A `pyarrow.Table`: pyarrow comes without type annotations."""


class Arrival(Struct, frozen=True):
    """Messages of an agent's run on a host that one stream has delivered so far.

    Attributes:
        agent: host and id of the run, as `host/id`; the id alone where an older Corral stored it.
        high: the greatest sequence.
        seen: bit i stands for sequence `high - i`.
    """

    agent: str
    high: int
    seen: int


class HostClock(Struct, frozen=True):
    """A host whose clock is off.

    Attributes:
        host: the host's name.
        offset_seconds: by how much it is ahead of the server's clock; negative where it is behind.
        since_ns: when that was seen first, by the server's clock, nanoseconds since the epoch.
        until_ns: when it was right again; None while it is off.
    """

    host: str
    offset_seconds: float
    since_ns: int
    until_ns: int | None = None


class Asked(Struct, frozen=True):
    """A work request with its outcome.

    Attributes:
        event: the request.
        planner: id of the planner that answered it.
    """

    event: RequestEvent
    planner: str


class Batch(Struct, frozen=True, kw_only=True):
    """Rows to store in one transaction, with the position in the stream that it ends on.

    Attributes:
        stream: that it comes from (with its partition, where there are several).
        sequence: of the last message in it, stored or refused.
        stored_ns: when the bus stored that message, nanoseconds since the epoch; 0 if that is not known.
        samples: columns of the table of samples except `batch`; None without samples. `series` counts from 0 in the
            order of `Storage.series`.
        tables: rows to append to other tables, by name.
        inventories: in order.
        leases: in order.
        requests: work requests with their outcomes, in order.
        request_events: messages that these are from, for the requests that wait and for drains, in order.
        jobs: changes of jobs, in order.
        arrivals: new deduplication state of every agent that has a message in it.
        clocks: of hosts whose clock is found to be off, or right again.
        refused: messages that are not in it, by code.
        messages: in it.
    """

    stream: str
    sequence: int
    samples: ArrowTable | None = None
    tables: Mapping[str, ArrowTable] = {}
    inventories: Sequence[Inventory] = ()
    leases: Sequence[LeaseEvent] = ()
    requests: Sequence[Asked] = ()
    request_events: Sequence[RequestEvents] = ()
    jobs: Sequence[JobEvent] = ()
    arrivals: Sequence[Arrival] = ()
    clocks: Sequence[HostClock] = ()
    refused: Mapping[str, int] = {}
    messages: int = 0
    stored_ns: int = 0


class Series:
    """Numbers for devices: `(host, device)` to a number from 0, in the order of their first sample.

    Any thread may ask for new ones; a storage writes those that it does not have yet with the next batch.
    """

    def __init__(self, known: Sequence[tuple[str, str]] = ()) -> None:
        self._lock = threading.Lock()
        self.names: list[tuple[str, str]] = list(known)
        self._numbers: dict[tuple[str, str], int] = {name: at for at, name in enumerate(self.names)}

    def number(self, host: str, device: str) -> int:
        """Number of a device; a new one if it has none."""
        key = (host, device)
        found = self._numbers.get(key)
        if found is None:
            with self._lock:
                found = self._numbers.get(key)
                if found is None:
                    self.names.append(key)
                    found = self._numbers[key] = len(self.names) - 1
        return found


class Storage(Protocol):
    """Storage that keeps each batch exactly once."""

    @property
    def processor(self) -> str:
        """Id of the history: part of the names of its durable consumers."""
        ...

    @property
    def series(self) -> Series:
        """Numbers of the devices that it knows."""
        ...

    def resume(self, stream: str, created: str, last_sequence: int | None = None) -> int:
        """Sequence of the last stored message of a stream; 0 if there is none.

        Args:
            stream: its name.
            created: when it was created: one that was created again counts from 1 again, and so does its watermark.
            last_sequence: of the stream now. If it is below the watermark, the stream has lost messages that are stored
                (the server was restored from a copy, or lost power) and assigns their sequences again. The stream is
                then read from its start. None if it is not known.
        """
        ...

    def marked_ns(self, stream: str) -> int:
        """Time when the bus stored the message at a stream's watermark, nanoseconds since the epoch; 0 if not known.

        A stream that was set back and has grown since has another message at that sequence.
        """
        ...

    def watermarks(self) -> dict[str, int]:
        """The last stored sequence of each stream."""
        ...

    def arrivals(self, stream: str) -> list[Arrival]:
        """Stored deduplication state of each agent's run."""
        ...

    def clocks(self) -> list[HostClock]:
        """Stored state of hosts' clocks that are, or were, off."""
        ...

    def commit(self, batch: Batch) -> None:
        """Store a batch, all of it or nothing.

        Raises:
            StoragePaused: it could not be stored now; the same batch may be tried again.
            Unstorable: a value in it is refused; what else is in it may be tried without it.
            StorageError: it can't be stored at all.
        """
        ...

    def cursor(self) -> Any:
        """New DuckDB cursor on it, for readers."""
        ...

    def close(self) -> None:
        """Write what is left, and release the database."""
        ...
