"""Rejections: every device counted under one reason, in words, and if the request could ever fit."""

from __future__ import annotations

import math
from typing import Final

from ...schemas.requests import Placement, Reason, Rejection, RejectionCode
from ...schemas.values.units import format_bytes, format_limit
from ..fleet.bookings import booked_words
from ..fleet.fleet import Fleet
from ..fleet.reservation import owners_of
from ..fleet.state import WHOLE_SHARE, Ask, HostState
from . import domains
from .capacity import CapacityTally, allowed, room_for
from .feasible import NEAR_MEMORY, candidates, capacity, verdict_of


def reject(fleet: Fleet, ask: Ask, request_id: str = "") -> Rejection:
    """Make the rejection of a request that `select` found no placement for."""
    if not fleet.hosts or (ask.gpus and not fleet.devices):
        message = "the planner knows no device (yet): is a collector running, on this bus?"
        return Rejection(code=RejectionCode.NO_DEVICES, message=message, request_id=request_id)
    tally = room_for(fleet, ask)
    merged = dict(tally.devices)
    if NEAR_MEMORY in merged:
        merged["memory"] = merged.get("memory", 0) + merged.pop(NEAR_MEMORY)
    unit = "devices" if ask.gpus else "hosts"
    reasons = [
        Reason(code=code, devices=devices, detail=_detail(fleet, code, tally, ask))
        for code, devices in sorted(merged.items(), key=lambda item: (-item[1], item[0]))
    ]
    if _IN_PART & merged.keys() and (fleet.reserved or fleet.reserved_hosts) and "reserved" not in merged:
        message_end = f"; a part is {kept(fleet)}"
    else:
        message_end = ""
    fits = could_ever_fit(fleet, fleet.ask(ask.key._replace(barred=())) if ask.barred else ask)
    listed = ", ".join(f"{reason.devices} {reason.detail}" for reason in reasons)
    message = f"0/{tally.total} {unit}: {listed}{message_end}"
    if not fits:
        message += "; this fleet could not hold it even when idle"
    return Rejection(
        code=RejectionCode.NO_CAPACITY if fits else RejectionCode.IMPOSSIBLE,
        message=message,
        reasons=reasons,
        could_ever_fit=fits,
        request_id=request_id,
        nearest=_nearest(fleet, tally, ask, fits) or (_sooner(fleet, ask) if "booked" in merged else ""),
    )


def quota_rejection(fleet: Fleet, ask: Ask, reason: str, request_id: str = "") -> Rejection:
    """Make the rejection of a request that quotas let take nothing.

    Args:
        fleet: the state.
        ask: the request.
        reason: which quota, and what to do, in words.
        request_id: of the request.
    """
    free = fleet.ask(ask.key._replace(barred=())) if ask.barred else ask
    if not could_ever_fit(fleet, free):
        # Not what others are guaranteed stands in its way, and to wait is of no use.
        return reject(fleet, free, request_id)
    return Rejection(
        code=RejectionCode.NO_CAPACITY,
        message=reason,
        reasons=[Reason(code="quota", devices=len(fleet.devices), detail=reason)],
        could_ever_fit=True,
        request_id=request_id,
        nearest="wait (wait_seconds) until the group uses less",
    )


def _detail(fleet: Fleet, code: str, tally: CapacityTally, ask: Ask) -> str:
    if code == "reserved":
        return kept(fleet)
    if code == "booked":
        return _booked(fleet, ask)
    return words(code, tally, ask) + (_nearest_domain(fleet, ask) if code == "devices" and ask.within else "")


def _nearest_domain(fleet: Fleet, ask: Ask) -> str:
    near = domains.nearest(fleet, ask)
    return "" if near is None else f" (nearest: {domains.words(ask, near.domain.values)} with {near.held})"


def _booked(fleet: Fleet, ask: Ask) -> str:
    """Text on the booked devices that a request could use: of those that are booked last, for whom and from when."""
    latest = _booked_from(fleet, ask)
    bookings = fleet.bookings.closing(latest) or fleet.bookings.running
    return booked_words(bookings, fleet.bookings, fleet.now)


