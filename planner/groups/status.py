"""State of the groups, as it is answered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ...schemas.groups import GroupStatus
from ..fleet.state import WHOLE_SHARE
from .state import GroupState
from .tree import Node


class Waiting(NamedTuple):
    """Requests of a group that wait, without those of the groups within.

    Attributes:
        requests: number of them.
        gpus: devices that they ask for.
        next_request_id: the first in line.
        next_owner: its owner.
        position: its position in the line.
    """

    requests: int
    gpus: float
    next_request_id: str
    next_owner: str
    position: int


def status(state: GroupState, waiting: Mapping[str, Waiting], now: float, name: str | None = None) -> list[GroupStatus]:
    """State of each group, in the order of their names.

    Args:
        state: of the groups.
        waiting: requests that wait, by the name of their group.
        now: seconds.
        name: only this group and those within; None for all.
    """
    return [
        _status(state, node, waiting, now)
        for node in sorted(state.tree.nodes.values(), key=lambda node: node.name.split("/"))
        if name is None or node.name == name or node.name.startswith(f"{name}/")
    ]


def _status(state: GroupState, node: Node, waiting: Mapping[str, Waiting], now: float) -> GroupStatus:
    use = state.use.of(node)
    wait = [waiting[each.name] for each in node.walk() if each.name in waiting]
    first = min(wait, key=lambda each: each.position, default=None)
    guaranteed = _guaranteed(node)
    asked = sum(each.gpus for each in wait)
    whole = state.usage.of(state.tree.root, now)
    return GroupStatus(
        group=node.config,
        gpus_used={model: share / WHOLE_SHARE for model, share in sorted(use.devices.items())},
        cpus_used=use.cpus_milli / 1000,
        host_memory_used_bytes=use.memory_bytes,
        gpus_guaranteed=guaranteed,
        gpus_borrowed=_borrowed(state, node) / WHOLE_SHARE,
        gpus_owed=min(asked, state.use.owed(node) / WHOLE_SHARE),
        preemptible_gpus=use.preemptible / WHOLE_SHARE,
        usage=state.usage.of(node, now) / whole if whole else 0.0,
        fair_usage=_fair(state, node, waiting, now),
        waiting_requests=sum(each.requests for each in wait),
        waiting_gpus=asked,
        next_request_id="" if first is None else first.next_request_id,
        next_owner="" if first is None else first.next_owner,
    )


def _fair(state: GroupState, node: Node, waiting: Mapping[str, Waiting], now: float) -> float:
    """The part of all use that a group's weight gives it, among those that count."""
    assert node.parent is not None
    beside = [each for each in node.parent.children.values() if each is node or _counts(state, each, waiting, now)]
    around = 1.0 if node.parent.parent is None else _fair(state, node.parent, waiting, now)
    return around * node.weight / sum(each.weight for each in beside)


def _counts(state: GroupState, node: Node, waiting: Mapping[str, Waiting], now: float) -> bool:
    """True if a group uses, has used, or asks for something."""
    use = state.use.of(node)
    return bool(
        use.devices
        or use.cpus_milli
        or use.memory_bytes
        or state.usage.of(node, now) > 0
        or any(each.name in waiting for each in node.walk())
    )


def _guaranteed(node: Node) -> float:
    """Devices that a group, or the groups within it, are guaranteed."""
    own = sum(amount for _, amount in node.guarantee.patterns) / WHOLE_SHARE
    return max(own, sum(_guaranteed(child) for child in node.children.values()))


def _borrowed(state: GroupState, node: Node) -> int:
    """Billionths of devices that a group uses beyond its guarantee; without one, beyond those of the groups within."""
    if node.guarantee.patterns or not node.children:
        return state.use.borrowed(node)
    used = sum(state.use.of(node).devices.values())
    within = sum(
        sum(state.use.of(child).devices.values()) - _borrowed(state, child) for child in node.children.values()
    )
    return used - within
