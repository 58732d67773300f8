"""Present use of groups, and the starts that quotas allow.

A start is *within guarantee* if its group, or a group around it, has room in the guarantee for all of it. It is allowed
if no limit of these groups is exceeded. For work that can't be preempted, all groups must besides still be able to have
what they are guaranteed: for each set of models that a pattern of a guarantee stands for, what such work holds of them,
and what groups are guaranteed of them beyond that, must not exceed what the fleet has. (That is sufficient if of two
such sets one contains the other or they have nothing in common, as with `H100` and `*`.) The same holds for cores and
for RAM, of all hosts together.

A request that asks for several devices is counted as if all were of one model, for each model that it could take: so
devices of two models are granted together only where each model alone has room for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from ..fleet.state import WHOLE_SHARE
from .tree import Node, Quota, Tree

Barred = tuple[str, ...]
"""Models that a request must not take, sorted."""

Wanted = tuple[tuple[str, ...], int]
"""Models that a request could take, and the billionths of devices that it asks for."""
Stamp = tuple[Tree, int]
_CLASSES_KEPT: Final = 4096
_PLACES_KEPT: Final = 16_384


class Amounts(NamedTuple):
    """Amounts that a lease holds, or a request asks for.

    Attributes:
        devices: billionths of devices by model.
        cpus_milli: thousandths of cores.
        memory_bytes: host RAM.
    """

    devices: Mapping[str, int]
    cpus_milli: int = 0
    memory_bytes: int = 0


class Holding(NamedTuple):
    """A lease that counts.

    Attributes:
        owner: of the lease.
        amounts: what it holds.
        preemptible: true if it may be taken back.
    """

    owner: str
    amounts: Amounts
    preemptible: bool


class Pending:
    """Amounts that groups are about to get, or to give up: devices by pattern of their guarantees, cores and RAM.

    Args:
        base: amounts that count as well; None for none. What is added here is not added to them.
    """

    __slots__ = ("_base", "_cores", "_devices", "_totals")

    def __init__(self, base: Pending | None = None) -> None:
        self._base = base
        self._totals: dict[Node, int] = {}
        self._devices: dict[tuple[Node, int], int] = {}
        self._cores: dict[Node, tuple[int, int]] = {}

    def add(self, node: Node, amounts: Amounts, sign: int = 1) -> None:
        """Count what a lease of a group holds, for the groups around it as well; with sign -1 no more."""
        for each in node.path:
            for model, share in amounts.devices.items():
                at = each.guarantee.first(model)
                if at is not None:
                    self._devices[each, at] = self._devices.get((each, at), 0) + sign * share
            self._totals[each] = self._totals.get(each, 0) + sign * sum(amounts.devices.values())
            cpus_milli, memory_bytes = self._cores.get(each, (0, 0))
            self._cores[each] = (cpus_milli + sign * amounts.cpus_milli, memory_bytes + sign * amounts.memory_bytes)

    def devices(self, node: Node, at: int) -> int:
        """Billionths of devices under a pattern of a group's guarantee."""
        own = self._devices.get((node, at), 0)
        return own if self._base is None else own + self._base.devices(node, at)

    def total(self, node: Node) -> int:
        """Billionths of devices of all models."""
        own = self._totals.get(node, 0)
        return own if self._base is None else own + self._base.total(node)

    def cores(self, node: Node) -> tuple[int, int]:
        """Thousandths of cores, and bytes of RAM."""
        own = self._cores.get(node, (0, 0))
        if self._base is None:
            return own
        below = self._base.cores(node)
        return own[0] + below[0], own[1] + below[1]


_NOTHING: Final = Pending()


