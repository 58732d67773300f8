"""State of groups for a listing: what they hold, borrow, are owed and wait for, and their part of past use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from msgspec import Struct

from ....schemas.requests import LeaseState, WorkRequest
from ....schemas.work.groups import GroupStatus, Resources
from ...fleet.known import Fleet
from ...fleet.state import WHOLE_SHARE
from ...groups.state import GroupState, amounts_of, devices_of, models_of
from ...groups.tree import Node, Tree
from ...groups.validate import guarantees
from ...leases.lifecycle import LeaseTable
from ..waiting.queue import WaitingQueue


class Asked(NamedTuple):
    """A request in the queue.

    Attributes:
        request: with its id.
        devices: billionths of devices that it asks for.
        models: names of the models that it could take.
    """

    request: WorkRequest
    devices: int
    models: Sequence[str]


class _Waiting(Struct):
    """Requests of a group that wait, with those of the groups within.

    Attributes:
        asked: in the order of the queue.
        own: true if one is of a member of the group itself.
    """

    asked: list[Asked] = []
    own: bool = False


def state_of(tree: Tree, revision: int, fleet: Fleet, table: LeaseTable, now: float) -> GroupState:
    """State of groups by the leases in a table, which has all active leases and those that ended recently."""
    state = GroupState()
    state.change(tree, revision, now)
    state.note_fleet(fleet)
    for record in table:
        lease = record.lease
        amounts = amounts_of(fleet, lease.grants)
        state.usage.starts(lease.lease_id, lease.owner, amounts, lease.granted_at.timestamp())
        if lease.state is LeaseState.ACTIVE:
            state.use.hold(lease.lease_id, lease.owner, amounts, lease.preemptible)
        else:
            state.usage.ends(lease.lease_id, (lease.ended_at or lease.expires_at).timestamp())
    return state


def asked_of(queue: WaitingQueue, fleet: Fleet) -> list[Asked]:
    """Requests that wait in a queue, in its order."""
    return [
        Asked(queued.request, devices_of(ask), models_of(fleet, ask) if ask.gpus else ())
        for queued in queue
        for ask in (queued.entry.ask,)
    ]


def statuses(state: GroupState, waiting: Iterable[Asked], now: float) -> list[GroupStatus]:
    """State of all groups, by name.

    Args:
        state: what groups use and have used.
        waiting: requests in the queue, in its order.
        now: seconds since the epoch.
    """
    tree = state.tree
    waits = {node: _Waiting() for node in tree.nodes.values()}
    for asked in waiting:
        node = tree.node_of(asked.request.owner)
        waits[node].own = True
        for each in node.path:
            waits[each].asked.append(asked)
    past = {node: state.usage.of(node, now) for node in tree.nodes.values()}
    everything = sum(past[node] for node in tree.root.children.values())
    fair: dict[Node, float] = {}
    _share_out(tree.root, 1.0, _busy(state, waits, past), fair)
    guaranteed = guarantees(tree.config)
    room = _Room(state)
    return [
        _status(
            state,
            node,
            guaranteed.get(name) or Resources(),
            waits[node].asked,
            past[node] / everything if everything else 0.0,
            fair[node],
            room,
        )
        for name, node in sorted(tree.nodes.items())
    ]


def _status(
    state: GroupState, node: Node, guaranteed: Resources, asked: list[Asked], usage: float, fair: float, room: _Room
) -> GroupStatus:
    use = state.use.of(node)
    return GroupStatus(
        group=node.config,
        gpus_used={model: _devices(amount) for model, amount in sorted(use.devices.items())},
        cpus_used=use.cpus_milli / 1000,
        host_memory_used_bytes=use.memory_bytes,
        gpus_guaranteed=sum(guaranteed.gpus.values()),
        gpus_borrowed=_devices(_borrowed(state, node)),
        gpus_owed=_devices(_owed(state, node, asked, room, {})),
        preemptible_gpus=_devices(use.preemptible),
        usage=usage,
        fair_usage=fair,
        waiting_requests=len(asked),
        waiting_gpus=_devices(sum(one.devices for one in asked)),
        next_request_id=(asked[0].request.request_id or "") if asked else "",
        next_owner=asked[0].request.owner if asked else "",
    )


def _devices(billionths: int) -> float:
    return round(billionths / WHOLE_SHARE, 6)


def _borrowed(state: GroupState, node: Node) -> int:
    """Billionths of devices beyond the guarantee; a group without its own has those of the groups within."""
    if node.guarantee.patterns or not node.children:
        return state.use.borrowed(node)
    inside = node.children.values()
    own = _held(state, node) - sum(_held(state, child) for child in inside)
    return own + sum(_borrowed(state, child) for child in inside)


def _held(state: GroupState, node: Node) -> int:
    return sum(state.use.of(node).devices.values())


class _Room:
    """Room for what groups are owed: in their guarantees, and under the limits of all groups on the way.

    Others within a group that is at its limit give back what they have borrowed, which counts as room.

    Args:
        state: what groups use.
    """

    def __init__(self, state: GroupState) -> None:
        self._state = state
        self._spare: dict[Node, dict[str, int]] = {}
        for holding in state.use.holdings.values():
            if holding.preemptible:
                own = self._spare.setdefault(state.node_of(holding.owner), {})
                for model, share in holding.amounts.devices.items():
                    own[model] = own.get(model, 0) + share
        self._models = sorted({model for own in self._spare.values() for model in own})
        self._claimable: dict[tuple[Node, str], int] = {}
        self._under: dict[tuple[Node, Node, int, int], int] = {}

    def under_limits(self, within: Node, path: Sequence[Node], model: str) -> list[tuple[tuple[Node, int, int], int]]:
        """Billionths of devices that are left under each limit on a way to a group.

        Args:
            within: group in whose guarantee there is room.
            path: groups on the way to that which asks.
            model: of the devices.
        """
        return [
            ((each, place, at), self._left(within, each, place, at))
            for each in path
            for place, limit in enumerate(each.limits)
            for at in limit.every(model)
        ]

    def _left(self, within: Node, each: Node, place: int, at: int) -> int:
        key = (within, each, place, at)
        if key not in self._under:
            limit, used = each.limits[place], self._state.use.of(each).limited[place][at]
            models = [model for model in self._models if at in limit.every(model)]
            self._under[key] = limit.patterns[at][1] - used + sum(self._beside(within, each, model) for model in models)
        return self._under[key]

    def _beside(self, within: Node, around: Node, model: str) -> int:
        """Billionths of devices that those in a group, but not in a group within it, can be made to give back."""
        if around not in within.path[:-1]:
            return 0
        way = within.path[within.path.index(around) :]
        return sum(
            self._spare.get(outer, {}).get(model, 0)
            + sum(self._given_back(child, model) for child in outer.children.values() if child is not inner)
            for outer, inner in pairwise(way)
        )

    def _given_back(self, node: Node, model: str) -> int:
        """Billionths of devices of leases that may be preempted, as far as the group is above its guarantee."""
        key = (node, model)
        if key not in self._claimable:
            inside = sum(self._given_back(child, model) for child in node.children.values())
            found = self._spare.get(node, {}).get(model, 0) + inside
            at = node.guarantee.first(model)
            if at is not None:
                above = self._state.use.of(node).guaranteed[at] - node.guarantee.patterns[at][1]
                found = min(found, max(0, above))
            self._claimable[key] = found
        return self._claimable[key]


_Taken = dict[tuple[Node, int, int], int]
"""Billionths of devices that are counted as owed already, by the limit that they count for."""


def _owed(state: GroupState, node: Node, asked: Sequence[Asked], room: _Room, taken: _Taken) -> int:
    """Billionths of devices that a group waits for within its guarantee, or that the groups within wait for in theirs.

    What each request could take is counted against the room that is left in the guarantee, and under the limits of all
    groups on its way, in the queue's order.
    """
    of_inner, of_own = dict(taken), dict(taken)
    inner = sum(
        _owed(state, child, [one for one in asked if child in state.node_of(one.request.owner).path], room, of_inner)
        for child in node.children.values()
        if asked
    )
    use = state.use.of(node)
    left_in = [max(0, most - used) for used, (_, most) in zip(use.guaranteed, node.guarantee.patterns, strict=True)]
    own = sum(_owed_to(one, state, node, left_in, room, of_own) for one in asked)
    taken.update(of_own if own > inner else of_inner)
    return max(own, inner)


def _owed_to(one: Asked, state: GroupState, node: Node, left_in: list[int], room: _Room, taken: _Taken) -> int:
    """The part of a request that its group is owed; what it takes of the room is counted."""
    path = state.node_of(one.request.owner).path
    left = one.devices
    for model in one.models:
        at = node.guarantee.first(model)
        if at is None or not left or not left_in[at]:
            continue
        limits = room.under_limits(node, path, model)
        most = max(0, min((under - taken.get(key, 0) for key, under in limits), default=left))
        found = min(left, left_in[at], most)
        left_in[at] -= found
        left -= found
        for key, _ in limits:
            taken[key] = taken.get(key, 0) + found
    return one.devices - left


def _busy(state: GroupState, waits: Mapping[Node, _Waiting], past: Mapping[Node, float]) -> dict[Node, bool]:
    """Groups that use, have used or wait for something; and true for those of which a member itself does now."""
    found = {node: False for node, used in past.items() if used or waits[node].asked}
    for holding in state.use.holdings.values():
        node = state.node_of(holding.owner)
        for each in node.path:
            found.setdefault(each, False)
        found[node] = True
    for node, waiting in waits.items():
        if waiting.own:
            found[node] = True
    return found


def _share_out(node: Node, part: float, busy: Mapping[Node, bool], into: dict[Node, float]) -> None:
    """Share a part of the fleet out among the groups within a group, by weight.

    Its own members count as one of weight 1 beside them. A group that uses and asks for nothing gets what it would get
    if it did.
    """
    children = node.children.values()
    own = 1.0 if busy.get(node) and children else 0.0
    active = own + sum(child.weight for child in children if child in busy)
    for child in children:
        into[child] = part * child.weight / (active if child in busy else active + child.weight)
        _share_out(child, into[child], busy, into)
