"""What is asked about leases that are there: renewals, releases, lists of them, and their events."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import nats.aio.client

from ..bus.credentials import ANY_OWNER
from ..bus.permissions import identity_of
from ..schemas import operations, plain, requests
from ..schemas.subjects import PlanSubject
from . import subscriptions
from .errors import Refused
from .paging import all_leases
from .request import default_owner
from .rpc import Calls


class LeaseCalls(Calls):
    """Questions over a connection, in the name of an owner.

    Args:
        nc: a connected client of the bus.
        owner: who asks where a call does not say; None takes whom the environment, or the credentials, name.
        timeout: as `Calls`.
        patience: likewise.
        owned_subjects: ask on the subjects that end on the owner; None where the connection has credentials.

    Attributes:
        identity: of the connection's credentials.
    """

    def __init__(
        self,
        nc: nats.aio.client.Client,
        *,
        owner: str | None,
        timeout: float,
        patience: float,
        owned_subjects: bool | None,
    ) -> None:
        super().__init__(nc)
        self.identity = identity_of(nc)
        self.owner = owner or default_owner(self.identity.owner)
        self.timeout = timeout
        self.patience = patience
        self.owned_subjects = bool(self.identity.file) if owned_subjects is None else owned_subjects

    async def renew(
        self, lease_id: str, *, ttl: float | None = None, owner: str | None = None, holder: str = ""
    ) -> requests.Lease:
        """Keep a lease for its time to live from now (or for `ttl` seconds).

        Args:
            lease_id: which.
            ttl: seconds, for this once.
            owner: whose it is.
            holder: name of the process that holds it from now on (`bus/process_identity.py`).

        Raises:
            NotFound: there is none; `Ended`, one of them, where it has ended.
            NotOwner: somebody else holds it.
        """
        owner = owner or self.owner
        action = requests.LeaseAction(lease_id=lease_id, owner=owner, ttl_seconds=plain.number(ttl), holder=holder)
        return await self._plan(self._owned(PlanSubject.RENEW, owner), action, requests.Lease)

    async def release(self, lease_id: str, *, owner: str | None = None) -> requests.Lease:
        """Give a lease back.

        Raises:
            NotFound: there is none; `Ended`, one of them, where it has ended.
            NotOwner: somebody else holds it.
        """
        owner = owner or self.owner
        action = requests.LeaseAction(lease_id=lease_id, owner=owner)
        return await self._plan(self._owned(PlanSubject.RELEASE, owner), action, requests.Lease)

    async def leases(
        self,
        *,
        owner: str | None = None,
        states: Sequence[requests.LeaseState] = (requests.LeaseState.ACTIVE,),
        lease_id: str | None = None,
    ) -> list[requests.Lease]:
        """Leases, oldest first; of everyone where no owner is given."""

        async def ask(wanted: operations.LeaseFilter) -> operations.Leases:
            return await self._plan(PlanSubject.LEASES, wanted, operations.Leases)

        return await all_leases(ask, operations.LeaseFilter(owner=owner, states=tuple(states), lease_id=lease_id))

    def lease_events(self, *, lease_id: str = "*", kind: str = "*") -> AsyncIterator[requests.LeaseEvent]:
        """Changes of leases as they happen, from now on."""
        return subscriptions.lease_events(self.nc, lease_id, kind)

    def _owned(self, subject: str, owner: str) -> str:
        named = self.identity.owner
        if named not in ("", ANY_OWNER, owner):
            # The server would refuse it, and not say so to who waits for the answer.
            raise Refused(f"these credentials ask for {named!r} alone, not for {owner!r}", "refused", "$.owner")
        return f"{subject}.{owner}" if self.owned_subjects else subject