class NodeUse:
    """Use of a group, with those within.

    Attributes:
        guaranteed: billionths of devices by pattern of its guarantee.
        firm: the part of that which can't be preempted.
        limited: billionths of devices by pattern of each of its limits.
        firm_cores: thousandths of cores and bytes of RAM of work that can't be preempted.
        devices: billionths of devices by model.
        preemptible: the part of all devices that may be preempted.
        cpus_milli: thousandths of cores.
        memory_bytes: host RAM.
        priced: devices, each counted by its price.
        version: number of changes.
    """

    __slots__ = (
        "cpus_milli",
        "devices",
        "firm",
        "firm_cores",
        "guaranteed",
        "limited",
        "memory_bytes",
        "preemptible",
        "priced",
        "version",
    )

    def __init__(self, node: Node) -> None:
        self.version = 0
        self.guaranteed = [0] * len(node.guarantee.patterns)
        self.firm = [0] * len(node.guarantee.patterns)
        self.firm_cores: tuple[int, int] = (0, 0)
        self.limited = [[0] * len(limit.patterns) for limit in node.limits]
        self.devices: dict[str, int] = {}
        self.preemptible = 0
        self.cpus_milli = 0
        self.memory_bytes = 0
        self.priced = 0.0


_Place = tuple[NodeUse, int | None, Sequence[tuple[list[int], int]]]
"""Use of a group, the pattern of its guarantee that a model counts under, and where it counts for its limits."""


class _Limit(NamedTuple):
    """A limit on devices of a model.

    Attributes:
        used: billionths of devices by pattern of the limit, kept up to date.
        at: number of the pattern.
        most: billionths of devices under it.
        glob: the pattern.
    """

    used: list[int]
    at: int
    most: int
    glob: str


class _Level(NamedTuple):
    """A group on the way to another, as quotas on devices of a model see it.

    Attributes:
        node: the group.
        use: of it.
        at: number of the pattern of its guarantee that the model counts under; None if there is none.
        guaranteed: billionths of devices under that pattern.
        limits: on the model.
    """

    node: Node
    use: NodeUse
    at: int | None
    guaranteed: int
    limits: tuple[_Limit, ...]


class Admission(NamedTuple):
    """Verdict of the quotas on a request.

    Attributes:
        within: models that it must not take to stay within guarantee; None if it can't stay within.
        barred: models that it must not take at all; None if it must not start.
        reason: why models are barred, or why it must not start, in words; empty if nothing is.
        owed: models that it must not take to stay within guarantee, if only the limit of a group around is in its way;
            None otherwise.
        limited: that group: others within it have borrowed what is owed.
    """

    within: Barred | None
    barred: Barred | None
    reason: str = ""
    owed: Barred | None = None
    limited: Node | None = None

    @property
    def exhausted(self) -> bool:
        """True if it must not start, and no lease has to give devices back for it."""
        return self.within is None and self.barred is None and self.owed is None


