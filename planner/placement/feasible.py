"""Feasibility of devices and hosts for a request, with the reason if they are not feasible."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from ...schemas.values import globs
from ..fleet.device import Device
from ..fleet.state import (
    BLOCKS,
    MIG_PARENT,
    ROUNDED_OFF_BYTES,
    UNLIMITED,
    WHOLE_SHARE,
    Ask,
    DeviceState,
    HostState,
    Model,
)

VERDICTS_KEPT: Final = 4096
PART_SLACK_BYTES: Final = 512 * 2**20
"""Tolerance for a share that names no memory: it may get this less than its part, or an eighth if that is less."""
NEAR_MEMORY: Final = "memory?"
"""Verdict: too little free memory as rounded, but the exact amount may suffice."""


def model_verdict(model: Model, ask: Ask) -> str:
    """Reason why no device of the model can ever hold the request; empty if it could."""
    if model.mig_profile:
        return _instance_verdict(model, ask)
    if ask.mig:
        return "not_mig"
    if ask.models and not globs.matches_any(model.name.lower(), ask.models):
        return "model"
    return _others(model, ask)


def _instance_verdict(model: Model, ask: Ask) -> str:
    if not ask.mig and not ask.mig_models:
        return "mig"
    if ask.mig and not globs.matches_any(model.mig_profile.lower(), ask.mig):
        return "mig_profile"
    # A glob that names no profile matches an instance only if the request has `mig`.
    models = ask.models if ask.mig else ask.mig_models
    name = model.name.lower()
    named = (name, f"{name} mig {model.mig_profile.lower()}")
    if models and not any(globs.matches_any(text, models) for text in named):
        return "model"
    return _others(model, ask)


def _others(model: Model, ask: Ask) -> str:
    if ask.vendors and model.vendor.lower() not in ask.vendors:
        return "vendor"
    if model.compute_capability < ask.min_compute_capability:
        return "compute_capability"
    return "quota" if model.name in ask.barred else ""


def device_verdict(device: DeviceState, ask: Ask) -> str:
    """Reason why a device can't be used; empty if it can."""
    if device.blocked & MIG_PARENT:
        return "mig_parent"
    if not model_allowed(device.model, ask):
        return model_verdict(device.model, ask)
    if device.blocked:
        return next(name for bit, name in BLOCKS.items() if device.blocked & bit)
    if ask.whole:
        if device.leased:
            return "leased"
        if device.share < WHOLE_SHARE:
            return "reserved"
    elif device.share < ask.share:
        return "share"
    if not admitted(device, ask):
        return "booked"
    if not (ask.whole or ask.gpu_memory_bytes or has_part(device, ask.share)):
        return "memory"
    if device.memory_free < ask.gpu_memory_bytes:
        if device.rounded and ask.gpu_memory_bytes < device.memory_free + ROUNDED_OFF_BYTES:
            return _in_use(device, ask) or NEAR_MEMORY
        return "memory"
    return _in_use(device, ask)


def admitted(device: DeviceState | Device, ask: Ask) -> bool:
    """True if booked windows leave a device to the request: it may use the window, or has ended before the next."""
    if device.booked_for or ask.inside:
        return device.booked_for in ask.windows
    return ask.ends_by <= device.booked_from


def _in_use(device: DeviceState, ask: Ask) -> str:
    return "in_use" if ask.whole and device.in_use and not ask.allow_in_use else ""


def verdict_of(device: DeviceState, ask: Ask) -> str:
    """`device_verdict`, cached for each state."""
    verdicts = ask.verdicts
    found = verdicts.get(device)
    if found is None:
        if len(verdicts) >= VERDICTS_KEPT:
            verdicts.clear()
        found = verdicts[device] = device_verdict(device, ask)
    return found


