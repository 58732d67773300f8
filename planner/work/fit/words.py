"""The answer to whether a model fits in words, and the nearest request that would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from msgspec.structs import replace

from ....schemas.models.serving import FitVerdict, ServeFit, ServeWork
from ....schemas.values.units import format_bytes
from .chain import alone, fewest
from .costs import Costs
from .units import Candidate, mixes, singles

_COUNTED: Final = 16
"""Number of further devices up to which they are counted exactly."""


def fit_words(work: ServeWork, found: ServeFit, offered: int) -> str:
    """The answer in one sentence.

    Args:
        work: what was asked.
        found: the answer, without its words.
        offered: number of devices that might have been used.
    """
    need = f"{format_bytes(found.weights_bytes)} of weights and {format_bytes(found.kv_bytes)} of KV cache"
    of = f" of {offered}" if offered > found.devices else ""
    if found.verdict is FitVerdict.ONE_DEVICE:
        return f"it fits on one device: {need}"
    if found.verdict is FitVerdict.SEVERAL_DEVICES:
        least = min(len(plan.devices) for plan in found.plans)
        return f"it fits on {least} devices, and on none alone: {need}"
    if not found.devices:
        return f"no device may take its {need}"
    if found.short_bytes:
        return (
            f"it does not fit: {need} need {format_bytes(found.short_bytes)} more than the {found.devices}{of} devices "
            f"may use ({format_bytes(found.usable_bytes)})"
        )
    return (
        f"it does not fit: {need} are less than all {found.devices}{of} devices may use "
        f"({format_bytes(found.usable_bytes)}), but no split into whole layers holds them"
    )


def nearest(costs: Costs, devices: Sequence[Candidate], found: ServeFit) -> str:
    """Nearest change with which the model fits; if it fits on several devices, with which it fits on one."""
    if found.verdict is FitVerdict.ONE_DEVICE or not devices:
        return ""
    work = costs.work
    if found.verdict is FitVerdict.SEVERAL_DEVICES:
        units = singles(work, devices)

        def on_one(asked: ServeWork) -> bool:
            return bool(alone(Costs(asked), units))

        most = _most_context(work, on_one)
        return f"on one device with a context of {most} tokens" if most else ""

    def on_all(asked: ServeWork) -> bool:
        return holds(Costs(asked), devices)

    ways: list[str] = []
    most = _most_context(work, on_all)
    if most:
        ways.append(f"a context of {most} tokens")
    fewer = _most_sequences(work, on_all)
    if fewer:
        ways.append(f"{fewer} sequences at once")
    if not ways:
        ways.append(_more_devices(costs, devices, found))
    return " or ".join(ways)


def holds(costs: Costs, devices: Sequence[Candidate]) -> bool:
    """True if some chain over the devices holds the model."""
    return any(fewest(costs, units) is not None for units in mixes(costs.work, devices))


def _most_context(work: ServeWork, fits: Callable[[ServeWork], bool]) -> int:
    """The longest context that fits, in steps of 64 tokens; 0 for none."""
    low, high = 0, (work.context_tokens - 1) // 64
    while low < high:
        middle = (low + high + 1) // 2
        if fits(replace(work, context_tokens=64 * middle, prompt_tokens=None)):
            low = middle
        else:
            high = middle - 1
    return 64 * low


def _most_sequences(work: ServeWork, fits: Callable[[ServeWork], bool]) -> int:
    """The most sequences that fit; 0 for none."""
    low, high = 0, work.sequences - 1
    while low < high:
        middle = (low + high + 1) // 2
        if fits(replace(work, sequences=middle)):
            low = middle
        else:
            high = middle - 1
    return low if low and fits(replace(work, sequences=low)) else 0


def _more_devices(costs: Costs, devices: Sequence[Candidate], found: ServeFit) -> str:
    """Number of further devices of the largest kind, on hosts like its own, that would hold the model."""
    largest = max(devices, key=lambda device: device.memory_bytes)
    info = largest.info
    [unit] = singles(costs.work, [largest])
    room, layer = unit.memory - costs.working, max(costs.sizes.layers) + round(costs.kv_layer_bytes)
    if room < layer:
        need = format_bytes(layer + costs.working)
        return f"devices with more memory: one layer takes {need}, and {info.name} has {format_bytes(unit.memory)}"
    for more in range(1, _COUNTED + 1):
        added = [replace(info, uuid=f"more-{at}", host=f"more-{at}") for at in range(more)]
        if holds(costs, [*devices, *(Candidate(one, largest.memory_bytes) for one in added)]):
            return f"{more} more {info.name}"
    return f"about {-(-(found.short_bytes or layer) // (room // layer * layer))} more {info.name}"
