"""The default policy: places a request where it has the least opportunity cost, the loss of value for later requests.

The worth of a host's free capacity, in milli of a device, is

    V = B − X + T

B is the worth of its gaps (free shares) one by one, X the part of B for which its free cores and RAM are not expected
to suffice, and T the extra worth of whole devices together (all from `prices`). A request costs V before − V after. The
least cost wins, and of equal costs the host with the least left. So gaps are filled that few other requests could fill,
cores are taken from hosts that have more than their devices need, and whole devices and scarce models stay free for
requests that need them.

Strain (heat, load, foreign memory, throttling, warnings) counts as up to `STRAIN_MILLI` of a device.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING

from ....fleet.state import WHOLE_MILLI, Ask, AskKey, DeviceState, HostState, Model
from ..demand import Demand
from ..policy import Choice, Search, pick
from ..strain import strain, strain_parts
from .prices import Prices
from .search import ArraySearch, left
from .valuation import STRAIN_MILLI, Valuation

if TYPE_CHECKING:
    from ....fleet.fleet import Fleet
    from ....fleet.index import HostClass


class Opportunity:
    """Picks the host with the least opportunity cost. It is also a `Search` over all classes.

    Args:
        profile: the mix of requests, if it is known; otherwise it is learned from the requests.
    """

    name = "opportunity"

    def __init__(self, profile: Mapping[AskKey, float] | None = None) -> None:
        self.version = 0
        self._demand = Demand(profile)
        self._models: dict[Model, int] = {}
        self._reprice(Prices(self._demand.mix))

    def _reprice(self, prices: Prices) -> None:
        self._worths = Valuation(prices, self._models)
        self._cheapest: ArraySearch | None = None
        self._told: tuple[HostState, Ask, tuple[int, ...], tuple[float, float, float]] | None = None

    @property
    def draw(self) -> random.Random | None:
        """None: hosts are ranked by score."""
        return None

    @property
    def search(self) -> Search | None:
        """Search over all classes at a time."""
        return self

    def observe(self, fleet: Fleet, ask: Ask) -> None:
        """Learn the mix of requests; prices and caches are kept until the mix has changed significantly."""
        if self._demand.observe(ask):
            prices = Prices(self._demand.mix)
            if not prices.close_to(self._worths.prices, self._models):
                self.version += 1
                self._reprice(prices)

    def choose(self, state: HostState, ask: Ask, candidates: Sequence[int]) -> Choice:
        """Pick the devices that cost least on this host; the score is their negative cost."""
        devices = state.devices
        if ask.gpus == 1:
            best: tuple[float, int, int] | None = None
            costs = (0.0, 0.0, 0.0)
            seen: set[DeviceState] = set()
            for at in candidates:
                device = devices[at]
                if device in seen:
                    continue
                seen.add(device)
                each = self._worths.costs(state, ask, (at,))
                cost = round(sum(each) + self._worths.traits(device).trouble, 6)
                this = (cost, device.memory_free, at)
                if best is None or this < best:
                    best, costs = this, each
            assert best is not None
            cost, chosen = best[0], (best[2],)
        else:
            if ask.gpus and state.topology is None and len(state.kinds) > 1:
                candidates = sorted(
                    candidates, key=lambda at: (self._worths.taken(devices[at], ask), strain(devices[at]))
                )
            chosen = pick(state, candidates, ask.gpus)
            costs = self._worths.costs(state, ask, chosen)
            cost = round(sum(costs) + STRAIN_MILLI * sum([strain(devices[at]) for at in chosen]), 6)
        self._told = (state, ask, chosen, costs)
        return Choice(-cost / WHOLE_MILLI, -left(state), chosen)

    def parts(self, state: HostState, ask: Ask, choice: Choice, device: int) -> dict[str, float]:
        """Components of a device's cost, negative: its gap, cores and RAM that others then lack, the group, strain."""
        told = self._told
        if told is None or told[0] is not state or told[1] is not ask or told[2] != choice.devices:
            told = self._told = (state, ask, choice.devices, self._worths.costs(state, ask, choice.devices))
        taken, lack, group = told[3]
        count = max(1, len(choice.devices))
        found = {"gap": 0.0, "feed": -lack / count / WHOLE_MILLI, "group": -group / count / WHOLE_MILLI}
        if device >= 0:
            seen = state.devices[device]
            found["gap"] = -self._worths.taken(seen, ask) / WHOLE_MILLI
            if self._worths.traits(seen).trouble:
                for name, value in strain_parts(seen).items():
                    if value:
                        found[name] = value * STRAIN_MILLI / WHOLE_MILLI
        elif taken:
            found["gap"] = -taken / WHOLE_MILLI
        return found

    def best(self, fleet: Fleet, ask: Ask) -> tuple[HostClass, Choice] | None:
        """Find the class that costs least, with the choice on it; None if none can hold the request."""
        return self._all(fleet).best(fleet, ask)

    def top(self, fleet: Fleet, ask: Ask, count: int, without: Set[str]) -> list[tuple[str, Choice]]:
        """Find the hosts that cost least, at most `count`, without some."""
        return self._all(fleet).top(fleet, ask, count, without)

    def may_hold(self, fleet: Fleet, ask: Ask, most: int, without: Set[str]) -> int:
        """Upper bound on the whole devices for the ask that one host can hold, by its totals; at most `most`."""
        return self._all(fleet).may_hold(fleet, ask, most, without)

    def _all(self, fleet: Fleet) -> ArraySearch:
        found = self._cheapest
        if found is None or found.index is not fleet.index:
            found = self._cheapest = ArraySearch(fleet, self._worths, self.choose)
        return found
