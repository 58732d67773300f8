"""Shortage of a placement of layers against a target flow: the value that the search lowers.

The flow itself says little about a change, since one layer that is short decides it. The shortage is the sum over
layers of what their coverage lacks to the target. Where links limit the flow, a node covers its layers with no more
than they allow into it and out of it; then the least coverage is an upper bound on the flow. Otherwise it is the flow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import Final

from .cluster import Interval
from .flow import Network

_WIDE: Final = 1e18
"""Rate of links that can't limit the flow; finite, so that it can be subtracted from sums."""


class Shortage:
    """A placement with its coverage and shortage, changed one node at a time.

    Args:
        network: rates of nodes; its links are ignored.
        placement: layers of each node.
        target: flow to reach.
        caches: for each node its KV cache in tokens × layers by number of layers, from 1.
        cache_least: tokens whose cache must fit in each layer; 0: no requirement.

    Attributes:
        coverage: by layer the sum of the rates of its nodes.
        cache: by layer the tokens of KV cache that its nodes hold; empty without a requirement.
        shortage: the value to lower.
    """

    def __init__(
        self,
        network: Network,
        placement: Sequence[tuple[int, int]],
        target: float,
        caches: Sequence[Sequence[float]] = (),
        cache_least: float = 0.0,
    ) -> None:
        self.network = network
        self.target = target
        self.placement = [(first, layers) for first, layers in placement]
        self.coverage = network.coverage([Interval(*interval) for interval in placement])
        self._caches = caches
        self._cache_least = cache_least
        self.cache = [0.0] * network.layers if cache_least else []
        if self.cache:
            for node, (first, layers) in enumerate(placement):
                self._hold(self.cache, node, first, layers, 1.0)
        self.shortage = self.lacking(self.coverage, self.cache)

    def aim(self, target: float) -> None:
        """Set the target."""
        self.target = target
        self.shortage = self.lacking(self.coverage, self.cache)

    def lacking(self, coverage: Sequence[float], cache: Sequence[float]) -> float:
        """Compute the shortage."""
        target = self.target
        lacking = sum([target - covered for covered in coverage if covered < target])
        if cache:
            least = self._cache_least
            lacking += sum([least - held for held in cache if held < least]) * target / least
        return lacking

    def enough_cache(self) -> bool:
        """True if the KV cache meets the requirement."""
        return not self.cache or min(self.cache) >= self._cache_least

    def change(self, node: int, first: int, layers: int, temperature: float, random: Random) -> bool:
        """Give a node other layers, perhaps none, if that lowers the shortage, or by chance at this temperature."""
        if not self.cache:
            return self._change_fast(node, first, layers, temperature, random)
        coverage = self.coverage.copy()
        old_first, old_layers = self.placement[node]
        self._cover(coverage, node, old_first, old_layers, -1.0)
        self._cover(coverage, node, first, layers, 1.0)
        cache = self._cache_after(node, first, layers)
        shortage = self.lacking(coverage, cache)
        more = shortage - self.shortage
        if more > 0 and random.random() >= math.exp(-more / temperature):
            return False
        self.placement[node] = (first, layers)
        self.coverage, self.cache, self.shortage = coverage, cache, shortage
        return True

    def _cover(self, coverage: list[float], node: int, first: int, layers: int, sign: float) -> None:
        if layers:
            rate = sign * self.network.rates[node][layers - 1]
            for layer in range(first, first + layers):
                coverage[layer] += rate

    def _hold(self, cache: list[float], node: int, first: int, layers: int, sign: float) -> None:
        if layers:
            held = sign * self._caches[node][layers - 1] / layers
            for layer in range(first, first + layers):
                cache[layer] += held

    def _cache_after(self, node: int, first: int, layers: int) -> list[float]:
        if not self.cache:
            return self.cache
        cache = self.cache.copy()
        self._hold(cache, node, *self.placement[node], -1.0)
        self._hold(cache, node, first, layers, 1.0)
        return cache

    def _change_fast(self, node: int, first: int, layers: int, temperature: float, random: Random) -> bool:
        """Do the same where only coverage counts: most of the search's time, so without copies."""
        old_first, old_layers = self.placement[node]
        rates, coverage, target = self.network.rates[node], self.coverage, self.target
        end, old_end = first + layers, old_first + old_layers
        rate, old_rate = rates[layers - 1], rates[old_layers - 1] if old_layers else 0.0
        more = 0.0
        if first >= old_end or end <= old_first:
            for covered in coverage[old_first:old_end]:
                if covered < target:
                    more += old_rate
                elif covered - old_rate < target:
                    more += target - covered + old_rate
            for covered in coverage[first:end]:
                if covered < target:
                    more -= min(rate, target - covered)
        else:
            for layer in range(min(first, old_first), max(end, old_end)):
                covered = after = coverage[layer]
                if old_first <= layer < old_end:
                    after -= old_rate
                if first <= layer < end:
                    after += rate
                if covered < target:
                    more -= target - covered
                if after < target:
                    more += target - after
        if more > 0 and random.random() >= math.exp(-more / temperature):
            return False
        for layer in range(old_first, old_end):
            coverage[layer] -= old_rate
        for layer in range(first, end):
            coverage[layer] += rate
        self.placement[node] = (first, layers)
        self.shortage += more
        return True