def _booked_from(fleet: Fleet, ask: Ask) -> float:
    """The latest time by which leases must have ended on a booked device that a request could use.

    Minus infinity if all are booked now.
    """
    if ask.filtered or not ask.gpus:
        states = {host.state for host in (allowed(fleet, ask) if ask.filtered else fleet.hosts.values())}
        if not ask.gpus:
            return max((state.booked_from for state in states if state.booked_from < math.inf), default=-math.inf)
        devices = {device for state in states for device, _ in state.kinds}
    else:
        devices = fleet.index.devices.keys()
    booked = (device.booked_from for device in devices if verdict_of(device, ask) == "booked")
    return max((at for at in booked if at < math.inf), default=-math.inf)


def _sooner(fleet: Fleet, ask: Ask) -> str:
    """Suggest a limit with which a request could have devices until they are booked; empty if none would do."""
    left = _booked_from(fleet, ask) - fleet.now
    if left < 1:
        return "wait for the booked window to end (wait_seconds)"
    limit = format_limit(math.floor(left))
    return f"ask with a time limit of at most {limit} (--max), or preemptible, to use devices until then"


def kept(fleet: Fleet) -> str:
    """Text that names the owners of applied reservations."""
    owners = owners_of([*fleet.reserved.values(), *fleet.reserved_hosts.values()])
    more = f" and {len(owners) - _OWNERS_NAMED} more" if len(owners) > _OWNERS_NAMED else ""
    return f"reserved for requests ahead of it, of {', '.join(owners[:_OWNERS_NAMED])}{more}"


def words(code: str, tally: CapacityTally, ask: Ask) -> str:
    """Text of a reason, with the nearest miss if there is one."""
    near = max(tally.most(code), tally.most(NEAR_MEMORY)) if code == "memory" else tally.most(code)
    if code == "memory":
        return f"too little free memory (largest {format_bytes(near)})"
    if code == "share":
        return f"too little free share (largest {near / WHOLE_SHARE:g})"
    if code == "compute_capability":
        wanted = ".".join(map(str, ask.min_compute_capability))
        return f"compute capability below {wanted} (highest {int(near) // 1000}.{int(near) % 1000})"
    if code == "host_devices":
        wanted = ask.gpus if ask.placement is Placement.SAME_HOST else ask.part(1).gpus
        return f"too few together (most on one host: {int(near)} of {wanted})"
    if code == "devices":
        return f"could be used, but the request needs {_needs(ask)}"
    if code == "cpus":
        return f"on hosts with too few free cores (most {near / 1000:g}, needed {_part_cpus(ask):g})"
    if code == "host_memory":
        return f"on hosts with too little free RAM (most {format_bytes(near)}, needed {format_bytes(_part_ram(ask))})"
    if code == "host" and ask.within:
        return f"{WORDS[code]}, or without the label {' and '.join(ask.within)}"
    return WORDS.get(code, code)


_OWNERS_NAMED: Final = 3
_IN_PART: Final = frozenset({"cpus", "host_memory", "share", "memory"})
"""Reasons that may be due to a part of a host or device being reserved."""
WORDS: Final = {
    "model": "wrong model",
    "vendor": "wrong vendor",
    "stale": "without recent samples",
    "unhealthy": "unhealthy",
    "drained": "drained",
    "mig_parent": "split into MIG instances",
    "host_lost": "on lost hosts",
    "reserved": "reserved for requests ahead of it",
    "leased": "leased",
    "booked": "booked",
    "in_use": "in use by others without a lease",
    "mig": "MIG instances",
    "mig_profile": "MIG instances of another profile",
    "not_mig": "whole, not MIG instances",
    "host": "on hosts that the request does not allow",
    "quota": "beyond the quota of the group",
}


