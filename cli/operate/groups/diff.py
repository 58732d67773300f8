"""Differences between two trees of groups, as lines that a person reads before applying them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from msgspec import Struct

from ....schemas.values.units import exact_seconds
from ....schemas.work.groups import Group, GroupTree
from ....schemas.work.idle import format_rule
from .file import format_amounts

ADDED: Final = "+"
CHANGED: Final = "~"
REMOVED: Final = "-"
_MEMBERS_SHOWN: Final = 8


class Difference(Struct, frozen=True):
    """A group, or a setting of the tree, that differs.

    Attributes:
        sign: `+` if it is new, `-` if it is gone, `~` if it has changed.
        name: of the group or setting.
        lines: what differs.
    """

    sign: str
    name: str
    lines: list[str]


def differences(before: GroupTree, after: GroupTree) -> list[Difference]:
    """Differences between two trees: settings first, then groups by name."""
    found: list[Difference] = []
    lives = [exact_seconds(tree.half_life_seconds) for tree in (before, after)]
    if lives[0] != lives[1]:
        found.append(Difference(CHANGED, "half_life", [_arrow(*lives)]))
    prices = [",".join(f"{pattern}={price:g}" for pattern, price in tree.prices.items()) for tree in (before, after)]
    if prices[0] != prices[1]:
        found.append(Difference(CHANGED, "prices", [_arrow(*prices)]))
    old, new = ({group.name: group for group in tree.groups} for tree in (before, after))
    for name in sorted({*old, *new}):
        lines = list(_lines(old.get(name), new.get(name)))
        sign = ADDED if name not in old else REMOVED if name not in new else CHANGED
        if lines or sign != CHANGED:
            found.append(Difference(sign, name, lines))
    return found


def _lines(before: Group | None, after: Group | None) -> Iterator[str]:
    """Fields that differ; all that are set, of a group that is new or gone."""
    for label, old, new in zip(_LABELS, _values(before), _values(after), strict=True):
        if old != new:
            yield f"{label:<16} {_arrow(old, new) if before and after else old or new}"
    old_members = [] if before is None else before.members
    new_members = [] if after is None else after.members
    come = [owner for owner in new_members if owner not in set(old_members)]
    gone = [owner for owner in old_members if owner not in set(new_members)]
    signed = [*_listed(come, ADDED if before else ""), *_listed(gone, REMOVED if after else "")]
    if signed:
        yield f"{'members':<16} {' '.join(signed)}"


_LABELS: Final = ("weight", "guarantee", "limit", "borrowing_limit", "idle")


def _values(group: Group | None) -> tuple[str, ...]:
    if group is None:
        return ("",) * len(_LABELS)
    amounts = (format_amounts(part) for part in (group.guarantee, group.limit, group.borrowing_limit))
    guarantee, limit, borrowing_limit = amounts
    return (
        f"{group.weight:g}",
        guarantee,
        limit,
        borrowing_limit,
        "" if group.idle is None else format_rule(group.idle),
    )


def _listed(owners: Sequence[str], sign: str) -> list[str]:
    shown = [f"{sign}{owner}" for owner in owners[:_MEMBERS_SHOWN]]
    left = len(owners) - len(shown)
    return [*shown, f"{sign}{left} more"] if left > 0 else shown


def _arrow(before: str, after: str) -> str:
    return f"{before or 'none'} → {after or 'none'}"
