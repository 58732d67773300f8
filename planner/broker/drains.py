"""Drains: hosts, devices and labels that operators keep free of new work."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from ...schemas import codec
from ...schemas.operations import DrainAction, Drains
from ..durable.store import DRAINS, Store, WriteFailed
from ..fleet.fleet import Fleet, apply
from ..leases.lifecycle import Refused
from .drain_spans import DrainSpans, signed
from .operator_changes import refusals
from .pending import Responder


class Drainer:
    """Stores and applies the drains of a term.

    Args:
        fleet: to which drains apply.
        store: the bucket.
        term: revision of the leader's key.
        drains: as read from the bucket.
        spans: publishes when drains begin and end.
        freed: called when a drain was taken off.
        deposed: called when a write was refused since another planner leads.
    """

    def __init__(
        self,
        fleet: Fleet,
        store: Store,
        term: int,
        drains: dict[str, str],
        spans: DrainSpans,
        freed: Callable[[], None],
        deposed: Callable[[], None],
    ) -> None:
        self._fleet = fleet
        self._store = store
        self._term = term
        self._drains = drains
        self._spans = spans
        self._freed = freed
        self._deposed = deposed
        self._lock = asyncio.Lock()

    async def drain(self, action: DrainAction, caller: Responder) -> None:
        """Drain or undrain, store that, and answer with all drains."""
        async with refusals(action, caller, self._deposed):
            async with self._lock:
                changed = drained(self._drains, action, self._fleet)
                if changed != self._drains:
                    written = codec.encode(changed, codec.JSON)
                    if len(written) > self._store.max_record_bytes and len(changed) > len(self._drains):
                        raise WriteFailed(f"{len(changed)} drains take {len(written)} bytes: drain hosts, or labels")
                    await self._store.put(DRAINS, written, self._term)
                    self._drains = changed
                    apply(self._fleet, Drains(drains=changed))
                    await self._spans.change(changed, action.operator)
            await caller.answer(Drains(drains=dict(sorted(self._drains.items()))))
            if not action.drain:
                self._freed()


def drained(before: Mapping[str, str], action: DrainAction, fleet: Fleet) -> dict[str, str]:
    """All drains after a change.

    Args:
        before: `host:NAME`, `device:UUID` or `label:K=V` → reason.
        action: the change. Undraining something that is not drained, or not known, is no error.
        fleet: known hosts and devices.

    Raises:
        Refused: a drain names nothing, or something that the fleet lacks, or gives no reason.
    """
    targets = [
        *(f"device:{uuid}" for uuid in action.devices),
        *(f"host:{name}" for name in action.hosts),
        *(f"label:{key}={value}" for key, value in action.host_labels.items()),
    ]
    if not action.drain:
        return {target: reason for target, reason in before.items() if target not in targets}
    if not targets:
        raise Refused("invalid", "Name the devices, hosts or host_labels to drain", "$.devices")
    if not action.reason.strip():
        raise Refused("invalid", "Say why: a drain needs a reason", "$.reason")
    for field, names, known in (
        ("devices", action.devices, fleet.devices),
        ("hosts", action.hosts, fleet.hosts),
    ):
        for at, name in enumerate(names):
            if name not in known:
                raise Refused("not_found", f"The fleet has no {field[:-1]} {name!r}", f"$.{field}[{at}]")
    return {**before, **dict.fromkeys(targets, signed(action.reason.strip(), action.operator))}
