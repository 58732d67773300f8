"""Expected service of a plan: an event simulation of requests, with the times of the roofline.

The roofline of a plan has all sequences decode in even batches. Requests also compute prompts, during which others
wait, end at different times, and queue before the slowest stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from msgspec.structs import replace

from ....schemas.models.serving import ExpectedService, ServePlan, ServeStage
from ..serving.cluster import SINK, SOURCE, Batch, Cluster, Interval, Kind, Route
from ..serving.simulate import Load, simulate
from .capacity import cluster_with
from .costs import Costs, Unit

_OUTPUTS: Final = 8
"""Lengths of outputs, in even steps up to what the context leaves: requests that all end at once would stay in step."""
_TIMES: Final = (1.5, 2.0)
"""Times of a request before the measurement, and in it."""
_TIMES_OF_MANY: Final = (1.0, 0.75)
"""The same with many requests at once, whose mean takes less time."""
_MANY: Final = 64
_PAUSE_SECONDS: Final = 1e-4
"""Time of a scheduler between two iterations."""
_LEAST_STEPS: Final = 32
"""Decoding steps of a mean output below which nothing is simulated."""


class Requests(NamedTuple):
    """Requests that are simulated.

    Attributes:
        prompt: length of each prompt.
        outputs: lengths of outputs.
    """

    prompt: int
    outputs: list[int]

    @property
    def mean(self) -> float:
        """Mean length of outputs."""
        return sum(self.outputs) / len(self.outputs)


def _requests(costs: Costs) -> Requests | None:
    prompt = costs.prompt_tokens
    left = costs.work.context_tokens - prompt
    if left < 1:
        return None
    return Requests(prompt, sorted({max(1, left * part // _OUTPUTS) for part in range(1, _OUTPUTS + 1)}))


def _times(costs: Costs) -> tuple[float, float]:
    return _TIMES_OF_MANY if costs.work.sequences >= _MANY else _TIMES


def steps_needed(costs: Costs, plan: ServePlan) -> int:
    """Steps of requests through stages to simulate each token of a plan, about; 0 if it can't be simulated."""
    requests = _requests(costs)
    ways = [way for way in plan.routes if way.tokens_per_second]
    if requests is None or not ways or not plan.token_seconds or plan.first_token_seconds is None:
        return 0
    hops = sum(way.tokens_per_second or 0.0 for way in ways if way.target >= 0) / sum(
        way.tokens_per_second or 0.0 for way in ways if way.origin < 0
    )
    return int(costs.work.sequences * hops * requests.mean * sum(_times(costs)))


def expected(costs: Costs, plan: ServePlan, units: Mapping[str, Unit], steps: int) -> ExpectedService | None:
    """Simulate as many requests at once as are asked; None if a rate is unknown, or there are too many for the steps.

    Args:
        costs: of the model.
        plan: the plan.
        units: each device alone, by its uuid.
        steps: steps of requests through stages, about. A step generates several tokens where they would not suffice.
    """
    work, requests = costs.work, _requests(costs)
    needed = steps_needed(costs, plan)
    if requests is None or not needed or not plan.token_seconds or plan.first_token_seconds is None:
        return None
    prompt, outputs, mean = requests.prompt, requests.outputs, requests.mean
    typical = Costs(replace(work, context_tokens=round(prompt + mean / 2), prompt_tokens=prompt))
    routes = [
        Route(way.origin if way.origin >= 0 else SOURCE, way.target if way.target >= 0 else SINK, way.tokens_per_second)
        for way in plan.routes
        if way.tokens_per_second
    ]
    stride = -(-needed // max(1, steps))
    if stride > 1 and mean / stride < _LEAST_STEPS:
        return None
    held = [_unit(stage, units) for stage in plan.stages]
    kinds = [_kind(costs, typical, unit, stage) for unit, stage in zip(held, plan.stages, strict=True)]
    # A request takes as long as alone, and waits for the prompts of the others on its way.
    alone = mean * plan.token_seconds + plan.first_token_seconds * max(1.0, work.sequences / len(held))
    warm, measured = _times(costs)
    load = Load(
        [(prompt, output) for output in outputs],
        concurrency=work.sequences,
        start_gap_seconds=0.0,
        cache_share=1.0,
        warm_seconds=warm * alone,
        seconds=measured * alone,
        seed=work.seed,
        pause_seconds=_PAUSE_SECONDS,
        stride=stride,
    )
    placement = [Interval(stage.first_layer, stage.layers) for stage in plan.stages]
    found = simulate(_cluster(costs, held, kinds), placement, routes, load)
    if not found.finished or found.refused:
        return None
    return ExpectedService(
        tokens_per_second=found.decode_tokens_per_second,
        token_seconds=found.token_seconds,
        first_token_seconds=found.first_token_seconds,
        prompt_tokens=prompt,
        output_tokens=round(mean),
        step_tokens=stride,
    )


def _cluster(costs: Costs, units: Sequence[Unit], kinds: Sequence[Kind]) -> Cluster:
    """The stages with their links. A stage of all layers generates token after token, without a way round."""
    made = cluster_with(costs, units, kinds)
    whole = {at for at, kind in enumerate(kinds) if len(kind.tokens_per_second) == costs.model.layers}
    links = tuple(
        replace(link, latency_seconds=0.0) if {link.origin, link.target} & whole else link for link in made.links
    )
    return replace(made, links=links)


def _unit(stage: ServeStage, units: Mapping[str, Unit]) -> Unit:
    """The devices of a stage as one."""
    parts = [units[device.device] for device in stage.devices]
    devices = tuple(at for part in parts for at in part.devices)
    return Unit(devices, min(part.memory for part in parts), parts[0].rates, parts[0].host)


def _kind(costs: Costs, typical: Costs, unit: Unit, stage: ServeStage) -> Kind:
    """A stage with its times by batch, and its KV cache."""
    first, end = stage.first_layer, stage.first_layer + stage.layers
    sizes = [1.0]
    while sizes[-1] < costs.work.sequences:
        sizes.append(min(2 * sizes[-1], float(costs.work.sequences)))
    decode = [typical.decode_seconds(unit, first, end, size) or 0.0 for size in sizes]
    prompt = typical.prompt_seconds(unit, first, end) or 0.0
    cache = costs.held_sequences(unit, first, end) * costs.work.context_tokens * stage.layers
    return Kind(
        tokens_per_second=(1.0,) * stage.layers,
        kv_cache_tokens=(float(cache),) * stage.layers,
        prompt=Batch((float(typical.prompt_tokens),), (prompt / stage.layers,)),
        decode=Batch(tuple(sizes), tuple(seconds / stage.layers for seconds in decode)),
    )