class GroupUse:
    """Use of all groups, kept up to date lease by lease.

    Args:
        tree: the groups.

    Attributes:
        tree: as given.
        version: number of changes.
        holdings: leases that count, by id.
    """

    def __init__(self, tree: Tree) -> None:
        self.holdings: dict[str, Holding] = {}
        self.version = 0
        self._capacity: dict[str, int] = {}
        self._cores: tuple[int, int] | None = None
        self._firm: dict[str, int] = {}
        self._known: frozenset[str] = frozenset()
        self._classes: dict[tuple[Node, tuple[str, ...]], list[list[str]]] = {}
        self._around: dict[Node, list[NodeUse]] = {}
        """Use of each group and of those around it, the root first."""
        self._places: dict[tuple[Node, str], tuple[float, Sequence[_Place]]] = {}
        self._levels: dict[tuple[Node, str], list[_Level]] = {}
        self._limits_cores: dict[Node, bool] = {}
        """Whether a limit on cores or RAM applies to each group, or to one around it."""
        self._set(tree)

    def _set(self, tree: Tree) -> None:
        self.tree = tree
        self._uses = {node: NodeUse(node) for node in [tree.root, *tree.nodes.values()]}
        self._around = {node: [self._uses[each] for each in (tree.root, *node.path)] for node in self._uses}
        self._places = {}
        self._levels = {}
        self._limits_cores = {
            node: any(
                limit.cpus_milli is not None or limit.memory_bytes is not None
                for each in node.path
                for limit in each.limits
            )
            for node in self._uses
        }
        self._firm = {}
        self._classes = {}
        self._owed = Owed(tree, self._uses, self._known)
        self._owed_cores = OwedCores(tree, self._uses)
        self.version += 1

    def change(self, tree: Tree) -> None:
        """Take other groups: what runs counts for the groups that its owners have now."""
        self._set(tree)
        for holding in self.holdings.values():
            self._count(holding, 1)

    def of(self, node: Node) -> NodeUse:
        """Use of a group; of the root, that of all."""
        return self._uses[node]

    def hold(self, lease_id: str, owner: str, amounts: Amounts, preemptible: bool) -> None:
        """Count a lease; the same lease again replaces what it counted."""
        self.drop(lease_id)
        holding = self.holdings[lease_id] = Holding(owner, amounts, preemptible)
        self._count(holding, 1)

    def drop(self, lease_id: str) -> None:
        """Count a lease no more, if it did."""
        holding = self.holdings.pop(lease_id, None)
        if holding is not None:
            self._count(holding, -1)

    def _count(self, holding: Holding, sign: int) -> None:
        self.version += 1
        amounts, firm = holding.amounts, not holding.preemptible
        node = self.tree.node_of(holding.owner)
        cpus, memory = sign * amounts.cpus_milli, sign * amounts.memory_bytes
        for use in self._around[node]:
            use.version += 1
            if cpus or memory:
                use.cpus_milli += cpus
                use.memory_bytes += memory
                if firm:
                    use.firm_cores = (use.firm_cores[0] + cpus, use.firm_cores[1] + memory)
        for model, share in amounts.devices.items():
            share *= sign
            price, places = self._places_of(node, model)
            for use, at, limits in places:
                _add(use.devices, model, share)
                use.priced += price * share / WHOLE_SHARE
                if not firm:
                    use.preemptible += share
                if at is not None:
                    use.guaranteed[at] += share
                    if firm:
                        use.firm[at] += share
                for used, number in limits:
                    used[number] += share
        if firm:
            for model, share in amounts.devices.items():
                _add(self._firm, model, sign * share)
                if model not in self._known:
                    self._know(frozenset([model]))
            self._owed.renew(node)
            self._owed_cores.renew(node)

    def _places_of(self, node: Node, model: str) -> tuple[float, Sequence[_Place]]:
        """The price of a model, and where devices of it count that a group holds."""
        found = self._places.get((node, model))
        if found is None:
            places = [
                (
                    use,
                    each.guarantee.first(model),
                    [
                        (used, number)
                        for limit, used in zip(each.limits, use.limited, strict=True)
                        for number in limit.every(model)
                    ],
                )
                for each, use in zip((self.tree.root, *node.path), self._around[node], strict=True)
            ]
            if len(self._places) >= _PLACES_KEPT:
                self._places.clear()
            found = self._places[node, model] = (self.tree.price(model), places)
        return found

    def _levels_of(self, node: Node, model: str) -> list[_Level]:
        """A group and those around it, the outermost first, as quotas on devices of a model see them."""
        found = self._levels.get((node, model))
        if found is None:
            if len(self._levels) >= _PLACES_KEPT:
                self._levels.clear()
            found = self._levels[node, model] = [self._level(each, model) for each in node.path]
        return found

    def _level(self, node: Node, model: str) -> _Level:
        use, at = self._uses[node], node.guarantee.first(model)
        limits = tuple(
            _Limit(used, number, limit.patterns[number][1], limit.patterns[number][0])
            for limit, used in zip(node.limits, use.limited, strict=True)
            for number in limit.every(model)
        )
        return _Level(node, use, at, 0 if at is None else node.guarantee.patterns[at][1], limits)

    def note_capacity(self, capacity: Mapping[str, int], cores: tuple[int, int] | None = None) -> None:
        """Note what the fleet has.

        Args:
            capacity: billionths of devices that could take work, by model.
            cores: thousandths of cores and bytes of RAM of all hosts; None if unknown, then none are kept for others.
        """
        if capacity != self._capacity or cores != self._cores:
            self._capacity, self._cores = dict(capacity), cores
            self.version += 1
            self._know(frozenset(capacity))

    def _know(self, models: frozenset[str]) -> None:
        if not models <= self._known:
            self._known |= models
            self._owed = Owed(self.tree, self._uses, self._known)
            self._classes = {}

    def _alike(self, node: Node, models: Sequence[str]) -> list[list[str]]:
        """Models that no quota on a request of a group tells apart, as lists, so that one of each is compared."""
        key = node, tuple(models)
        found = self._classes.get(key)
        if found is None:
            by_patterns: dict[object, list[str]] = {}
            for model in models:
                quotas = [quota.every(model) for each in node.path for quota in (each.guarantee, *each.limits)]
                by_patterns.setdefault((self._owed.sets_with(model), *quotas), []).append(model)
            if len(self._classes) >= _CLASSES_KEPT:
                self._classes.clear()
            found = self._classes[key] = list(by_patterns.values())
        return found

    # What quotas allow

    def stamp(self, node: Node, preemptible: bool) -> Stamp:
        """Stamp that changes when what quotas allow requests of a group may have changed.

        What may be preempted depends on the use of its group and of those around it alone, anything else on all.
        """
        if not preemptible:
            return self.tree, self.version
        # The first of those around is the root, whose use changes with any.
        return self.tree, sum([use.version for use in self._around[node]]) - self._uses[self.tree.root].version

    def inner_version(self, node: Node) -> int:
        """Number that changes with the use of a group and of those around it, but for the outermost."""
        return sum([use.version for use in self._around[node][2:]])

    def is_over_limit(self, node: Node, wanted: Wanted) -> bool:
        """True if a start would exceed limits of a group, whichever model it takes."""
        models, devices = wanted
        return bool(models) and all(self.excess(node, model, devices) > 0 for model in models)

    def admission(
        self, node: Node, models: Sequence[str], devices: int, cpus_milli: int, memory_bytes: int, preemptible: bool
    ) -> Admission:
        """Say what quotas allow a request.

        Args:
            node: group of its owner.
            models: models that it could take; empty for a request without devices.
            devices: billionths of devices that it asks for.
            cpus_milli: thousandths of cores.
            memory_bytes: host RAM.
            preemptible: true if its lease may be taken back.
        """
        why = self._over_cores(node, cpus_milli, memory_bytes) if self._limits_cores[node] else ""
        if not why and not preemptible:
            why = self._cores_needed_by_others(node, cpus_milli, memory_bytes)
        if why:
            return Admission(None, None, why)
        if not models:
            within = self.is_within(node, None, 0, cpus_milli, memory_bytes)
            return Admission(() if within else None, ())
        over: list[str] = []
        beyond: list[str] = []
        owed: list[str] = []
        limited: Node | None = None
        last = ""
        for alike in self._alike(node, models):
            model = alike[0]
            levels = self._levels_of(node, model)
            full = room = -1
            reason = ""
            for number, (each, use, at, guaranteed, limits) in enumerate(levels):
                for limit in limits:
                    if limit.used[limit.at] + devices > limit.most:
                        full = number
                        reason = reason or _limit_reached(each, limit, devices)
                if at is not None and use.guaranteed[at] + devices <= guaranteed:
                    room = number
            if 0 <= full < room:  # others have borrowed what a group within is guaranteed
                owed += alike
                if alike[-1] >= last:
                    limited, last = levels[full].node, alike[-1]
            within = not reason and room >= 0
            if not reason and not preemptible:
                reason = self._needed_by_others(node, model, devices)
                within = within and not reason
            if reason:
                over += alike
                why = why or reason
            if not within:
                beyond += alike
        return Admission(
            None if len(beyond) == len(models) else tuple(sorted(beyond)),
            None if len(over) == len(models) else tuple(sorted(over)),
            why,
            tuple(sorted(set(models) - set(owed))) if owed and len(beyond) == len(models) else None,
            limited,
        )

    def excess(self, node: Node, model: str, devices: int) -> int:
        """Billionths of devices by which a start would exceed the limits of a group; 0 or less if it would not."""
        return max(
            (
                used[at] + devices - limit.patterns[at][1]
                for limit, used in zip(node.limits, self._uses[node].limited, strict=True)
                for at in limit.every(model)
            ),
            default=0,
        )

    def is_within(self, node: Node, model: str | None, devices: int, cpus_milli: int, memory_bytes: int) -> bool:
        """True if one of the groups on the way to a group has room in its guarantee."""
        return self.within_level(node, model, devices, cpus_milli, memory_bytes) is not None

    def within_level(
        self,
        node: Node,
        model: str | None,
        devices: int,
        cpus_milli: int = 0,
        memory_bytes: int = 0,
        pending: Pending = _NOTHING,
    ) -> Node | None:
        """The innermost of the groups on the way to a group that has room in its guarantee; None if none has.

        Args:
            node: group of the owner.
            model: of the devices; None for cores and RAM alone.
            devices: billionths of devices.
            cpus_milli: thousandths of cores.
            memory_bytes: host RAM.
            pending: what groups are about to get.
        """
        for each in reversed(node.path):
            use, quota = self._uses[each], each.guarantee
            if model is None:
                cpus, memory = pending.cores(each)
                if _has_room(quota, use, cpus + cpus_milli, memory + memory_bytes):
                    return each
                continue
            at = quota.first(model)
            if at is not None and use.guaranteed[at] + pending.devices(each, at) + devices <= quota.patterns[at][1]:
                return each
        return None

    def _over_cores(self, node: Node, cpus_milli: int, memory_bytes: int) -> str:
        """Say which limit on cores or RAM a start would exceed; empty if none."""
        for each in node.path:
            use = self._uses[each]
            for limit in each.limits:
                if limit.cpus_milli is not None and use.cpus_milli + cpus_milli > limit.cpus_milli:
                    return f"group {each.name} may use {limit.cpus_milli / 1000:g} cores"
                if limit.memory_bytes is not None and use.memory_bytes + memory_bytes > limit.memory_bytes:
                    return f"group {each.name} may use {limit.memory_bytes} bytes of RAM"
        return ""

    def _needed_by_others(self, node: Node, model: str, devices: int) -> str:
        """Say what others are guaranteed that a start which can't be preempted would take; empty if nothing."""
        owed = self._owed
        for number in owed.sets_with(model):
            after = owed.total_after(number, node, model, devices)
            if not after:
                continue
            models = owed.sets[number]
            firm = sum([amount for name, amount in self._firm.items() if name in models])
            capacity = sum([amount for name, amount in self._capacity.items() if name in models])
            if firm + devices + after > max(firm + owed.total(number), capacity):
                return (
                    f"what is free of {owed.names[number].strip('*') or 'all GPUs'} is guaranteed to other groups: "
                    "wait, or ask for work that "
                    "may be preempted (preemptible)"
                )
        return ""

    def _cores_needed_by_others(self, node: Node, cpus_milli: int, memory_bytes: int) -> str:
        """Say which cores or RAM others are guaranteed that a start which can't be preempted would take."""
        owed = self._owed_cores
        if not owed.any or self._cores is None:
            return ""
        firm, asked = self._uses[self.tree.root].firm_cores, (cpus_milli, memory_bytes)
        before, after = owed.total(), owed.total_after(node, asked)
        for at, name in enumerate(("cores", "RAM")):
            most = max(firm[at] + before[at], self._cores[at])
            if asked[at] and after[at] and firm[at] + asked[at] + after[at] > most:
                return (
                    f"what is free of the {name} is guaranteed to other groups: wait, or ask for work that may be "
                    "preempted (preemptible)"
                )
        return ""

    def owed(self, node: Node) -> int:
        """Billionths of devices that a group is guaranteed and does not use."""
        use = self._uses[node]
        own = sum(
            max(0, amount - used) for used, (_, amount) in zip(use.guaranteed, node.guarantee.patterns, strict=True)
        )
        return max(own, sum(self.owed(child) for child in node.children.values()))

    # Whose leases may be taken back

    def protects(self, node: Node, amounts: Amounts, claimant: Node, removed: Pending) -> bool:
        """True if a guarantee keeps a lease from another group: its group, or one around it, uses no more than that.

        Args:
            node: group of the lease.
            amounts: what it holds.
            claimant: group that asks.
            removed: what groups give up already.
        """
        return self._left(node, amounts, claimant, removed, 0)

    def falls_below(self, node: Node, amounts: Amounts, claimant: Node, removed: Pending) -> bool:
        """True if a group of a lease is below its guarantee without it; `removed` counts the lease."""
        return self._left(node, amounts, claimant, removed, 1)

    def _left(self, node: Node, amounts: Amounts, claimant: Node, removed: Pending, below: int) -> bool:
        """True if what is left to a group, plus `below` of the least unit, is not above its guarantee."""
        around = set(claimant.path)
        for each in node.path:
            if each in around:
                continue
            quota, use = each.guarantee, self._uses[each]
            for model in amounts.devices:
                at = quota.first(model)
                if at is not None and use.guaranteed[at] - removed.devices(each, at) + below <= quota.patterns[at][1]:
                    return True
            cpus, memory = removed.cores(each)
            if not amounts.devices and _has_room(quota, use, below - cpus, below - memory):
                return True
        return False

    def borrowed(self, node: Node) -> int:
        """Billionths of devices that a group uses beyond its guarantee."""
        use = self._uses[node]
        kept = sum(min(used, amount) for used, (_, amount) in zip(use.guaranteed, node.guarantee.patterns, strict=True))
        return sum(use.devices.values()) - kept


