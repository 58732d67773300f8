"""Protocols of telemetry sources: a source reads devices; the agent paces, packs, buffers and publishes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, runtime_checkable

from msgspec import Struct

from ..schemas.requests import Lease
from ..schemas.telemetry import Inventory, ProcessSample, Severity


class Tick(Struct, frozen=True, kw_only=True):
    """One reading of one host's D devices, as columns of D values each.

    Attributes:
        host: the host's name.
        devices: the D uuids; the agent starts a new message when they change.
        times_ns: D times of reading, packed as in `SampleBatch`.
        columns: metric name → D packed values; a metric that no device supports is left out.
        nulls: metric name → D bytes, 1 where null.
    """

    host: str
    devices: list[str]
    times_ns: bytes
    columns: dict[str, bytes]
    nulls: dict[str, bytes] = {}


class SourceEvent(Struct, frozen=True, kw_only=True):
    """An event noticed by a source; the agent adds its id and sequence and publishes it at once (`DeviceEvent`)."""

    host: str
    time_ns: int
    kind: str
    severity: Severity = Severity.INFO
    device: str | None = None
    code: int = 0
    message: str = ""
    data: dict[str, str | int | float | bool | None] = {}


Emit = Callable[[SourceEvent], None]
"""Takes an event from any thread."""


class SourceUnavailable(RuntimeError):
    """The source can't be read now (no driver, no library); the agent tries again later, with backoff."""


class Source(Protocol):
    """A source of telemetry for one host, or, simulated and replayed, for many.

    All methods block and are called from one worker thread, never from the event loop.

    A source may also be a `LeaseAware`, a `HostSource` or a `PatientSource`, and have these attributes:

    - `read_errors`: number of driver calls that have failed so far.
    - `impossible`: number of values from the driver that their metric can't have, by metric.
    - `identifies_processes`: True if it can attribute processes (`ProcessBatch.identified`).
    - `unreadable`: uuids of the devices whose processes the last `processes` could not list, or not all of them.
    """

    name: str
    """`nvml`, `amdsmi`, `simulated` or `replay`."""

    def open(self, emit: Emit) -> None:
        """Prepare to read. Events go to `emit` from then on, from the thread that notices them.

        Raises:
            SourceUnavailable: not now; the message says what is missing.
        """
        ...

    def inventory(self) -> Sequence[Inventory]:
        """Read the hosts with their devices as they are now; `agent` is left empty for the agent to fill in."""
        ...

    def read(self) -> Sequence[Tick]:
        """Read one tick, with one entry per host. A device that fails is left out, and an event reports it.

        Raises:
            SourceUnavailable: the driver is gone as a whole.
            EndOfData: there is no more to come.
        """
        ...

    def processes(self) -> dict[str, list[ProcessSample]]:
        """List the processes on the devices of each host; a host whose processes can't be seen is left out."""
        ...

    def close(self) -> None:
        """Release the driver; `open` may be called again afterwards."""
        ...


@runtime_checkable
class LeaseAware(Protocol):
    """A source that needs the active leases, as the simulated one does."""

    def set_leases(self, leases: list[Lease]) -> None:
        """Set all leases that are active now. Called from the event loop, while other methods may run."""
        ...


@runtime_checkable
class HostSource(Protocol):
    """A source that reads the machine that it runs on, and so can read the processes there."""

    host: str
    """The host's name as in subjects."""

    def ancestry(self, pids: Iterable[int]) -> dict[int, list[str]]:
        """Names of processes and of their ancestors, nearest first (`bus/process_identity.py`), by process id."""
        ...


@runtime_checkable
class PatientSource(Protocol):
    """A source whose data can wait, such as a recording: it is not read while the outbox has no room."""

    def limit_read(self, max_bytes: int) -> None:
        """Limit each reading from now on to so many bytes, or to one sample."""
        ...


class EndOfData(Exception):
    """A replay has reached its end."""
