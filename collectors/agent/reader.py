"""The reader: one thread that owns a source and paces it, so that no driver call ever blocks the event loop.

A source that can't be read is closed and opened again, with backoff, for as long as the agent runs.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final, cast

from msgspec import Struct

from ...schemas.telemetry import Inventory, ProcessSample, Severity
from ..source import EndOfData, HostSource, PatientSource, Source, SourceEvent, SourceUnavailable, Tick
from .pacing import Pace

log = logging.getLogger("corral.collector")

INVENTORY_SECONDS: Final = 60.0
PROCESSES_AFTER_SECONDS: Final = 0.6
"""Time after the end of a lease when processes are listed: a driver frees what they held within half a second."""
PROCESSES_LEAST_SECONDS: Final = 2.0
"""Least time between two lists of processes, however many leases end."""
RETRY_SECONDS: Final = 1.0
RETRY_MAX_SECONDS: Final = 60.0
MAX_WAITING: Final = 4
"""Most deliveries that wait for the event loop; beyond it ticks are skipped as late."""


class Reading(Struct, frozen=True, kw_only=True):
    """Result of one tick of the reader.

    Attributes:
        ticks: one entry per host; several where a replay has several due.
        inventory: inventories of hosts that are new or have changed, or of all hosts if they are due; None otherwise.
        processes: processes of each host; None where they are not due.
        ancestry: names of these processes and their ancestors, where the source can look (`HostSource`).
        unreadable: uuids of devices whose processes can't be listed, or not all of them.
        time_ns: when it was read, nanoseconds since the epoch.
    """

    ticks: Sequence[Tick] = ()
    inventory: Sequence[Inventory] | None = None
    processes: dict[str, list[ProcessSample]] | None = None
    unreadable: Sequence[str] = ()
    ancestry: dict[int, list[str]] = {}
    time_ns: int = 0


class Reader:
    """Reads a source in a separate thread until it is stopped or the data ends.

    Args:
        source: used by this thread alone.
        host: name of the host or fleet in the events that the source is gone or back.
        interval_seconds: time between ticks.
        processes_seconds: time between lists of processes; 0 never lists them.
        readings_per_delivery: number of readings that wake the event loop once.
        deliver: takes readings in order, in this thread.
        emit: takes each event, in any thread.
        finished: called once at the end, with the error if there was one.
        full: returns True if there is no room for more; a patient source is not read meanwhile.

    Attributes:
        ticks: ticks read since the start.
        taken: readings that the consumer is done with; the consumer counts them.
    """

    def __init__(
        self,
        source: Source,
        *,
        host: str,
        interval_seconds: float,
        processes_seconds: float,
        readings_per_delivery: int,
        deliver: Callable[[list[Reading]], None],
        emit: Callable[[SourceEvent], None],
        finished: Callable[[BaseException | None], None],
        full: Callable[[], bool],
    ) -> None:
        self.source = source
        self.host = host
        self.interval_seconds = interval_seconds
        self.processes_seconds = processes_seconds
        self.ticks = 0
        self.taken = 0
        self._read_failures = 0
        self._failures_in_a_row = 0
        self._late_before = 0
        self._late_for_loop = 0
        self._pace: Pace | None = None
        self._deliver = deliver
        self._per_delivery = max(readings_per_delivery, 1)
        self._held: list[Reading] = []
        self._emit = emit
        self._finished = finished
        self._full = full
        self._patient = isinstance(source, PatientSource)
        self._stop = threading.Event()
        self._inventory_wanted = threading.Event()
        self._processes_wanted_at = math.inf
        self._durations: list[float] = []
        self._durations_lock = threading.Lock()
        self._reading_since: float | None = None
        self._known: dict[str, Inventory] = {}
        self._delivered = 0
        self._thread = threading.Thread(target=self._run, name="corral-reader", daemon=True)

    @property
    def failing(self) -> bool:
        """True if the source could not be read when it was last tried."""
        return self._failures_in_a_row > 0

    @property
    def read_errors(self) -> int:
        """Readings that failed as a whole and, where the source counts them, driver calls that failed."""
        counted = cast("int", getattr(self.source, "read_errors", 0))
        return self._read_failures + counted

    @property
    def late_ticks(self) -> int:
        """Ticks skipped since the start, including those that a read in progress has cost so far."""
        pace, busy = self._pace, self._reading_since is not None
        late = self._late_before + self._late_for_loop + (pace.late if pace is not None else 0)
        return late + (pace.missed(time.monotonic()) if pace is not None and busy else 0)

    @property
    def busy_seconds(self) -> float:
        """Seconds that the read in progress has taken so far; 0 between reads."""
        since = self._reading_since
        return 0.0 if since is None else time.monotonic() - since

    def start(self) -> None:
        """Start reading."""
        self._thread.start()

    def stop(self, timeout_seconds: float = 3.0) -> bool:
        """Stop and close the source; False where a driver call hangs and the thread had to be left behind."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def want_inventory(self) -> None:
        """Request that the inventory is read with the next tick: something has changed on a device."""
        self._inventory_wanted.set()

    def want_processes(self) -> None:
        """Request a list of processes soon: a lease has ended, and its devices count as in use until it is seen."""
        self._processes_wanted_at = time.monotonic() + PROCESSES_AFTER_SECONDS

    def durations(self) -> tuple[float, float]:
        """Mean and maximum of the reading times since the last call, in seconds; a read that hangs is included."""
        with self._durations_lock:
            found, self._durations = self._durations, []
        busy = self.busy_seconds
        if busy > self.interval_seconds:
            found.append(busy)
        return (sum(found) / len(found), max(found)) if found else (0.0, 0.0)

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            while not self._stop.is_set():
                try:
                    self.source.open(self._emit)
                    self._read_until_stopped()
                    return
                except EndOfData:
                    raise
                except SourceUnavailable as unavailable:
                    self._lost(str(unavailable))
                except Exception as unexpected:  # one bad reading must not end a daemon; it is reported and counted
                    log.exception("reading %s failed", self.source.name)
                    self._lost(f"{type(unexpected).__name__}: {unexpected}")
                self.source.close()
                # Jitter over an exponential limit: a rack that lost its driver does not ask in step.
                limit = min(RETRY_SECONDS * 2**self._failures_in_a_row, RETRY_MAX_SECONDS)
                self._stop.wait(limit / 2 + random.uniform(0, limit / 2))
        except EndOfData:
            pass
        except BaseException as failure:  # any error is passed to the event loop
            error = failure
        finally:
            self._hand_over()
            try:
                self.source.close()
            except Exception:
                log.exception("closing %s failed", self.source.name)
            self._finished(error)

    def _lost(self, why: str) -> None:
        if self._failures_in_a_row == 0:
            log.warning("%s can't be read: %s", self.source.name, why)
            self._report("driver_lost", Severity.WARNING, why)
        self._failures_in_a_row = min(self._failures_in_a_row + 1, 30)
        self._read_failures += 1
        self._reading_since = None
        self._hand_over()
        if self._pace is not None:
            self._late_before += self._pace.late
            self._pace = None

    def _read_until_stopped(self) -> None:
        start = time.monotonic()
        pace = self._pace = Pace(start, self.interval_seconds)
        inventory_due = processes_due = start
        processes_read = -math.inf
        while not self._stop.is_set():
            now = time.monotonic()
            if self._patient and (self._full() or self._delivered > self.taken):
                self._stop.wait(pace.next(now))
                continue
            if self._delivered - self.taken >= MAX_WAITING * self._per_delivery:
                self._late_for_loop += 1
                self._stop.wait(pace.next(time.monotonic()))
                continue
            self._reading_since = now
            inventory: list[Inventory] | None = None
            if now >= inventory_due:
                inventory_due = now + INVENTORY_SECONDS
                self._inventory_wanted.clear()
                inventory = self._inventory(everything=True)
            elif self._inventory_wanted.is_set():
                self._inventory_wanted.clear()
                inventory = self._inventory(everything=False)
            ticks = self.source.read()
            time_ns = time.time_ns()
            if any(tick.host not in self._known for tick in ticks):
                inventory = [*(inventory or ()), *self._inventory(everything=False)]
            processes = None
            unreadable: tuple[str, ...] = ()
            ancestry: dict[int, list[str]] = {}
            due = min(processes_due, max(self._processes_wanted_at, processes_read + PROCESSES_LEAST_SECONDS))
            if self.processes_seconds > 0 and now >= due:
                if now >= processes_due:
                    processes_due = max(processes_due + self.processes_seconds, now)
                if now >= self._processes_wanted_at:
                    self._processes_wanted_at = math.inf
                processes_read = now
                processes = self.source.processes()
                unreadable = tuple(getattr(self.source, "unreadable", ()))
                if isinstance(self.source, HostSource):
                    pids = {process.pid for found in processes.values() for process in found}
                    ancestry = self.source.ancestry(pids)
            self._reading_since = None
            self.ticks += 1
            if self._failures_in_a_row:
                self._failures_in_a_row = 0
                log.info("%s can be read again", self.source.name)
                self._report("driver_returned", Severity.CLEARED, f"{self.source.name} can be read again")
            with self._durations_lock:
                self._durations.append(time.monotonic() - now)
            self._held.append(
                Reading(
                    ticks=ticks,
                    inventory=inventory,
                    processes=processes,
                    unreadable=unreadable,
                    ancestry=ancestry,
                    time_ns=time_ns,
                )
            )
            if len(self._held) >= self._per_delivery or inventory:
                self._hand_over()
            self._stop.wait(pace.next(time.monotonic()))

    def _hand_over(self) -> None:
        held, self._held = self._held, []
        self._delivered += len(held)
        self._deliver(held)

    def _inventory(self, *, everything: bool) -> list[Inventory]:
        """Read the inventories: those of all hosts, or those that differ from what was published last."""
        found = self.source.inventory()
        changed = [
            inventory
            for inventory in found
            if everything or _facts(self._known.get(inventory.host.name)) != _facts(inventory)
        ]
        self._known = {inventory.host.name: inventory for inventory in found}
        return changed

    def _report(self, kind: str, severity: Severity, message: str) -> None:
        self._emit(SourceEvent(host=self.host, time_ns=time.time_ns(), kind=kind, severity=severity, message=message))


def _facts(inventory: Inventory | None) -> object:
    """Facts of an inventory whose change counts as a new inventory; the time of reading is not among them."""
    if inventory is None:
        return None
    return inventory.host, inventory.devices, inventory.links, inventory.nvlink_counts
