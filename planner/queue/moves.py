"""The fewest leases to preempt so that whole hosts become free, or a request can start.

Each host gives units of what is wanted: itself, if whole hosts are; room for a request, or for so many of its devices.
How many depends on which of its leases are gone, and never falls as more go. An elastic lease may give devices back
instead, down to its fewest. The choice is that by which the fewest leases end; of equal ones, that by which the fewest
give devices back, then that with the least price.

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
from itertools import combinations, product
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
        leases: ids of the leases that may end, each once.
        units: returns what it gives once some of these are gone, and some of `back`.
        back: devices that leases may be asked to give back there, uuids by lease. A lease on several hosts can give
            back those of all of them together.
    """

    name: str
    leases: tuple[str, ...]
    units: Callable[[Gone], int]
    back: Mapping[str, tuple[str, ...]] = {}


class Choice(NamedTuple):
    """Leases to take, and devices to ask for.

    Attributes:
        leases: ids of those that end, sorted.
        price: of all together.
        proven: true if no fewer would do, and as few for no lower price.
        back: devices that other leases are asked to give back, uuids by lease.
    """

    leases: tuple[str, ...]
    price: float
    proven: bool
    back: Mapping[str, tuple[str, ...]] = {}

    @property
    def gone(self) -> Gone:
        """All that would be gone: ids of leases, and uuids of devices."""
        return frozenset(self.leases).union(*self.back.values())

    @property
    def cost(self) -> tuple[int, int, float, tuple[str, ...], tuple[str, ...]]:
        """Order of choices: the smaller is better."""
        return len(self.leases), len(self.back), self.price, self.leases, tuple(sorted(self.back))


_Cost = tuple[int, int, float, tuple[str, ...]]
"""Number of leases that end, number of those that give back, price, and all moves: the smaller is better."""
_NOTHING: Final[_Cost] = (0, 0, 0.0, ())
_BACK: Final = " "
"""Separates lease and host in the name of the move by which a lease gives devices of a host back; no id has it."""


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
    able = sorted(((site, _all_units(site)) for site in sites), key=lambda pair: pair[0].name)
    able = [(site, units) for site, units in able if units > 0]
    if sum(units for _, units in able) < wanted:
        return None
    search = _Search([site for site, _ in able], prices, wanted, most_tried)
    return search.run()


def _all_units(site: Site) -> int:
    return site.units(frozenset(site.leases).union(*site.back.values()))


