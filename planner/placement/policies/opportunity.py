"""The default: what is placed goes where it takes least from what the rest of the fleet's future can still earn.

The worth of a host's free capacity, in milli of a device, is

    V = B − X + T

with B the worth of its gaps one by one, X the part of B that its free cores and RAM are not expected to feed, and T
what whole devices are worth together (all from `prices`). A request costs V before − V after; the least cost wins, and
of equal costs the host with the least left. So gaps are filled that nothing else would fill, cores are taken from hosts
that have more than their devices need, whole devices and scarce models stay free for those who need them.

Live trouble (heat, strangers, throttling, warnings) counts as up to `STRAIN_MILLI` of a device.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from math import erfc, exp, pi, sqrt
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from ...fleet.state import UNLIMITED, WHOLE_MILLI, Ask, AskKey, DeviceState, HostState, Model
from ..feasible import candidates, excluded, model_allowed
from .demand import Demand
from .offers import Floats, Integers, Offers, Rows, Table
from .policy import Choice, pick
from .prices import DEVICES_MOST, Prices
from .simple import CORES_SCALE, SHARE_SCALE
from .strain import strain, strain_parts

if TYPE_CHECKING:
    from ...fleet.fleet import Fleet
    from ...fleet.index import HostClass

STRAIN_MILLI: Final = 300.0
LOOKS: Final = 6
"""For several devices the arrays tell what they cost at least, since a host's may differ: look at so many hosts."""
_SURE: Final = 1e-5
_TIE: Final = 1e-7
_STATES_KEPT: Final = 50_000

# E[(z + Z)^+] of a standard normal Z, by linear interpolation; beyond 6 it is z itself.
_GRID: Final[Floats] = np.linspace(-6.0, 6.0, 1201)
_EXCESS: Final[Floats] = np.array([z * 0.5 * erfc(-z / sqrt(2)) + exp(-0.5 * z * z) / sqrt(2 * pi) for z in _GRID])

# Columns of the two tables. `STATIC` is what a row costs whatever is asked; of hosts `STRAIN` is by device.
_CPUS, _MEMORY, _BASE, _STATIC, _MODEL, _WHOLE, _WORTH, _SHARE, _GAP, _FREE = range(10)
_STRAIN: Final = _SHARE


class _Standing(NamedTuple):
    """What a host's free capacity is worth: B, X, and per model the whole devices that are free."""

    base: float
    lack: float
    whole: dict[Model, int]


class _Traits(NamedTuple):
    """What a device brings to its row, whichever host it is on."""

    model: Model
    number: int
    whole: bool
    worth: float
    trouble: float
    row: tuple[float, float, float, float, float, float]


