"""What the slow numbers say of a device's health: pure functions from two readings to events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec import Struct

from ...schemas.telemetry import Severity

SETTLE_SECONDS: Final = 5.0
"""So long after a fault the driver's recovery action is taken for its word on it."""

STARTED: Final = "device_started"
"""Kind of the event that says that a device is watched from now on, and is well."""

ACTIONS: Final = {
    1: (Severity.RESET, "the driver asks for a reset of the device"),
    2: (Severity.HARDWARE, "the driver asks for a reboot of the host"),
    3: (Severity.RESET, "the driver asks for an end of peer-to-peer traffic"),
    4: (Severity.RESET, "the driver asks for a drain and a reset of the device"),
    # Some earlier headers mean the bus by it.
    5: (Severity.RESET, "the driver asks for a recovery of the IMEX domain, or a reset of the device's bus"),
    6: (Severity.RESET, "the driver asks for a reset of the device's bus"),
    7: (Severity.HARDWARE, "the driver asks for a reboot of the system"),
}
"""By number, as nvml.h of CUDA 13 has them (`nvmlDeviceGpuRecoveryAction_t`)."""
_OTHER: Final = (Severity.RESET, "the driver asks for a recovery that is not known here")


class Health(Struct, frozen=True, kw_only=True):
    """The readings that matter; None where the device does not give one.

    Attributes:
        recovery_action: as in the catalogue.
        remap_failure: a memory row could not be remapped.
        remap_pending: rows wait for a reset.
        retired_pending: pages wait for a reset.
        uncorrected: ECC errors since the driver was loaded or the device reset.
    """

    recovery_action: int | None = None
    remap_failure: int | None = None
    remap_pending: int | None = None
    retired_pending: int | None = None
    uncorrected: int | None = None


class Finding(Struct, frozen=True):
    """An event to publish of a device."""

    kind: str
    severity: Severity
    message: str


def changes(before: Health | None, now: Health, *, faulted: bool = False) -> Sequence[Finding]:
    """What has changed since the last reading.

    Args:
        before: the last reading; None at the start, where a device without trouble is said to be well: whatever an
            earlier run has reported was put right, since a reset needs every client of the driver stopped.
        now: this reading.
        faulted: an event has reported a fault that the driver has had time to judge.
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
