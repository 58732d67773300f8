"""Random changes of a placement by one node, which the searches try. Pure and deterministic by the random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import NamedTuple


class Mix(NamedTuple):
    """Shares of the kinds of change, as sums from 0 to 1; the rest moves a node to the layers with the least coverage.

    Attributes:
        shift: up to here a node's interval is shifted by one or two layers.
        resize: up to here it gets a layer more, or one less.
        anywhere: up to here it gets any interval.
    """

    shift: float
    resize: float
    anywhere: float


def proposed(
    placement: Sequence[tuple[int, int]],
    most: Sequence[int],
    coverage: Sequence[float],
    mix: Mix,
    random: Random,
) -> tuple[int, int, int]:
    """Choose a node and other layers for it, which may lie outside the model or be more than it can hold.

    Args:
        placement: first layer and number of layers of each node.
        most: number of layers that each node can hold.
        coverage: tokens a second, or another measure of supply, of each layer.
        mix: of kinds of changes.
        random: numbers.

    Returns:
        The node, its first layer, and its number of layers.
    """
    chance = random.random
    node = int(chance() * len(most))
    first, layers = placement[node]
    kind = chance()
    if layers and kind < mix.shift:
        first += (1 if chance() < 0.5 else -1) * (1 if chance() < 0.6 else 2)
    elif layers and kind < mix.resize:
        if chance() < 0.5:
            layers += 1
            first -= chance() < 0.5
        else:
            layers -= 1
            first += chance() < 0.5
    elif kind < mix.anywhere:
        layers = 1 + int(chance() * most[node])
        first = int(chance() * (len(coverage) - layers + 1))
    else:
        worst = coverage.index(min(coverage))
        layers = max(1, min(most[node], layers + int(chance() * 3) - 1))
        first = worst - int(chance() * layers)
    return node, first, layers
