"""Calls on existing leases: renew, release, checkpoint, resize, list, and follow their events."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from ...schemas import operations, requests
from ...schemas.subjects import PlanSubject
from ...schemas.values import plain
from .. import subscriptions
from ..owned_calls import OwnedCalls
from ..paging import all_leases


class LeaseCalls(OwnedCalls):
    """Calls on leases; see `OwnedCalls`."""

    async def renew(
        self, lease_id: str, *, ttl: float | None = None, owner: str | None = None, holder: str = ""
    ) -> requests.Lease:
        """Renew a lease for its time to live from now, or for `ttl` seconds.

        Args:
            lease_id: id of the lease.
            ttl: seconds, for this renewal only.
            owner: owner of the lease; the client's owner by default.
            holder: name of the process that holds the lease from now on (`bus/process_identity.py`); empty leaves the
                holder unchanged.

        Returns:
            The lease after the renewal.

        Raises:
            NotFound: there is no such lease; its subclass `Ended`, if the lease has ended.
            NotOwner: the lease belongs to another owner.
        """
        owner = owner or self.owner
        action = requests.LeaseAction(lease_id=lease_id, owner=owner, ttl_seconds=plain.number(ttl), holder=holder)
        return await self._plan(self._owned(PlanSubject.RENEW, owner), action, requests.Lease)

    async def release(self, lease_id: str, *, owner: str | None = None) -> requests.Lease:
        """Release a lease.

        Returns:
            The lease after the release.

        Raises:
            NotFound: there is no such lease; its subclass `Ended`, if the lease has ended.
            NotOwner: the lease belongs to another owner.
        """
        owner = owner or self.owner
        action = requests.LeaseAction(lease_id=lease_id, owner=owner)
        return await self._plan(self._owned(PlanSubject.RELEASE, owner), action, requests.Lease)

    async def saved(self, lease_id: str, *, owner: str | None = None) -> requests.Lease:
        """Say that the work of a lease is saved. While the notice of a preemption is out, the lease ends.

        Returns:
            The lease after the change.

        Raises:
            NotFound: there is no such lease; its subclass `Ended`, if the lease has ended.
            NotOwner: the lease belongs to another owner.
        """
        return await self._checkpoint(lease_id, owner, saved=True)

    async def busy(self, lease_id: str, seconds: float, *, owner: str | None = None) -> requests.Lease:
        """Put the end of a preemption off to `seconds` from now, once, and at most by the grace of the lease again.

        Returns:
            The lease after the change; `ends_at` of its `preemption` is the new end.

        Raises:
            Refused: no notice is out, or its end was put off before.
            NotFound: there is no such lease; its subclass `Ended`, if the lease has ended.
            NotOwner: the lease belongs to another owner.
        """
        return await self._checkpoint(lease_id, owner, busy_seconds=plain.number(seconds))

    async def _checkpoint(self, lease_id: str, owner: str | None, **answer: Any) -> requests.Lease:
        owner = owner or self.owner
        action = requests.CheckpointAction(lease_id=lease_id, owner=owner, **answer)
        return await self._plan(self._owned(PlanSubject.CHECKPOINT, owner), action, requests.Lease)

    async def resize(
        self,
        lease_id: str,
        *,
        accept: bool = True,
        devices: Sequence[str] = (),
        number: int | None = None,
        owner: str | None = None,
    ) -> requests.Lease:
        """Answer the notice that an elastic lease may have more devices or shall give some back.

        Args:
            lease_id: id of the lease.
            accept: take the devices that are offered, or give back those that are asked for, which must not be in use
                any more; False declines.
            devices: uuids: of an offer, those to take; of a request, those to give back instead. Without a notice they
                are given back.
            number: the notice that is answered; None for the one that is out.
            owner: owner of the lease; the client's owner by default.

        Returns:
            The lease after the change.

        Raises:
            Conflict: the notice is over or was withdrawn, or the devices were taken meanwhile; nothing has changed.
            Refused: the lease is not elastic, or has no notice.
            NotFound: there is no such lease; its subclass `Ended`, if the lease has ended.
            NotOwner: the lease belongs to another owner.
        """
        owner = owner or self.owner
        action = requests.ResizeAction(
            lease_id=lease_id, owner=owner, accept=accept, devices=list(devices), number=number
        )
        return await self._plan(self._owned(PlanSubject.RESIZE, owner), action, requests.Lease)

    async def leases(
        self,
        *,
        owner: str | None = None,
        states: Sequence[requests.LeaseState] = (requests.LeaseState.ACTIVE,),
        lease_id: str | None = None,
    ) -> list[requests.Lease]:
        """Leases in the given states, oldest first; of all owners if none is given."""

        async def ask(wanted: operations.LeaseFilter) -> operations.Leases:
            return await self._plan(PlanSubject.LEASES, wanted, operations.Leases)

        return await all_leases(ask, operations.LeaseFilter(owner=owner, states=tuple(states), lease_id=lease_id))

    def lease_events(self, *, lease_id: str = "*", kind: str = "*") -> AsyncIterator[requests.LeaseEvent]:
        """Stream lease events from now on; of one lease or one kind, if given."""
        return subscriptions.lease_events(self.nc, lease_id, kind)
