"""Groups: their tree, which operators change, and their state.

The tree is one entry of the bucket with a revision of its own, which each change raises.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from ....schemas import codec
from ....schemas.requests import Error
from ....schemas.values.units import format_bytes
from ....schemas.work.groups import GroupChange, GroupFilter, Groups, GroupTree
from ...durable.store import GROUPS, Store
from ...fleet.fleet import Fleet
from ...fleet.state import MIG_PARENT
from ...groups.patterns import ANY, is_within, matches
from ...groups.tree import Tree
from ...groups.validate import InvalidGroups, added, check, guarantees, is_inside, parent_of
from ...leases.lifecycle import LeaseTable, Refused
from ..operator_changes import refusals
from ..pending import Responder
from ..waiting.queue import WaitingQueue
from .accounts import GroupAccounts
from .status import asked_of, state_of, statuses

log = logging.getLogger("corral.planner.groups")

_STATE_BYTES: Final = 600
"""Bytes that the state of a group takes in a listing, without what is configured."""
_FIELD: Final = re.compile(r"\$\.groups\[(\d+)\](.*)")


class StoredGroups(Struct, frozen=True, kw_only=True):
    """The groups as the bucket holds them.

    Attributes:
        tree: the groups, sorted by name.
        revision: number of changes so far.
    """

    tree: GroupTree = GroupTree()
    revision: int = 0


def decode_groups(value: bytes) -> StoredGroups:
    """Decode the entry of the bucket. Fields of a newer version are left out; an unreadable entry counts as no groups.

    Both are logged.
    """
    if not value:
        return StoredGroups()
    try:
        stored, unknown = codec.decode_request(value, StoredGroups)
        check(stored.tree)
    except (codec.DecodeError, InvalidGroups) as error:
        log.error("the groups in the bucket can't be used, and no quotas are in force: %s", error)
        return StoredGroups()
    for warning in unknown:
        log.warning("groups in the bucket: %s", warning)
    return stored


class GroupCommands:
    """Stores, changes and lists the groups of a term.

    Args:
        fleet: whose devices are shared.
        table: leases.
        queue: requests that wait.
        accounts: the groups in force, and what they use.
        store: the bucket.
        term: revision of the leader's key.
        max_bytes: size limit of a listing.
        changed: called when another tree is in force.
        deposed: called when a write was refused since another planner leads.
    """

    def __init__(
        self,
        fleet: Fleet,
        table: LeaseTable,
        queue: WaitingQueue,
        accounts: GroupAccounts,
        store: Store,
        term: int,
        max_bytes: int,
        changed: Callable[[], None],
        deposed: Callable[[], None],
    ) -> None:
        self._accounts = accounts
        self._fleet = fleet
        self._table = table
        self._queue = queue
        self._store = store
        self._term = term
        self._max_bytes = max_bytes
        self._changed = changed
        self._deposed = deposed
        self._lock = asyncio.Lock()

    @property
    def tree(self) -> Tree:
        """The groups in force."""
        return self._accounts.state.tree

    @property
    def revision(self) -> int:
        """Number of changes of the groups."""
        return self._accounts.state.revision

    def listing(self, only: GroupFilter) -> Groups | Error:
        """Groups that match a filter, with their state; an error if there is none."""
        found = self._listing(self.tree)
        if only.name is None:
            return found
        matching = [status for status in found.groups if is_inside(status.group.name, only.name)]
        if not matching:
            return Error(code="not_found", message=f"There is no group {only.name!r}", field="$.name")
        return replace(found, groups=matching)

    async def change(self, action: GroupChange, caller: Responder) -> Callable[[], Groups] | None:
        """Change the tree and store that; with `dry_run`, do neither.

        Returns:
            Computes the answer, all groups after the change; None if it was refused, and so answered.
        """
        async with refusals(action, caller, self._deposed):
            async with self._lock:
                tree = self._result(action)
                if tree is not self.tree and not action.dry_run:
                    await self._store.put(GROUPS, _encoded(tree, self.revision + 1), self._term)
                    self._accounts.change(tree, self.revision + 1, self._table)
                    self._changed()
                    # A term that begins before the next saving counts from now on, too.
                    await self._accounts.save(self._store, self._term)
            return lambda: replace(self._listing(tree), warnings=beyond(tree.config, self._fleet))
        return None

    def _result(self, action: GroupChange) -> Tree:
        """The groups after a change; those in force if it changes nothing."""
        tree = changed(self.tree.config, action)
        # As bytes: the order of patterns counts, too.
        if _encoded(tree, 0) == _encoded(self.tree, 0):
            return self.tree
        if action.revision not in (None, self.revision):
            text = (
                f"The groups have changed: they are at revision {self.revision}, not {action.revision}. Read them "
                "again, and decide anew"
            )
            raise Refused("conflict", text, "$.revision")
        size = len(_encoded(tree, self.revision + 1))
        if size > self._store.max_record_bytes or size + _STATE_BYTES * len(tree.nodes) > self._max_bytes:
            text = f"{len(tree.nodes)} groups with {size} bytes are more than a message can list: give fewer members"
            raise Refused("too_large", text, "$.set" if action.replace is None else "$.replace")
        return tree

    def _listing(self, tree: Tree) -> Groups:
        now = time.time()
        if tree is self.tree and self._accounts.active:
            state = self._accounts.state
            state.note_fleet(self._fleet)
        else:  # one that is not in force, or that of a fleet without groups, for which nothing is counted
            state = state_of(tree, self.revision, self._fleet, self._table, now)
        return Groups(
            groups=statuses(state, asked_of(self._queue, self._fleet), now),
            prices=tree.config.prices,
            half_life_seconds=tree.config.half_life_seconds,
            revision=self.revision,
        )


def _encoded(tree: Tree, revision: int) -> bytes:
    return codec.encode(StoredGroups(tree=tree.config, revision=revision), codec.JSON)


# Changes


def changed(before: GroupTree, change: GroupChange) -> Tree:
    """The tree after a change, with its groups sorted by name.

    Raises:
        Refused: the change contradicts itself, or the result would be invalid; with the field of the change at fault.
    """
    base = before if change.replace is None else change.replace
    numbers = {group.name: number for number, group in enumerate(change.set)}
    if len(numbers) < len(change.set):
        twice = next(number for number, group in enumerate(change.set) if numbers[group.name] != number)
        name = change.set[twice].name
        raise Refused("invalid", f"Group {name!r} is set twice", f"$.set[{numbers[name]}].name")
    kept = [
        (number, group)
        for number, group in enumerate(base.groups)
        if group.name not in numbers and not any(is_inside(group.name, name) for name in change.delete)
    ]
    tree = replace(base, groups=[*(group for _, group in kept), *change.set])
    try:
        check(tree)  # unsorted, so that of several groups at fault the changed one is named
    except InvalidGroups as error:
        places = [f"$.replace.groups[{number}]" if change.replace is not None else "$.set" for number, _ in kept]
        places += [f"$.set[{number}]" for number in range(len(change.set))]
        raise Refused("invalid", error.message, _field(error.field, places)) from None
    return Tree(replace(tree, groups=sorted(tree.groups, key=lambda group: group.name)))


def _field(field: str, places: list[str]) -> str:
    """Path in a change of a field of the tree; `places` are the paths of the tree's groups there."""
    found = _FIELD.fullmatch(field)
    if found is None:
        return field.replace("$.", "$.replace.", 1)
    place = places[int(found[1])]
    return place if place == "$.set" else f"{place}{found[2]}"


