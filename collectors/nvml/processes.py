"""Processes on each device: memory and shares of time from NVML, the rest from the operating system."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Any, Final

from msgspec import Struct

from ...schemas.telemetry import ProcessSample
from ..processes.proc import ProcessTable
from ..retry import Retry
from .inventory import Found
from .library import DRIVER_GONE, LOST, NOT_FOUND, SUCCESS, UNSUPPORTED, Library, NvmlFailure
from .running import RunningReader

_KINDS: Final = (
    ("nvmlDeviceGetComputeRunningProcesses", "compute"),
    ("nvmlDeviceGetMPSComputeRunningProcesses", "compute"),
    ("nvmlDeviceGetGraphicsRunningProcesses", "graphics"),
)
_FAILED: Final[list[Any]] = []
"""Stands for a list that could not be read this time."""
_UTILIZATION: Final = ("nvmlDeviceGetProcessesUtilizationInfo", "nvmlDeviceGetProcessUtilization")


class _Use(Struct):
    kind: str
    memory: int | None = None
    shares: tuple[float | None, float | None, float | None, float | None] = (None, None, None, None)


class ProcessReader:
    """Reads the processes of devices.

    It remembers for a while which calls each device refuses, and the time of the last shares that it has read.

    Args:
        library: NVML.
        with_commands: True to publish command lines.
    """

    def __init__(self, library: Library, *, with_commands: bool) -> None:
        self._library = library
        self._table = ProcessTable(with_commands=with_commands)
        self._running = RunningReader(library)
        self._refused: dict[tuple[str, str], Retry] = {}
        self._seen: dict[str, int] = {}
        self.errors = 0
        self.unreadable: list[str] = []
        """Devices whose processes the last `read` could not list, or not all of them."""

    def read(self, devices: list[Found]) -> list[ProcessSample]:
        """List the processes on these devices. A split device is left out: its processes are those of its instances.

        A device that is lost is left out, too: the next tick reports it.

        Raises:
            NvmlFailure: the driver is gone.
        """
        found: list[ProcessSample] = []
        self.unreadable = []
        for device in devices:
            if device.info.mig_enabled:
                continue
            try:
                uses = self._uses(device)
            except NvmlFailure as failure:
                if failure.code in DRIVER_GONE:
                    raise
                continue
            found += [self._sample(device.info.uuid, pid, use) for pid, use in uses.items()]
        return found

    def _uses(self, device: Found) -> dict[int, _Use]:
        uses: dict[int, _Use] = {}
        complete = True
        for function, kind in _KINDS:
            running = self._ask(device, function, lambda name: self._running.read(name, device.handle))
            if (running is None and kind == "compute" and "MPS" not in function) or running is _FAILED:
                complete = False
            for process in running or ():
                use = uses.setdefault(process.pid, _Use(kind))
                if use.kind != kind:
                    use.kind = "both"
                if process.memory_bytes is not None and process.memory_bytes < 2**63:
                    use.memory = max(use.memory or 0, process.memory_bytes)
        if not complete:
            self.unreadable.append(device.info.uuid)
        if uses and device.parent is None:
            self._add_shares(device, uses)
        return uses

    def _add_shares(self, device: Found, uses: dict[int, _Use]) -> None:
        uuid = device.info.uuid
        since = self._seen.get(uuid, 0)
        samples: Any = None
        for function in _UTILIZATION:
            samples = self._ask(device, function, lambda name: self._library.call(name, device.handle, since))
            if samples is not None:
                break
        latest: dict[int, Any] = {}
        for sample in samples or ():
            before = latest.get(int(sample.pid))
            if before is None or sample.timeStamp >= before.timeStamp:
                latest[int(sample.pid)] = sample
        for pid, sample in latest.items():
            self._seen[uuid] = max(self._seen.get(uuid, 0), int(sample.timeStamp))
            if pid in uses:
                uses[pid].shares = (
                    _percent(sample.smUtil),
                    _percent(sample.memUtil),
                    _percent(sample.encUtil),
                    _percent(sample.decUtil),
                )

    def _ask(self, device: Found, function: str, ask: Callable[[str], Any]) -> Any:
        """Answer of a function; None where the device refuses it, `_FAILED` on errors, `()` where there is none now."""
        key = (device.info.uuid, function)
        refused = self._refused.get(key)
        now = monotonic()
        if refused is not None and now < refused.due:
            return None
        try:
            answer = ask(function)
            self._refused.pop(key, None)
            return answer
        except NvmlFailure as failure:
            if failure.code in DRIVER_GONE or failure.code in LOST:
                raise
            if failure.code in UNSUPPORTED:
                if refused is None:
                    self._refused[key] = Retry(now)
                else:
                    refused.refused(now)
                return None
            # No process has run since the last look: "not found", and in some versions "success".
            if failure.code not in (NOT_FOUND, SUCCESS):
                self.errors += 1
                return _FAILED
            return ()

    def _sample(self, uuid: str, pid: int, use: _Use) -> ProcessSample:
        facts = self._table.facts(pid)
        sm, memory, encoder, decoder = use.shares
        return ProcessSample(
            device=uuid,
            pid=pid,
            kind=use.kind,
            memory_used_bytes=use.memory,
            sm_utilization_percent=sm,
            memory_utilization_percent=memory,
            encoder_utilization_percent=encoder,
            decoder_utilization_percent=decoder,
            name=facts.name,
            user=facts.user,
            container=facts.container,
            lease=facts.lease,
            started_ns=facts.started_ns,
            command=facts.command,
        )


def _percent(value: Any) -> float | None:
    return float(value) if 0 <= value <= 100 else None
