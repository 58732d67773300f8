"""State of groups: what their leases hold, what they wait for, and what they use beyond their guarantees."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from ...schemas.groups import DEFAULT_GROUP, Group, GroupStatus, GroupTree, Resources
from ...schemas.requests import Lease, LeaseState, WorkRequest
from ..groups.patterns import first_match, in_order
from ..groups.validate import around, guarantees
from ..leases.lifecycle import LeaseTable
from .queue import WaitingQueue


class _Used(Struct):
    """What the leases and requests of a group amount to, with the groups within."""

    gpus: dict[str, float] = {}
    cpus: float = 0.0
    host_memory_bytes: int = 0
    waiting: int = 0
    waiting_gpus: float = 0.0
    next: WorkRequest | None = None


def statuses(tree: GroupTree, table: LeaseTable, queue: WaitingQueue) -> list[GroupStatus]:
    """State of all groups, by name; `default`, and groups that are only named within another's name, are among them."""
    groups = {group.name: group for group in tree.groups}
    group_of = {owner: group.name for group in tree.groups for owner in group.members}
    used = {name: _Used() for name in all_names(tree)}
    guaranteed = guarantees(tree)
    for record in table:
        if record.lease.state is LeaseState.ACTIVE:
            for name in around(group_of.get(record.lease.owner, DEFAULT_GROUP)):
                _add_lease(used[name], record.lease)
    for queued in queue:
        for name in around(group_of.get(queued.request.owner, DEFAULT_GROUP)):
            _add_request(used[name], queued.request)
    return [
        _status(groups.get(name) or Group(name=name), guaranteed.get(name) or Resources(), part)
        for name, part in used.items()
    ]


def all_names(tree: GroupTree) -> list[str]:
    """Names of all groups, sorted, with `default` and those that are only named within another's name."""
    return sorted({DEFAULT_GROUP, *(name for group in tree.groups for name in around(group.name))})


def _add_lease(used: _Used, lease: Lease) -> None:
    for grant in lease.grants:
        if grant.device:
            used.gpus[grant.model] = used.gpus.get(grant.model, 0.0) + grant.share
        used.cpus += grant.cpus
        used.host_memory_bytes += grant.host_memory_bytes


def _add_request(used: _Used, request: WorkRequest) -> None:
    used.waiting += 1
    used.waiting_gpus += request.gpu_share if request.gpu_share is not None else request.gpus
    used.next = used.next or request


def _status(group: Group, guaranteed: Resources, used: _Used) -> GroupStatus:
    return GroupStatus(
        group=group,
        gpus_used=dict(sorted(used.gpus.items())),
        cpus_used=used.cpus,
        host_memory_used_bytes=used.host_memory_bytes,
        gpus_guaranteed=sum(guaranteed.gpus.values()),
        gpus_borrowed=_borrowed(guaranteed.gpus, used.gpus),
        waiting_requests=used.waiting,
        waiting_gpus=used.waiting_gpus,
        next_request_id=(used.next and used.next.request_id) or "",
        next_owner=used.next.owner if used.next else "",
    )


def _borrowed(guaranteed: Mapping[str, float], used: Mapping[str, float]) -> float:
    """Devices beyond a guarantee; a device counts for the first pattern that matches its model."""
    patterns = [pattern for pattern, _ in in_order(guaranteed)]
    by_pattern: dict[str, float] = {}
    beyond_all = 0.0
    for model, amount in used.items():
        pattern = first_match(patterns, model)
        if pattern is None:
            beyond_all += amount
        else:
            by_pattern[pattern] = by_pattern.get(pattern, 0.0) + amount
    return beyond_all + sum(max(0.0, amount - guaranteed[pattern]) for pattern, amount in by_pattern.items())
