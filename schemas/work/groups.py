"""Groups that share a fleet: quotas, members, and their state.

Groups form a tree by their names: `lab/vision` is in `lab`. An owner is a member of one group at most; all others share
the group `default`.

Model patterns are case-insensitive globs over the device's name. A pattern without `*`, `?` and `[` matches the names
that contain it: `H100` is `*H100*`. Patterns are compared in the order in which they are written, but `*` comes last
wherever it is written, since not every language keeps the order of an object's fields.
"""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta, Struct

from ..requests import Bytes, Count, OwnerName, ShortText
from ..values import names
from .idle import IdleRule

DEFAULT_GROUP: Final = "default"
"""Group of the owners that are members of no other."""
HALF_LIFE_SECONDS: Final = 7 * 86400.0
"""Time after which past use counts half as much for fair share, by default."""
MAX_GROUPS: Final = 1024
"""Groups of a fleet: as many as one message can list with their state."""
MAX_DEPTH: Final = 8
"""Levels of the tree."""

# A name that is too deep is refused where the tree is checked, in words.
GroupName = Annotated[str, Meta(min_length=1, max_length=128, pattern=names.GROUP)]
Weight = Annotated[float, Meta(ge=1e-6, le=1_000_000)]
"""Weight of a group, or price of a device."""
Devices = Annotated[float, Meta(ge=0, le=1_000_000)]
Patterns = Annotated[dict[Annotated[str, Meta(min_length=1, max_length=128)], Devices], Meta(max_length=64)]
"""Number of devices by model pattern."""


class Resources(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Amounts of resources.

    Attributes:
        gpus: number of devices by model pattern; a share of a device counts as a part.
        cpus: logical cores; null where they do not matter.
        host_memory_bytes: host RAM; null where it does not matter.
    """

    gpus: Patterns = {}
    cpus: Annotated[float, Meta(ge=0, le=1_000_000_000)] | None = None
    host_memory_bytes: Bytes | None = None


class Group(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A group of owners with its quotas.

    Attributes:
        name: name, with those of the groups around it: `lab/vision`.
        weight: part of what is shared that it gets, relative to the groups beside it.
        guarantee: what the group gets back from others when it asks. A device counts for the first pattern that
            matches its model. Idle guarantees are lent. Those of the groups within a group must not exceed its own, if
            it has one.
        limit: what the group never exceeds, with the groups within. A device counts for each pattern that matches.
        borrowing_limit: what the group may use beyond its guarantee, with the groups within. A device counts for each
            pattern that matches.
        members: owners.
        idle: what happens to leases of members whose devices are idle. Null takes the rule of the group around it, if
            any.
    """

    name: GroupName
    weight: Weight = 1.0
    guarantee: Resources = Resources()
    limit: Resources = Resources()
    borrowing_limit: Resources = Resources()
    members: Annotated[list[OwnerName], Meta(max_length=100_000)] = []
    idle: IdleRule | None = None


class GroupTree(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """All groups of a fleet.

    Attributes:
        groups: the groups. A group that is only named within another's name has weight 1 and no quota.
        prices: relative price of a device by model pattern, for fair share; the first that matches counts, and 1 where
            none does.
        half_life_seconds: time after which past use counts half as much for fair share.
    """

    groups: Annotated[list[Group], Meta(max_length=MAX_GROUPS)] = []
    prices: Annotated[dict[ShortText, Weight], Meta(max_length=256)] = {}
    half_life_seconds: Annotated[float, Meta(ge=60, le=366 * 86400)] = HALF_LIFE_SECONDS


class GroupFilter(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Request for the groups and their state.

    Attributes:
        name: only this group, and those within.
    """

    name: GroupName | None = None


class GroupChange(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Change of the groups, by an operator. What runs goes on; quotas count from the next decision on.

    The tree is replaced first, then groups are deleted, then set. A repeated change has no further effect.

    Attributes:
        replace: the tree in place of all that is there; null keeps it.
        set: groups to add, or to change as a whole.
        delete: groups to delete, with those within. One that is not there is no error.
        revision: refuse the change as `conflict` unless the tree is at this revision, or is already as the change would
            make it; null for any.
        dry_run: answer with the tree that would result, and change nothing.
        operator: name of the operator.
    """

    replace: GroupTree | None = None
    set: Annotated[list[Group], Meta(max_length=MAX_GROUPS)] = []
    delete: Annotated[list[GroupName], Meta(max_length=MAX_GROUPS)] = []
    revision: Count | None = None
    dry_run: bool = False
    operator: ShortText = ""


class GroupStatus(Struct, frozen=True, kw_only=True):
    """State of a group, with the groups within.

    Attributes:
        group: as configured.
        gpus_used: devices that its leases hold, by model; a share counts as a part.
        cpus_used: cores that they hold.
        host_memory_used_bytes: host RAM that they hold.
        gpus_guaranteed: devices that it is guaranteed.
        gpus_borrowed: devices that it uses beyond its guarantee.
        gpus_owed: devices that it is guaranteed, has asked for and waits for, and that the limits of the groups around
            it let it have, with what others there would give back.
        preemptible_gpus: devices of its leases that may be preempted.
        usage: its part of all recent use, 0 to 1: past use halves every `half_life_seconds`, and counts by price or by
            the part of cores or RAM, whichever is the greatest part of the fleet.
        fair_usage: the part that its weight gives it, among the groups beside it that used or asked for something.
        waiting_requests: requests in the queue.
        waiting_gpus: devices that they ask for.
        next_request_id: the request that is next in line; empty if none waits.
        next_owner: its owner.
    """

    group: Group
    gpus_used: dict[str, float] = {}
    cpus_used: float = 0.0
    host_memory_used_bytes: int = 0
    gpus_guaranteed: float = 0.0
    gpus_borrowed: float = 0.0
    gpus_owed: float = 0.0
    preemptible_gpus: float = 0.0
    usage: float = 0.0
    fair_usage: float = 0.0
    waiting_requests: int = 0
    waiting_gpus: float = 0.0
    next_request_id: str = ""
    next_owner: str = ""


class Groups(Struct, frozen=True, kw_only=True, tag="groups", tag_field="type"):
    """The groups and their state, in the order of their names.

    Attributes:
        groups: state of each group that matches the filter; `default` is among them.
        prices: as in `GroupTree`.
        half_life_seconds: as in `GroupTree`.
        revision: revision of the tree, which each change raises; 0 before the first.
        warnings: fields of the request that this planner does not know and has ignored; in the answer to a change, also
            what the operator should know, such as guarantees beyond what the fleet has.
    """

    groups: list[GroupStatus]
    prices: dict[str, float] = {}
    half_life_seconds: float = HALF_LIFE_SECONDS
    revision: int = 0
    warnings: list[str] = []
