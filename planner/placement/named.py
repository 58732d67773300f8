"""Placement on the devices that a request names, in its order."""

from __future__ import annotations

from itertools import groupby

from ...schemas.requests import Placement, Reason, Rejection, RejectionCode, WorkRequest
from ..fleet.fleet import Fleet
from ..fleet.state import Ask, InvalidRequest
from .exact import Pick
from .feasible import NEAR_MEMORY, capacity, matches_host, verdict_of
from .policies import Choice
from .reject import WORDS, could_ever_fit


def check_named(request: WorkRequest) -> None:
    """Check that a request that names devices asks for nothing that would choose others.

    Raises:
        InvalidRequest: it does; with the field at fault and what to do.
    """
    if not request.devices:
        return
    if len(request.devices) != request.gpus:
        text = f"gpus is {request.gpus}, but {len(request.devices)} devices are named: set gpus to their number"
        raise InvalidRequest(text, "$.gpus")
    if len(set(request.devices)) < len(request.devices):
        raise InvalidRequest("a device is named twice", "$.devices")
    others = {
        "gpu_share": request.gpu_share,
        "mig": request.mig,
        "gpus_max": request.gpus_max,
        "gpus_per_host": request.gpus_per_host,
        "within": request.within,
        "prefer_within": request.prefer_within,
        "wait_seconds": request.wait_seconds,
    }
    for name, value in others.items():
        if value:
            raise InvalidRequest(f"devices are named, so {name} has nothing to choose: leave it out", f"$.{name}")


def named_picks(fleet: Fleet, ask: Ask, request: WorkRequest) -> list[Pick] | Rejection:
    """Pick the named devices, or reject the request with the reason for each of them that can't be had now.

    Args:
        fleet: the state.
        ask: the request in whole numbers.
        request: the same, valid by `check_named`.
    """
    one = fleet.ask(
        ask.key._replace(
            gpus=request.gpus,
            placement=Placement.SAME_HOST,
            hosts=(),
            host_labels=(),
            within=(),
            prefer_within="",
            per_host=1,
        )
    )
    reasons: list[Reason] = []
    places: list[tuple[str, int]] = []
    for uuid in request.devices:
        device = fleet.devices.get(uuid)
        host = None if device is None else fleet.hosts.get(device.host)
        if device is None or host is None:
            reasons.append(Reason(code="unknown", devices=1, detail=f"{uuid}: no such device"))
            continue
        place = host.order.index(device)
        verdict = verdict_of(host.state.devices[place], one)
        if verdict == NEAR_MEMORY:
            verdict = "" if device.memory_free >= ask.gpu_memory_bytes else "memory"
        if not verdict and not matches_host(host.name, host.labels, ask.hosts, ask.host_labels):
            verdict = "host"
        if verdict:
            reasons.append(Reason(code=verdict, devices=1, detail=f"{uuid}: {WORDS.get(verdict, verdict)}"))
        places.append((host.name, place))
    for name, count in {name: sum(other == name for other, _ in places) for name, _ in places}.items():
        if not reasons and capacity(fleet.hosts[name].state, one, count) < count:
            reasons.append(
                Reason(code="host", devices=count, detail=f"{name}: too few cores or too little RAM are free")
            )
    if reasons:
        return _rejection(fleet, ask, request, reasons)
    picks: list[Pick] = []
    for name, run in groupby(places, key=lambda entry: entry[0]):
        host, chosen = fleet.hosts[name], tuple(place for _, place in run)
        devices = tuple(host.order[place] for place in chosen)
        picks.append(Pick(host, devices, chosen, host.state, one, Choice(0.0, 0.0, chosen)))
    return picks


def _details(reasons: list[Reason]) -> str:
    named = [reason.detail for reason in reasons]
    return ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")


def _rejection(fleet: Fleet, ask: Ask, request: WorkRequest, reasons: list[Reason]) -> Rejection:
    known = all(reason.code != "unknown" for reason in reasons)
    # Whether they are on one host does not matter, as they are named.
    one = ask.key._replace(gpus=1, placement=Placement.SAME_HOST, within=(), prefer_within="", per_host=1)
    fits = known and could_ever_fit(fleet, fleet.ask(one))
    merged: dict[str, list[Reason]] = {}
    for reason in reasons:
        merged.setdefault(reason.code, []).append(reason)
    listed = [
        Reason(code=code, devices=sum(reason.devices for reason in alike), detail=_details(alike))
        for code, alike in merged.items()
    ]
    count = sum(reason.devices for reason in reasons)
    return Rejection(
        code=RejectionCode.NO_CAPACITY if fits else RejectionCode.IMPOSSIBLE,
        message=f"{count} of the {request.gpus} named devices can't be had: "
        + "; ".join(reason.detail for reason in listed),
        reasons=listed,
        could_ever_fit=fits,
        request_id=request.request_id or "",
    )