class Owed:
    """Devices that groups are guaranteed beyond their work that can't be preempted, by set of models.

    Args:
        tree: the groups.
        uses: their use.
        models: all models.

    Attributes:
        sets: the models that each pattern of a guarantee stands for, and all models.
        names: the pattern of each set.
    """

    def __init__(self, tree: Tree, uses: Mapping[Node, NodeUse], models: frozenset[str]) -> None:
        self._uses = uses
        self._root = tree.root
        meant_by: dict[Node, list[frozenset[str]]] = {
            node: [
                frozenset(model for model in models if node.guarantee.first(model) == at)
                for at in range(len(node.guarantee.patterns))
            ]
            for node in tree.nodes.values()
        }
        named: dict[frozenset[str], str] = {}
        for node, meant in meant_by.items():
            for each, (glob, _) in zip(meant, node.guarantee.patterns, strict=True):
                named.setdefault(each, glob)
        if named:
            named.setdefault(models, "*")
        self.sets, self.names = list(named), list(named.values())
        self._with: dict[str, tuple[int, ...]] = {}
        self._parts = {
            node: [_contained(node.guarantee, meant, models) for models in self.sets]
            for node, meant in meant_by.items()
        }
        """The patterns of each group's guarantee that a set contains, with their amounts, by set."""
        self._owed: dict[Node, list[int]] = {}
        self._inside: dict[Node, list[int]] = {}
        for child in tree.root.children.values():
            self._compute(child)
        self._inside[tree.root] = [
            sum(self._owed[child][number] for child in tree.root.children.values()) for number in range(len(self.sets))
        ]

    def _compute(self, node: Node) -> None:
        for child in node.children.values():
            self._compute(child)
        numbers = range(len(self.sets))
        self._inside[node] = [sum(self._owed[child][at] for child in node.children.values()) for at in numbers]
        self._owed[node] = [max(self._own(node, at), self._inside[node][at]) for at in numbers]

    def _own(self, node: Node, number: int, model: str = "", devices: int = 0) -> int:
        """Devices of a group's own guarantee beyond its firm work, after a further start."""
        firm = self._uses[node].firm
        at = node.guarantee.first(model) if devices else None
        owed = 0
        for each, amount in self._parts[node][number]:
            left = amount - firm[each] - (devices if each == at else 0)
            if left > 0:
                owed += left
        return owed

    def renew(self, node: Node) -> None:
        """Compute a group and those around it anew."""
        for each in reversed(node.path):
            assert each.parent is not None
            inside = self._inside[each.parent]
            for number, before in enumerate(self._owed[each]):
                after = max(self._own(each, number), self._inside[each][number])
                self._owed[each][number] = after
                inside[number] += after - before

    def sets_with(self, model: str) -> tuple[int, ...]:
        """Numbers of the sets that have a model."""
        found = self._with.get(model)
        if found is None:
            found = tuple(number for number, models in enumerate(self.sets) if model in models)
            self._with[model] = found
        return found

    def total(self, number: int) -> int:
        """Billionths of devices that groups are owed of a set."""
        return self._inside[self._root][number]

    def total_after(self, number: int, node: Node, model: str, devices: int) -> int:
        """The same after a start that can't be preempted."""
        change = 0
        for each in reversed(node.path):
            after = max(self._own(each, number, model, devices), self._inside[each][number] + change)
            change = after - self._owed[each][number]
        return self.total(number) + change


