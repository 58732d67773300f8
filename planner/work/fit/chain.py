"""Placement of all layers on one unit, or as a chain of units: the exact least slowest stage for each order.

A chain is `pipeline` over the units in an order. The order matters where memory binds, since the first holds the
embedding and the last the head, and where links differ: units of one host stay together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from ..balance import Machine
from ..pipeline import pipeline
from .costs import Costs, Unit


class Chain(NamedTuple):
    """Runs of layers, one after the other.

    Attributes:
        units: units that have layers, in order.
        ends: for each the layer after its last.
    """

    units: tuple[Unit, ...]
    ends: tuple[int, ...]

    @property
    def runs(self) -> list[tuple[Unit, int, int]]:
        """Each unit with its first layer and the one after its last."""
        return list(zip(self.units, (0, *self.ends), self.ends, strict=False))


class Pace(NamedTuple):
    """Speed of a chain.

    Attributes:
        tokens_per_second: tokens of all sequences, at most.
        token_seconds: time from a token to the next of one sequence.
        first_token_seconds: time to the first token; None if a rate of operations is unknown.
    """

    tokens_per_second: float
    token_seconds: float
    first_token_seconds: float | None


def alone(costs: Costs, units: Sequence[Unit]) -> list[Chain]:
    """Chains of one unit each that holds all layers."""
    layers = costs.model.layers
    return [Chain((unit,), (layers,)) for unit in units if costs.fits(unit, 0, layers)]


def chain(costs: Costs, units: Sequence[Unit]) -> Chain | None:
    """Split all layers over units in order, so that the slowest stage is as fast as possible; None if they don't fit.

    If the bandwidth of one is unknown, their memory takes its place.
    """
    items, held = costs.item_costs(units)
    known = all(unit.rates.bytes_per_second for unit in units)
    machines = [
        Machine(
            (unit.rates.bytes_per_second if known else unit.memory) * unit.size,
            max(0, unit.memory - costs.working) * unit.size,
        )
        for unit in units
    ]
    found = pipeline(items, held, machines)
    if not found.ends or found.ends[-1] < len(items):
        return None
    kept = [(unit, end) for unit, start, end in zip(units, (0, *found.ends), found.ends, strict=False) if end > start]
    made = Chain(tuple(unit for unit, _ in kept), tuple(end for _, end in kept))
    return made if all(costs.fits(unit, first, end) for unit, first, end in made.runs) else None


def pace(costs: Costs, made: Chain) -> Pace | None:
    """Speed of a chain with the asked sequences; None if a rate is unknown.

    With m stages and s sequences, each stage computes s / m of them at a time. A sequence comes round after the sum of
    all stages and links, or after as many times of the slowest stage as there are batches in the ring, if that is
    longer.
    """
    stages, sequences = len(made.units), costs.work.sequences
    batches = min(stages, sequences)
    batch = sequences / batches
    times = [costs.decode_seconds(unit, first, end, batch) for unit, first, end in made.runs]
    known = [time for time in times if time is not None]
    if len(known) < stages:
        return None
    links = [costs.link_seconds(a, b, batch) for a, b in zip(made.units, made.units[1:], strict=False)]
    around = max(sum(known) + sum(links), batches * max(*known, *links, 0.0))
    return Pace(sequences / around, around, _first_token(costs, made))


def _first_token(costs: Costs, made: Chain) -> float | None:
    total = 0.0
    for unit, first, end in made.runs:
        seconds = costs.prompt_seconds(unit, first, end)
        if seconds is None:
            return None
        total += seconds
    pairs = zip(made.units, made.units[1:], strict=False)
    return total + sum(costs.link_seconds(a, b, costs.prompt_tokens) for a, b in pairs)


def orders(units: Sequence[Unit]) -> list[Unit]:
    """Units for a chain: hosts by the memory of all their units, the largest first; in a host likewise."""
    memory: dict[str, int] = {}
    for unit in units:
        memory[unit.host] = memory.get(unit.host, 0) + unit.memory * unit.size
    return sorted(units, key=lambda unit: (-memory[unit.host], unit.host, -unit.memory * unit.size, unit.devices))


def fewest(costs: Costs, units: Sequence[Unit]) -> Chain | None:
    """A chain over as few units as the order of `orders` allows, found by bisection; None if all don't suffice."""
    ordered = orders(units)
    low, high = 1, len(ordered)
    best = chain(costs, ordered) if ordered else None
    if best is None:
        return None
    while low < high:
        middle = (low + high) // 2
        found = chain(costs, ordered[:middle])
        if found is None:
            low = middle + 1
        else:
            best, high = found, middle
    return best


def best_chain(costs: Costs, units: Sequence[Unit]) -> Chain | None:
    """The chain with most tokens a second over the first k units of the order, for each k that suffices.

    More stages read less each, but cross more links.
    """
    least = fewest(costs, units)
    if least is None:
        return None
    ordered = orders(units)
    best, rate = least, _rate(costs, least)
    for count in _counts(len(least.units), len(ordered)):
        found = chain(costs, ordered[:count])
        if found is not None and _rate(costs, found) > rate:
            best, rate = found, _rate(costs, found)
    return best


def _rate(costs: Costs, made: Chain) -> float:
    found = pace(costs, made)
    return -math.inf if found is None else found.tokens_per_second


def _counts(least: int, most: int) -> list[int]:
    """Numbers of units to try: all up to 32, then ever fewer."""
    found: list[int] = []
    count = least
    while count <= most:
        found.append(count)
        count += max(1, count // 16)
    return found
