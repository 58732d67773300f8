"""State of groups for a listing: what they hold, borrow, are owed and wait for, and their part of past use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from msgspec import Struct

from ...schemas.groups import GroupStatus, Resources
from ...schemas.requests import LeaseState, WorkRequest
from ..fleet.known import Fleet
from ..fleet.state import WHOLE_SHARE
from ..groups.state import GroupState, amounts_of, devices_of, models_of
from ..groups.tree import Node, Tree
from ..groups.validate import guarantees
from ..leases.lifecycle import LeaseTable
from .queue import WaitingQueue


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
    return [
        _status(
            state,
            node,
            guaranteed.get(name) or Resources(),
            waits[node].asked,
            past[node] / everything if everything else 0.0,
            fair[node],
        )
        for name, node in sorted(tree.nodes.items())
    ]


def _status(
    state: GroupState, node: Node, guaranteed: Resources, asked: list[Asked], usage: float, fair: float
) -> GroupStatus:
    use = state.use.of(node)
    return GroupStatus(
        group=node.config,
        gpus_used={model: _devices(amount) for model, amount in sorted(use.devices.items())},
        cpus_used=use.cpus_milli / 1000,
        host_memory_used_bytes=use.memory_bytes,
        gpus_guaranteed=sum(guaranteed.gpus.values()),
        gpus_borrowed=_devices(_borrowed(state, node)),
        gpus_owed=_devices(_owed(state, node, asked)),
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


def _owed(state: GroupState, node: Node, asked: Sequence[Asked]) -> int:
    """Billionths of devices that a group waits for within its guarantee, or that the groups within wait for in theirs.

    What each request could take is counted against the room that is left in the guarantee, in the queue's order.
    """
    inner = sum(
        _owed(state, child, [one for one in asked if child in state.node_of(one.request.owner).path])
        for child in node.children.values()
        if asked
    )
    use = state.use.of(node)
    room = [max(0, most - used) for used, (_, most) in zip(use.guaranteed, node.guarantee.patterns, strict=True)]
    own = 0
    for one in asked:
        left = one.devices
        for at in dict.fromkeys(node.guarantee.first(model) for model in one.models):
            if at is not None:
                taken = min(left, room[at])
                room[at] -= taken
                left -= taken
                own += taken
    return max(own, inner)


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
