"""Requests that are much work to read, or to distribute: both is done beside the planner's loop.

What comes back from there is not taken apart again: items stay JSON as the bucket and the answer will hold them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, cast

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from ...schemas import codec
from ...schemas.operations import Leases
from ...schemas.requests import Assignment, Distributed, Distribution, Lease, UnassignedItem, WorkRequest
from ..placement.decide import Placed, check_work
from ..work.distribute import distribute

HEAVY_BYTES: Final = 48 * 1024
"""A message of more is read beside the loop: 1 MiB of JSON takes 50 ms."""


class Heavy(Struct, frozen=True):
    """Work whose items are not looked at here.

    Attributes:
        digest: of the whole request.
        distribution: all of it; for a copy of this process to ask for.
    """

    digest: str
    distribution: Callable[[], Distribution]


class Read(Struct, frozen=True):
    """A request that was read and checked beside the loop.

    Attributes:
        request: without its items.
        digest: of the whole of it; empty for one without an id.
        warnings: fields that were ignored.
    """

    request: WorkRequest
    digest: str
    warnings: list[str]


def without_items(request: WorkRequest) -> WorkRequest:
    """A request as the loop keeps it, while its items stay in the message that they came in.

    Raises:
        InvalidRequest: items, or what is said of them, contradict each other.
    """
    work = request.distribution
    if work is None:
        return request
    check_work(request, work)
    return replace(request, distribution=replace(work, items=0))


def distributed(placed: Placed, work: Distribution) -> bytes:
    """Distribute over the devices of a placement, on a copy of this process."""
    outcome = distribute(work, placed.grants, placed.devices)
    items = [codec.encode(grant.items, codec.JSON) for grant in outcome.grants]
    unassigned = codec.encode(outcome.unassigned, codec.JSON) if outcome.unassigned else b""
    return msgspec.msgpack.encode((items, unassigned, outcome.report))


def filled(placed: Placed, packed: bytes) -> Placed:
    """A placement with the items that `distributed` has shared out, as they are written."""
    items, unassigned, report = _unpack(packed)
    grants = [replace(grant, items=_raw(held)) for grant, held in zip(placed.grants, items, strict=True)]
    return replace(placed, grants=grants, unassigned=_raw(unassigned) if unassigned else [], distribution=report)


def whole(reply: Struct) -> Struct:
    """An answer with its items taken apart again, for those who do not read JSON."""
    if isinstance(reply, Assignment):
        return replace(reply, lease=_whole(reply.lease))
    if isinstance(reply, Lease):
        return _whole(reply)
    if isinstance(reply, Leases):
        return replace(reply, leases=[_whole(lease) for lease in reply.leases])
    return reply


def _whole(lease: Lease) -> Lease:
    if not any(isinstance(cast("object", grant.items), msgspec.Raw) for grant in lease.grants):
        return lease
    grants = [replace(grant, items=_items(grant.items)) for grant in lease.grants]
    unassigned = cast("object", lease.unassigned)
    left = _decode_unassigned(unassigned) if isinstance(unassigned, msgspec.Raw) else lease.unassigned
    return replace(lease, grants=grants, unassigned=left)


def _items(held: object) -> list[str | int]:
    return _decode_items(held) if isinstance(held, msgspec.Raw) else cast("list[str | int]", held)


def _raw(data: bytes) -> Any:
    return msgspec.Raw(data)


_unpack: Final = msgspec.msgpack.Decoder(tuple[list[bytes], bytes, Distributed]).decode
_decode_items: Final = msgspec.json.Decoder(list[str | int]).decode
_decode_unassigned: Final = msgspec.json.Decoder(list[UnassignedItem]).decode