def _needs(ask: Ask) -> str:
    where = f" within one {' and one '.join(ask.within)}" if ask.within else ""
    if ask.placement is Placement.SPREAD:
        each = f" with {ask.per_host} devices each" if ask.per_host > 1 else ""
        return f"{ask.gpus} hosts{each}{where}"
    return f"{ask.gpus}{where}"


def _part_cpus(ask: Ask) -> float:
    return (ask if ask.placement is Placement.SAME_HOST else ask.part(1)).cpus_milli / 1000


def _part_ram(ask: Ask) -> int:
    return (ask if ask.placement is Placement.SAME_HOST else ask.part(1)).host_memory_bytes


def _nearest(fleet: Fleet, tally: CapacityTally, ask: Ask, fits: bool) -> str:
    """Suggest the one change that would bring the request closest; empty if there is none."""
    near = domains.nearest(fleet, ask) if ask.within else None
    if near is not None:
        spread = ask.placement is Placement.SPREAD
        held = near.held * ask.per_host
        if (tally.hosts if spread else tally.together) >= ask.gpus:
            return f"ask for {held} devices, or with prefer_within (--prefer-within), which would fit now"
        return f"ask for {held} devices, which {domains.words(ask, near.domain.values)} has free"
    most = tally.most("host_devices")
    if most and ask.per_host > 1:
        return f"ask for {most} devices on each host (gpus_per_host)"
    if most:
        if ask.placement is Placement.SAME_HOST and fits:
            return f"{most} of {ask.gpus} devices are free on one host; placement fewest_hosts may use several"
        return f"ask for {most} devices, or allow several hosts with placement fewest_hosts"
    memory = max(tally.most("memory"), tally.most(NEAR_MEMORY))
    if memory:
        return f"ask for at most {format_bytes(memory)} of device memory"
    if tally.most("share"):
        return f"ask for a share of at most {tally.most('share') / WHOLE_SHARE:g}"
    if tally.most("cpus"):
        return f"ask for at most {tally.most('cpus') / 1000:g} cores"
    if tally.most("host_memory"):
        return f"ask for at most {format_bytes(tally.most('host_memory'))} of RAM"
    if "in_use" in tally.devices and fits:
        return "ask with allow_in_use (--allow-in-use) to be given devices that others use, or wait for them to end"
    if "leased" in tally.devices and "booked" not in tally.devices and fits:
        return "wait for a lease to end (wait_seconds)"
    if "mig" in tally.devices and ask.gpus <= 1:
        return "ask with mig (--mig) for a MIG instance"
    if "mig" in tally.devices:
        return "ask with mig (--mig) for MIG instances, one in each request"
    return ""


def could_ever_fit(fleet: Fleet, ask: Ask) -> bool:
    """Check if the fleet could hold the request when idle and healthy; cached until that capacity changes."""
    key = ("ever", ask)
    kept = fleet.cache.get(key)
    version = fleet.idle_version, fleet.shape_version
    if kept is None or kept[0] != version:
        kept = fleet.cache.put(key, (version, _could_ever_fit(fleet, ask)))
    return kept[1]


def _could_ever_fit(fleet: Fleet, ask: Ask) -> bool:
    if ask.within:
        return any(could_ever_fit(fleet, domain.ask) for domain in domains.domains(fleet, ask))
    if ask.filtered:
        counted: dict[HostState, int] = {}
        for host in allowed(fleet, ask):
            if host.idle is not None:
                counted[host.idle] = counted.get(host.idle, 0) + 1
    else:
        counted = fleet.idle
    together = hosts_able = 0
    for state, hosts in counted.items():
        room = capacity(state, ask, len(candidates(state, ask)))
        if not ask.gpus or ask.placement is Placement.SAME_HOST:
            if room >= ask.gpus and state.cpus_free >= ask.cpus_milli and state.memory_free >= ask.host_memory_bytes:
                return True
            continue
        together += room * hosts
        hosts_able += hosts if room else 0
    if not ask.gpus or ask.placement is Placement.SAME_HOST:
        return False
    return (hosts_able if ask.placement is Placement.SPREAD else together) >= ask.gpus
