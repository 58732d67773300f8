"""Operations of holders and operators on existing leases: renew, release, checkpoint, evict, preempt, list."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

from ...schemas.operations import EvictAction, LeaseFilter, Leases, PreemptAction
from ...schemas.requests import CheckpointAction, LeaseAction, LeaseState, Preemption, ResizeAction
from ..durable.store import Deposed, WriteFailed
from ..fleet.fleet import Fleet
from ..leases import lifecycle as leases
from ..leases import resizing
from ..leases.ledger import Ledger, clock, write_refused
from ..leases.lifecycle import LeaseRecord
from .pending import Responder


class LeaseCommands:
    """Changes leases and lists them.

    Args:
        fleet: knows the devices of a host.
        ledger: leases of the term.
        planner: id of this planner.
    """

    def __init__(self, fleet: Fleet, ledger: Ledger, planner: str) -> None:
        self._fleet = fleet
        self._ledger = ledger
        self._planner = planner

    async def renew(self, action: LeaseAction, caller: Responder) -> None:
        """Renew a lease: its end moves to now plus its time to live, or the one that the action gives."""

        def step(record: LeaseRecord | None) -> LeaseRecord:
            held = leases.check_holder(record, action.lease_id, action.owner)
            served = self._ledger.service_seconds()
            return leases.renew(held, action.ttl_seconds, clock(), self._planner, served, action.holder)

        await self.change(action, step, caller)

    async def release(self, action: LeaseAction, caller: Responder) -> None:
        """Release a lease. Idempotent: releasing it again gives the same answer."""

        def step(record: LeaseRecord | None) -> LeaseRecord:
            known = leases.check_known(record, action.lease_id, action.owner)
            if known.lease.state is LeaseState.RELEASED:
                return known
            return leases.end(leases.check_active(known), LeaseState.RELEASED, "", clock(), self._planner)

        await self.change(action, step, caller)

    async def evict(self, action: EvictAction, caller: Responder) -> None:
        """Evict: end a lease on behalf of an operator."""
        by = f" (by {action.operator})" if action.operator else ""

        def step(record: LeaseRecord | None) -> LeaseRecord:
            known = leases.check_active(leases.check_known(record, action.lease_id))
            return leases.end(known, LeaseState.EVICTED, f"{action.reason}{by}", clock(), self._planner)

        await self.change(action, step, caller)

    async def checkpoint(self, action: CheckpointAction, caller: Responder) -> None:
        """Note that the work of a lease is saved, or put the end of its preemption off.

        Idempotent: the answer to `saved` is the same again after it has ended the lease.
        """

        def step(record: LeaseRecord | None) -> LeaseRecord:
            known = leases.check_known(record, action.lease_id, action.owner)
            if action.saved == (action.busy_seconds is not None):
                raise leases.Refused("invalid", "Say that the work is saved, or for how long it is busy", "$.saved")
            lease = known.lease
            if action.saved and lease.saved_at and lease.state is LeaseState.EVICTED and lease.preemption is not None:
                return known
            held, now = leases.check_active(known), clock()
            if action.busy_seconds is None:
                return leases.saved(held, now, self._planner)
            return leases.busy(held, action.busy_seconds, now, self._planner)

        await self.change(action, step, caller)

    async def preempt(self, action: PreemptAction, caller: Responder) -> None:
        """Preempt a lease on behalf of an operator, or ask its holder for devices, if it names some.

        Idempotent: a notice that is out is the answer.
        """
        by = f" (by {action.operator})" if action.operator else ""

        def step(record: LeaseRecord | None) -> LeaseRecord:
            known, now = leases.check_active(leases.check_known(record, action.lease_id)), clock()
            if action.devices:
                return resizing.ask_by_hand(known, action.devices, f"{action.reason}{by}", now, self._planner)
            ends_at = now + timedelta(seconds=known.lease.grace_seconds)
            notice = Preemption(notified_at=now, ends_at=ends_at, reason=f"{action.reason}{by}")
            return leases.notify(known, notice, now, self._planner)

        await self.change(action, step, caller)

    async def change(
        self,
        action: LeaseAction | CheckpointAction | ResizeAction | EvictAction | PreemptAction,
        step: Callable[[LeaseRecord | None], LeaseRecord],
        caller: Responder,
    ) -> None:
        """Apply a step to the lease that an action names, and answer its state then, or why it is refused."""
        try:
            reply = await self._ledger.change(action.lease_id, step)
        except leases.Refused as refused:
            reply = refused.error
        except WriteFailed as error:
            reply = write_refused(error)
        except Deposed:
            caller.forward(action)
            return
        if reply is not None:
            await caller.answer(reply)

    def leases(self, only: LeaseFilter) -> Leases:
        """Leases that match a filter, oldest first, by page."""
        states = frozenset(only.states)
        table = self._ledger.table
        one = None if only.lease_id is None else table.get(only.lease_id)
        records = table if only.lease_id is None else [] if one is None else [one]
        hosts = frozenset(only.hosts)
        if hosts and one is None and states == frozenset({LeaseState.ACTIVE}):
            # A host may have had another name when its devices were leased.
            now = (device for host in hosts & self._fleet.hosts.keys() for device in self._fleet.hosts[host].devices)
            held = (record for device in now for record in map(table.get, device.holders) if record is not None)
            there = (record for host in hosts for record in table.on_host(host))
            records = {record.lease.lease_id: record for record in (*there, *held)}.values()
        elif hosts:
            records = [record for record in records if any(part.host in hosts for part in record.lease.grants)]
        now = clock()
        found = [
            self._ledger.with_actual_end(record, now)
            for record in records
            if record.lease.state in states and (only.owner is None or record.lease.owner == only.owner)
        ]
        found.sort(key=lambda lease: (lease.granted_at, lease.lease_id))
        return Leases(leases=found[only.offset : None if only.limit is None else only.offset + only.limit])
