"""Booked windows: times for which devices are kept for some owners, or for maintenance; once, each day or each week.

An operator books a window; the planner chooses the devices then, for all of its occurrences. Before an occurrence these
devices take only leases that have surely ended `lead_seconds` ahead of it, by their `max_seconds`. During it they are
for the window's owners alone, and their leases there end with it.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final

from msgspec import Meta, Struct

from ..requests import Identifier, Labels, OwnerName, ShortText, Time
from .groups import GroupName

MAX_WINDOWS: Final = 256
MAX_OCCURRENCES: Final = 400
LEAD_SECONDS: Final = 60.0
MAX_REPLACED: Final = 256
"""Limit on the replacements that are kept for a window."""


class Repeat(StrEnum):
    """Repetition of a window."""

    NONE = "none"
    DAILY = "daily"
    WEEKLY = "weekly"


class WindowState(StrEnum):
    """State of a booked window."""

    BOOKED = "booked"
    """Its next occurrence is to come."""
    RUNNING = "running"
    """An occurrence is now."""
    OVER = "over"


class Window(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A booked window. To book devices, give `gpus`, and `owners` or a `group`; for maintenance, what it is of.

    Attributes:
        starts_at: begin of the first occurrence.
        ends_at: end of the first occurrence; the others last as long.
        window_id: id of the window; null lets the planner choose one. A window that is booked again under the same id,
            with the same fields, is booked once.
        repeat: `none`, or at the same time of day in `zone`, `daily` or `weekly`.
        repeat_until: for a window that repeats: no occurrence begins later.
        zone: name of the time zone by whose clocks it repeats, such as `Europe/Berlin`.
        gpus: number of devices to book.
        models: globs over the device's name, case-insensitive; empty allows any.
        hosts: globs over the names of hosts, of which devices are chosen; for maintenance, the names of hosts.
        owners: owners whom the window is for.
        group: group whom the window is for, with the groups within it.
        maintenance: true if the window is for no one. Leases of before go on, but nothing new starts.
        devices: uuids of the devices. The planner chooses those of a window with `gpus`.
        host_labels: for maintenance: every host with these labels, also one that joins later.
        lead_seconds: time ahead of each occurrence by which other leases have ended, for their processes to end.
        reason: why; users see it.
        operator: name of the operator who has booked it.
        booked_at: when it was booked; the planner says so.
    """

    starts_at: Time
    ends_at: Time
    window_id: Identifier | None = None
    repeat: Repeat = Repeat.NONE
    repeat_until: Time | None = None
    zone: Annotated[str, Meta(min_length=1, max_length=64)] = "UTC"
    gpus: Annotated[int, Meta(ge=0, le=4096)] = 0
    models: Annotated[list[ShortText], Meta(max_length=64)] = []
    hosts: Annotated[list[ShortText], Meta(max_length=1024)] = []
    owners: Annotated[list[OwnerName], Meta(max_length=1024)] = []
    group: GroupName | None = None
    maintenance: bool = False
    devices: Annotated[list[ShortText], Meta(max_length=4096)] = []
    host_labels: Labels = {}
    lead_seconds: Annotated[float, Meta(ge=1, le=86400)] = LEAD_SECONDS
    reason: ShortText = ""
    operator: ShortText = ""
    booked_at: Time | None = None


class WindowAction(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Book or cancel a window.

    Attributes:
        book: the window to book; null to cancel one.
        cancel: id of the window to cancel; null to book one.
        dry_run: answer as if it was booked, and change nothing.
        operator: name of the operator.
    """

    book: Window | None = None
    cancel: Identifier | None = None
    dry_run: bool = False
    operator: ShortText = ""


class WindowFilter(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Request for a list of the booked windows. Each field narrows the list.

    Attributes:
        window_id: only the window with this id.
        owner: only windows that are for this owner.
    """

    window_id: Identifier | None = None
    owner: OwnerName | None = None


class WindowLease(Struct, frozen=True, kw_only=True):
    """A lease that a window finds on its devices.

    Attributes:
        lease_id: id of the lease.
        owner: owner of the lease.
        name: name of its workload.
        hosts: hosts of its devices that are in the window.
        ends_at: time at which it ends however often it is renewed; null for no limit.
        preempted: true if it is preempted ahead of the window.
    """

    lease_id: str
    owner: str
    name: str = ""
    hosts: list[str] = []
    ends_at: Time | None = None
    preempted: bool = False


class MissingDevice(Struct, frozen=True, kw_only=True):
    """A device of a window that can't take work, in whose place there is no other yet.

    Attributes:
        device: uuid of the device.
        host: name of its host; empty if no host lists the device.
        reason: why, in words: `drained: new fans`.
    """

    device: str
    host: str = ""
    reason: str = ""


class Replacement(Struct, frozen=True, kw_only=True):
    """A device that a window got in place of another.

    Attributes:
        device: uuid of the device that failed, was drained or lost.
        host: name of its host; empty if no host lists the device.
        by_device: uuid of the device in its place.
        by_host: name of that one's host.
        time: time of the replacement.
        reason: why, in words.
    """

    device: str
    by_device: str
    by_host: str
    time: Time
    host: str = ""
    reason: str = ""


class WindowStatus(Struct, frozen=True, kw_only=True):
    """State of a booked window.

    Attributes:
        window: the window, with its devices.
        state: state of the window.
        starts_at: begin of the occurrence that is now, or else of the next; null if it is over.
        ends_at: end of that occurrence; null if it is over.
        occurrences: number of occurrences that are not over.
        hosts: names of the hosts of its devices.
        leases: leases of before that may reach into this occurrence. Of a window for owners, these are preemptible, and
            are preempted ahead of it. Those that had devices when a maintenance was booked go on until they end, or
            an operator ends them.
        missing: of a window for owners: devices that it is short of. They are replaced when others are free.
        replaced: devices that it got in place of others since it was booked, the latest last; 256 at most.
    """

    window: Window
    state: WindowState
    starts_at: Time | None = None
    ends_at: Time | None = None
    occurrences: int = 0
    hosts: list[str] = []
    leases: list[WindowLease] = []
    missing: list[MissingDevice] = []
    replaced: list[Replacement] = []


class Windows(Struct, frozen=True, kw_only=True, tag="windows", tag_field="type"):
    """Booked windows, soonest first; in answer to an action, the window that was booked or canceled.

    Attributes:
        windows: windows that match.
        warnings: fields of the request that this planner does not know and has ignored.
    """

    windows: list[WindowStatus]
    warnings: list[str] = []


def format_gpus(status: WindowStatus) -> str:
    """Number of GPUs of a window, as `4`, or as `3 of 4` while it is short of some; empty without GPUs."""
    booked = len(status.window.devices)
    return f"{booked - len(status.missing)} of {booked}" if status.missing else str(booked or "")
