"""State of the notifier, in a bucket of the bus: rules of owners, what is to be sent, and how far it has read.

A delivery is created under a name made of its cause and its target, before the event that it is made of counts as read.
Creating it again does nothing, so an event that is read twice is told once. Once sent, it becomes a mark without a
message, which expires.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from typing import Final, TypeVar

from msgspec import Struct
from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.js import api
from nats.js.errors import APIError, NotFoundError

from ..bus import stream_reader
from ..bus.layout import bucket_config, default_replicas, default_scale
from ..bus.permissions import request
from ..schemas import codec, subjects
from ..schemas.subjects import Bucket
from ..schemas.work.notifications import NotifyRule
from .conditions import Episode
from .rules import Delivery

T = TypeVar("T")

log = logging.getLogger("corral.notifier")

BUCKET: Final = Bucket(
    name=subjects.NOTIFY_BUCKET,
    max_bytes=2**26,
    description="Rules for notifications, messages that wait to be sent, and marks of those that were",
    rollup=False,
)
STREAM: Final = f"KV_{BUCKET.name}"
TOLD_SECONDS: Final = 3 * 86400
"""Time for which it is remembered that a target was told of a cause. An event is not read again after that."""
_OUT: Final = "out"
_RULES: Final = "rules"
_AT: Final = "at"
_EPISODES: Final = "episodes"
_INFO_SECONDS: Final = 5.0
_WRONG_SEQUENCE: Final = 10071
_EXISTS: Final = 10058


class StoreFailed(Exception):
    """The bus did not store something; it is tried again."""


class Cursor(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Place up to which a stream was read.

    Attributes:
        created: creation time of the stream, which tells it from one that was made anew.
        sequence: of the last message that was read.
        stored_at: when that was stored, seconds since the epoch; 0 for none.
    """

    created: str
    sequence: int
    stored_at: float = 0.0


