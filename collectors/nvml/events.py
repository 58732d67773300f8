"""Events of the NVIDIA driver, read in a separate thread: Xid codes, ECC errors, changes of clocks, power and MIG."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from msgspec import Struct

from ...schemas.telemetry import Severity
from ..source import Emit, SourceEvent
from .inventory import Found
from .library import DRIVER_GONE, SUCCESS, TIMEOUT, Library, NvmlFailure, address
from .xid import describe

log = logging.getLogger("corral.collector.nvml")

WAIT_MILLISECONDS: Final = 200
"""Time that the thread waits in the driver before it checks whether to stop."""
QUIET_SECONDS: Final = 60.0
"""Clock and power changes of a device are published at once, but once in this time at most; those between are counted.
Clocks change many times a second, and events are kept for a month."""
_BACKOFF_SECONDS: Final = 1.0
_NO_INSTANCE: Final = 0xFFFFFFFF
XID: Final = "nvmlEventTypeXidCriticalError"


class Notice(Struct, frozen=True):
    """Form in which an event of NVML is published; noisy ones once in `QUIET_SECONDS` at most."""

    constant: str
    kind: str
    severity: Severity
    message: str
    noisy: bool = False


NOTICES: Final = (
    Notice(XID, "xid", Severity.WARNING, ""),
    Notice("nvmlEventTypeSingleBitEccError", "ecc", Severity.WARNING, "ECC corrected a memory error"),
    # The Xid that comes with it says whether the device goes on.
    Notice("nvmlEventTypeDoubleBitEccError", "ecc", Severity.WARNING, "ECC could not correct a memory error"),
    Notice("nvmlEventTypeSingleBitEccErrorStorm", "ecc", Severity.WARNING, "ECC mends many memory errors"),
    Notice("nvmlEventTypeDramRetirementEvent", "memory_retired", Severity.WARNING, "faulty memory is being retired"),
    Notice("nvmlEventTypeDramRetirementFailure", "memory_retired", Severity.RESET, "faulty memory was not retired"),
    Notice("nvmlEventTypeNonFatalPoisonError", "poison", Severity.APPLICATION, "a program met poisoned memory"),
    Notice("nvmlEventTypeFatalPoisonError", "poison", Severity.RESET, "poisoned memory: the device must be reset"),
    Notice("nvmlEventTypeGpuUnavailableError", "gpu_unavailable", Severity.RESET, "the device is not available"),
    Notice("nvmlEventTypeGpuRecoveryAction", "recovery_action", Severity.WARNING, "the recovery action changed"),
    Notice("nvmlEventMigConfigChange", "mig_changed", Severity.INFO, "the MIG layout changed"),
    Notice("nvmlEventTypePowerSourceChange", "power", Severity.INFO, "the power source changed", noisy=True),
    Notice("nvmlEventTypeClock", "clock", Severity.INFO, "the clocks changed", noisy=True),
    Notice("nvmlEventTypePState", "pstate", Severity.INFO, "the performance state changed", noisy=True),
)


class EventThread:
    """A thread that waits for events of these devices until it is closed.

    Args:
        library: NVML; it must outlive the thread.
        host: the host's name.
        devices: whole devices and MIG instances.
        emit: takes each event, in the thread.
        noticed: called after each event with the uuid of its whole device and the severity.
        energy: returns the energy counter of a whole device as last read, mJ; None if it has none.
    """

    def __init__(
        self,
        library: Library,
        host: str,
        devices: list[Found],
        emit: Emit,
        noticed: Callable[[str, str, Severity], None],
        energy: Callable[[str], int | None] = lambda uuid: None,
    ) -> None:
        self._library = library
        self._host = host
        self._emit = emit
        self._noticed = noticed
        self._energy = energy
        self._stop = threading.Event()
        self._uuids = {address(device.handle): device.info.uuid for device in devices if device.parent is None}
        self._instances = {
            (device.info.mig_parent, device.gpu_instance, device.compute_instance): device.info.uuid
            for device in devices
            if device.parent is not None
        }
        self._quiet: dict[tuple[str, str], tuple[float, int]] = {}
        self._notices = {
            number: notice for notice in NOTICES if (number := library.constant(notice.constant)) is not None
        }
        self._set: Any = None
        self._thread: threading.Thread | None = None
        registered = self._register(devices)
        if registered:
            self._thread = threading.Thread(target=self._run, name="corral-nvml-events", daemon=True)
            self._thread.start()

    def _register(self, devices: list[Found]) -> int:
        self._set = self._library.ask(None, "nvmlEventSetCreate")
        if self._set is None:
            return 0
        wanted = 0
        for number in self._notices:
            wanted |= number
        registered = 0
        for device in devices:
            if device.parent is not None:
                continue
            try:
                supported = int(self._library.call("nvmlDeviceGetSupportedEventTypes", device.handle))
                if supported & wanted:
                    self._library.call("nvmlDeviceRegisterEvents", device.handle, supported & wanted, self._set)
                    registered += 1
            except NvmlFailure as failure:
                log.info("no events of %s: %s", device.info.uuid, failure)
        return registered

    def close(self) -> bool:
        """Stop waiting and free the event set; False where the driver call does not return."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(WAIT_MILLISECONDS / 1000 + 5.0)
            if self._thread.is_alive():
                return False  # freeing what the driver still waits on would crash
        if self._set is not None:
            with contextlib.suppress(NvmlFailure):
                self._library.call("nvmlEventSetFree", self._set)
            self._set = None
        return True

    def _run(self) -> None:
        wait = self._library.function("nvmlEventSetWait_v2")
        if wait is None:
            return
        data: Any = self._library.structure("c_nvmlEventData_t")()
        where = ctypes.byref(data)
        logged = False
        while not self._stop.is_set():
            code = wait(self._set, where, ctypes.c_uint(WAIT_MILLISECONDS))
            if code == SUCCESS:
                try:
                    self._publish(data)
                except Exception:  # an event that can't be handled must not end the thread
                    log.exception("an event of the driver could not be published")
            elif code in DRIVER_GONE:
                return
            elif code != TIMEOUT:
                if not logged:
                    logged = True
                    log.warning("waiting for events fails: %s (logged once)", self._library.text(code))
                self._stop.wait(_BACKOFF_SECONDS)

    def _publish(self, data: Any) -> None:
        notice = self._notices.get(int(data.eventType))
        parent = self._uuids.get(ctypes.cast(data.device, ctypes.c_void_p).value or 0)
        if notice is None or parent is None:
            return
        extra: dict[str, str | int | float | bool | None] = {}
        device, severity, message, code = parent, notice.severity, notice.message, 0
        if data.gpuInstanceId != _NO_INSTANCE:
            extra["gpu_instance"] = int(data.gpuInstanceId)
            if data.computeInstanceId != _NO_INSTANCE:
                extra["compute_instance"] = int(data.computeInstanceId)
            device = self._instances.get((parent, data.gpuInstanceId, data.computeInstanceId), parent)
        if notice.constant == XID:
            code = int(data.eventData)
            xid = describe(code)
            severity, message = xid.severity, f"Xid {code}: {xid.meaning}"
            # A counter that is lower later means that the device was reset meanwhile.
            if (energy := self._energy(parent)) is not None:
                extra["energy_millijoules"] = energy
        elif data.eventData:
            extra["value"] = int(data.eventData)
        if notice.noisy:
            now = time.monotonic()
            since, skipped = self._quiet.get((device, notice.kind), (-QUIET_SECONDS, 0))
            if now - since < QUIET_SECONDS:
                self._quiet[device, notice.kind] = (since, skipped + 1)
                return
            self._quiet[device, notice.kind] = (now, 0)
            if skipped:
                extra["skipped"] = skipped
        self._emit(
            SourceEvent(
                host=self._host,
                time_ns=time.time_ns(),
                kind=notice.kind,
                severity=severity,
                device=device,
                code=code,
                message=message,
                data=extra,
            )
        )
        self._noticed(parent, notice.kind, severity)
