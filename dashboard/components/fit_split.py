"""The split of a model over devices, drawn: layers of each stage, memory of each device, replicas and traffic."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple
from urllib.parse import quote

from ...client.notebook import short_model
from ...client.server_commands.command import copies
from ...schemas.models.serving import ServePlan, ServeStage, StageDevice
from ...schemas.values.units import format_bytes
from ..html import tag

MAX_DEVICES: Final = 96
"""Most devices of a plan that are drawn."""
PARTS: Final = (
    ("weights", "weights"),
    ("kv", "KV cache of the asked sequences"),
    ("working", "intermediate results (estimate)"),
    ("left", "left for more KV cache"),
)
"""Parts of a device's memory, with their names."""


class Copy(NamedTuple):
    """Stages that are drawn together: a whole copy of the model, or all stages where copies share some.

    Attributes:
        title: its name; empty where there is only one.
        traffic: part of all requests that it serves, 0 to 1.
        stages: indexes of its stages, by first layer.
    """

    title: str
    traffic: float
    stages: tuple[int, ...]


def copies_of(plan: ServePlan) -> list[Copy]:
    """The copies of the model in a plan."""
    found = copies(plan)
    everything = tuple(sorted(range(len(plan.stages)), key=lambda at: (plan.stages[at].first_layer, at)))
    if not found or len(found) == 1:
        return [Copy("Stages that share requests" if found is None else "", 1.0, everything)]
    number = {id(stage): at for at, stage in enumerate(plan.stages)}
    starts = [route for route in plan.routes if route.origin < 0 <= route.target]
    return [
        Copy(f"Replica {at}", start.weight, tuple(number[id(stage)] for stage in stages))
        for at, (start, stages) in enumerate(zip(starts, found, strict=True), 1)
    ]


def ways(plan: ServePlan, stage: int) -> list[tuple[int, float]]:
    """Stages that a stage sends tokens to, with the part that each gets; -1 as the stage: where requests start."""
    return [(route.target, route.weight) for route in plan.routes if route.origin == stage and route.target >= 0]


def parts_of(device: StageDevice) -> dict[str, int]:
    """Bytes of each part of a device's memory."""
    return {
        "weights": device.weights_bytes,
        "kv": device.kv_bytes,
        "working": device.working_bytes,
        "left": device.left_bytes,
    }


def split(plan: ServePlan) -> None:
    """Draw a plan."""
    layers = max(stage.first_layer + stage.layers for stage in plan.stages)
    largest = max(max(device.memory_bytes, sum(parts_of(device).values())) for device in plan.devices)
    _legend(layers)
    drawn = 0
    for copy in copies_of(plan):
        if drawn >= MAX_DEVICES:
            break
        drawn += _copy(plan, copy, layers, largest, MAX_DEVICES - drawn)
    left = len(plan.devices) - drawn
    if left > 0:
        tag("div", "note", f"and {left:,} more devices, which corral fit --json lists")


def _copy(plan: ServePlan, copy: Copy, layers: int, largest: int, most: int) -> int:
    """Draw the stages of a copy, until they have `most` devices or more; returns the number of their devices."""
    numbers = {stage: number for number, stage in enumerate(copy.stages, 1)}
    shared = copies(plan) is None
    drawn = 0
    with tag("section", "fit-copy"):
        if copy.title:
            with tag("div", "fit-copy-head"):
                tag("b", text=copy.title)
                starts = f"requests start at {_targets(ways(plan, -1), numbers)}"
                tag("span", "note", starts if shared else f"{copy.traffic:.0%} of the requests")
        for at, number in numbers.items():
            if drawn >= most:
                break
            stage = plan.stages[at]
            _stage(number, stage, layers, largest, _targets(ways(plan, at), numbers) if shared else "")
            drawn += len(stage.devices)
    return drawn


def _legend(layers: int) -> None:
    with tag("div", "bar note fit-keys"):
        with tag("span"):
            tag("i", "fit-layers")
            tag("span", text=f"layers, of 0 to {layers - 1}; as high as the part of the tokens that passes them")
        for part, words in PARTS:
            with tag("span"):
                tag("i", f"fit-{part}")
                tag("span", text=words)


def _stage(number: int, stage: ServeStage, layers: int, largest: int, onward: str) -> None:
    last = stage.first_layer + stage.layers - 1
    name = f"layer {stage.first_layer}" if stage.layers == 1 else f"layers {stage.first_layer}–{last}"
    together = len(stage.devices)
    with tag("div", "fit-stage"):
        with tag("div", "fit-stage-name"):
            tag("b", text=f"Stage {number}: {name}")
            facts = [f"{stage.layers} of {layers} layers", f"{stage.traffic:.0%} of the tokens"]
            if stage.tokens_per_second is not None:
                facts.append(f"{stage.tokens_per_second:,.0f} tokens/s at most")
            tag("div", "note", " · ".join(facts))
            words = f"Stage {number}: {name}, {stage.traffic:.0%} of the tokens"
            with tag("div", "fit-track", role="img", aria_label=words, title=words):
                tag("i").style(
                    f"left:{100 * stage.first_layer / layers:.2f}%;width:{100 * stage.layers / layers:.2f}%;"
                    f"height:{max(12.0, 100 * stage.traffic):.0f}%"
                )
            if onward:
                tag("div", "note", f"then {onward}")
        with tag("div", "fit-devices fit-group" if together > 1 else "fit-devices"):
            if together > 1:
                tag("div", "note", f"{together} GPUs as one: each has a part of every layer (tensor parallel)")
            for device in stage.devices:
                _device(device, largest)


def _device(device: StageDevice, largest: int) -> None:
    parts = parts_of(device)
    amounts_text = ", ".join(f"{format_bytes(parts[part])} {words}" for part, words in PARTS)
    with tag("div", "fit-device"):
        with tag("div", "fit-device-name"):
            name = f"{device.host} · GPU {device.index}"
            # A device that was assumed in addition has no page.
            tag("a", "link", name, href=f"/device/{quote(device.device, safe='')}" if device.device else None)
            tag("span", "note", short_model(device.model))
            amounts = f"{format_bytes(parts['weights'])} weights, {format_bytes(parts['kv'])} KV, "
            tag("span", "note fit-amounts", amounts + f"{format_bytes(parts['left'])} left")
        with tag("div", "fit-memory", role="img", aria_label=f"{name}: {amounts_text}", title=amounts_text):
            at = 0.0
            for part, _ in PARTS:
                width = 100 * parts[part] / largest
                if width > 0:
                    tag("i", f"fit-{part}").style(f"left:{at:.2f}%;width:{width:.2f}%")
                at += width


def _targets(onward: Iterable[tuple[int, float]], numbers: Mapping[int, int]) -> str:
    ordered = sorted((numbers[target], weight) for target, weight in onward)
    return ", ".join(f"stage {number} ({weight:.0%})" for number, weight in ordered)
