"""Changes of the devices of an elastic lease, as pure functions over records.

```
            offer ─────► resize_offered ──┬─ accepted ──► resized (more devices)
 active ───┤                              └─ declined, over, withdrawn ──► as it was
            request ───► resize_requested ┬─ accepted ──► resized (fewer devices)
                                          └─ declined, over, withdrawn ──► as it was
```

A notice is in the record, so that it outlives the planner, and changes nothing by itself: the devices change with the
holder's answer, which must come before the notice is over. At most one notice is out. A lease never has fewer devices
than its `elastic.min`, nor more than its `elastic.max`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from typing import Final, NamedTuple

from msgspec.structs import replace

from ...schemas.limits import GRACE_SECONDS
from ...schemas.requests import Grant, Lease, LeaseEventKind, LeaseState, Resize, ResizeAction, ResizeKind
from .lifecycle import LeaseRecord, Refused, Returned, next_record

OFFER_SECONDS: Final = 30.0
"""Time for which devices are offered."""
RETURNED_SECONDS: Final = 600.0
"""Time for which a record has the devices that were given back: longer than use is saved without them."""


class Claimant(NamedTuple):
    """The request for which devices are asked back.

    Attributes:
        request_id: its id.
        owner: its owner.
        group: group of the owner; empty if none counts.
    """

    request_id: str
    owner: str
    group: str = ""


def devices_of(lease: Lease) -> list[str]:
    """UUIDs of a lease's devices."""
    return [grant.device for grant in lease.grants if grant.device]


def may_grow_by(lease: Lease) -> int:
    """Number of devices that an active elastic lease may be offered; 0 while a notice is out."""
    if lease.state is not LeaseState.ACTIVE or lease.elastic is None or lease.resize or lease.preemption:
        return 0
    return max(0, lease.elastic.max - len(devices_of(lease)))


def may_shrink_by(lease: Lease) -> int:
    """Number of devices that an active elastic lease may be asked to give back."""
    if lease.state is not LeaseState.ACTIVE or lease.elastic is None or lease.preemption:
        return 0
    return max(0, len(devices_of(lease)) - lease.elastic.min)


def offer(record: LeaseRecord, grants: Sequence[Grant], now: datetime, planner: str) -> LeaseRecord:
    """Offer devices to the holder of an elastic lease; the record stays as it is if it can't have so many."""
    if not grants or len(grants) > may_grow_by(record.lease):
        return record
    resize = Resize(
        number=record.version + 1,
        kind=ResizeKind.OFFER,
        notified_at=now,
        ends_at=now + timedelta(seconds=OFFER_SECONDS),
        grants=list(grants),
        reason="idle, and nobody in the queue could take them",
    )
    return next_record(record, LeaseEventKind.RESIZE_OFFERED, replace(record.lease, resize=resize), now, planner)


def is_asked(lease: Lease) -> bool:
    """True if the holder of a lease has been asked to give devices back, and may still."""
    return lease.resize is not None and lease.resize.kind is ResizeKind.REQUEST


def ask_back(
    record: LeaseRecord,
    devices: Collection[str],
    claimant: Claimant,
    now: datetime,
    planner: str,
    reason: str = "a request in the queue could take them",
) -> LeaseRecord:
    """Ask the holder of an elastic lease to give devices back within its grace.

    It takes the place of an offer. The record stays as it is if the lease can't do without them, or was asked before.
    """
    lease = record.lease
    grants = [grant for grant in lease.grants if grant.device in devices]
    if not grants or is_asked(lease) or len(grants) > may_shrink_by(lease):
        return record
    resize = Resize(
        number=record.version + 1,
        kind=ResizeKind.REQUEST,
        notified_at=now,
        ends_at=now + timedelta(seconds=lease.grace_seconds or GRACE_SECONDS),
        grants=grants,
        reason=reason,
        claimant=claimant.request_id,
        claimant_owner=claimant.owner,
        claimant_group=claimant.group,
    )
    return next_record(record, LeaseEventKind.RESIZE_REQUESTED, replace(lease, resize=resize), now, planner)


