"""The tree of groups, with its quotas made ready to compare.

A guarantee counts each device once, for the first of its patterns that matches the model; a limit counts it for each
pattern that matches. A borrowing limit is a limit above the guarantee of the same pattern, or above all guarantees for
the pattern `*`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from ...schemas.values import globs
from ...schemas.work.groups import DEFAULT_GROUP, Group, GroupTree, Resources
from ..fleet.state import WHOLE_SHARE, milli
from .patterns import ANY, pattern_of
from .validate import check


class Quota:
    """Amounts of one guarantee or limit, in whole numbers.

    Attributes:
        patterns: lower-case globs over models, each with billionths of devices.
        cpus_milli: thousandths of cores; None for any.
        memory_bytes: host RAM; None for any.
    """

    __slots__ = ("_every", "_first", "cpus_milli", "memory_bytes", "patterns")

    def __init__(self, patterns: Mapping[str, int], cpus_milli: int | None, memory_bytes: int | None) -> None:
        self.patterns = tuple(patterns.items())
        self.cpus_milli = cpus_milli
        self.memory_bytes = memory_bytes
        self._first: dict[str, int | None] = {}
        self._every: dict[str, tuple[int, ...]] = {}

    @property
    def empty(self) -> bool:
        """True if it says nothing."""
        return not self.patterns and self.cpus_milli is None and self.memory_bytes is None

    def first(self, model: str) -> int | None:
        """Number of the first pattern that matches a model; None if none does."""
        if model not in self._first:
            self._first[model] = next(iter(self.every(model)), None)
        return self._first[model]

    def every(self, model: str) -> tuple[int, ...]:
        """Numbers of the patterns that match a model."""
        found = self._every.get(model)
        if found is None:
            name = model.lower()
            found = tuple(at for at, (glob, _) in enumerate(self.patterns) if globs.matches(name, glob))
            self._every[model] = found
        return found

    def amount(self, glob: str) -> int:
        """Billionths of devices under a pattern; under `*` those of all patterns."""
        return sum(amount for other, amount in self.patterns if glob in (ANY, other))


NOTHING: Final = Quota({}, None, None)


def quota_of(resources: Resources) -> Quota:
    """Quota of configured amounts."""
    return Quota(
        {pattern_of(text): round(amount * WHOLE_SHARE) for text, amount in resources.gpus.items()},
        None if resources.cpus is None else milli(resources.cpus),
        resources.host_memory_bytes,
    )


class Node:
    """A group in the tree.

    Attributes:
        config: as configured.
        name: of the group; empty for the root.
        parent: the group around it; None for the root.
        weight: as configured.
        children: the groups within, by name.
        path: the groups from the outermost to this one, without the root.
        guarantee: what it is guaranteed.
        limits: what it must not exceed: its limit, and its guarantee with what it may borrow.
    """

    __slots__ = ("children", "config", "guarantee", "limits", "name", "parent", "path", "weight")

    def __init__(self, config: Group, parent: Node | None) -> None:
        self.config = config
        self.name = config.name if parent is not None else ""
        self.parent = parent
        self.weight = config.weight
        self.children: dict[str, Node] = {}
        self.path: tuple[Node, ...] = () if parent is None else (*parent.path, self)
        self.guarantee = NOTHING
        self.limits: tuple[Quota, ...] = ()

    def __repr__(self) -> str:
        return f"Node({self.name or 'root'})"

    def walk(self) -> Iterator[Node]:
        """This group and all within."""
        yield self
        for child in self.children.values():
            yield from child.walk()


class Tree:
    """All groups.

    Args:
        config: as configured.

    Attributes:
        config: as given.
        root: holds the outermost groups; it is no group itself.
        nodes: groups by name; `default` is always there.

    Raises:
        InvalidGroups: groups contradict each other.
    """

    def __init__(self, config: GroupTree) -> None:
        check(config)
        self.config = config
        self.root = Node(Group(name=DEFAULT_GROUP), None)
        self.nodes: dict[str, Node] = {}
        self._members: dict[str, Node] = {}
        self._prices = [(pattern_of(text), price) for text, price in config.prices.items()]
        self._price_of: dict[str, float] = {}
        self._add_all(config)
        for node in self.nodes.values():
            _resolve(node)

    @property
    def empty(self) -> bool:
        """True if no group is configured."""
        return not self.config.groups

    def node_of(self, owner: str) -> Node:
        """Group of an owner."""
        return self._members.get(owner) or self.nodes[DEFAULT_GROUP]

    def price(self, model: str) -> float:
        """Relative price of a model."""
        found = self._price_of.get(model)
        if found is None:
            name = model.lower()
            found = next((price for glob, price in self._prices if globs.matches(name, glob)), 1.0)
            self._price_of[model] = found
        return found

    def _add_all(self, config: GroupTree) -> None:
        configured = {group.name: group for group in config.groups}
        for group in config.groups:
            node = self._add(group.name, configured)
            self._members.update(dict.fromkeys(group.members, node))
        self._add(DEFAULT_GROUP, configured)

    def _add(self, name: str, configured: Mapping[str, Group]) -> Node:
        found = self.nodes.get(name)
        if found is None:
            around, _, _ = name.rpartition("/")
            parent = self._add(around, configured) if around else self.root
            found = self.nodes[name] = Node(configured.get(name) or Group(name=name), parent)
            parent.children[name] = found
        return found


def _resolve(node: Node) -> None:
    config = node.config
    own, limit, borrowing = quota_of(config.guarantee), quota_of(config.limit), quota_of(config.borrowing_limit)
    # `*` is what the others leave, so it comes last.
    node.guarantee = Quota(
        dict(sorted(own.patterns, key=lambda pattern: pattern[0] == ANY)), own.cpus_milli, own.memory_bytes
    )
    above = Quota(
        {glob: own.amount(glob) + amount for glob, amount in borrowing.patterns},
        None if borrowing.cpus_milli is None else (own.cpus_milli or 0) + borrowing.cpus_milli,
        None if borrowing.memory_bytes is None else (own.memory_bytes or 0) + borrowing.memory_bytes,
    )
    node.limits = tuple(quota for quota in (limit, above) if not quota.empty)