def _contained(
    guarantee: Quota, meant: Sequence[frozenset[str]], models: frozenset[str]
) -> tuple[tuple[int, int], ...]:
    """Numbers of the patterns of a guarantee that stand for some of these models alone, with their amounts."""
    patterns = zip(meant, guarantee.patterns, strict=True)
    return tuple([(at, amount) for at, (each, (_, amount)) in enumerate(patterns) if each <= models])


class OwedCores:
    """Cores and RAM that groups are guaranteed beyond their work that can't be preempted.

    Args:
        tree: the groups.
        uses: their use.

    Attributes:
        any: true if any are guaranteed.
    """

    def __init__(self, tree: Tree, uses: Mapping[Node, NodeUse]) -> None:
        quotas = [node.guarantee for node in tree.nodes.values()]
        self.any = any(quota.cpus_milli is not None or quota.memory_bytes is not None for quota in quotas)
        self._uses = uses
        self._root = tree.root
        self._owed: dict[Node, tuple[int, int]] = {}
        self._inside: dict[Node, tuple[int, int]] = {}
        if self.any:
            self._compute(tree.root)

    def _compute(self, node: Node) -> None:
        for child in node.children.values():
            self._compute(child)
        owed = [self._owed[child] for child in node.children.values()]
        self._inside[node] = (sum(cpus for cpus, _ in owed), sum(memory for _, memory in owed))
        self._owed[node] = _most(self._own(node), self._inside[node])

    def _own(self, node: Node, more: tuple[int, int] = (0, 0)) -> tuple[int, int]:
        """Cores and RAM of a group's own guarantee beyond its firm work, after a further start."""
        quota, (cpus_milli, memory_bytes) = node.guarantee, self._uses[node].firm_cores
        return (
            max(0, (quota.cpus_milli or 0) - cpus_milli - more[0]),
            max(0, (quota.memory_bytes or 0) - memory_bytes - more[1]),
        )

    def renew(self, node: Node) -> None:
        """Compute a group and those around it anew."""
        if not self.any:
            return
        for each in reversed(node.path):
            assert each.parent is not None
            before, after = self._owed[each], _most(self._own(each), self._inside[each])
            self._owed[each] = after
            self._inside[each.parent] = _changed(self._inside[each.parent], before, after)

    def total(self) -> tuple[int, int]:
        """Thousandths of cores and bytes of RAM that groups are owed."""
        return self._inside[self._root]

    def total_after(self, node: Node, asked: tuple[int, int]) -> tuple[int, int]:
        """The same after a start that can't be preempted."""
        inside: tuple[int, int] = self._inside[node]
        for each in reversed(node.path):
            assert each.parent is not None
            after = _most(self._own(each, asked), inside)
            inside = _changed(self._inside[each.parent], self._owed[each], after)
        return inside


