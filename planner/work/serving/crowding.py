"""Search for a placement in which requests meet few prompts of others, by simulated annealing.

The next token of a request waits behind the prompt of another one on a node that both pass, and follows it from node to
node until their ways part. In a chain they never do, so that all tokens travel at the speed of prompts. Let a node take
the part p of the traffic through a layer, and a prompt t seconds in that layer. A second request takes the same node
with probability p, so that two requests share Σ p² · t seconds of a prompt, over all layers and their nodes. This is
the crowding, which the search lowers among placements with enough flow and KV cache.

A node with k tokens of KV cache in each layer can take no more than k / K of the traffic where requests of K tokens are
in progress. So its rate counts up to that part of the flow. Then coverage tells both: flow and cache suffice exactly
where the rates of the nodes of each layer sum to the flow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import Final, NamedTuple

from .anneal import Budget
from .change import Mix, proposed
from .cluster import Cluster, Interval
from .flow import Network

_HOT: Final = 0.1
_COLD: Final = 0.002
"""Temperatures at the start and at the end, as a share of the flow."""
_WEIGHT: Final = 0.7
"""Shortage, as a share of the flow, that counts as much as the crowding of a chain over nodes of each kind."""
_CLOCK_STEPS: Final = 64
_MIX: Final = Mix(shift=0.4, resize=0.75, anywhere=0.87)
_RIPPLES: Final = 0.4
"""Share of the steps that move a layer from one node to another, with all intervals between."""
_SWAPS: Final = 0.1
_LEAST_COVERAGE: Final = 1e-9
_Layers = tuple[int, int]


class Wanted(NamedTuple):
    """Flow and KV cache that a placement must offer.

    Attributes:
        flow: tokens a second.
        kv_cache_tokens: tokens of requests in progress whose KV cache must fit.
        prompt_tokens: length of a prompt.
    """

    flow: float
    kv_cache_tokens: float
    prompt_tokens: float


def limited_rates(cluster: Cluster, network: Network, wanted: Wanted) -> list[list[float]]:
    """For each node by layers held, from 1: its rate, no more than its part of the KV cache lets it take."""
    return [
        [
            min(rate, wanted.flow * held / (layers * wanted.kv_cache_tokens))
            for layers, (rate, held) in enumerate(zip(rates, cluster.kind_of(node).kv_cache_tokens, strict=False), 1)
        ]
        for node, rates in enumerate(network.rates)
    ]


def prompt_seconds(cluster: Cluster, tokens: float) -> list[float] | None:
    """For each node the seconds of a prompt in one layer; None if they are unknown."""
    found: list[float] = []
    for node in range(len(cluster.nodes)):
        times = cluster.kind_of(node).prompt
        if times is None:
            return None
        found.append(times.of(tokens))
    return found if all(found) else None


class _State:
    """A placement with its coverage, crowding and shortage."""

    def __init__(self, layers: int, rates: Sequence[Sequence[float]], seconds: Sequence[float], flow: float) -> None:
        self.layers = layers
        self.rates = rates
        self.seconds = seconds
        self.flow = flow
        self.placement: list[_Layers] = []
        self.coverage: list[float] = []
        self.squares: list[float] = []
        self.value = self.lacking = self.crowding = math.inf
        self._scale = _WEIGHT * flow / (sum(seconds) / len(seconds) * layers)

    def try_all(self, placement: list[_Layers], temperature: float, random: Random) -> None:
        """Take another placement if that lowers the value, or by chance at this temperature."""
        coverage, squares = [0.0] * self.layers, [0.0] * self.layers
        for node, held in enumerate(placement):
            self._cover(coverage, squares, node, held, 1.0)
        if self._accept(coverage, squares, temperature, random):
            self.placement = placement

    def try_one(self, node: int, held: _Layers, temperature: float, random: Random) -> None:
        """Give one node other layers, likewise."""
        coverage, squares = self.coverage.copy(), self.squares.copy()
        self._cover(coverage, squares, node, self.placement[node], -1.0)
        self._cover(coverage, squares, node, held, 1.0)
        if self._accept(coverage, squares, temperature, random):
            self.placement[node] = held

    def _cover(self, coverage: list[float], squares: list[float], node: int, held: _Layers, sign: float) -> None:
        first, layers = held
        if layers:
            rate = self.rates[node][layers - 1]
            square = sign * rate * rate * self.seconds[node]
            rate *= sign
            for layer in range(first, first + layers):
                coverage[layer] += rate
                squares[layer] += square

    def _accept(self, coverage: list[float], squares: list[float], temperature: float, random: Random) -> bool:
        flow = self.flow
        lacking = sum([flow - covered for covered in coverage if covered < flow])
        crowding = sum(
            [
                square / (covered * covered)
                for square, covered in zip(squares, coverage, strict=True)
                if covered > _LEAST_COVERAGE
            ]
        )
        value = lacking + self._scale * crowding
        if value > self.value and random.random() >= math.exp((self.value - value) / temperature):
            return False
        self.coverage, self.squares = coverage, squares
        self.value, self.lacking, self.crowding = value, lacking, crowding
        return True


def least_crowded(
    cluster: Cluster,
    network: Network,
    wanted: Wanted,
    start: Sequence[Interval],
    budget: Budget,
    random: Random,
) -> tuple[Interval, ...] | None:
    """Search a placement with enough flow and KV cache, and little crowding; None if none was found.

    Args:
        cluster: nodes with KV cache and times of prompts; no link may limit its flow.
        network: its rates.
        wanted: what the placement must offer.
        start: where to begin.
        budget: time and steps.
        random: source of the choices.
    """
    seconds = prompt_seconds(cluster, wanted.prompt_tokens)
    if seconds is None:
        return None
    rates = limited_rates(cluster, network, wanted)
    most = [len(each) for each in rates]
    state = _State(network.layers, rates, seconds, wanted.flow)
    state.try_all([(first, min(layers, len(rates[node]))) for node, (first, layers) in enumerate(start)], 1.0, random)
    best: tuple[Interval, ...] | None = None
    least = math.inf
    temperature = _HOT * wanted.flow
    enough = 1e-6 * wanted.flow
    rounds = 0
    while True:
        if rounds % _CLOCK_STEPS == 0:
            share = budget.used()
            if share >= 1.0:
                return best
            temperature = wanted.flow * _HOT * (_COLD / _HOT) ** share
        rounds += 1
        budget.done += 1
        kind = random.random()
        if kind < _RIPPLES + _SWAPS:
            changed = (_ripple if kind < _RIPPLES else _swap)(state, random)
            if changed is not None:
                state.try_all(changed, temperature, random)
        else:
            node, first, layers = proposed(state.placement, most, state.coverage, _MIX, random)
            fits = 1 <= layers <= most[node] and first >= 0 and first + layers <= state.layers
            if fits and (first, layers) != state.placement[node]:
                state.try_one(node, (first, layers), temperature, random)
        if state.crowding < least and state.lacking <= enough:
            least = state.crowding
            best = tuple(Interval(*held) for held in state.placement)


def _swap(state: _State, random: Random) -> list[_Layers] | None:
    """Let two nodes change places, each with as many layers there as it can hold."""
    one, other = int(random.random() * len(state.rates)), int(random.random() * len(state.rates))
    if one == other or state.rates[one] == state.rates[other]:
        return None
    placement = state.placement.copy()
    for node, (first, layers) in ((one, state.placement[other]), (other, state.placement[one])):
        placement[node] = (first, min(layers, len(state.rates[node])))
    return placement


def _ripple(state: _State, random: Random) -> list[_Layers] | None:
    """Let a node hold one layer more at the cost of another one; intervals that lie between move by one."""
    grows, shrinks = int(random.random() * len(state.rates)), int(random.random() * len(state.rates))
    (first, layers), (other, count) = state.placement[grows], state.placement[shrinks]
    if grows == shrinks or layers >= len(state.rates[grows]) or count < 2:
        return None
    placement = state.placement.copy()
    if first + layers <= other:
        for node, (start, held) in enumerate(placement):
            if first + layers <= start and start + held < other + count:
                placement[node] = (start + 1, held)
        placement[grows], placement[shrinks] = (first, layers + 1), (other + 1, count - 1)
    elif other + count <= first:
        for node, (start, held) in enumerate(placement):
            if other < start and start + held <= first:
                placement[node] = (start - 1, held)
        placement[grows], placement[shrinks] = (first - 1, layers + 1), (other, count - 1)
    else:
        return None
    return placement
