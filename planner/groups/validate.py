"""Checks of a tree of groups: names, members, patterns, and whether its guarantees and limits agree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final, NamedTuple

from ...schemas.values import globs
from ...schemas.values.units import format_bytes
from ...schemas.work.groups import DEFAULT_GROUP, MAX_DEPTH, Group, GroupTree, Resources
from .patterns import in_order, is_within, pattern_of

_SLACK: Final = 1e-9
"""Sums of parts of devices may be this much too large, by rounding."""


class InvalidGroups(ValueError):
    """A tree of groups that contradicts itself.

    Attributes:
        message: what is wrong, and what to do.
        field: path of the field at fault in the tree, such as `$.groups[2].members[0]`. Of several groups at fault, it
            is a field of the last.
    """

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.message = message
        self.field = field


class _Numbered(NamedTuple):
    """A group with its place in the tree. One that is only named within others' names has the last of their places."""

    number: int
    group: Group


def check(tree: GroupTree) -> None:
    """Check a tree of groups.

    Raises:
        InvalidGroups: a name comes twice or is too deep, an owner is in two groups, a pattern is wrong or comes twice,
            a guarantee is above a limit, or groups are guaranteed more than the group around them.
    """
    _check_names(tree)
    _check_members(tree)
    _check_patterns(tree)
    by_name = _with_implied(tree)
    within = _by_parent(by_name)
    found = guarantees(tree)
    for name, own in by_name.items():
        inner = [(found[child], by_name[child]) for child in within.get(name, ())]
        _check_parts(own, inner)
        _check_limit(own, found[name], [numbered for _, numbered in inner])


def guarantees(tree: GroupTree) -> dict[str, Resources]:
    """Guarantee of each group, by name: its guarantee of each resource, else the sum of those within.

    Groups that are only named within another's name are among them.
    """
    by_name = _with_implied(tree)
    within = _by_parent(by_name)
    found: dict[str, Resources] = {}
    for name in sorted(by_name, key=_depth, reverse=True):  # the deepest first
        found[name] = _combined(by_name[name].group.guarantee, [found[child] for child in within.get(name, ())])
    return found


def parent_of(name: str) -> str:
    """Name of the group around a group; empty for one at the top."""
    return name.rpartition("/")[0]


def around(name: str) -> Iterator[str]:
    """Names of a group and of the groups around it, from the inside out."""
    while name:
        yield name
        name = parent_of(name)


def is_inside(name: str, outer: str) -> bool:
    """True if a group is another one, or within it."""
    return name == outer or name.startswith(f"{outer}/")


def _depth(name: str) -> int:
    return name.count("/") + 1


def _check_names(tree: GroupTree) -> None:
    seen: set[str] = set()
    for index, group in enumerate(tree.groups):
        field = f"$.groups[{index}].name"
        if group.name in seen:
            raise InvalidGroups(f"There are two groups {group.name!r}", field)
        seen.add(group.name)
        if _depth(group.name) > MAX_DEPTH:
            text = f"Group {group.name!r} is {_depth(group.name)} levels deep, {MAX_DEPTH} are the most"
            raise InvalidGroups(text, field)
        if group.name.startswith(f"{DEFAULT_GROUP}/"):
            text = f"Group {DEFAULT_GROUP!r}, of all who are in no other, can have no groups within: take another name"
            raise InvalidGroups(text, field)


def _check_members(tree: GroupTree) -> None:
    group_of: dict[str, str] = {}
    for index, group in enumerate(tree.groups):
        if group.name == DEFAULT_GROUP and group.members:
            text = f"Group {DEFAULT_GROUP!r} has all who are in no other group: it can't be given members"
            raise InvalidGroups(text, f"$.groups[{index}].members")
        for place, owner in enumerate(group.members):
            before = group_of.setdefault(owner, group.name)
            field = f"$.groups[{index}].members[{place}]"
            if before != group.name:
                text = f"Owner {owner!r} is in two groups, {before!r} and {group.name!r}: leave it in one of them"
                raise InvalidGroups(text, field)
        if len(set(group.members)) < len(group.members):
            twice = next(owner for owner in group.members if group.members.count(owner) > 1)
            raise InvalidGroups(f"Owner {twice!r} is in {group.name!r} twice", f"$.groups[{index}].members")


def _check_patterns(tree: GroupTree) -> None:
    complex_ones: set[str] = set()
    for field, patterns in _patterns(tree):
        written: dict[str, str] = {}
        for pattern in patterns:
            before = written.setdefault(pattern_of(pattern), pattern)
            if before != pattern:
                raise InvalidGroups(f"{before!r} and {pattern!r} are the same pattern", field)
            if not pattern or not pattern.isprintable() or pattern != pattern.strip():
                raise InvalidGroups(f"{pattern!r} is no pattern for the model of a device", field)
            if "?" in pattern or "[" in pattern:
                complex_ones.add(pattern_of(pattern))
        if len(complex_ones) > globs.MAX_COMPLEX:
            text = f"More than {globs.MAX_COMPLEX} patterns of the tree have ? or [ in them: use * where you can"
            raise InvalidGroups(text, field)


