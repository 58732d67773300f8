"""History of drains: from when to when each target was drained, published when it begins and when it ends.

The bucket keeps the drains that are in force, and ends that the stream has not acknowledged. So a leader publishes what
an earlier one did not get to; the history stores each span once.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from ...schemas import codec
from ...schemas.work.drains import DrainSpan
from ..durable.store import DRAIN_SPANS, Store, WriteFailed
from .request_log import RequestLog

log = logging.getLogger("corral.planner.broker.drains")

LOOK_SECONDS: Final = 1.0
_AGAIN_SECONDS: Final = 86400.0
"""Time after which drains in force are published again: their stream forgets after some time, and a history that is
made anew shall know them."""
_SIGNED: Final = re.compile(r"(.*) \(by ([^()]+)\)", re.S)


class SavedSpans(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Spans in the bucket.

    Attributes:
        begun: of the drains in force, by target.
        ended: of drains that have ended, whose end the stream may not have.
    """

    begun: dict[str, DrainSpan] = {}
    ended: list[DrainSpan] = []


def signed(reason: str, operator: str) -> str:
    """Reason of a drain with the name of its operator, as people read it."""
    return f"{reason} (by {operator})" if operator else reason


def follow(saved: SavedSpans, drains: Mapping[str, str], at: datetime, by: str = "") -> SavedSpans:
    """Spans after a change of the drains. A drain that gets another reason ends, and another begins.

    Args:
        saved: spans before.
        drains: target → signed reason, after the change.
        at: time of the change.
        by: operator who made it; empty if that is not known.
    """
    begun = {target: span for target, span in saved.begun.items() if drains.get(target) == _text(span)}
    ended = [
        replace(span, until=max(at, span.since), ended_by=by)
        for target, span in saved.begun.items()
        if target not in begun
    ]
    for target, text in drains.items():
        if target not in begun:
            found = _SIGNED.fullmatch(text)
            reason, operator = found.groups() if found else (text, "")
            begun[target] = DrainSpan(target=target, since=at, reason=reason, operator=operator)
    return SavedSpans(begun=begun, ended=[*saved.ended, *ended])


def _text(span: DrainSpan) -> str:
    return signed(span.reason, span.operator)


class DrainSpans:
    """Publishes and stores the spans of one term.

    Args:
        store: the bucket.
        term: revision of the leader's key.
        log: publishes them.
        saved: as read from the bucket.
        drains: as read from the bucket: target → signed reason.
        changed_at: time of their last change, in seconds since the epoch.
    """

    def __init__(
        self,
        store: Store,
        term: int,
        log: RequestLog,
        saved: SavedSpans,
        drains: Mapping[str, str],
        changed_at: float,
    ) -> None:
        self._store = store
        self._term = term
        self._log = log
        # A planner that was killed between a change of the drains and that of the spans left these behind.
        self._spans = follow(saved, drains, datetime.fromtimestamp(changed_at, UTC))
        self._is_saved = self._spans == saved
        self._maintenance: dict[tuple[str, str, datetime], DrainSpan] = {}
        self._again_at = -math.inf

    async def change(self, drains: Mapping[str, str], by: str) -> None:
        """Follow a change of the drains that is durable.

        Raises:
            Deposed: another planner leads.
        """
        before = self._spans
        after = self._spans = follow(before, drains, datetime.now(UTC), by)
        await self._save()
        self._publish_ended(after.ended[len(before.ended) :])
        self._publish(span for target, span in after.begun.items() if before.begun.get(target) != span)

    async def tick(self, now: float, maintenance: Iterable[DrainSpan]) -> None:
        """Publish what an earlier term may not have, maintenance that begins or was canceled, and save what is not yet.

        Args:
            now: seconds since the epoch.
            maintenance: spans of the maintenance that is now, with their planned ends.

        Raises:
            Deposed: another planner leads.
        """
        if now >= self._again_at:
            self._again_at = now + _AGAIN_SECONDS
            self._publish_ended(self._spans.ended)
            self._publish(self._spans.begun.values())
            self._maintenance.clear()
        self._follow_maintenance(datetime.fromtimestamp(now, UTC), maintenance)
        if not self._is_saved:
            await self._save()

    def _follow_maintenance(self, now: datetime, found: Iterable[DrainSpan]) -> None:
        running = {(span.window, span.target, span.since): span for span in found}
        canceled = [span for key, span in self._maintenance.items() if key not in running and _is_on(span, now)]
        self._publish(replace(span, until=max(now, span.since)) for span in canceled)
        self._publish(span for key, span in running.items() if key not in self._maintenance)
        self._maintenance = running

    def _publish(self, spans: Iterable[DrainSpan]) -> None:
        for span in spans:
            self._log.add(span)

    def _publish_ended(self, spans: Iterable[DrainSpan]) -> None:
        for span in list(spans):
            self._log.add(span, lambda span=span: self._forget(span))

    def _forget(self, span: DrainSpan) -> None:
        self._spans = replace(self._spans, ended=[each for each in self._spans.ended if each != span])
        self._is_saved = False

    async def _save(self) -> None:
        value = codec.encode(self._spans, codec.JSON)
        self._is_saved = True
        try:
            await self._store.put(DRAIN_SPANS, value, self._term)
        except WriteFailed as error:
            # They are published all the same; only a leader that takes over now may not know when they began.
            log.warning("the times of drains are not kept: %s", error)


def _is_on(span: DrainSpan, now: datetime) -> bool:
    return span.until is None or span.until > now