class StoredRules(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Rules of an owner.

    Attributes:
        owner: their owner.
        rules: in the order in which they were made.
    """

    owner: str
    rules: list[NotifyRule] = []


class Store:
    """The notifier's bucket.

    Args:
        nc: connection.
    """

    def __init__(self, nc: Client) -> None:
        self._nc = nc
        self._js = nc.jetstream()

    async def prepare(self) -> None:
        """Create the bucket if it is missing.

        Raises:
            NotAllowed: the server's configuration is of an earlier version.
            nats.errors.Error: the bus failed.
        """
        try:
            # The server says at once whether it is permitted, unlike to `stream_info`.
            await request(self._nc, f"$JS.API.STREAM.INFO.{STREAM}", timeout=_INFO_SECONDS)
            await self._js.stream_info(STREAM)
            return
        except NotFoundError:
            pass
        config = bucket_config(BUCKET, default_replicas(self._js))
        config.max_bytes = int(BUCKET.max_bytes * default_scale())
        try:
            await self._js.add_stream(config)
        except APIError as error:
            if error.err_code != _EXISTS:
                raise

    # Deliveries

    async def load_deliveries(self) -> tuple[list[Delivery], set[str]]:
        """Deliveries that wait, and the names of those that are done.

        Raises:
            nats.errors.Error: the bus failed.
        """
        waiting: list[Delivery] = []
        done: set[str] = set()
        config = api.ConsumerConfig(deliver_policy=api.DeliverPolicy.LAST_PER_SUBJECT)
        async for stored in stream_reader.read(self._nc, STREAM, _subject(f"{_OUT}.*"), config):
            if not stored.data:
                done.add(stored.subject.rpartition(".")[2])
                continue
            try:
                waiting.append(codec.decode(stored.data, Delivery, codec.JSON))
            except codec.DecodeError as error:
                log.error("a message that waits can't be read: %s", error)
        return sorted(waiting, key=lambda each: each.made_at), done

    async def add_deliveries(self, deliveries: Iterable[Delivery]) -> list[Delivery]:
        """Keep deliveries.

        Returns:
            Those that are new: not kept or sent before.

        Raises:
            StoreFailed: not all could be kept.
        """
        every = list(deliveries)
        made = await asyncio.gather(*(self._create(each) for each in every))
        return [each for each, new in zip(every, made, strict=True) if new]

    async def _create(self, delivery: Delivery) -> bool:
        return await self.put(f"{_OUT}.{delivery.key}", codec.encode(delivery, codec.JSON), after=0) is not None

    async def done(self, deliveries: Iterable[Delivery]) -> None:
        """Record that deliveries are sent, or given up.

        Raises:
            StoreFailed: not all could be recorded.
        """
        await asyncio.gather(*(self.put(f"{_OUT}.{each.key}", b"", seconds=TOLD_SECONDS) for each in deliveries))

    # Rules

    async def load_rules(self) -> dict[str, StoredRules]:
        """Rules by owner.

        Raises:
            nats.errors.Error: the bus failed.
        """
        found: dict[str, StoredRules] = {}
        config = api.ConsumerConfig(deliver_policy=api.DeliverPolicy.LAST_PER_SUBJECT)
        async for stored in stream_reader.read(self._nc, STREAM, _subject(f"{_RULES}.*"), config):
            try:
                rules = codec.decode(stored.data, StoredRules, codec.JSON)
            except codec.DecodeError as error:
                log.error("the rules in %s can't be read, and don't count: %s", stored.subject, error)
                continue
            found[rules.owner] = rules
        return found

    async def save_rules(self, rules: StoredRules) -> None:
        """Keep the rules of an owner.

        Raises:
            StoreFailed: they could not be kept.
        """
        await self.put(f"{_RULES}.{subjects.person_token(rules.owner)}", codec.encode(rules, codec.JSON))

    # How far it has come

    async def cursor(self, stream: str) -> Cursor | None:
        """Place up to which a stream was read; None if it never was.

        Raises:
            nats.errors.Error: the bus failed.
        """
        return await self._read(f"{_AT}.{stream}", Cursor)

    async def save_cursor(self, stream: str, cursor: Cursor) -> None:
        """Keep how far a stream was read.

        Raises:
            StoreFailed: it could not be kept.
        """
        await self.put(f"{_AT}.{stream}", codec.encode(cursor, codec.JSON))

    async def episodes(self) -> dict[str, Episode]:
        """Episodes by key.

        Raises:
            nats.errors.Error: the bus failed.
        """
        return await self._read(_EPISODES, dict[str, Episode]) or {}

    async def save_episodes(self, episodes: Mapping[str, Episode]) -> None:
        """Keep the episodes.

        Raises:
            StoreFailed: they could not be kept.
        """
        await self.put(_EPISODES, codec.encode(episodes, codec.JSON))

    # Entries

    async def _read(self, key: str, type: type[T]) -> T | None:
        stored = await stream_reader.last(self._nc, STREAM, _subject(key))
        if stored is None or not stored.data:
            return None
        try:
            return codec.decode(stored.data, type, codec.JSON)
        except codec.DecodeError as error:
            log.error("%s in the bucket can't be read, and starts anew: %s", key, error)
            return None

    async def put(self, key: str, value: bytes, *, after: int | None = None, seconds: float = 0.0) -> int | None:
        """Write an entry.

        Args:
            key: its name.
            value: its content.
            after: revision that it must have now, 0 if it must not be there; None for any.
            seconds: time after which it expires; 0 for never.

        Returns:
            Its revision; None if it does not have the revision `after` now.

        Raises:
            StoreFailed: the bus did not store it.
        """
        headers: dict[str, str] = {}
        if after is not None:
            headers[api.Header.EXPECTED_LAST_SUBJECT_SEQUENCE.value] = str(after)
        if seconds:
            headers["Nats-TTL"] = f"{max(1, round(seconds))}s"
        try:
            return (await self._js.publish(_subject(key), value, headers=headers or None)).seq
        except APIError as error:
            if error.err_code == _WRONG_SEQUENCE:
                return None
            raise StoreFailed(f"the bucket {BUCKET.name} refuses it: {error.description}") from error
        except (NatsError, OSError, TimeoutError) as error:
            raise StoreFailed(f"the bus does not answer: {error or type(error).__name__}") from error

    async def get(self, key: str) -> tuple[bytes, int] | None:
        """An entry with its revision; None if it is not there.

        Raises:
            nats.errors.Error: the bus failed.
        """
        try:
            found = await self._js.get_last_msg(STREAM, _subject(key))
        except NotFoundError:
            return None
        return found.data or b"", found.seq or 0


def _subject(key: str) -> str:
    return f"$KV.{BUCKET.name}.{key}"
