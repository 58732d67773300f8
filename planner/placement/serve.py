"""Devices that could serve a model now, and the explanation of a request with `distribution.method: serve`."""

from __future__ import annotations

from ...schemas.models.serving import ServeFit, ServeWork
from ...schemas.requests import Placement
from ..fleet.device import Device
from ..fleet.fleet import Fleet
from ..fleet.state import Ask
from ..work.fit.plans import fit
from ..work.fit.units import Candidate
from .capacity import allowed
from .feasible import NEAR_MEMORY, candidates, verdict_of


def usable(fleet: Fleet, ask: Ask, named: list[str]) -> list[Device]:
    """Devices that a request could get now, one at a time, whatever its number of devices.

    Args:
        fleet: the state.
        ask: the request in whole numbers.
        named: uuids of the only devices that it allows; empty allows any.
    """
    one = fleet.ask(
        ask.key._replace(
            gpus=1,
            cpus_milli=0,
            host_memory_bytes=0,
            placement=Placement.SAME_HOST,
            within=(),
            prefer_within="",
            per_host=1,
        )
    )
    only = set(named)
    found: list[Device] = []
    for host in allowed(fleet, one):
        if host.state.blocked:
            continue
        places = set(candidates(host.state, one))
        for place, device in enumerate(host.order):
            near = place not in places and verdict_of(host.state.devices[place], one) == NEAR_MEMORY
            if (place in places or (near and device.memory_free >= one.gpu_memory_bytes)) and (
                not only or device.uuid in only
            ):
                found.append(device)
    return found


def fit_fleet(fleet: Fleet, ask: Ask, work: ServeWork, named: list[str]) -> ServeFit:
    """Decide whether the devices that a request could get now can serve a model."""
    return fit(work, [Candidate(device.info, device.memory_free) for device in usable(fleet, ask, named)])