def beyond(tree: GroupTree, fleet: Fleet) -> list[str]:
    """Warnings about a tree: patterns that match no device, and guarantees of more than the fleet has at present."""
    models = _models(fleet)
    found = [
        f"{field} of {name!r}: no device of the fleet matches {pattern!r}"
        for name, field, patterns in _fields(tree)
        for pattern in patterns
        if models and not any(matches(pattern, model) for model in models)
    ]
    top = [part for name, part in guarantees(tree).items() if not parent_of(name)]
    gpus = added(part.gpus for part in top)
    for pattern in dict.fromkeys([*gpus, ANY]) if gpus else ():
        total = sum(amount for one, amount in gpus.items() if is_within(one, pattern))
        there = sum(count for model, count in models.items() if matches(pattern, model))
        if total > there > 0 or (pattern == ANY and total > there):
            what = "devices" if pattern == ANY else f"{pattern!r}"
            found.append(f"{total:g} {what} are guaranteed, and the fleet has {there}")
    hosts = fleet.hosts.values()
    cores, there = sum(part.cpus or 0.0 for part in top), sum(host.cpus_total for host in hosts) / 1000
    if cores > there:  # a host that does not report its cores counts as unlimited
        found.append(f"{cores:g} cores are guaranteed, and the fleet has {there:g}")
    memory, there = sum(part.host_memory_bytes or 0 for part in top), sum(host.memory_total for host in hosts)
    if memory > there:
        found.append(f"{format_bytes(memory)} of RAM are guaranteed, and the fleet has {format_bytes(there)}")
    return found


def _fields(tree: GroupTree) -> Iterator[tuple[str, str, Iterable[str]]]:
    for group in tree.groups:
        yield group.name, "guarantee", group.guarantee.gpus
        yield group.name, "limit", group.limit.gpus
        yield group.name, "borrowing_limit", group.borrowing_limit.gpus


def _models(fleet: Fleet) -> dict[str, int]:
    """Devices of the fleet by model; of a split board (MIG) the instances count instead."""
    found: dict[str, int] = {}
    for device in fleet.devices.values():
        if not device.blocked & MIG_PARENT:
            found[device.model.name] = found.get(device.model.name, 0) + 1
    return found
