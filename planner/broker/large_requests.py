"""Requests that are expensive to decode, or to distribute: both is done in a forked copy of the process.

Its results are not decoded again: items stay the JSON that goes into the bucket and the answer.
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

LARGE_BYTES: Final = 48 * 1024
"""A larger message is decoded in a copy of the process: 1 MiB of JSON takes 50 ms."""


class EncodedItems(Struct, frozen=True):
    """Work items that this process does not decode.

    Attributes:
        digest: of the whole request.
        distribution: decodes all of it; called in a copy of this process.
        body: the message; empty if the request has the items, too.
        body_type: its content type.
    """

    digest: str
    distribution: Callable[[], Distribution]
    body: bytes = b""
    body_type: str = codec.JSON


def encoded_items(digest: str, body: bytes, body_type: str) -> EncodedItems:
    """Items of a message that this process does not decode.

    Args:
        digest: of the whole request.
        body: the message.
        body_type: its content type.
    """

    def distribution() -> Distribution:
        return codec.decode(body, _Distributing, body_type).distribution

    return EncodedItems(digest, distribution, body, body_type)


class _Distributing(Struct):
    distribution: Distribution = Distribution()


class DecodedRequest(Struct, frozen=True):
    """A request that was decoded and checked in a copy of the process.

    Attributes:
        request: without its items.
        digest: of the whole of it; empty for one without an id.
        warnings: fields that were ignored.
    """

    request: WorkRequest
    digest: str
    warnings: list[str]


def without_items(request: WorkRequest) -> WorkRequest:
    """Check work items, and drop them from a request: they stay encoded in the message that they came in.

    Raises:
        InvalidRequest: items contradict each other, or the request.
    """
    work = request.distribution
    if work is None:
        return request
    check_work(request, work)
    return replace(request, distribution=replace(work, items=0))


def distribute_packed(placed: Placed, work: Distribution) -> bytes:
    """Distribute work items over the devices of a placement, in a forked copy; packed for `with_distribution`."""
    outcome = distribute(work, placed.grants, placed.devices)
    items = [codec.encode(grant.items, codec.JSON) for grant in outcome.grants]
    unassigned = codec.encode(outcome.unassigned, codec.JSON) if outcome.unassigned else b""
    return msgspec.msgpack.encode((items, unassigned, outcome.report))


def with_distribution(placed: Placed, packed: bytes) -> Placed:
    """Put the result of `distribute_packed` into a placement; its items stay encoded."""
    items, unassigned, report = _unpack(packed)
    grants = [replace(grant, items=_raw(held)) for grant, held in zip(placed.grants, items, strict=True)]
    return replace(placed, grants=grants, unassigned=_raw(unassigned) if unassigned else [], distribution=report)


def decode_items(reply: Struct) -> Struct:
    """Decode the encoded items of an answer, for clients that do not use JSON."""
    if isinstance(reply, Assignment):
        return replace(reply, lease=_decode_items_of(reply.lease))
    if isinstance(reply, Lease):
        return _decode_items_of(reply)
    if isinstance(reply, Leases):
        return replace(reply, leases=[_decode_items_of(lease) for lease in reply.leases])
    return reply


def _decode_items_of(lease: Lease) -> Lease:
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
