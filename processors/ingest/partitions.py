"""Partitions of the streams into parts, and the assignment of parts to processors.

A host's telemetry belongs to one of N partitions, by the server's hash of its name. The stream `CORRAL_PARTITIONS` is
sourced from that of telemetry, with the partition put before the host, and each partition has a separate consumer.
Inventories and facts are one part each. `origin.py` makes sure that the stream of partitions keeps mirroring telemetry.

A part's owner holds a key in a bucket with a time to live, and renews it five times within that. Each processor takes
free parts up to its fair share, and releases parts above it. The keys only say who should work. The fence of a part
(`storage/lake/lake.py`) prevents two processors from storing the same messages.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable
from typing import Final

from msgspec import Struct
from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.js import JetStreamContext, api
from nats.js.errors import (
    APIError,
    BadRequestError,
    BucketNotFoundError,
    KeyWrongLastSequenceError,
    NoKeysError,
    NotFoundError,
)
from nats.js.kv import KeyValue

from ...bus.stream_reader import created
from ...bus.tasks import cancel_all, heed_cancellation
from ...schemas import subjects
from ..storage.errors import StorageError
from .ingest import CONSUMERS, Consumer
from .origin import BUCKET, STREAM, Sourcing, transforms

log = logging.getLogger("corral.partitions")

TTL_SECONDS: Final = 5.0
"""Time to live of keys in a new bucket. A bucket that an operator created keeps the one that it has."""
MAINTENANCE: Final = "upkeep"
"""A part without a stream: its owner runs the lake's maintenance of files and rollups. Its name is in bucket keys."""
LINGER_SECONDS: Final = 2.0
"""Each transaction makes a file: fewer, larger ones than in the embedded storage."""

_NAME_IN_USE: Final = 10058


def consumers(partitions: int) -> dict[str, Consumer]:
    """Consumers of the parts that have a stream, by the part's name."""
    telemetry, *others = CONSUMERS
    found = {consumer.stream: consumer for consumer in others}
    for number in range(partitions):
        part = f"{STREAM}/{number}"
        found[part] = Consumer(
            STREAM,
            f"partition-{number}",
            telemetry.batch_bytes,
            LINGER_SECONDS,
            subjects=(f"{subjects.PREFIX}.*.{number}.*",),
            part=part,
        )
    return found


async def ensure_stream(js: JetStreamContext, partitions: int) -> None:
    """Create the stream of partitions and the bucket of owners if they are missing.

    Raises:
        StorageError: the stream is there with another number of partitions.
    """
    origin = await js.stream_info(subjects.TELEMETRY_STREAM)
    telemetry = origin.config
    cut = transforms(partitions)
    try:
        found = (await js.stream_info(STREAM)).config
    except NotFoundError:
        config = api.StreamConfig(
            name=STREAM,
            description="Telemetry with its partition in the subject, for processors that share the work",
            sources=[api.StreamSource(name=subjects.TELEMETRY_STREAM, subject_transforms=cut)],
            retention=api.RetentionPolicy.LIMITS,
            discard=api.DiscardPolicy.OLD,
            storage=api.StorageType.FILE,
            max_age=telemetry.max_age,
            max_bytes=telemetry.max_bytes,
            num_replicas=telemetry.num_replicas,
            allow_direct=True,
            metadata=Sourcing(created(origin)).metadata(),
        )
        try:
            found = (await js.add_stream(config)).config
        except BadRequestError as error:
            if error.err_code != _NAME_IN_USE:
                raise
            found = (await js.stream_info(STREAM)).config
    # A second transform only marks the generation.
    ways = [t.dest for source in found.sources or [] for t in (source.subject_transforms or [])[:1]]
    if ways != [cut[0].dest]:
        raise StorageError(
            f"the stream {STREAM} is cut in another way ({', '.join(ways)}), not into {partitions} partitions. "
            "Several lakes on one bus have the same number of partitions."
        )
    try:
        await js.key_value(BUCKET)
    except (NotFoundError, BucketNotFoundError):
        config = api.KeyValueConfig(
            bucket=BUCKET,
            description="Which processor owns which part of the streams",
            ttl=TTL_SECONDS,
            max_bytes=16 * 2**20,
            storage=api.StorageType.FILE,
            replicas=telemetry.num_replicas or 1,
        )
        try:
            await js.create_key_value(config)
        except BadRequestError as error:
            if error.err_code != _NAME_IN_USE:
                raise