def _most(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return max(one[0], other[0]), max(one[1], other[1])


def _changed(amounts: tuple[int, int], before: tuple[int, int], after: tuple[int, int]) -> tuple[int, int]:
    return amounts[0] + after[0] - before[0], amounts[1] + after[1] - before[1]


def _limit_reached(node: Node, limit: _Limit, devices: int) -> str:
    """Say that a start would exceed a limit."""
    asked = f", less than the {devices / WHOLE_SHARE:g} asked for" if devices > limit.most else ""
    return (
        f"group {node.name} uses {limit.used[limit.at] / WHOLE_SHARE:g} devices of {limit.glob!r}, and "
        f"{limit.most / WHOLE_SHARE:g} are its limit{asked}"
    )


def _has_room(quota: Quota, use: NodeUse, cpus_milli: int, memory_bytes: int) -> bool:
    if quota.cpus_milli is None and quota.memory_bytes is None:
        return False
    return (quota.cpus_milli is None or use.cpus_milli + cpus_milli <= quota.cpus_milli) and (
        quota.memory_bytes is None or use.memory_bytes + memory_bytes <= quota.memory_bytes
    )


def _add(into: dict[str, int], key: str, amount: int) -> None:
    left = into.get(key, 0) + amount
    if left:
        into[key] = left
    else:
        into.pop(key, None)
