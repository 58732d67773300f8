"""Membership of people in groups of the fleet, as the provider has it."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from msgspec.structs import replace

from ..schemas.work.groups import Group


def with_member(groups: Iterable[Group], owner: str, group: str, managed: Collection[str]) -> list[Group]:
    """Groups that change so that an owner is in a group, and in none of the others that the provider decides about.

    Args:
        groups: all groups, as they are.
        owner: the owner.
        group: name of the group; empty for none.
        managed: names of the groups that the provider decides about. An owner can be in one group, so membership in
            any other ends, too, if `group` is not empty.
    """
    changed: list[Group] = []
    for found in groups:
        wanted = found.name == group
        if wanted and owner not in found.members:
            changed.append(replace(found, members=[*found.members, owner]))
        elif not wanted and owner in found.members and (group or found.name in managed):
            changed.append(replace(found, members=[member for member in found.members if member != owner]))
    return changed