class _Owned(Struct):
    revision: int
    renewed: float
    task: asyncio.Task[None]


class Claims:
    """Claims parts of one history for this processor: takes, renews and releases them.

    Args:
        nc: connection to the bus.
        history: id of the history.
        owner: id of this process.
        parts: all there are.
        work: processes a part while it is owned; it ends only if it is cancelled, or if the part is lost.
    """

    def __init__(
        self, nc: Client, history: str, owner: str, parts: list[str], work: Callable[[str], Awaitable[None]]
    ) -> None:
        self._js = nc.jetstream(timeout=2)
        self._owner = owner
        self._value = owner.encode()
        self._keys = {part: f"{history}.part.{part.replace('/', '-')}" for part in parts}
        self._members = f"{history}.member."
        self._work = work
        self._owned: dict[str, _Owned] = {}
        self._bucket: KeyValue | None = None
        self._ttl = TTL_SECONDS

    @property
    def owned(self) -> list[str]:
        """Parts that are owned now."""
        return sorted(self._owned)

    async def run(self) -> None:
        """Take, renew and release parts until cancelled; then release all of them."""
        try:
            while True:
                heed_cancellation()
                began = time.monotonic()
                try:
                    await self._round()
                except (NatsError, APIError, TimeoutError, OSError) as error:
                    log.warning("the owners of the parts can't be read: %s", error or type(error))
                await self._stop_stale()
                await asyncio.sleep(max(0.1, self._ttl / 5 - (time.monotonic() - began)))
        finally:
            await self._leave()

    async def _round(self) -> None:
        if self._bucket is None:
            self._bucket = await self._js.key_value(BUCKET)
            self._ttl = (await self._bucket.status()).ttl or TTL_SECONDS
        bucket = self._bucket
        await bucket.put(self._members + self._owner, self._value)
        for part, owned in list(self._owned.items()):
            if owned.task.done():
                await self._release(part)
                continue
            try:
                owned.revision = await bucket.update(self._keys[part], self._value, last=owned.revision)
                owned.renewed = time.monotonic()
            except KeyWrongLastSequenceError:
                log.warning("%s was taken by another processor", part)
                await self._stop(part)
        try:
            keys = set(await bucket.keys())
        except NoKeysError:
            return
        members = max(1, sum(key.startswith(self._members) for key in keys))
        fair = math.ceil(len(self._keys) / members)
        for part in self.owned[fair:]:
            await self._release(part)
        free = [part for part, key in self._keys.items() if key not in keys]
        # In random order: two processors that start together would else race for each part.
        random.shuffle(free)
        for part in free[: max(0, fair - len(self._owned))]:
            try:
                revision = await bucket.create(self._keys[part], self._value)
            except KeyWrongLastSequenceError:
                continue
            log.info("owns %s", part)
            task = asyncio.create_task(self._guarded(part))
            self._owned[part] = _Owned(revision, time.monotonic(), task)

    async def _guarded(self, part: str) -> None:
        try:
            await self._work(part)
        except asyncio.CancelledError:
            raise
        except Exception:
            # The next round releases it, so that another processor can take it.
            log.exception("%s failed, and is released", part)

    async def _stop_stale(self) -> None:
        """Stop work on parts that could not be renewed in time: another processor may own them by now."""
        for part, owned in list(self._owned.items()):
            if time.monotonic() - owned.renewed > self._ttl:
                log.warning("%s could not be renewed, and is released", part)
                await self._stop(part)

    async def _stop(self, part: str) -> _Owned | None:
        owned = self._owned.pop(part, None)
        if owned is not None:
            await cancel_all([owned.task])
        return owned

    async def _release(self, part: str) -> None:
        owned = await self._stop(part)
        if owned is not None and self._bucket is not None:
            log.info("releases %s", part)
            try:
                await self._bucket.delete(self._keys[part], last=owned.revision)
            except (NatsError, APIError, TimeoutError) as error:
                log.debug("%s is released when its key expires: %s", part, error)

    async def _leave(self) -> None:
        for part in self.owned:
            await self._release(part)
        if self._bucket is not None:
            try:
                await self._bucket.delete(self._members + self._owner)
            except (NatsError, APIError, TimeoutError, OSError) as error:
                log.debug("this processor's key expires by itself: %s", error)
