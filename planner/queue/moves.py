"""The fewest leases to preempt so that whole hosts become free, or a request can start.

Each host gives units of what is wanted: itself, if whole hosts are; room for a request, or for so many of its devices.
How many depends on which of its leases are gone, and never falls as more go. The choice is that with the fewest leases,
of equal ones that with the least price.

Leases on one host: for each host the cheapest leases for one unit, two, and so on, by trying sets of growing size; over
the hosts a knapsack in whole units. Leases on several hosts join these, so each set of them is tried as gone, smaller
ones first, with the rest staying. That is exact. Both searches have a limit; a choice beyond it is the best that was
found, and says so.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import combinations
from math import comb
from typing import Final, NamedTuple

MOST_TRIED: Final = 200_000
"""Limit on the sets of leases that are tried: some seconds."""
MOST_OF_HOST: Final = 20_000
"""Limit on the sets of leases of one host."""
MOST_JOINED: Final = 256
"""Limit on the sets of leases on several hosts that are tried as gone."""

Gone = AbstractSet[str]


class Site(NamedTuple):
    """A host with the leases that may be taken from it.

    Attributes:
        name: of the host.
        leases: ids, each once.
        units: returns what it gives once some of these are gone.
    """

    name: str
    leases: tuple[str, ...]
    units: Callable[[Gone], int]


class Choice(NamedTuple):
    """Leases to take.

    Attributes:
        leases: ids, sorted.
        price: of all together.
        proven: true if no fewer would do, and as few for no lower price.
    """

    leases: tuple[str, ...]
    price: float
    proven: bool


_Cost = tuple[int, float, tuple[str, ...]]
"""Number of leases, their price, and their ids: the smaller is better."""
_NOTHING: Final[_Cost] = (0, 0.0, ())


def fewest(
    sites: Sequence[Site], prices: Mapping[str, float], wanted: int, most_tried: int = MOST_TRIED
) -> Choice | None:
    """Choose the fewest leases without which there are so many units; None if all of them are not enough.

    Args:
        sites: hosts, with units that do not fall as more leases go.
        prices: of all leases that may be taken, at least 0.
        wanted: units, over all hosts.
        most_tried: limit on the sets of leases that are tried.
    """
    # In one order, so that equal choices are the same whatever order they come in.
    sites = sorted((site for site in sites if site.units(frozenset(site.leases)) > 0), key=lambda site: site.name)
    if sum(site.units(frozenset(site.leases)) for site in sites) < wanted:
        return None
    search = _Search(sites, prices, wanted, most_tried)
    return search.run()


class _Search:
    def __init__(self, sites: Sequence[Site], prices: Mapping[str, float], wanted: int, most_tried: int) -> None:
        self._sites = sites
        self._prices = prices
        self._wanted = wanted
        self._left = most_tried
        times = Counter(lease for site in sites for lease in site.leases)
        self._joined = {lease: None for lease in sorted(times) if times[lease] > 1}
        self._tables: dict[tuple[str, frozenset[str]], list[_Cost]] = {}
        self._exact = True

    def run(self) -> Choice:
        best = self._greedy()
        tried = 0
        for size in range(len(self._joined) + 1):
            if size > best[0]:
                break
            for gone in combinations(self._joined, size):
                tried += 1
                if tried > MOST_JOINED:
                    self._exact = False
                    return Choice(best[2], best[1], proven=False)
                found = self._over_hosts(frozenset(gone), best[0])
                if found is not None and found < best:
                    best = found
        return Choice(best[2], best[1], self._exact)

    def _cost(self, leases: Iterable[str]) -> _Cost:
        ids = tuple(sorted(set(leases)))
        return len(ids), math.fsum(self._prices[each] for each in ids), ids

    def _greedy(self) -> _Cost:
        """All leases, less each that is not needed, the most expensive first."""
        at: dict[str, list[Site]] = {}
        for site in self._sites:
            for lease in site.leases:
                at.setdefault(lease, []).append(site)
        gone = frozenset(at)
        units = {site.name: site.units(gone) for site in self._sites}
        total = sum(units.values())
        for lease in sorted(at, key=lambda each: (-self._prices[each], each)):
            rest = gone - {lease}
            after = {site.name: site.units(rest) for site in at[lease]}
            lost = sum(units[name] - left for name, left in after.items())
            if total - lost >= self._wanted:
                gone, total = rest, total - lost
                units.update(after)
        return self._cost(gone)

    def _over_hosts(self, gone: frozenset[str], most: int) -> _Cost | None:
        """The best choice with these of the leases on several hosts gone and the others kept; None if none is as good.

        Args:
            gone: leases on several hosts.
            most: number of leases that is known to do.
        """
        base = self._cost(gone)
        best: list[_Cost | None] = [base, *[None] * self._wanted]
        for site in self._sites:
            table = self._table(site, gone.intersection(site.leases), most - len(gone))
            after = list(best)
            for units, cost in enumerate(table):
                if not units:
                    continue
                for before, known in enumerate(best):
                    if known is None or known[0] + cost[0] > most:
                        continue
                    place = min(self._wanted, before + units)
                    reached = (known[0] + cost[0], known[1] + cost[1], known[2] + cost[2])
                    held = after[place]
                    if held is None or reached[:2] < held[:2] or (reached[:2] == held[:2] and reached < held):
                        after[place] = reached
            best = after
        found = best[self._wanted]
        return None if found is None else self._cost(found[2])

    def _table(self, site: Site, gone: frozenset[str], most: int) -> list[_Cost]:
        """The cheapest leases of a host alone by the units that it then gives, from 0 on; at most `most` leases."""
        key = site.name, gone
        kept = self._tables.get(key)
        if kept is None:
            own = [lease for lease in site.leases if lease not in self._joined]
            kept = self._tables[key] = self._make_table(site, gone, own, most)
        return kept

    def _make_table(self, site: Site, gone: frozenset[str], own: Sequence[str], most: int) -> list[_Cost]:
        every = gone.union(own)
        top = min(self._wanted, site.units(every))
        table: list[_Cost] = [_NOTHING] * (1 + min(top, site.units(gone)))
        if len(table) > top:
            return table
        # A host gives its only unit once each lease that keeps it from that is gone.
        needed = [lease for lease in own if top == 1 and not site.units(every - {lease})]
        rest = [lease for lease in own if lease not in needed]
        left = min(self._left, MOST_OF_HOST)
        for size in range(max(1, len(needed)), most + 1):
            left -= comb(len(rest), size - len(needed))
            if left < 0:
                self._exact = False
                _extend(table, self._chain(site, gone, own), top)
            if len(table) > top:
                break
            found: dict[int, _Cost] = {}
            for more in combinations(rest, size - len(needed)):
                self._left -= 1
                units = site.units(gone.union(needed, more))
                cost = self._cost((*needed, *more))
                if units not in found or cost < found[units]:
                    found[units] = cost
            _extend(table, found, top)
        return table

    def _chain(self, site: Site, gone: frozenset[str], own: Sequence[str]) -> dict[int, _Cost]:
        """Leases by the units that they give: all, then less that with the fewest units, the highest price first."""
        taken, found = list(own), dict[int, _Cost]()
        while taken:
            units, cost = site.units(gone.union(taken)), self._cost(taken)
            if units not in found or cost < found[units]:
                found[units] = cost
            out = frozenset(taken)
            taken.remove(max(taken, key=lambda each: (site.units(gone.union(out - {each})), self._prices[each], each)))
        return found


def _extend(table: list[_Cost], found: Mapping[int, _Cost], top: int) -> None:
    """Add to a table what sets of leases cost by the units that they give."""
    for units in range(len(table), 1 + min(top, max(found, default=0))):
        table.append(min(cost for reached, cost in found.items() if reached >= units))  # noqa: PERF401


def best_of(alternatives: Sequence[tuple[Sequence[Site], int]], prices: Mapping[str, float]) -> Choice | None:
    """The best choice of several alternatives, each hosts and the units that are wanted of them; None if none does."""
    most = max(1, MOST_TRIED // max(1, len(alternatives)))
    found = [choice for sites, wanted in alternatives if (choice := fewest(sites, prices, wanted, most)) is not None]
    if not found:
        return None
    best = min(found, key=lambda choice: (len(choice.leases), choice.price, choice.leases))
    return best._replace(proven=all(choice.proven for choice in found))
