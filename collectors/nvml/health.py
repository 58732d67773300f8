"""Changes of a device's health, by its slow metrics: pure functions from two readings to events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec import Struct

from ...schemas.telemetry import Severity

SETTLE_SECONDS: Final = 5.0
"""Time after a fault at which the driver's recovery action counts as its judgment of the fault."""

STARTED: Final = "device_started"
"""Kind of the event which reports that a device is watched from now on, and is healthy."""

ACTIONS: Final = {
    1: (Severity.RESET, "the driver asks for a reset of the device"),
    2: (Severity.HARDWARE, "the driver asks for a reboot of the host"),
    3: (Severity.RESET, "the driver asks for an end of peer-to-peer traffic"),
    4: (Severity.RESET, "the driver asks for a drain and a reset of the device"),
    # In some earlier headers 5 is a reset of the device's bus.
    5: (Severity.RESET, "the driver asks for a recovery of the IMEX domain, or a reset of the device's bus"),
    6: (Severity.RESET, "the driver asks for a reset of the device's bus"),
    7: (Severity.HARDWARE, "the driver asks for a reboot of the system"),
}
"""Recovery actions by number, as in nvml.h of CUDA 13 (`nvmlDeviceGpuRecoveryAction_t`)."""
_OTHER: Final = (Severity.RESET, "the driver asks for a recovery that is not known here")


class Health(Struct, frozen=True, kw_only=True):
    """Readings that tell a device's health; None where the device does not give one.

    Attributes:
        recovery_action: as in the catalog.
        remap_failure: 1 if a memory row could not be remapped.
        remap_pending: not 0 if rows wait for a reset to be remapped.
        retired_pending: not 0 if pages wait for a reset to be retired.
        uncorrected: uncorrected ECC errors since the driver was loaded or the device reset.
    """

    recovery_action: int | None = None
    remap_failure: int | None = None
    remap_pending: int | None = None
    retired_pending: int | None = None
    uncorrected: int | None = None


class Finding(Struct, frozen=True):
    """An event to publish about a device."""

    kind: str
    severity: Severity
    message: str


def changes(before: Health | None, now: Health, *, faulted: bool = False) -> Sequence[Finding]:
    """Compare two readings; returns the events to publish.

    Args:
        before: the last reading; None at the start, where a device without trouble is reported as healthy. Whatever an
            earlier run has reported was repaired then, since a reset needs every client of the driver stopped.
        now: this reading.
        faulted: True if an event has reported a fault that the driver has had time to judge.
    """
    found: list[Finding] = []
    old = before or Health()
    action = ACTIONS.get(now.recovery_action, _OTHER) if now.recovery_action else None
    if now.remap_failure and not old.remap_failure:
        found.append(
            Finding("row_remap_failure", Severity.HARDWARE, "a memory row could not be remapped: replace the board")
        )
    if now.remap_pending and not old.remap_pending:
        found.append(Finding("row_remap_pending", Severity.WARNING, "memory rows wait for a reset to be remapped"))
    if now.retired_pending and not old.retired_pending:
        found.append(Finding("page_retirement_pending", Severity.WARNING, "memory pages wait for a reset"))
    if action is not None:
        if now.recovery_action != old.recovery_action:
            found.append(Finding("recovery_action", *action))
        return found
    if now.remap_failure:
        return found
    if old.recovery_action or (faulted and now.recovery_action == 0):
        found.append(Finding("recovery_action", Severity.CLEARED, "the driver asks for no recovery any more"))
    elif before is None and (now.recovery_action is not None or not now.uncorrected):
        found.append(Finding(STARTED, Severity.CLEARED, "the device is watched, and nothing is wrong with it"))
    return found
