"""Search for a great flow by simulated annealing over intervals of layers.

It lowers the shortage (`shortage.py`), and keeps the placement with the greatest exact flow on the way.
"""

from __future__ import annotations

import time
from random import Random
from typing import Final, NamedTuple

from .change import Mix, proposed
from .cluster import Interval
from .flow import flow
from .shortage import Shortage

_CLOCK_STEPS: Final = 128
_MIX: Final = Mix(shift=0.35, resize=0.65, anywhere=0.8)
"""Steps between looks at the clock."""
_CHECK_ROUNDS: Final = 20
"""Rounds from one computation of the exact flow to the next at least, where links limit it."""


class Budget:
    """Processor time and steps that a search may take.

    Args:
        seconds: processor time; None: no limit.
        steps: steps; None: no limit.
    """

    __slots__ = ("_begun", "_seconds", "_steps", "done")

    def __init__(self, seconds: float | None, steps: int | None) -> None:
        self._begun = time.process_time()
        self._seconds = seconds
        self._steps = steps
        self.done = 0

    def used(self) -> float:
        """Return the used share of the budget; 1 or more: it is used up."""
        share = self.done / self._steps if self._steps else 0.0 if self._steps is None else 1.0
        if self._seconds is not None:
            passed = time.process_time() - self._begun
            share = max(share, passed / self._seconds if self._seconds else 1.0)
        return share


class Found(NamedTuple):
    """A placement and its flow."""

    placement: tuple[Interval, ...]
    flow: float


def anneal(
    state: Shortage, budget: Budget, until: float, random: Random, ceiling: float, hot: float, cold: float
) -> Found:
    """Lower the shortage of a state and return the best placement on the way, by its exact flow.

    Args:
        state: where to begin; it is changed.
        budget: time and steps.
        until: share of the budget at which to stop.
        random: source of the choices.
        ceiling: flow at which to stop.
        hot: temperature at the start, as a share of the target.
        cold: temperature at the end, likewise.
    """
    network = state.network
    total = network.layers
    most = [len(rates) for rates in network.rates]
    best = Found(tuple(Interval(*interval) for interval in state.placement), 0.0)
    begin = budget.used()
    temperature = hot * state.target
    rounds = 0
    checked = 0
    while True:
        if rounds % _CLOCK_STEPS == 0:
            share = (budget.used() - begin) / max(until - begin, 1e-9)
            if share >= 1.0:
                return best
            temperature = state.target * hot * (cold / hot) ** share
        rounds += 1
        budget.done += 1
        node, first, layers = proposed(state.placement, most, state.coverage, _MIX, random)
        if layers < 1 or layers > most[node] or first < 0 or first + layers > total:
            continue
        if (first, layers) == state.placement[node] or not state.change(node, first, layers, temperature, random):
            continue
        if state.shortage > 2 * state.target:
            continue
        least = min(state.coverage)
        if least <= best.flow or not state.enough_cache():
            continue
        if not network.free:
            if rounds - checked < _CHECK_ROUNDS:
                continue
            checked = rounds
            least = flow(network, [Interval(*interval) for interval in state.placement])
            if least <= best.flow:
                continue
        best = Found(tuple(Interval(*interval) for interval in state.placement), least)
        if least >= ceiling:
            return best
        if least > state.target:
            state.aim(min(ceiling, least * 1.01))
