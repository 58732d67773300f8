"""Drains over time: from when to when hosts, devices or labels were kept free of new work, by whom and why."""

from __future__ import annotations

from msgspec import Struct

from ..requests import Time


class DrainSpan(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Time for which something was drained. It is published when the drain begins, and again when it ends.

    `target`, `since` and `window` identify a span. Of several ends the first counts.

    Attributes:
        target: `host:NAME`, `device:UUID` or `label:K=V`.
        since: when it was drained; begin of the maintenance.
        until: when it was undrained; null while it is drained. For maintenance its planned end, unless it is canceled.
        reason: why, in the words of the operator.
        operator: name of the operator who drained it; empty if that is not known.
        ended_by: name of the operator who undrained it; empty if that is not known, and for maintenance.
        window: id of the booked window, for maintenance; empty for a drain.
    """

    target: str
    since: Time
    until: Time | None = None
    reason: str = ""
    operator: str = ""
    ended_by: str = ""
    window: str = ""