class _Search:
    def __init__(self, sites: Sequence[Site], prices: Mapping[str, float], wanted: int, most_tried: int) -> None:
        self._sites = sites
        self._prices = prices
        self._wanted = wanted
        self._left = most_tried
        times = Counter(lease for site in sites for lease in site.leases)
        self._joined = {lease: None for lease in sorted(times) if times[lease] > 1}
        self._tables: dict[tuple[str, frozenset[str]], list[_Cost]] = {}
        self._back = {f"{lease}{_BACK}{site.name}": uuids for site in sites for lease, uuids in site.back.items()}
        """Devices by the move that gives them back."""
        self._back_at = {
            site.name: [(f"{lease}{_BACK}{site.name}", uuids) for lease, uuids in site.back.items()] for site in sites
        }
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
                    return self._choice(best)
                found = self._over_hosts(frozenset(gone), best[0])
                if found is not None and found < best:
                    best = found
        return self._choice(best)

    def _choice(self, cost: _Cost) -> Choice:
        """A choice, with no more devices to give back than are needed."""
        leases = [move for move in cost[3] if move not in self._back]
        gone = set(leases)
        uuids: list[tuple[str, str]] = []
        for move in cost[3]:
            uuids += [(move, uuid) for uuid in self._back.get(move, ())]
        gone.update(uuid for _, uuid in uuids)
        at = {site.name: site for site in self._sites}
        units = {site.name: site.units(frozenset(gone)) for site in self._sites}
        total = sum(units.values())
        back: dict[str, tuple[str, ...]] = {}
        for move, uuid in reversed(uuids):
            lease, _, name = move.partition(_BACK)
            less = total - units[name] + at[name].units(frozenset(gone - {uuid}))
            if less >= self._wanted:
                gone.discard(uuid)
                units[name], total = units[name] - total + less, less
            else:
                back[lease] = (uuid, *back.get(lease, ()))
        return Choice(tuple(leases), cost[2], self._exact, back)

    def _moves(self, site: Site) -> list[str]:
        """All moves of a host: ids of leases that end, and names of those that give devices back."""
        return [*site.leases, *(f"{lease}{_BACK}{site.name}" for lease in sorted(site.back))]

    def _units(self, site: Site, moves: frozenset[str]) -> int:
        if not site.back:
            return site.units(moves)
        uuids = [uuids for move, uuids in self._back_at[site.name] if move in moves]
        return site.units(moves.union(*uuids) if uuids else moves)

    def _price(self, move: str) -> float:
        """Price of a move: devices that are given back cost nothing, as their holder agrees to it."""
        return 0.0 if move in self._back else self._prices[move]

    def _cost(self, moves: Iterable[str]) -> _Cost:
        ids = tuple(sorted(set(moves)))
        if not self._back:
            return len(ids), 0, math.fsum([self._prices[each] for each in ids]), ids
        back = sum(move in self._back for move in ids)
        return len(ids) - back, back, math.fsum(map(self._price, ids)), ids

    def _dear_first(self, moves: Iterable[str]) -> list[str]:
        return sorted(moves, key=lambda move: (move in self._back, -self._price(move), move))

    def _greedy(self) -> _Cost:
        """All moves, less each that is not needed, the most expensive first."""
        at: dict[str, list[Site]] = {}
        for site in self._sites:
            for move in self._moves(site):
                at.setdefault(move, []).append(site)
        taken = dict.fromkeys(at)
        gone = {site.name: frozenset(self._moves(site)) for site in self._sites}
        units = {site.name: self._units(site, gone[site.name]) for site in self._sites}
        total = sum(units.values())
        for move in self._dear_first(at):
            rest = {site.name: gone[site.name] - {move} for site in at[move]}
            after = {site.name: self._units(site, rest[site.name]) for site in at[move]}
            lost = sum(units[name] - left for name, left in after.items())
            if total - lost >= self._wanted:
                del taken[move]
                total -= lost
                gone.update(rest)
                units.update(after)
        return self._cost(taken)

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
                    reached = (known[0] + cost[0], known[1] + cost[1], known[2] + cost[2], known[3] + cost[3])
                    held = after[place]
                    if held is None or reached[:3] < held[:3] or (reached[:3] == held[:3] and reached < held):
                        after[place] = reached
            best = after
        found = best[self._wanted]
        return None if found is None else self._cost(found[3])

    def _table(self, site: Site, gone: frozenset[str], most: int) -> list[_Cost]:
        """The cheapest moves of a host alone by the units that it then gives, from 0 on; at most `most` leases end."""
        key = site.name, gone
        kept = self._tables.get(key)
        if kept is None:
            own = [move for move in self._moves(site) if move not in self._joined]
            kept = self._tables[key] = self._make_table(site, gone, own, most)
        return kept

    def _make_table(self, site: Site, gone: frozenset[str], own: Sequence[str], most: int) -> list[_Cost]:
        every = gone.union(own)
        top = min(self._wanted, self._units(site, every))
        table: list[_Cost] = [_NOTHING] * (1 + min(top, self._units(site, gone)))
        if len(table) > top:
            return table
        # A host gives its only unit once each lease that keeps it from that is gone.
        needed = [move for move in own if top == 1 and not self._units(site, every - {move})]
        ends = [move for move in own if move not in needed and move not in self._back]
        backs = [move for move in own if move not in needed and move in self._back]
        ending = sum(move not in self._back for move in needed)
        left = min(self._left, MOST_OF_HOST)
        for size, giving in product(range(most + 1 - ending), range(len(backs) + 1)):
            left -= comb(len(ends), size) * comb(len(backs), giving)
            if left < 0:
                self._exact = False
                _extend(table, self._chain(site, gone, own), top)
            if len(table) > top:
                break
            found: dict[int, _Cost] = {}
            for some, others in product(combinations(ends, size), combinations(backs, giving)):
                self._left -= 1
                moves = (*needed, *some, *others)
                units = self._units(site, gone.union(moves))
                cost = self._cost(moves)
                if units not in found or cost < found[units]:
                    found[units] = cost
            _extend(table, found, top)
        return table

    def _chain(self, site: Site, gone: frozenset[str], own: Sequence[str]) -> dict[int, _Cost]:
        """Moves by the units that they give: all, then less that with the fewest units, the highest price first."""
        taken, found = list(own), dict[int, _Cost]()
        while taken:
            units, cost = self._units(site, gone.union(taken)), self._cost(taken)
            if units not in found or cost < found[units]:
                found[units] = cost
            out = frozenset(taken)
            order = {move: place for place, move in enumerate(reversed(self._dear_first(taken)))}
            taken.remove(max(taken, key=lambda move: (self._units(site, gone.union(out - {move})), order[move])))
        return found


def _extend(table: list[_Cost], found: Mapping[int, _Cost], top: int) -> None:
    """Add to a table what sets of moves cost by the units that they give."""
    for units in range(len(table), 1 + min(top, max(found, default=0))):
        table.append(min(cost for reached, cost in found.items() if reached >= units))  # noqa: PERF401


def best_of(alternatives: Sequence[tuple[Sequence[Site], int]], prices: Mapping[str, float]) -> Choice | None:
    """The best choice of several alternatives, each hosts and the units that are wanted of them; None if none does."""
    most = max(1, MOST_TRIED // max(1, len(alternatives)))
    found = [choice for sites, wanted in alternatives if (choice := fewest(sites, prices, wanted, most)) is not None]
    if not found:
        return None
    best = min(found, key=lambda choice: choice.cost)
    return best._replace(proven=all(choice.proven for choice in found))
