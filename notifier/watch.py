"""Asks planner and history for what no event tells: leases that end soon or are idle, broken devices, queue, groups."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Final, TypeVar

from msgspec.structs import replace

from ..bus.tasks import heed_cancellation
from ..client.client import Client
from ..client.errors import CorralError
from ..client.reports.idle_query import idle_now
from ..schemas.query import ResultFormat
from ..schemas.requests import Lease
from ..schemas.work.idle import IdleRule
from ..schemas.work.notifications import NewsKind, OwnedRule
from . import conditions
from .conditions import Condition, Episode, Source, id_of
from .news import IdleLease, News, expiring, idle_warnings
from .rules import concerns
from .store import Store, StoreFailed

log = logging.getLogger("corral.notifier")

T = TypeVar("T")

EVERY_SECONDS: Final = 15.0
IDLE_EVERY_SECONDS: Final = 60.0
_IDLE_BACK_SECONDS: Final = 86400.0
"""Limit on how far back the begin of an idle time is looked for; longer where a rule wants more."""
_QUERY_SECONDS: Final = 60.0

Tell = Callable[[News, Sequence[OwnedRule]], Awaitable[None]]


class Watch:
    """Finds out what has come to hold, and tells of it.

    Args:
        client: asks.
        store: keeps the episodes.
        rules: gives the rules as they are now.
        tell: keeps what follows from news by some rules. It raises `StoreFailed` to be asked again.
        every_seconds: time between two rounds.

    Attributes:
        problems: why a source did not answer in the last round.
    """

    def __init__(
        self,
        client: Client,
        store: Store,
        rules: Callable[[], list[OwnedRule]],
        tell: Tell,
        *,
        every_seconds: float = EVERY_SECONDS,
    ) -> None:
        self.problems: dict[Source, str] = {}
        self._client = client
        self._store = store
        self._rules = rules
        self._tell = tell
        self._every_seconds = every_seconds
        self._idle: dict[float, list[IdleLease]] = {}
        self._idle_asked_at = float("-inf")
        self._episodes: dict[str, Episode] = {}

    async def load(self) -> None:
        """Read the episodes from the bucket.

        Raises:
            nats.errors.Error: the bus failed.
        """
        self._episodes = await self._store.episodes()

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            heed_cancellation()
            began = time.monotonic()
            try:
                await self.round(datetime.now(UTC))
            except StoreFailed as error:
                log.warning("what was found can't be kept yet, retrying: %s", error)
            await asyncio.sleep(max(0.05, self._every_seconds - (time.monotonic() - began)))

    async def round(self, now: datetime) -> None:
        """Look once.

        Raises:
            StoreFailed: something could not be kept.
        """
        rules = self._rules()
        kinds = {kind for owned in rules for kind in owned.rule.on}
        leases: dict[str, Lease] | None = {}
        if kinds & {NewsKind.EXPIRING, NewsKind.IDLE, NewsKind.UNHEALTHY}:
            found = await self._ask(Source.LEASES, self._client.leases())
            leases = None if found is None else {lease.lease_id: lease for lease in found}
        if leases is not None:
            await self._of_leases(rules, leases, now)
        await self._of_conditions(rules, kinds, leases, now)

    async def _of_leases(self, rules: Sequence[OwnedRule], leases: Mapping[str, Lease], now: datetime) -> None:
        for owned in rules:
            if NewsKind.EXPIRING in owned.rule.on:
                for news in expiring(owned.rule, leases.values(), now):
                    await self._tell(news, [owned])
        about_idle = [owned for owned in rules if NewsKind.IDLE in owned.rule.on]
        if about_idle:
            for news in idle_warnings(leases.values()):
                await self._tell(news, about_idle)

    async def _of_conditions(
        self,
        rules: Sequence[OwnedRule],
        kinds: set[NewsKind],
        leases: Mapping[str, Lease] | None,
        now: datetime,
    ) -> None:
        seen: dict[str, Condition] = {}
        known: set[Source] = set()
        if NewsKind.UNHEALTHY not in kinds:
            known.add(Source.DEVICES)
        elif leases is not None and (devices := await self._ask(Source.DEVICES, self._client.devices())) is not None:
            known.add(Source.DEVICES)
            seen |= conditions.troubles(devices)
        if NewsKind.QUEUE_LONG not in kinds:
            known.add(Source.QUEUE)
        elif (queue := await self._ask(Source.QUEUE, self._client.queue())) is not None:
            known.add(Source.QUEUE)
            seen |= conditions.long_queues(rules, queue)
        if NewsKind.OVER_SHARE not in kinds:
            known.add(Source.GROUPS)
        elif (groups := await self._ask(Source.GROUPS, self._client.groups())) is not None:
            known.add(Source.GROUPS)
            seen |= conditions.excesses(rules, groups.groups)
        if NewsKind.IDLE not in kinds:
            known.add(Source.IDLE)
        elif leases is not None and await self._ask_idle(rules, leases):
            known.add(Source.IDLE)
            for owned in rules:
                if NewsKind.IDLE in owned.rule.on:
                    idle = self._idle.get(owned.rule.idle_below_percent, [])
                    still = [
                        replace(each, lease=leases[each.lease.lease_id])
                        for each in idle
                        if each.lease.lease_id in leases
                    ]
                    seen |= conditions.idle_leases(owned, still, now)
        await self._fold(rules, seen, known, leases or {}, now)

    async def _fold(
        self,
        rules: Sequence[OwnedRule],
        seen: Mapping[str, Condition],
        known: set[Source],
        leases: Mapping[str, Lease],
        now: datetime,
    ) -> None:
        going, over = conditions.fold(self._episodes, seen, known, now)
        if going != self._episodes and not over:
            # Kept before it is told of: its begin is in the cause.
            await self._keep(going)
        for key, episode in over.items():
            if (news := conditions.over_news(key, episode)) is not None:
                wanting = [owned for owned in rules if owned.rule.resolved and id_of(owned) in episode.told]
                await self._tell(conditions.with_owners(news, leases), wanting)
        if over:
            await self._keep(going)
        told = dict(going)
        for key, condition in seen.items():
            episode = going[key]
            news = conditions.with_owners(conditions.news_of(key, episode, condition), leases)
            wanting = [
                owned
                for owned in rules
                if id_of(owned) not in episode.told and condition.rule in ("", id_of(owned)) and concerns(owned, news)
            ]
            if wanting:
                await self._tell(news, wanting)
                told[key] = replace(episode, told=episode.told | {id_of(owned) for owned in wanting})
        if told != going:
            await self._keep(told)

    async def _keep(self, episodes: dict[str, Episode]) -> None:
        await self._store.save_episodes(episodes)
        self._episodes = episodes

    async def _ask_idle(self, rules: Sequence[OwnedRule], leases: Mapping[str, Lease]) -> bool:
        """Ask the history for idle leases, once a minute; false if it did not answer."""
        if time.monotonic() - self._idle_asked_at < IDLE_EVERY_SECONDS and not self.problems.get(Source.IDLE):
            return True
        holders = {lease.owner for lease in leases.values()}
        wanted: dict[float, tuple[float, float]] = {}
        for owned in rules:
            rule = owned.rule
            if NewsKind.IDLE in rule.on and holders and (not owned.owner or owned.owner in holders):
                least, most = wanted.get(rule.idle_below_percent, (rule.idle_seconds, rule.idle_seconds))
                wanted[rule.idle_below_percent] = (min(least, rule.idle_seconds), max(most, rule.idle_seconds))
        found: dict[float, list[IdleLease]] = {}
        for below, (least, most) in wanted.items():
            since = time.time() - max(_IDLE_BACK_SECONDS, most + 7200)
            sql = idle_now(IdleRule(below_percent=below, after_seconds=least), since)
            asked = self._client.query(sql, format=ResultFormat.JSON, timeout=_QUERY_SECONDS)
            result = await self._ask(Source.IDLE, asked)
            if result is None:
                return False
            found[below] = [
                IdleLease(leases[row["lease_id"]], _time(row["since"]), row["mean_percent"])
                for row in result.dicts()
                if row["lease_id"] in leases
            ]
        self._idle, self._idle_asked_at = found, time.monotonic()
        self.problems.pop(Source.IDLE, None)
        return True

    async def _ask(self, source: Source, asking: Awaitable[T]) -> T | None:
        try:
            found = await asking
        except (CorralError, OSError, TimeoutError) as error:
            if source not in self.problems:
                log.warning("%s: no answer, retrying: %s", source, error)
            self.problems[source] = str(error) or type(error).__name__
            return None
        self.problems.pop(source, None)
        return found


def _time(value: datetime | str) -> datetime:
    found = value if isinstance(value, datetime) else datetime.fromisoformat(value)
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)
