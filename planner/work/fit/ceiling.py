"""Tokens a second that no placement over some units exceeds, by the rates of the units.

Each token passes each layer once, so F tokens a second are F · layers passes. A unit passes b sequences through one of
its layers in t(b) seconds; meanwhile these b are nowhere else, and there are only s sequences (Little 1961). So for
each price λ ≥ 0 of a sequence at work: F · layers ≤ λ · s + Σ over units of the greatest b / t(b) - λ · b. A unit that
holds n layers at most passes no more than n · F either. The least F over some prices is the bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from ..serving.bound import bound
from ..serving.flow import Network
from .capacity import cluster_of, fastest_layer_seconds, most_layers, most_sequences
from .costs import Costs, Unit
from .flow_plan import MOST_UNITS

_STEP: Final = 1.04
"""Ratio of neighboring sizes of batches; between two the rate counts as at the larger, the sequences as the smaller."""
_PRICES: Final = 24
_REFINED: Final = 12
_HALVINGS: Final = 50


class _Passes(NamedTuple):
    """Units of one kind.

    Attributes:
        units: number of units.
        layers: most layers that each holds.
        points: sizes of batches with passes a second that no batch up to the next size exceeds.
    """

    units: int
    layers: int
    points: list[tuple[float, float]]

    def most(self, price: float) -> float:
        """The greatest passes a second of one unit, less the price of its sequences."""
        return max(0.0, max(rate - price * size for size, rate in self.points))


def ceiling(costs: Costs, units: Sequence[Unit]) -> float | None:
    """Tokens a second that no placement over some units exceeds; None if a rate is unknown."""
    held = [unit for unit in units if most_layers(costs, unit)]
    known: dict[tuple[object, ...], list[Unit]] = {}
    for unit in held:
        known.setdefault((unit.memory, unit.rates, unit.size), []).append(unit)
    kinds = [_passes(costs, alike) for alike in known.values()]
    if not kinds:
        return 0.0
    found = [kind for kind in kinds if kind is not None]
    if len(found) < len(kinds):
        return None
    least = _least(found, costs.model.layers, costs.work.sequences)
    if len(held) > MOST_UNITS:
        return least
    made = cluster_of(costs, held, costs.work.sequences, at_best=True)
    return least if made is None else min(least, bound(Network(made[0])))


def _passes(costs: Costs, alike: Sequence[Unit]) -> _Passes | None:
    unit, most = alike[0], most_sequences(costs, alike[0])
    sizes = [1.0]
    while sizes[-1] < most:
        sizes.append(min(float(most), sizes[-1] * _STEP))
    points: list[tuple[float, float]] = []
    for size, larger in zip(sizes, [*sizes[1:], sizes[-1]], strict=True):
        seconds = fastest_layer_seconds(costs, unit, larger)
        if not seconds:
            return None
        points.append((size, larger / seconds))
    return _Passes(len(alike), most_layers(costs, unit), points)


def _least(kinds: Sequence[_Passes], layers: int, sequences: int) -> float:
    """The least bound over some prices, of a geometric series and between the best of it and its neighbors."""
    if sum(kind.units * kind.layers for kind in kinds) < layers:
        return 0.0
    first = max(kind.points[0][1] for kind in kinds)
    low = min(rate / size for kind in kinds for size, rate in kind.points[-1:]) / 100
    ratio = (first / low) ** (1 / (_PRICES - 1))
    tried = [_of_price(kinds, layers, sequences, low * ratio**at) for at in range(_PRICES)]
    best = min(range(_PRICES), key=tried.__getitem__)
    finer = ratio ** (2 / (_REFINED + 1))
    start = low * ratio ** (best - 1)
    return min(tried[best], *(_of_price(kinds, layers, sequences, start * finer**at) for at in range(1, _REFINED + 1)))


def _of_price(kinds: Sequence[_Passes], layers: int, sequences: int, price: float) -> float:
    """The greatest F that a price allows, found by bisection and rounded upwards."""
    gains = [(kind.units, kind.layers, kind.most(price)) for kind in kinds]
    low, high = 0.0, (price * sequences + sum(count * gain for count, _, gain in gains)) / layers
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        carried = price * sequences + sum(count * min(most * middle, gain) for count, most, gain in gains)
        low, high = (middle, high) if carried >= middle * layers else (low, middle)
    return high