def ask_by_hand(record: LeaseRecord, devices: Sequence[str], reason: str, now: datetime, planner: str) -> LeaseRecord:
    """Ask the holder of an elastic lease to give devices back, on behalf of an operator. Idempotent.

    Raises:
        Refused: the lease is not elastic, can't do without them, or is asked for others already.
    """
    lease = record.lease
    if lease.elastic is None:
        text = f"Lease {lease.lease_id} is not elastic: name no devices to preempt it as a whole"
        raise Refused("refused", text, "$.devices")
    if lease.preemption is not None:
        raise Refused("refused", f"Lease {lease.lease_id} is being preempted: all its devices come back", "$.lease_id")
    named = _named(lease.grants, devices, "are the lease's")
    if lease.resize is not None and is_asked(lease):
        if {grant.device for grant in lease.resize.grants} == {grant.device for grant in named}:
            return record
        ends = lease.resize.ends_at.isoformat(timespec="seconds")
        raise Refused("conflict", f"Lease {lease.lease_id} is asked for other devices until {ends}", "$.devices")
    if len(named) > may_shrink_by(lease):
        text = f"The lease has to keep {lease.elastic.min} devices, its min: ask for {may_shrink_by(lease)} at most"
        raise Refused("invalid", text, "$.devices")
    return ask_back(record, [grant.device for grant in named], Claimant("", ""), now, planner, reason)


def withdraw(record: LeaseRecord, number: int, now: datetime, planner: str) -> LeaseRecord:
    """Withdraw a notice, if it is still out: the lease goes on as it is."""
    resize = record.lease.resize
    if record.lease.state is not LeaseState.ACTIVE or resize is None or resize.number != number:
        return record
    return next_record(record, LeaseEventKind.RENEWED, replace(record.lease, resize=None), now, planner)


def answered(record: LeaseRecord, action: ResizeAction, now: datetime) -> list[Grant] | None:
    """Devices of which an answer to a notice says that the lease gets them, or gives them back.

    Args:
        record: of an active lease of the owner.
        action: the answer.
        now: time of the answer.

    Returns:
        None if the answer came before, and was carried out; an empty list if it declines.

    Raises:
        Refused: the lease is not elastic, no such notice is out, or the devices are not those that it is about.
    """
    lease, resize = record.lease, record.lease.resize
    if lease.elastic is None:
        text = f"Lease {lease.lease_id} is not elastic: it keeps the devices that it was granted"
        raise Refused("refused", text, "$.lease_id")
    if action.number is not None and action.number == record.answered:
        return None
    if action.number is not None and (resize is None or resize.number != action.number):
        text = (
            f"Notice {action.number} of lease {lease.lease_id} is over or was withdrawn: its devices stay as they are"
        )
        raise Refused("conflict", text, "$.number")
    if resize is not None and now > resize.ends_at:
        ended = resize.ends_at.isoformat(timespec="seconds")
        raise Refused("conflict", f"The notice of lease {lease.lease_id} was over at {ended}: nothing changes")
    if not action.accept:
        if resize is None:
            raise Refused("refused", f"Lease {lease.lease_id} has no notice to decline", "$.accept")
        return []
    if resize is not None and resize.kind is ResizeKind.OFFER and not _gives_back(lease, action):
        return _named(resize.grants, action.devices, "are offered") if action.devices else list(resize.grants)
    return _given(lease, action)


def _gives_back(lease: Lease, action: ResizeAction) -> bool:
    """True if devices are named that the lease has: while some are offered, too, it may give others back."""
    return bool(action.devices) and set(action.devices) <= set(devices_of(lease))


