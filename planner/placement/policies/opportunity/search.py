"""Vectorized search for the classes of hosts on which a request costs least, in a few passes over arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from math import erfc, exp, inf, pi, sqrt
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ....fleet.state import UNLIMITED, WHOLE_MILLI, Ask, HostState, Model
from ...feasible import candidates, excluded, model_allowed, part_most
from ..policy import Choice
from ..simple import CORES_SCALE, SHARE_SCALE
from .host_arrays import Floats, HostTable, Integers, Rows, Table
from .prices import CORES_STEP_MILLI, CORES_STEPS, DEVICES_MOST
from .valuation import Valuation

if TYPE_CHECKING:
    from ....fleet.fleet import Fleet
    from ....fleet.index import HostClass

LOOKS: Final = 6
"""For several devices the arrays have a lower bound on the cost: if it is not exact, so many more are compared."""
_SURE: Final = 1e-5
_TIE: Final = 1e-7

# E[(z + Z)^+] of a standard normal Z, by linear interpolation; beyond 6 it is z itself.
_GRID: Final[Floats] = np.linspace(-6.0, 6.0, 1201)
_EXCESS: Final[Floats] = np.array([z * 0.5 * erfc(-z / sqrt(2)) + exp(-0.5 * z * z) / sqrt(2 * pi) for z in _GRID])

# Columns of the two tables. Cores and RAM are in the milli that they suffice for; `STATIC` is the cost of a row for any
# request. `GROUP` is the index in `_groups` of the worth of the remaining whole devices without free cores; in a row of
# a host, before any is taken. Of a host's whole devices those of one kind are taken first, then the others: the columns
# have the number of the first, and the worth and strain of one of them and of one of the others, the least of these if
# there are more than two kinds. `SHARE` and `PART` are the largest shares, in billionths, that a device can give to a
# request that names its memory and to one that gets its part: exact, so that a row is usable just where the device is.
_CPUS, _MEMORY, _BASE, _STATIC, _MODEL, _WHOLE, _GROUP = range(7)
_WORTH, _SHARE, _GAP, _FREE, _PART = range(7, 12)
_TOGETHER, _FREEST, _STRAIN, _FIRST, _FIRST_WORTH, _FIRST_STRAIN, _NEXT_WORTH, _NEXT_STRAIN = range(7, 15)
_WIDTHS: Final = (_PART + 1, _NEXT_STRAIN + 1)
_NO_WHOLE: Final = (-1.0,) + (0.0,) * (_NEXT_STRAIN - _MODEL)
_ROW: Final = CORES_STEPS
_BLOCK: Final = (DEVICES_MOST + 1) * _ROW


class ArraySearch:
    """Search over the classes of one fleet, at fixed prices.

    Args:
        fleet: the fleet.
        worths: values free capacity.
        choose: scores a host and picks devices on it.
    """

    def __init__(
        self, fleet: Fleet, worths: Valuation, choose: Callable[[HostState, Ask, Sequence[int]], Choice]
    ) -> None:
        self.index = fleet.index
        self._worths = worths
        self._choose = choose
        self._offers = HostTable(_WIDTHS)
        self._models: list[Model] = []
        self._gaps: Floats = np.zeros(0)
        self._groups: Floats = np.zeros(_ROW)
        """Two blocks of `Worth.groups` for each model: one as it is, and one as if there were always enough cores."""
        prices = worths.prices
        self._cpus_scale = prices.cpus_per_milli or 1.0
        self._memory_scale = prices.memory_per_milli or 1.0
        self._spread = max(sqrt(prices.cpus_variance) / self._cpus_scale, _SURE)
        """Standard deviation of the milli for which cores do not suffice, over the square root of the milli."""

    def best(self, fleet: Fleet, ask: Ask) -> tuple[HostClass, Choice] | None:
        """Find the class that costs least, with the choice on it; None if none can hold the request."""
        best: tuple[tuple[float, float, Any], HostClass, Choice] | None = None
        looks = LOOKS if ask.gpus > 1 else 1
        for least, group, usable in self._cheapest(fleet, ask):
            # For several devices a row has a lower bound on the cost: no later row can be better than the best so far.
            if best is not None and least >= best[0][0] * WHOLE_MILLI - _SURE:
                break
            choice = self._choose(group.state, ask, usable)
            key = (-choice.score, -choice.tie, group.state.order)
            if best is None or key < best[0]:
                best = (key, group, choice)
            looks -= 1
            if not looks:
                break
        return None if best is None else best[1:]

    def top(self, fleet: Fleet, ask: Ask, count: int, without: Set[str]) -> list[tuple[str, Choice]]:
        """Find the hosts that cost least, at most `count`, without some."""
        found: list[tuple[tuple[float, float, Any], list[str], Choice]] = []
        seen: set[HostState] = set()
        hosts, looks, worst = 0, LOOKS if ask.gpus > 1 else 0, 0.0
        for least, group, usable in self._cheapest(fleet, ask):
            if hosts >= count:
                if not looks or least >= worst * WHOLE_MILLI - _SURE:
                    break
                looks -= 1
            if group.state in seen:
                continue
            seen.add(group.state)
            names = [name for name in group.least(count + len(without)) if name not in without]
            if names:
                choice = self._choose(group.state, ask, usable)
                found.append(((-choice.score, -choice.tie, group.state.order), names, choice))
                hosts += len(names)
                worst = max(worst, -choice.score)
        found.sort(key=lambda entry: entry[0])
        return [(name, choice) for _, names, choice in found for name in names][:count]

    def may_hold(self, fleet: Fleet, ask: Ask, most: int, without: Set[str]) -> int:
        """Upper bound on the whole devices for the ask that one host can hold, by its totals; at most `most`."""
        table = self._followed(fleet).hosts
        values = table.values[:, : table.count]
        held = np.minimum(values[_TOGETHER], most)
        if ask.cpus_milli:
            held = np.minimum(held, values[_CPUS] * (self._cpus_scale * ask.gpus / ask.cpus_milli) + _SURE)
        if ask.host_memory_bytes:
            held = np.minimum(held, values[_MEMORY] * (self._memory_scale * ask.gpus / ask.host_memory_bytes) + _SURE)
        if not ask.any_model:
            held[~self._allowed(ask)[values[_MODEL].astype(np.int64)]] = 0.0
        classes = fleet.index.classes
        while len(held):
            at = int(held.argmax())
            if held[at] < 1.0:
                break
            state = table.owners[at]
            group = None if state is None else classes.get(state)
            if group is not None and any(name not in without for name in group.pool):
                return int(held[at])
            held[at] = 0.0
        return 0

    def _cheapest(self, fleet: Fleet, ask: Ask) -> Iterator[tuple[float, HostClass, list[int]]]:
        """Yield the classes that can hold a request, in the order of a lower bound on its cost there.

        With that bound, which is exact for one device, and the usable devices. A class may come once for each of its
        models or devices.
        """
        offers = self._followed(fleet)
        if ask.gpus == 1:
            table, costs, rows = self._of_devices(offers.devices, ask)
        else:
            table, costs, rows = self._of_hosts(offers.hosts, ask)
        classes = fleet.index.classes
        while len(rows):
            at = int(costs.argmin())
            least = float(costs[at])
            if least == inf:
                return
            state = table.owners[int(rows[at])]
            costs[at] = inf
            if state is None:
                continue
            group = classes.get(state)
            if group is None:
                offers.leave(state)
                continue
            usable = candidates(state, ask)
            if len(usable) >= ask.gpus and not excluded(state, ask):
                yield least, group, usable

    def _followed(self, fleet: Fleet) -> HostTable:
        self._offers.follow(fleet, self._rows)
        return self._offers

    def _rows(self, state: HostState) -> Rows:
        if state.blocked:
            return [], []
        worths = self._worths
        base, lack, whole = worths.standing(state)
        static = _TIE * left(state) - lack
        shared = (state.cpus_free / self._cpus_scale, state.memory_free / self._memory_scale, base)
        mixed = len(whole) > 1
        cpus = UNLIMITED if mixed else state.cpus_free
        before = others = 0.0
        if len(whole) == 1:
            for model, count in whole.items():
                before = worths.prices.worth(model).group(count, cpus)
                others = 2 * worths.models[model] * _BLOCK + min(count, DEVICES_MOST) * _ROW
        devices: list[tuple[float, ...]] = []
        wholes: list[tuple[float, float, float, int]] = []
        for device, places in state.kinds:
            share, memory = device.open_share, device.memory_free
            if share <= 0:
                continue
            model, number, is_whole, gap, worth, trouble, prices = worths.traits(device)
            cost, group = static + trouble + before, others
            if is_whole:
                if mixed:
                    cost += prices.group(whole[model], cpus)
                group = (2 * number + mixed) * _BLOCK + min(whole[model] - 1, DEVICES_MOST) * _ROW
                wholes.append((worth, trouble, memory, len(places)))
            part = min(share, part_most(device))
            devices.append((*shared, cost, number, is_whole, group, worth, share, gap, memory, part))
        if len(self._models) < len(worths.models):
            self._number()
        if not wholes:
            # A host without whole devices still has cores and RAM.
            return devices, [(*shared, static, *_NO_WHOLE)]
        several = (state.whole_free, *_several(wholes, state.topology is None))
        hosts: list[tuple[float, ...]] = []
        for model, count in whole.items():
            cost = static + worths.prices.worth(model).group(count, cpus)
            number, count = worths.models[model], min(count, DEVICES_MOST)
            group = (2 * number + mixed) * _BLOCK + count * _ROW
            hosts.append((*shared, cost, number, count, group, *several))
        return devices, hosts

    def _number(self) -> None:
        """Rebuild the tables of worths, after new models were added."""
        self._models = [*self._worths.models]
        known = [self._worths.prices.worth(model) for model in self._models]
        self._gaps = np.array([each.gaps for each in known]).ravel()
        blocks: list[Floats] = []
        for each in known:
            block = np.array(each.groups).reshape(-1, _ROW)
            blocks += [block, np.repeat(block[:, -1:], _ROW, axis=1)]
        self._groups = np.array(blocks).ravel()

    def _of_devices(self, table: Table, ask: Ask) -> tuple[Table, Floats, Integers]:
        values = table.values[:, : table.count]
        cpus, memory = ask.cpus_milli / self._cpus_scale, ask.host_memory_bytes / self._memory_scale
        able = values[_CPUS] >= cpus
        if ask.whole:
            able &= values[_WHOLE] > 0
        else:
            able &= values[_SHARE if ask.gpu_memory_bytes else _PART] >= ask.share
        if memory:
            able &= values[_MEMORY] >= memory
        if ask.gpu_memory_bytes:
            able &= values[_FREE] >= ask.gpu_memory_bytes
        if not ask.any_model:
            able &= self._allowed(ask)[values[_MODEL].astype(np.int64)]
        rows = able.nonzero()[0]
        if not len(rows):
            return table, np.empty(0), rows
        taken = values[_WORTH].take(rows)
        if not ask.whole:
            left = values[_GAP].take(rows)
            left -= ask.share_milli
            np.maximum(left, 0.0, out=left)
            left += values[_MODEL].take(rows) * (WHOLE_MILLI + 1)
            taken -= self._gaps.take(left.astype(np.int64))
        costs = values[_STATIC].take(rows)
        costs += taken
        self._add_shared(costs, values, rows, taken, values[_GROUP].take(rows), cpus, memory)
        return table, costs, rows

    def _of_hosts(self, table: Table, ask: Ask) -> tuple[Table, Floats, Integers]:
        values = table.values[:, : table.count]
        gpus, cpus, memory = ask.gpus, ask.cpus_milli / self._cpus_scale, ask.host_memory_bytes / self._memory_scale
        able = values[_CPUS] >= cpus
        if memory:
            able &= values[_MEMORY] >= memory
        if gpus:
            # On hosts with several models each has a row: `candidates` checks later if they suffice together.
            able &= values[_TOGETHER] >= gpus
            if ask.gpu_memory_bytes:
                able &= values[_FREEST] >= ask.gpu_memory_bytes
            if not ask.any_model:
                able &= self._allowed(ask)[values[_MODEL].astype(np.int64)]
        rows = able.nonzero()[0]
        if not len(rows):
            return table, np.empty(0), rows
        costs = values[_STATIC].take(rows)
        group = values[_GROUP].take(rows)
        if not gpus:
            self._add_shared(costs, values, rows, 0.0, group, cpus, memory)
            return table, costs, rows
        first = np.minimum(values[_FIRST].take(rows), gpus)
        others = gpus - first
        taken = first * values[_FIRST_WORTH].take(rows)
        taken += others * values[_NEXT_WORTH].take(rows)
        costs += taken
        if ask.gpu_memory_bytes:
            # Some of the first may be unusable for it: the others have at least the least strain.
            costs += gpus * values[_STRAIN].take(rows)
        else:
            costs += first * values[_FIRST_STRAIN].take(rows)
            costs += others * values[_NEXT_STRAIN].take(rows)
        group -= np.minimum(values[_WHOLE].take(rows), gpus) * _ROW
        self._add_shared(costs, values, rows, taken, group, cpus, memory)
        return table, costs, rows

    def _allowed(self, ask: Ask) -> Any:
        # One more at the end, for rows without a model (number -1).
        return np.array([model_allowed(model, ask) for model in self._worths.models] + [False])

    def _add_shared(
        self,
        costs: Floats,
        values: Floats,
        rows: Integers,
        taken: Floats | float,
        group: Floats,
        cpus: float,
        memory: float,
    ) -> None:
        """Add the cost for the host as a whole: X after, less T after.

        Args:
            costs: changed in place.
            values: of the table.
            rows: indexes of the rows.
            taken: loss of B.
            group: index in `_groups` of the remaining whole devices.
            cpus: requested cores, in the milli that they suffice for.
            memory: requested RAM, likewise.
        """
        left = values[_CPUS].take(rows)
        left -= cpus
        base = values[_BASE].take(rows)
        base -= taken
        if self._worths.prices.cpus_per_milli > 0:
            deviation = np.sqrt(np.maximum(base, _SURE))
            deviation *= self._spread
            short = base - left
            short /= deviation
            lack = np.interp(short, _GRID, _EXCESS)
            np.maximum(lack, short, out=lack)
            lack *= deviation
            costs += lack
        if self._worths.prices.memory_per_milli > 0:
            base -= values[_MEMORY].take(rows)
            base += memory
            np.maximum(base, 0.0, out=base)
            costs += base
        # Rounded down, with a tolerance for floating-point error.
        left *= self._cpus_scale / CORES_STEP_MILLI
        left += _SURE
        np.minimum(left, CORES_STEPS - 1, out=left)
        group += left
        costs -= self._groups.take(group.astype(np.int64))


def _several(wholes: list[tuple[float, float, float, int]], by_worth: bool) -> tuple[float, ...]:
    """Columns of a host's row for its whole devices, from `_FREEST` on.

    Args:
        wholes: (worth, strain in milli, free memory, number of devices) of each kind.
        by_worth: true if those of least worth are taken first; otherwise links decide, and any may have the least
            strain.
    """
    if len(wholes) == 1:
        worth, trouble, memory, count = wholes[0]
        return memory, trouble, count, worth, trouble, worth, trouble
    wholes.sort()
    worth, trouble, memory, count = wholes[0]
    rest = min([kind[1] for kind in wholes[1:]])
    least = min(trouble, rest)
    memory = max([kind[2] for kind in wholes])
    if not by_worth:
        trouble = rest = least
    return memory, least, count, worth, trouble, wholes[1][0], rest


def left(state: HostState) -> float:
    """Free cores and share, in units of a large host."""
    cpus = 0.0 if state.cpus_free >= UNLIMITED else state.cpus_free / CORES_SCALE
    return cpus + state.share_free / SHARE_SCALE