def _patterns(tree: GroupTree) -> Iterator[tuple[str, Iterable[str]]]:
    """Model patterns of a tree, each with the path of the field that they are in."""
    yield "$.prices", tree.prices
    for index, group in enumerate(tree.groups):
        yield f"$.groups[{index}].guarantee.gpus", group.guarantee.gpus
        yield f"$.groups[{index}].limit.gpus", group.limit.gpus
        yield f"$.groups[{index}].borrowing_limit.gpus", group.borrowing_limit.gpus


def _with_implied(tree: GroupTree) -> dict[str, _Numbered]:
    """The groups by name, with those that are only named within another's name."""
    found: dict[str, _Numbered] = {}
    for index, group in enumerate(tree.groups):
        for name in around(parent_of(group.name)):
            found[name] = _Numbered(index, Group(name=name))
    found.update((group.name, _Numbered(index, group)) for index, group in enumerate(tree.groups))
    return found


def _by_parent(names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        if parent := parent_of(name):
            found.setdefault(parent, []).append(name)
    return found


def _check_parts(own: _Numbered, inner: list[tuple[Resources, _Numbered]]) -> None:
    """Check that a group's guarantee, if it has one, covers those of the groups within."""
    group, guarantee = own.group, own.group.guarantee
    last = max([own.number, *(numbered.number for _, numbered in inner)])
    field = f"$.groups[{last}].guarantee"
    if guarantee.gpus:
        sums = dict.fromkeys(guarantee.gpus, 0.0)
        for part, child in inner:
            for pattern, amount in part.gpus.items():
                outer = next((one for one, _ in in_order(guarantee.gpus) if is_within(pattern, one)), None)
                if outer is None and amount:
                    text = (
                        f"{child.group.name!r} is guaranteed {pattern!r}, of which the guarantee of {group.name!r} "
                        f"({', '.join(guarantee.gpus)}) has none: add the pattern there"
                    )
                    raise InvalidGroups(text, f"$.groups[{max(own.number, child.number)}].guarantee.gpus")
                if outer is not None:
                    sums[outer] += amount
        for pattern, total in sums.items():
            if total > guarantee.gpus[pattern] + _SLACK:
                text = (
                    f"The groups within {group.name!r} are guaranteed {total:g} {pattern!r}, more than its own "
                    f"{guarantee.gpus[pattern]:g}"
                )
                raise InvalidGroups(text, f"{field}.gpus")
    cores = sum(part.cpus or 0.0 for part, _ in inner)
    if guarantee.cpus is not None and cores > guarantee.cpus + _SLACK:
        text = f"The groups within {group.name!r} are guaranteed {cores:g} cores, more than its own {guarantee.cpus:g}"
        raise InvalidGroups(text, f"{field}.cpus")
    memory = sum(part.host_memory_bytes or 0 for part, _ in inner)
    if guarantee.host_memory_bytes is not None and memory > guarantee.host_memory_bytes:
        text = (
            f"The groups within {group.name!r} are guaranteed {format_bytes(memory)} of RAM, more than its own "
            f"{format_bytes(guarantee.host_memory_bytes)}"
        )
        raise InvalidGroups(text, f"{field}.host_memory_bytes")


def _combined(own: Resources, inner: list[Resources]) -> Resources:
    """Guarantee of a group: its own guarantee of each resource, else the sum of those within."""
    cores = [part.cpus for part in inner if part.cpus is not None]
    memory = [part.host_memory_bytes for part in inner if part.host_memory_bytes is not None]
    return Resources(
        gpus=own.gpus or added(part.gpus for part in inner),
        cpus=own.cpus if own.cpus is not None else sum(cores) if cores else None,
        host_memory_bytes=own.host_memory_bytes if own.host_memory_bytes is not None else sum(memory) or None,
    )


def added(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Sum of amounts by pattern; patterns that stand for the same glob are one, in the spelling that comes first."""
    spelling: dict[str, str] = {}
    sums: dict[str, float] = {}
    for part in parts:
        for pattern, amount in part.items():
            name = spelling.setdefault(pattern_of(pattern), pattern)
            sums[name] = sums.get(name, 0.0) + amount
    return sums


def _check_limit(own: _Numbered, guaranteed: Resources, inner: list[_Numbered]) -> None:
    """Check that a group is not guaranteed more than its limit."""
    group, limit = own.group, own.group.limit
    last = max([own.number, *(numbered.number for numbered in inner)])
    field = f"$.groups[{last}].{'limit' if last == own.number else 'guarantee'}"
    for pattern, most in limit.gpus.items():
        total = sum(amount for one, amount in guaranteed.gpus.items() if is_within(one, pattern))
        if total > most + _SLACK:
            text = f"{group.name!r} is guaranteed {total:g} {pattern!r}, more than its limit of {most:g}"
            raise InvalidGroups(text, f"{field}.gpus")
    if limit.cpus is not None and (guaranteed.cpus or 0.0) > limit.cpus + _SLACK:
        text = f"{group.name!r} is guaranteed {guaranteed.cpus:g} cores, more than its limit of {limit.cpus:g}"
        raise InvalidGroups(text, f"{field}.cpus")
    if limit.host_memory_bytes is not None and (guaranteed.host_memory_bytes or 0) > limit.host_memory_bytes:
        text = (
            f"{group.name!r} is guaranteed {format_bytes(guaranteed.host_memory_bytes or 0)} of RAM, more than its "
            f"limit of {format_bytes(limit.host_memory_bytes)}"
        )
        raise InvalidGroups(text, f"{field}.host_memory_bytes")
