"""Leases whose devices are idle: their holders are warned, then the rule of their group is carried out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final

from msgspec.structs import replace

from ....schemas.requests import IdleNotice, Lease, LeaseState
from ....schemas.work.idle import IdleAction, IdleRule, format_rule
from ...durable.store import Deposed, WriteFailed
from ...fleet.device import Device
from ...fleet.fleet import Fleet
from ...groups.idle import IdleCount, Step, advance, next_step, read
from ...groups.tree import Node, Tree
from ...leases import lifecycle
from ...leases.ledger import Ledger, clock
from ...leases.lifecycle import LeaseRecord, Refused
from .accounts import GroupAccounts

log = logging.getLogger("corral.planner.broker.quotas.idle_watch")

IDLE_SECONDS: Final = 5.0
"""Time between two looks at the activity of leases."""
_NO_RULES_SECONDS: Final = 1.0
"""Time between two looks whether there is a rule now."""
_LOOKS: Final = 5
"""Looks at least within the shortest time of a rule."""
_LEASES_AT_ONCE: Final = 256
"""Leases that are read before other tasks run."""


class IdleWatch:
    """Idle leases of one term.

    Args:
        fleet: live state.
        ledger: leases of the term.
        accounts: the groups in force, which have the rules.
        planner: id of this planner.
        freed: called when a lease has become preemptible.
    """

    def __init__(
        self, fleet: Fleet, ledger: Ledger, accounts: GroupAccounts, planner: str, freed: Callable[[], None]
    ) -> None:
        self._fleet = fleet
        self._ledger = ledger
        self._accounts = accounts
        self._planner = planner
        self._freed = freed
        self._tree: Tree | None = None
        self._rules: dict[Node, tuple[IdleRule, str]] = {}
        self._counts: dict[str, IdleCount] = {}

    async def look(self, now: float, wall: float) -> float:
        """Read the activity of all leases under a rule, and do what is due.

        Args:
            now: seconds, by a clock that is never set.
            wall: seconds since the epoch.

        Returns:
            Seconds until the next look.
        """
        tree = self._accounts.state.tree
        changed = tree is not self._tree
        if changed:
            self._tree, self._rules = tree, rules_of(tree)
        if not self._rules and not changed:
            return _NO_RULES_SECONDS
        due, counts = await self._read_all(now, wall)
        self._counts = counts
        for record, group, step in due:
            await self._do(record.lease, group, step, wall)
        if not self._rules:
            return _NO_RULES_SECONDS
        return min(IDLE_SECONDS, min(rule.after_seconds for rule, _ in self._rules.values()) / _LOOKS)

    async def _read_all(
        self, now: float, wall: float
    ) -> tuple[list[tuple[LeaseRecord, str, Step]], dict[str, IdleCount]]:
        """Read all leases; returns what is due, with the group of the rule, and the counts of those that are idle."""
        counts: dict[str, IdleCount] = {}
        due: list[tuple[LeaseRecord, str, Step]] = []
        peaks: dict[Device, float] = {}
        for at, record in enumerate(list(self._ledger.table)):
            if at % _LEASES_AT_ONCE == _LEASES_AT_ONCE - 1:
                await asyncio.sleep(0)
            lease = record.lease
            if lease.state is not LeaseState.ACTIVE or lease.preemption is not None:
                continue
            found = self._rules.get(self._accounts.state.node_of(lease.owner))
            if found is None:
                if lease.idle is not None and lease.idle.acted_at is None:
                    due.append((record, "", Step.WITHDRAW))
                continue
            rule, group = found
            devices = [self._fleet.devices.get(grant.device) for grant in lease.grants if grant.device]
            reading = read(devices, lease.lease_id, rule, wall, self._fleet.stale_after, peaks)
            count = advance(self._counts.get(lease.lease_id), rule, reading, now, wall)
            if count is not None:
                counts[lease.lease_id] = count
            if (step := next_step(count, lease.idle)) is not Step.NOTHING:
                due.append((record, group, step))
        return due, counts

    async def _do(self, lease: Lease, group: str, step: Step, wall: float) -> None:
        """Change a lease, unless it has been changed meanwhile in a way that matters."""

        def change(record: LeaseRecord | None) -> LeaseRecord | None:
            if record is None or record.lease.state is not LeaseState.ACTIVE or record.lease.idle != lease.idle:
                return record
            return self._changed(record, group, step, wall)

        try:
            after = await self._ledger.change(lease.lease_id, change)
        except (Refused, Deposed, WriteFailed) as error:
            log.info("idle lease %s stays as it is: %s", lease.lease_id, error)
            self._tree = None  # without rules, too, it is tried again
            return
        if after is None or step is not Step.ACT:
            return
        log.info("lease %s of %s: %s", lease.lease_id, lease.owner, lifecycle.idle_reason(after.idle or _notice(lease)))
        if after.state is LeaseState.ACTIVE and after.preemptible:
            self._accounts.hold(after.lease_id, after.owner, after.grants, True)
            self._freed()

    def _changed(self, record: LeaseRecord, group: str, step: Step, wall: float) -> LeaseRecord:
        count = self._counts.get(record.lease.lease_id)
        if step is Step.WITHDRAW or count is None:
            return lifecycle.warn_idle(record, None, clock(), self._planner)
        if step is Step.WARN:
            return lifecycle.warn_idle(record, notice_of(count, group, wall), clock(), self._planner)
        notice = replace(_notice(record.lease), mean_percent=count.mean, peak_percent=count.peak)
        if count.rule.action is IdleAction.END:
            return lifecycle.end_idle(record, notice, clock(), self._planner)
        return lifecycle.make_preemptible(record, notice, clock(), self._planner)


def rules_of(tree: Tree) -> dict[Node, tuple[IdleRule, str]]:
    """The rule of each group that has one, its own or that of a group around it, and the name of the rule's group."""
    found: dict[Node, tuple[IdleRule, str]] = {}
    for node in tree.nodes.values():
        for each in reversed(node.path):
            if (rule := each.config.idle) is not None:
                if rule.action is not IdleAction.OFF:
                    found[node] = rule, each.name
                break
    return found


def notice_of(count: IdleCount, group: str, wall: float) -> IdleNotice:
    """The warning about an idle lease.

    Args:
        count: of the lease.
        group: whose rule it is.
        wall: seconds since the epoch.
    """
    rule, now = count.rule, datetime.fromtimestamp(wall, UTC)
    acts = rule.action is not IdleAction.WARN
    return IdleNotice(
        group=group,
        rule=format_rule(rule),
        since=datetime.fromtimestamp(count.since, UTC),
        noticed_at=now,
        acts_at=now + timedelta(seconds=rule.warn_seconds) if acts else None,
        mean_percent=count.mean,
        peak_percent=count.peak,
    )


def _notice(lease: Lease) -> IdleNotice:
    assert lease.idle is not None  # nothing is done before its holder was warned
    return lease.idle
