"""Accounts of the groups in one term: which leases count, from which time to which."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

from msgspec import Struct

from ....schemas import codec
from ....schemas.requests import Grant, Lease, LeaseState
from ...durable.store import USAGE, Store
from ...fleet.fleet import Fleet
from ...groups.state import GroupState, amounts_of
from ...groups.tree import Tree
from ...groups.usage import Vector
from ...leases.lifecycle import LeaseRecord
from ...leases.resizing import shapes

SAVE_SECONDS: Final = 10.0
"""Time between two savings of past use. An ended lease is kept for longer, so that none is left out."""


class SavedUsage(Struct, frozen=True, kw_only=True):
    """Past use of owners, as the bucket holds it.

    Attributes:
        at: time up to which use is counted, in seconds since the epoch.
        owners: priced device seconds, core seconds and RAM byte seconds of each owner, decayed to that time.
    """

    at: float
    owners: dict[str, Vector]


class GroupAccounts:
    """Counts leases for the groups of their owners.

    Args:
        fleet: live state.
        saved: past use, as read from the bucket; None if there is none.

    Attributes:
        state: of the groups.
    """

    def __init__(self, fleet: Fleet, saved: SavedUsage | None = None) -> None:
        self.state = GroupState()
        self._fleet = fleet
        self._saved = saved

    @property
    def active(self) -> bool:
        """True if there are groups."""
        return self.state.active

    def group_of(self, owner: str) -> str:
        """Name of an owner's group; empty without groups."""
        return self.state.node_of(owner).name if self.active else ""

    def change(self, tree: Tree, revision: int, records: Iterable[LeaseRecord]) -> None:
        """Take other groups.

        Args:
            tree: the groups.
            revision: of the configuration.
            records: all leases, ended ones too: those of before the first group are counted from now on.
        """
        was_active, now = self.state.active, time.time()
        self.state.change(tree, revision, now)
        if self.state.active and not was_active:
            self._count_all(records, now)

    def _count_all(self, records: Iterable[LeaseRecord], now: float) -> None:
        since = now
        if self._saved is not None:
            since = self._saved.at
            self.state.usage.load(self._saved.owners, since)
        for record in records:
            lease = record.lease
            if lease.state is LeaseState.ACTIVE:
                self.hold_lease(lease)
                self._starts(record, since)
            elif lease.ended_at is not None and lease.ended_at.timestamp() > since:
                self._starts(record, since)
                self.state.usage.ends(lease.lease_id, lease.ended_at.timestamp())

    def _starts(self, record: LeaseRecord, since: float) -> None:
        lease = record.lease
        for at, grants in shapes(record, since):
            self.state.usage.ends(lease.lease_id, at)
            self.state.usage.starts(lease.lease_id, lease.owner, amounts_of(self._fleet, grants), at)

    def hold_lease(self, lease: Lease) -> None:
        """Count what an active lease holds."""
        self.hold(lease.lease_id, lease.owner, lease.grants, lease.preemptible)

    def hold(self, lease_id: str, owner: str, grants: Iterable[Grant], preemptible: bool) -> None:
        """Count what a lease is about to hold, or holds."""
        if self.state.active:
            self.state.use.hold(lease_id, owner, amounts_of(self._fleet, grants), preemptible)

    def drop(self, lease_id: str) -> None:
        """Count a lease no more that was not granted after all."""
        self.state.use.drop(lease_id)

    @contextmanager
    def with_held(self, held: Mapping[str, Sequence[Grant]]) -> Generator[None]:
        """Context in which some leases hold other devices, or none, than they do: for what quotas allow then.

        Args:
            held: by lease.
        """
        use = self.state.use
        before = {lease_id: use.holdings[lease_id] for lease_id in held if lease_id in use.holdings}
        try:
            for lease_id, holding in before.items():
                use.drop(lease_id)
                if held[lease_id]:
                    amounts = amounts_of(self._fleet, held[lease_id])
                    use.hold(lease_id, holding.owner, amounts, holding.preemptible)
            yield
        finally:
            for lease_id, holding in before.items():
                use.hold(lease_id, holding.owner, holding.amounts, holding.preemptible)

    def granted(self, record: LeaseRecord) -> None:
        """Count the use of a lease from its grant on."""
        if not self.state.active:
            return
        lease = record.lease
        held = self.state.use.holdings.get(lease.lease_id)
        if held is None or lease.elastic is not None:
            self._starts(record, 0.0)
        else:  # as it was counted when its devices were reserved
            self.state.usage.starts(lease.lease_id, lease.owner, held.amounts, lease.granted_at.timestamp())

    def resized(self, record: LeaseRecord) -> None:
        """Count the use of a lease with other devices from now on."""
        if self.state.active:
            self._starts(record, record.changed_at.timestamp())

    def ended(self, lease: Lease) -> None:
        """Count a lease up to its end."""
        self.state.use.drop(lease.lease_id)
        if lease.ended_at is not None:
            self.state.usage.ends(lease.lease_id, lease.ended_at.timestamp())

    async def save(self, store: Store, term: int) -> None:
        """Write past use into the bucket, if there are groups.

        Raises:
            Deposed: another planner leads.
            WriteFailed: the bucket refused it.
        """
        if not self.state.active:
            return
        now = time.time()
        saved = SavedUsage(at=now, owners=self.state.usage.saved(now))
        value = codec.encode(saved, codec.JSON)
        if store.has_room and len(value) <= store.max_record_bytes:
            await store.put(USAGE, value, term)
