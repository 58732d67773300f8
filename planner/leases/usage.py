"""Usage of the planner's bucket by owner, for quotas: no owner may fill it for all."""

from __future__ import annotations

from typing import Final, cast

from msgspec import Raw, Struct

from ...schemas.requests import Lease

_RECORD_BYTES: Final = 820
"""Bytes of a record without its grants, labels and items; measured, with times and ids."""
_GRANT_BYTES: Final = 400
_ITEM_BYTES: Final = 8
"""Bytes of a number with its comma, or of the quotes and the comma of an id."""


class OwnerUsage(Struct):
    """Usage of one owner.

    Attributes:
        leases: number of active leases.
        bytes: approximate size of the records, of active leases and of those that ended recently.
    """

    leases: int = 0
    bytes: int = 0


class UsageByOwner:
    """Usage by owner.

    Attributes:
        bytes: approximate size of all records.
    """

    def __init__(self) -> None:
        self._owned: dict[str, OwnerUsage] = {}
        self.bytes = 0

    def of(self, owner: str) -> OwnerUsage:
        """Usage of an owner; zeros if it has no leases."""
        return self._owned.get(owner) or OwnerUsage()

    def add(self, owner: str, leases: int, size: int) -> None:
        """Add to the usage of an owner, or subtract from it by negative numbers.

        Args:
            owner: of the leases.
            leases: number of active leases.
            size: bytes of records.
        """
        owned = self._owned.setdefault(owner, OwnerUsage())
        owned.leases += leases
        owned.bytes += size
        self.bytes += size
        if not owned.leases and not owned.bytes:
            del self._owned[owner]


def size_of(lease: Lease) -> int:
    """Approximate bytes that a lease takes in the bucket; the same for all of its life."""
    size = _RECORD_BYTES + sum(len(key) + len(value) for key, value in lease.labels.items())
    for grant in lease.grants:
        size += _GRANT_BYTES + _written(grant.items)
    left = cast("object", lease.unassigned)
    if isinstance(left, Raw):
        return size + memoryview(left).nbytes
    return size + sum(_written([item.id]) + len(item.reason) for item in lease.unassigned)


def _written(items: object) -> int:
    if isinstance(items, Raw):
        return memoryview(items).nbytes
    listed = cast("list[str | int]", items)
    if listed and isinstance(listed[0], int):  # then all are
        return _ITEM_BYTES * len(listed)
    return _ITEM_BYTES * len(listed) + sum(len(item) for item in listed if isinstance(item, str))