class LinkedShortage(Shortage):
    """The same where links limit the flow."""

    def __init__(
        self,
        network: Network,
        placement: Sequence[tuple[int, int]],
        target: float,
        caches: Sequence[Sequence[float]] = (),
        cache_least: float = 0.0,
    ) -> None:
        count = len(placement)
        self._links = [
            [_WIDE if network.site_of[a] == network.site_of[b] else network.links[a][b] for b in range(count)]
            for a in range(count)
        ]
        self._into = [0.0] * count
        self._out_of = [0.0] * count
        self._usable = [0.0] * count
        super().__init__(network, [(0, 0)] * count, target, caches, cache_least)
        forced = Random(0)
        for node, (first, layers) in enumerate(placement):
            if layers:
                self.change(node, first, layers, math.inf, forced)

    def change(self, node: int, first: int, layers: int, temperature: float, random: Random) -> bool:
        """Give a node other layers, perhaps none, if that lowers the shortage, or by chance at this temperature."""
        before = self._into, self._out_of, self._usable, self.coverage, self.placement[node]
        self._into, self._out_of, self._usable = self._into.copy(), self._out_of.copy(), self._usable.copy()
        self.coverage = self.coverage.copy()
        cache = self._cache_after(node, first, layers)
        touched = self._join(node, -1.0)
        self._recover(node, 0.0)
        self.placement[node] = (first, layers)
        touched |= self._join(node, 1.0)
        touched.add(node)
        rates = self.network.rates
        for other in touched:
            held = self.placement[other][1]
            passes = rates[other][held - 1] if held else 0.0
            usable = max(0.0, min(passes, self._into[other], self._out_of[other]))
            if usable != self._usable[other]:
                self._recover(other, usable)
        shortage = self.lacking(self.coverage, cache)
        more = shortage - self.shortage
        if more > 0 and random.random() >= math.exp(-more / temperature):
            self._into, self._out_of, self._usable, self.coverage, self.placement[node] = before
            return False
        self.cache, self.shortage = cache, shortage
        return True

    def _recover(self, node: int, usable: float) -> None:
        """Cover a node's layers with another rate than so far."""
        more = usable - self._usable[node]
        self._usable[node] = usable
        first, layers = self.placement[node]
        for layer in range(first, first + layers):
            self.coverage[layer] += more

    def _join(self, node: int, sign: float) -> set[int]:
        """Count the links of a node with all others, or no longer, and return the others that this concerns."""
        network, links, into, out_of = self.network, self._links, self._into, self._out_of
        first, layers = self.placement[node]
        touched: set[int] = set()
        if not layers:
            return touched
        end = first + layers
        if first == 0:
            into[node] += sign * network.source[node]
        if end == network.layers:
            out_of[node] += sign * network.sink[node]
        mine = links[node]
        for other, (start, count) in enumerate(self.placement):
            if other == node or not count:
                continue
            stop = start + count
            if start <= end < stop:
                passed = sign * mine[other]
                out_of[node] += passed
                into[other] += passed
                touched.add(other)
            elif first <= stop < end:
                passed = sign * links[other][node]
                into[node] += passed
                out_of[other] += passed
                touched.add(other)
        return touched