def _given(lease: Lease, action: ResizeAction) -> list[Grant]:
    if lease.preemption is not None:
        text = f"Lease {lease.lease_id} is being preempted: release it to give its devices back before it ends"
        raise Refused("refused", text, "$.lease_id")
    resize = lease.resize if lease.resize is not None and lease.resize.kind is ResizeKind.REQUEST else None
    if not action.devices and resize is None:
        raise Refused(
            "refused", f"Lease {lease.lease_id} has no notice to accept: name devices to give back", "$.devices"
        )
    given = (
        _named(lease.grants, action.devices, "are the lease's")
        if action.devices
        else list(resize.grants if resize else ())
    )
    if resize is not None and len(given) < len(resize.grants):
        text = f"{len(resize.grants)} devices are asked back, and {len(given)} named: name as many, or none"
        raise Refused("invalid", text, "$.devices")
    if len(given) > may_shrink_by(lease):
        least = 0 if lease.elastic is None else lease.elastic.min
        raise Refused("invalid", f"The lease has to keep {least} devices, its min: give fewer back", "$.devices")
    return given


def _named(grants: Sequence[Grant], devices: Sequence[str], which: str) -> list[Grant]:
    named = set(devices)
    found = [grant for grant in grants if grant.device in named]
    if len(found) < len(named):
        other = min(named - {grant.device for grant in found})
        raise Refused("invalid", f"Device {other!r} is none of those that {which}", "$.devices")
    return found


def resized(
    record: LeaseRecord,
    grants: Sequence[Grant],
    environment: dict[str, dict[str, str]],
    addresses: dict[str, str],
    now: datetime,
    planner: str,
) -> LeaseRecord:
    """Give a lease other devices, as its holder agreed.

    Args:
        record: of an active lease.
        grants: all devices that it has from now on.
        environment: for these.
        addresses: of their hosts.
        now: time of the change.
        planner: id of this planner.
    """
    before, lease = record.lease, record.lease
    kept = {grant.device for grant in grants}
    had = set(devices_of(before))
    returned = [each for each in record.returned if (now - each.until).total_seconds() < RETURNED_SECONDS]
    returned += [Returned(grant=_slim(grant), until=now) for grant in before.grants if grant.device not in kept]
    after = replace(
        lease,
        grants=[grant if grant.device in had else replace(grant, since=now) for grant in grants],
        environment=environment,
        addresses=addresses,
        resize=None,
    )
    number = record.answered if before.resize is None else before.resize.number
    changed = next_record(record, LeaseEventKind.RESIZED, after, now, planner)
    return replace(changed, returned=returned, answered=number)


def _slim(grant: Grant) -> Grant:
    return replace(grant, score_parts={}, items=[])


def changed_devices(before: LeaseRecord | None, after: LeaseRecord) -> tuple[list[Grant], list[Grant]]:
    """Devices that an active lease has got by a change, and those that it has no more."""
    if before is None or before.lease.grants is after.lease.grants or after.lease.state is not LeaseState.ACTIVE:
        return [], []
    had, has = set(devices_of(before.lease)), set(devices_of(after.lease))
    added = [grant for grant in after.lease.grants if grant.device not in had]
    return added, [grant for grant in before.lease.grants if grant.device not in has]


def shapes(record: LeaseRecord, since: float) -> list[tuple[float, list[Grant]]]:
    """Devices that a lease held from a time on: from when, and which, in order of time.

    Args:
        record: of a lease; it has what was given back in the last `RETURNED_SECONDS`.
        since: time from which it counts, seconds since the epoch.

    Returns:
        Times in seconds since the epoch, each with the devices from then on.
    """
    lease = record.lease
    granted_at = lease.granted_at.timestamp()
    first = max(since, granted_at)
    if lease.elastic is None:
        return [(first, lease.grants)]
    held = [(grant, _since(grant, granted_at), math.inf) for grant in lease.grants]
    held += [(each.grant, _since(each.grant, granted_at), each.until.timestamp()) for each in record.returned]
    times = {first, *(time for _, *times in held for time in times if first < time < math.inf)}
    return [(at, [grant for grant, begins, until in held if begins <= at < until]) for at in sorted(times)]


def _since(grant: Grant, granted_at: float) -> float:
    return granted_at if grant.since is None else grant.since.timestamp()