def candidates(state: HostState, ask: Ask) -> list[int]:
    """Indexes of the usable devices: those whose verdict is empty, found without computing reasons if possible."""
    found: list[int] = []
    memory, share = ask.gpu_memory_bytes, ask.share
    if not ask.plain:
        for device, places in state.kinds:
            if not verdict_of(device, ask):
                found += places
    elif ask.whole:
        for device, places in state.kinds:
            if device.idle and device.memory_free >= memory and (ask.any_model or model_allowed(device.model, ask)):
                found += places
    else:
        for device, places in state.kinds:
            if (
                device.open_share >= share
                and (device.memory_free >= memory if memory else has_part(device, share))
                and (ask.any_model or model_allowed(device.model, ask))
            ):
                found += places
    return found


def has_part(device: DeviceState, share: int) -> bool:
    """True if a share can get its part of the device's memory, less a tolerance for the driver and small processes."""
    part = device.memory_most * share // WHOLE_SHARE
    free = device.memory_free + ROUNDED_OFF_BYTES if device.rounded else device.memory_free
    return free >= part - min(PART_SLACK_BYTES, part // 8)


def part_most(device: DeviceState) -> int:
    """The largest share, in billionths, that `has_part` allows; it may be more than a whole device."""
    if not device.memory_most:
        return WHOLE_SHARE
    free = device.memory_free + ROUNDED_OFF_BYTES if device.rounded else device.memory_free
    part = min(free + PART_SLACK_BYTES, 8 * free // 7)
    return ((part + 1) * WHOLE_SHARE - 1) // device.memory_most


def model_allowed(model: Model, ask: Ask) -> bool:
    """True if the request allows the model; cached."""
    found = ask.allowed.get(model)
    if found is None:
        found = ask.allowed[model] = not model_verdict(model, ask)
    return found


def excluded(state: HostState, ask: Ask) -> bool:
    """True if a host's totals show that it can't hold the whole request."""
    return (
        state.cpus_free < ask.cpus_milli
        or state.memory_free < ask.host_memory_bytes
        or state.blocked != 0
        or (state.booked_from < ask.ends_by and not ask.gpus)
        or not ((state.whole_free >= ask.gpus if ask.whole else state.share_most >= ask.share) if ask.plain else True)
    )


def host_verdict(state: HostState, ask: Ask, usable: int) -> str:
    """Reason why a single host can't hold the whole request, given its number of usable devices; empty if it can."""
    if state.blocked:
        return next(name for bit, name in BLOCKS.items() if state.blocked & bit)
    if not ask.gpus and state.booked_from < ask.ends_by:
        return "booked"
    if usable < ask.gpus:
        return "host_devices"
    if state.cpus_free < ask.cpus_milli:
        return "cpus"
    if state.memory_free < ask.host_memory_bytes:
        return "host_memory"
    return ""


def capacity(state: HostState, ask: Ask, usable: int) -> int:
    """Number of the request's devices that a host can hold, each with its part of cores and RAM."""
    return 0 if state.blocked else room(state.cpus_free, state.memory_free, ask, usable)


def room(cpus_free: int, memory_free: int, ask: Ask, usable: int) -> int:
    """Number of the request's devices, of those that are usable, that so many cores and so much RAM suffice for.

    With several devices on each host, the number of times that a host has these.
    """
    held = min(usable // ask.per_host, ask.gpus)
    # The part of k devices is rounded up: ceil(C·k/N) ≤ F exactly where k ≤ ⌊F·N/C⌋.
    if ask.cpus_milli and cpus_free < UNLIMITED:
        held = min(held, max(0, cpus_free) * ask.gpus // ask.cpus_milli)
    if ask.host_memory_bytes and memory_free < UNLIMITED:
        held = min(held, max(0, memory_free) * ask.gpus // ask.host_memory_bytes)
    return held


def matches_host(name: str, labels: dict[str, str], hosts: Sequence[str], wanted: Sequence[tuple[str, str]]) -> bool:
    """True if a request that names hosts or labels may use a host."""
    if hosts and not globs.matches_any(name.lower(), hosts):
        return False
    return all(labels.get(key) == value for key, value in wanted)
