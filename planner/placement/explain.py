"""Explanations: verdicts on each device and host, with the reason why it is not selected."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import nsmallest
from typing import Final, NamedTuple

from ...schemas.operations import Verdict
from ...schemas.requests import Placement
from ...schemas.values.units import format_bytes
from ..fleet.bookings import booked_words
from ..fleet.device import Device
from ..fleet.fleet import Fleet
from ..fleet.reservation import Reserved, owners_of
from ..fleet.state import Ask, DeviceState, HostState
from . import domains
from .capacity import CapacityTally, allowed, near_device
from .feasible import NEAR_MEMORY, candidates, host_verdict, verdict_of
from .policies import Policy
from .rank import Ranking, ranking
from .reject import WORDS, words
from .select import Pick

LISTED: Final = 1000
"""Limit on the devices, and on the hosts, in an explanation."""


class _Place(NamedTuple):
    """Verdict on one index in a host state, which holds for all hosts of that state."""

    reason: str
    near: bool
    reserved: bool
    score: float | None
    parts: dict[str, float]


def verdicts(fleet: Fleet, policy: Policy, ask: Ask, picks: Sequence[Pick]) -> tuple[list[Verdict], dict[str, str]]:
    """Verdicts per device, selected ones first, then by score; and reasons per host that can't hold the request.

    Both are cut to `LISTED`.
    """
    selected = {device.uuid for pick in picks for device in pick.devices}
    part = ask if ask.placement is Placement.SAME_HOST else ask.part(min(1, ask.gpus))
    ranked = ranking(fleet, policy, part)
    inside = {host.name for host in allowed(fleet, ask)} if ask.filtered else None
    known: dict[tuple[HostState, bool], tuple[str, list[_Place]]] = {}
    found: list[tuple[bool, float, str, int, Device, _Place]] = []
    hosts: dict[str, str] = {}
    short = {} if picks or not ask.within else _short_domains(fleet, ask)
    for name, host in sorted(fleet.hosts.items()):
        outside = inside is not None and name not in inside
        key = (host.state, outside)
        told = known.get(key)
        if told is None:
            told = known[key] = _places(policy, part, ranked, host.state, outside)
        why, places = told
        why = why or short.get(name, "")
        if why and len(hosts) < LISTED:
            kept = fleet.reserved_hosts.get(name)
            hosts[name] = why if kept is None or outside else f"{why}; {_kept(kept)}"
        for device, place in zip(host.order, places, strict=True):
            order = float("inf") if place.score is None else -place.score
            found.append((device.uuid not in selected, order, name, device.index, device, place))
    listed = nsmallest(LISTED, found, key=lambda entry: entry[:4])
    return [_verdict(fleet, ask, device, place, not other) for other, _, _, _, device, place in listed], hosts


def _short_domains(fleet: Fleet, ask: Ask) -> dict[str, str]:
    """Reason why the domain of a host can't hold the request, by host."""
    return {
        host.name: f"{domains.words(ask, room.domain.values)} could hold {room.held} of {ask.gpus} devices"
        for room in domains.rooms(fleet, ask)
        for host in room.domain.hosts
    }


def _places(policy: Policy, part: Ask, ranked: Ranking, state: HostState, outside: bool) -> tuple[str, list[_Place]]:
    """Reason why hosts of a state can't hold the request (or empty), and the verdict on each of their devices."""
    why = WORDS["host"] if outside else _why_host(state, part, len(candidates(state, part)))
    choice = None if why else ranked.choice(state)
    places: list[_Place] = []
    for at, device in enumerate(state.devices):
        verdict = verdict_of(device, part)
        near = verdict == NEAR_MEMORY and not outside
        reason = why if outside or near else _why_device(verdict, device, part) or why
        parts = policy.parts(state, part, choice, at) if choice is not None and not reason and not near else {}
        score = sum(parts.values()) if parts else None
        places.append(_Place(reason, near, verdict == "reserved" and not outside, score, parts))
    return why, places


def _verdict(fleet: Fleet, ask: Ask, device: Device, place: _Place, taken: bool) -> Verdict:
    reason = place.reason
    kept = fleet.reserved.get(device.uuid)
    if kept is not None and place.reserved:
        reason = f"reserved for {', '.join(owners_of([kept]))}, who is ahead"
    elif kept is not None and reason == WORDS["leased"]:
        reason = f"leased; then reserved for {', '.join(owners_of([kept]))}, who is ahead"
    elif reason == WORDS["booked"]:
        reason = booked_words(device.bookings, fleet.bookings, fleet.now)
    if place.near and device.memory_free < ask.gpu_memory_bytes:
        reason = f"too little free memory ({format_bytes(device.memory_free)})"
    return Verdict(
        host=device.host,
        device=device.uuid,
        feasible=taken or not reason,
        reason="" if taken else reason,
        score=place.score,
        score_parts=place.parts,
        selected=taken,
    )


def _kept(kept: Reserved) -> str:
    """Text that describes the reservations on a host, with their owners."""
    parts = [f"{kept.amount / 1000:g} cores"] if kept.amount else []
    parts += [f"{format_bytes(kept.memory)} RAM"] if kept.memory else []
    return f"{' and '.join(parts) or 'devices'} reserved for {', '.join(owners_of([kept]))}"


def _why_device(verdict: str, device: DeviceState, ask: Ask) -> str:
    if not verdict:
        return ""
    single = CapacityTally(ask)
    single.devices[verdict] = 1
    single.nearest[verdict] = {near_device(verdict, device): 1}
    return words(verdict, single, ask)


def _why_host(state: HostState, ask: Ask, usable: int) -> str:
    code = host_verdict(state, ask, usable)
    if code == "host_devices":
        return f"{usable} of {ask.gpus} devices could be used"
    if code == "cpus":
        return f"{max(0, state.cpus_free) / 1000:g} of {ask.cpus_milli / 1000:g} cores are free"
    if code == "host_memory":
        return f"{format_bytes(max(0, state.memory_free))} of {format_bytes(ask.host_memory_bytes)} RAM are free"
    return WORDS.get(code, code)
