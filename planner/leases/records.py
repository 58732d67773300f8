"""Decoding of lease records from the bucket. A corrupt record must not keep a planner from leading."""

from __future__ import annotations

import logging
from typing import Any, cast

from ...schemas import codec
from .lifecycle import LeaseRecord

log = logging.getLogger("corral.planner.recorded")


def decode_record(lease_id: str, value: bytes) -> LeaseRecord | None:
    """Decode a lease's record, if need be without its optional parts.

    None if it is empty, or, with an error in the log, if it can't be decoded even so.
    """
    if not value:
        return None
    try:
        return codec.decode(value, LeaseRecord, codec.JSON)
    except codec.DecodeError as error:
        why = error
    try:
        record = codec.decode(codec.encode(_bare(value), codec.JSON), LeaseRecord, codec.JSON)
    except (codec.DecodeError, AttributeError, TypeError):  # no lease in it, or no grants
        log.error("lease %s can't be read and is left out, so that others may get its devices: %s", lease_id, why)
        return None
    log.error("lease %s is read without its distribution and its earlier events: %s", lease_id, why)
    return record


def _bare(value: bytes) -> dict[str, Any]:
    """Reduce a record to what is needed to hold its devices: no scores, distribution or earlier events."""
    tree = codec.decode(value, dict[str, Any], codec.JSON)
    lease = cast("dict[str, Any]", tree.get("lease"))
    grants = cast("list[dict[str, Any]]", lease.get("grants"))
    for grant in grants:
        grant.pop("score", None)
        grant.pop("score_parts", None)
    return {**tree, "lease": {**lease, "distribution": None}, "earlier": []}
