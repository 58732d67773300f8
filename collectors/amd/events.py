"""Events of the amdgpu driver, read in a separate thread."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Sequence
from typing import Any, Final, cast

from ...schemas.telemetry import Severity
from ..source import Emit, SourceEvent
from .inventory import Found
from .library import AmdLibrary

log = logging.getLogger("corral.collector.amd")

WAIT_MILLISECONDS: Final = 200
QUIET_SECONDS: Final = 60.0
"""Faults and throttling of a device are published at once, but once in this time at most: a fault loop reports
thousands."""
_PAUSE_SECONDS: Final = 0.05

NOTICES: Final = {
    "VMFAULT": ("vm_fault", Severity.APPLICATION, "a program used an address that it does not have"),
    "THERMAL_THROTTLE": ("throttle", Severity.WARNING, "the clocks are held down by temperature"),
    "GPU_PRE_RESET": ("device_reset", Severity.RESET, "the device is being reset"),
    "GPU_POST_RESET": ("device_reset", Severity.CLEARED, "the device has been reset"),
}
"""Kind, severity and message of an event, by its name in amdsmi."""


class AmdEventThread:
    """A thread that waits for events of these devices until it is closed."""

    def __init__(self, library: AmdLibrary, host: str, devices: Sequence[Found], emit: Emit) -> None:
        self._library = library
        self._host = host
        self._emit = emit
        self._stop = threading.Event()
        self._quiet: dict[tuple[str, str], float] = {}
        self._uuids = {_address(device.handle): device.info.uuid for device in devices}
        self._readers: list[Any] = []
        self._thread: threading.Thread | None = None
        kinds = [library.constant(f"AmdSmiEvtNotificationType.{name}") for name in NOTICES]
        for device in devices:
            try:
                self._readers.append(
                    library.amdsmi.AmdSmiEventReader(device.handle, [k for k in kinds if k is not None])
                )
            except Exception as error:  # a device without events is read all the same
                log.info("no events of %s: %s", device.info.uuid, " ".join(str(error).split()))
        if self._readers:
            self._thread = threading.Thread(target=self._run, name="corral-amd-events", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop waiting, and unsubscribe from the driver's events."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(WAIT_MILLISECONDS / 1000 + 5.0)
        for reader in self._readers:
            with contextlib.suppress(Exception):
                reader.stop()
        self._readers = []

    def _run(self) -> None:
        # One reader hears the events of all devices that have asked for them.
        while not self._stop.is_set():
            try:
                found = cast("list[dict[str, Any]]", self._readers[0].read(WAIT_MILLISECONDS))
            except self._library.amdsmi.AmdSmiLibraryException:
                found = []  # no event within the time
            if not found:
                self._stop.wait(_PAUSE_SECONDS)
            for event in found:
                self._publish(event)

    def _publish(self, event: dict[str, Any]) -> None:
        notice = NOTICES.get(str(event.get("event")))
        uuid = self._uuids.get(_address(event.get("processor_handle")))
        if notice is None or uuid is None:
            return
        kind, severity, message = notice
        now = time.monotonic()
        if severity in (Severity.APPLICATION, Severity.WARNING):
            if now - self._quiet.get((uuid, kind), -QUIET_SECONDS) < QUIET_SECONDS:
                return
            self._quiet[uuid, kind] = now
        self._emit(
            SourceEvent(
                host=self._host,
                time_ns=time.time_ns(),
                kind=kind,
                severity=severity,
                device=uuid,
                message=message,
                data={"driver": str(event.get("message", ""))},
            )
        )


def _address(handle: Any) -> int:
    return int(getattr(handle, "value", None) or 0)