class Opportunity:
    """The least opportunity cost.

    Args:
        profile: the mix of requests, where it is known; it is learned from the requests otherwise.
    """

    name = "opportunity"

    def __init__(self, profile: Mapping[AskKey, float] | None = None) -> None:
        self.version = 0
        self._demand = Demand(profile)
        self._prices = Prices(self._demand.mix)
        self._models: dict[Model, int] = {}
        self._forget()

    def _forget(self) -> None:
        self._standings: dict[HostState, _Standing] = {}
        self._traits: dict[DeviceState, _Traits] = {}
        self._offers: tuple[Any, Offers] | None = None
        self._gaps: Floats = np.zeros(0)
        self._groups: Floats = np.zeros(0)

    @property
    def draw(self) -> random.Random | None:
        """Scores count."""
        return None

    @property
    def search(self) -> Callable[[Fleet, Ask], tuple[HostClass, Choice] | None] | None:
        """All classes at a time, by `best`."""
        return self.best

    def observe(self, fleet: Fleet, ask: Ask) -> None:
        """Learn what requests are like; what was worked out is kept until the mix has really changed."""
        if self._demand.observe(ask):
            prices = Prices(self._demand.mix)
            if not prices.close_to(self._prices, self._models):
                self._prices = prices
                self.version += 1
                self._forget()

    # -- one host

    def choose(self, state: HostState, ask: Ask, candidates: Sequence[int]) -> Choice:
        """The devices that cost least on this host, and what they cost."""
        devices = state.devices
        if ask.gpus == 1:
            best: tuple[float, int, int] | None = None
            seen: set[DeviceState] = set()
            for at in candidates:
                device = devices[at]
                if device in seen:
                    continue
                seen.add(device)
                cost = round(self._cost(state, ask, (at,)) + STRAIN_MILLI * strain(device), 6)
                this = (cost, device.memory_free, at)
                if best is None or this < best:
                    best = this
            assert best is not None
            return Choice(-best[0] / WHOLE_MILLI, -_left(state), (best[2],))
        if ask.gpus and state.topology is None and len(state.kinds) > 1:
            candidates = sorted(candidates, key=lambda at: (self._taken(devices[at], ask), strain(devices[at])))
        chosen = pick(state, candidates, ask.gpus)
        cost = self._cost(state, ask, chosen) + STRAIN_MILLI * sum([strain(devices[at]) for at in chosen])
        return Choice(-round(cost, 6) / WHOLE_MILLI, -_left(state), chosen)

    def parts(self, state: HostState, ask: Ask, choice: Choice, device: int) -> dict[str, float]:
        """What a device costs: its gap, the cores and RAM that others then lack, the group it leaves, live trouble."""
        taken, lack, group = self._costs(state, ask, choice.devices)
        count = max(1, len(choice.devices))
        found = {"gap": 0.0, "feed": -lack / count / WHOLE_MILLI, "group": -group / count / WHOLE_MILLI}
        if device >= 0:
            found["gap"] = -self._taken(state.devices[device], ask) / WHOLE_MILLI
            for name, value in strain_parts(state.devices[device]).items():
                if value:
                    found[name] = value * STRAIN_MILLI / WHOLE_MILLI
        elif taken:
            found["gap"] = -taken / WHOLE_MILLI
        return found

    def _cost(self, state: HostState, ask: Ask, chosen: Sequence[int]) -> float:
        taken, lack, group = self._costs(state, ask, chosen)
        return taken + lack + group

    def _costs(self, state: HostState, ask: Ask, chosen: Sequence[int]) -> tuple[float, float, float]:
        """What goes of B, what comes to X, what goes of T."""
        standing = self._standing(state)
        taken = group = 0.0
        opened: dict[Model, int] = {}
        for at in chosen:
            device = state.devices[at]
            taken += self._taken(device, ask)
            if _is_whole(device):
                opened[device.model] = opened.get(device.model, 0) + 1
        for model, count in opened.items():
            groups = self._prices.worth(model).groups
            free = standing.whole[model]
            group += groups[min(free, DEVICES_MOST)] - groups[min(free - count, DEVICES_MOST)]
        lack = self._unfed(
            standing.base - taken, state.cpus_free - ask.cpus_milli, state.memory_free - ask.host_memory_bytes
        )
        return taken, lack - standing.lack, group

    def _taken(self, device: DeviceState, ask: Ask) -> float:
        gaps = self._prices.worth(device.model).gaps
        gap = _gap(device)
        left = 0 if ask.whole else max(0, gap - ask.share_milli)
        return gaps[gap] - gaps[left]

    def _standing(self, state: HostState) -> _Standing:
        found = self._standings.get(state)
        if found is None:
            if len(self._standings) > _STATES_KEPT:
                self._standings.clear()
            base = 0.0
            whole: dict[Model, int] = {}
            for device, places in state.kinds:
                base += self._prices.worth(device.model).gaps[_gap(device)] * len(places)
                if _is_whole(device):
                    whole[device.model] = whole.get(device.model, 0) + len(places)
            lack = self._unfed(base, state.cpus_free, state.memory_free)
            found = self._standings[state] = _Standing(base, lack, whole)
        return found

    def _unfed(self, base: float, cpus: float, memory: float) -> float:
        """Useful milli that a host's free cores and RAM are not expected to feed."""
        prices = self._prices
        lack = 0.0
        if prices.cpus_per_milli > 0:
            short = prices.cpus_per_milli * base - cpus
            deviation = sqrt(prices.cpus_variance * base) if base > 0 else 0.0
            if deviation <= 0 or short > 6 * deviation:
                lack = max(0.0, short) / prices.cpus_per_milli
            elif short > -6 * deviation:
                z = short / deviation
                excess = z * 0.5 * erfc(-z / sqrt(2)) + exp(-0.5 * z * z) / sqrt(2 * pi)
                lack = deviation * excess / prices.cpus_per_milli
        if prices.memory_per_milli > 0:
            lack += max(0.0, prices.memory_per_milli * base - memory) / prices.memory_per_milli
        return lack

    # -- all hosts

    def best(self, fleet: Fleet, ask: Ask) -> tuple[HostClass, Choice] | None:
        """The class that costs least, with the choice on it; None where none can hold the request."""
        offers = self._followed(fleet)
        if ask.gpus == 1:
            table, costs, rows = self._of_devices(offers.devices, ask)
        else:
            table, costs, rows = self._of_hosts(offers.hosts, ask)
        classes = fleet.index.classes
        best: tuple[tuple[float, float, Any], HostClass, Choice] | None = None
        looks = LOOKS if ask.gpus > 1 else 1
        while looks and len(rows):
            at = int(costs.argmin())
            # For several devices a row says what they cost at least: no other can be better than the best by now.
            if costs[at] == np.inf or (best is not None and costs[at] >= best[0][0] * WHOLE_MILLI + _SURE):
                break
            state = table.owners[int(rows[at])]
            costs[at] = np.inf
            if state is None:
                continue
            group = classes.get(state)
            if group is None:
                offers.leave(state)
                continue
            usable = candidates(state, ask)
            if excluded(state, ask) or len(usable) < ask.gpus:
                continue
            choice = self.choose(state, ask, usable)
            key = (-choice.score, -choice.tie, state.order)
            if best is None or key < best[0]:
                best = (key, group, choice)
            looks -= 1
        return None if best is None else best[1:]

    def _followed(self, fleet: Fleet) -> Offers:
        if self._offers is None or self._offers[0] is not fleet.index:
            self._offers = (fleet.index, Offers(self._rows, (_FREE + 1, _STRAIN + 1)))
        offers = self._offers[1]
        offers.follow(fleet)
        return offers

    def _rows(self, state: HostState) -> Rows:
        if state.blocked:
            return [], []
        base, lack, whole = self._standing(state)
        static = _TIE * _left(state) - lack
        shared = (float(state.cpus_free), float(state.memory_free), base)
        devices: list[tuple[float, ...]] = []
        worths: dict[Model, float] = {}
        strains: dict[Model, float] = {}
        for device, _ in state.kinds:
            if device.share_free <= 0:
                continue
            traits = self._traits.get(device) or self._look(device)
            cost = static + traits.trouble
            if traits.whole:
                model = traits.model
                free = min(whole[model], DEVICES_MOST)
                groups = self._prices.worth(model).groups
                cost += groups[free] - groups[free - 1]
                worths[model] = min(worths.get(model, traits.worth), traits.worth)
                strains[model] = min(strains.get(model, traits.trouble), traits.trouble)
            devices.append((*shared, cost, *traits.row))
        hosts = [
            (
                *shared,
                static,
                self._models[model],
                min(count, DEVICES_MOST),
                worths[model] / count,
                strains[model] / count,
            )
            for model, count in whole.items()
        ]
        # A host without whole devices still has cores and RAM to give.
        return devices, hosts or [(*shared, static, -1.0, 0.0, 0.0, 0.0)]

    def _look(self, device: DeviceState) -> _Traits:
        if len(self._traits) > _STATES_KEPT:
            self._traits.clear()
        model, gap, whole = device.model, _gap(device), _is_whole(device)
        worth = self._prices.worth(model).gaps[gap]
        number = self._models.setdefault(model, len(self._models))
        if len(self._gaps) < (number + 1) * (WHOLE_MILLI + 1):
            worths = [self._prices.worth(known) for known in self._models]
            self._gaps = np.array([each.gaps for each in worths]).ravel()
            self._groups = np.array([each.groups for each in worths]).ravel()
        row = (float(number), float(whole), worth, float(device.share_free), float(gap), float(device.memory_free))
        found = self._traits[device] = _Traits(model, number, whole, worth, STRAIN_MILLI * strain(device), row)
        return found

    def _of_devices(self, table: Table, ask: Ask) -> tuple[Table, Floats, Integers]:
        values = table.values[:, : table.count]
        able = values[_CPUS] >= ask.cpus_milli
        able &= values[_WHOLE] > 0 if ask.whole else values[_SHARE] >= ask.share_milli
        if ask.host_memory_bytes:
            able &= values[_MEMORY] >= ask.host_memory_bytes
        if ask.gpu_memory_bytes:
            able &= values[_FREE] >= ask.gpu_memory_bytes
        if not ask.any_model:
            able &= self._allowed(ask)[values[_MODEL].astype(np.int64)]
        rows = np.flatnonzero(able)
        if not len(rows):
            return table, np.empty(0), rows
        taken = values[_WORTH, rows]
        if not ask.whole:
            gaps = values[_GAP, rows]
            left = values[_MODEL, rows] * (WHOLE_MILLI + 1) + (gaps - np.minimum(gaps, ask.share_milli))
            taken -= self._gaps[left.astype(np.int64)]
        costs = values[_STATIC, rows] + taken
        costs += self._unfed_all(
            values[_BASE, rows] - taken, values[_CPUS, rows] - ask.cpus_milli, values[_MEMORY, rows], ask
        )
        return table, costs, rows

    def _of_hosts(self, table: Table, ask: Ask) -> tuple[Table, Floats, Integers]:
        values = table.values[:, : table.count]
        able = (values[_CPUS] >= ask.cpus_milli) & (values[_MEMORY] >= ask.host_memory_bytes)
        if ask.gpus:
            # Of mixed hosts each model is a row of its own: the rule itself then says whether they suffice together.
            able &= values[_WHOLE] > 0
            if not ask.any_model:
                able &= self._allowed(ask)[values[_MODEL].astype(np.int64)]
        rows = np.flatnonzero(able)
        if not len(rows):
            return table, np.empty(0), rows
        cpus, memory, base, costs, models, whole, worth, trouble = values[:, rows]
        if ask.gpus:
            taken = worth * ask.gpus
            first = models * (DEVICES_MOST + 1)
            before = self._groups[(first + whole).astype(np.int64)]
            after = self._groups[(first + np.maximum(whole - ask.gpus, 0.0)).astype(np.int64)]
            costs += taken + before - after + trouble * ask.gpus
            base -= taken
        costs += self._unfed_all(base, cpus - ask.cpus_milli, memory, ask)
        return table, costs, rows

    def _allowed(self, ask: Ask) -> Any:
        # One more at the end, for rows of no model (number -1).
        return np.array([model_allowed(model, ask) for model in self._models] + [False])

    def _unfed_all(self, base: Floats, cpus: Floats, memory: Floats, ask: Ask) -> Floats | float:
        """As `_unfed`, of many hosts; the RAM of the request is still in `memory`."""
        prices = self._prices
        lack: Floats | float = 0.0
        if prices.cpus_per_milli > 0:
            deviation = np.sqrt(np.maximum(prices.cpus_variance * base, 1e-12))
            z = (prices.cpus_per_milli * base - cpus) / deviation
            lack = np.maximum(np.interp(z, _GRID, _EXCESS), z) * (deviation / prices.cpus_per_milli)
        if prices.memory_per_milli > 0:
            short = base - (memory - ask.host_memory_bytes) / prices.memory_per_milli
            lack = lack + np.maximum(short, 0.0)
        return lack


def _is_whole(device: DeviceState) -> bool:
    return device.share_free == WHOLE_MILLI and not device.leased


def _gap(device: DeviceState) -> int:
    """Milli that can still be of use: the free share, or less where the free memory is less than that share of it."""
    total = device.model.memory_bytes
    if not total or device.memory_free >= total * device.share_free // WHOLE_MILLI:
        return device.share_free
    return device.memory_free * WHOLE_MILLI // total


def _left(state: HostState) -> float:
    """Cores and share that are free, in units of a large host."""
    cpus = 0.0 if state.cpus_free >= UNLIMITED else state.cpus_free / CORES_SCALE
    return cpus + state.share_free / SHARE_SCALE
