"""Create the streams and buckets that `schemas/subjects.py` declares. Existing ones keep an operator's limits."""

from __future__ import annotations

import asyncio
import os
from typing import Any, Final

from nats.errors import Error as NatsError
from nats.js import JetStreamContext, api
from nats.js.errors import APIError, BadRequestError, BucketNotFoundError, NotFoundError

from ..schemas.subjects import BUCKETS, DUPLICATES_SECONDS, STREAMS, Bucket, Stream
from .connect import WrongSetting, log
from .permissions import NotAllowed, request
from .tasks import heed_cancellation

REPLICAS_VARIABLE: Final = "CORRAL_REPLICAS"
SCALE_VARIABLE: Final = "CORRAL_STREAMS_SCALE"
CLUSTER_REPLICAS: Final = 3
"""Replicas of streams and buckets in a cluster: one server may be lost without loss of data."""
_INFO_SECONDS: Final = 5.0


def stream_config(stream: Stream, replicas: int = 1) -> api.StreamConfig:
    """Convert a stream's declaration to the server's configuration."""
    return api.StreamConfig(
        name=stream.name,
        description=stream.description,
        subjects=list(stream.subjects),
        retention=api.RetentionPolicy.LIMITS,
        discard=api.DiscardPolicy.OLD,
        storage=api.StorageType.FILE,
        max_age=stream.max_age_seconds,
        max_bytes=stream.max_bytes,
        max_msg_size=stream.max_message_bytes,
        max_msgs_per_subject=stream.max_messages_per_subject,
        duplicate_window=stream.duplicate_window_seconds,
        num_replicas=replicas,
        allow_direct=True,
    )


def bucket_config(bucket: Bucket, replicas: int = 1) -> api.StreamConfig:
    """Convert a bucket's declaration to the server's configuration.

    It is what nats-py's `create_key_value` makes, except that rollup headers are allowed only if `bucket.rollup` says
    so.
    """
    ttl_seconds = bucket.ttl_seconds or None
    return api.StreamConfig(
        name=f"KV_{bucket.name}",
        description=bucket.description,
        subjects=[f"$KV.{bucket.name}.>"],
        retention=api.RetentionPolicy.LIMITS,
        discard=api.DiscardPolicy.NEW,
        storage=api.StorageType.FILE,
        max_age=ttl_seconds,
        max_bytes=bucket.max_bytes,
        max_msg_size=-1,
        max_msgs=-1,
        max_msgs_per_subject=bucket.history,
        max_consumers=-1,
        duplicate_window=min(DUPLICATES_SECONDS, ttl_seconds or DUPLICATES_SECONDS),
        num_replicas=replicas,
        allow_direct=True,
        allow_rollup_hdrs=bucket.rollup,
        allow_msg_ttl=True,
        deny_delete=True,
    )


def default_replicas(js: JetStreamContext) -> int:
    """Number of replicas of a new stream: `CORRAL_REPLICAS`; without it 3 if the server is in a cluster, else 1.

    Raises:
        WrongSetting: `CORRAL_REPLICAS` is not 1, 3 or 5. The server takes 2 and 4, too, but a stream needs a majority
            of its replicas, so that the second or fourth adds another server whose loss counts, and no safety.
    """
    given = os.environ.get(REPLICAS_VARIABLE, "").strip()
    if given:
        if given not in {"1", "3", "5"}:
            raise WrongSetting(
                f"{REPLICAS_VARIABLE}={given!r} is not possible: write 1, 3 or 5, since streams need a majority"
            )
        return int(given)
    server: dict[str, Any] = js._nc._server_info  # pyright: ignore[reportPrivateUsage]  # there is no other way to it
    return CLUSTER_REPLICAS if server.get("cluster") else 1


def default_scale() -> float:
    """Factor on the bytes of new streams and buckets: `CORRAL_STREAMS_SCALE`, 1 without it.

    Raises:
        WrongSetting: it is no number from 0.01 to 10,000.
    """
    given = os.environ.get(SCALE_VARIABLE, "").strip()
    try:
        scale = float(given or 1)
    except ValueError:
        scale = 0.0
    if not 0.01 <= scale <= 10_000:
        raise WrongSetting(f"{SCALE_VARIABLE}={given!r} is not possible: write a factor from 0.01 to 10000, such as 4")
    return scale


async def ensure_layout(
    js: JetStreamContext, *, replicas: int | None = None, max_bytes_scale: float | None = None
) -> None:
    """Create the streams and buckets that are missing; existing ones are not changed.

    Args:
        js: of a connection that may manage streams.
        replicas: replicas of each stream, 1, 3 or 5; None for `default_replicas`.
        max_bytes_scale: factor on every byte limit; None for `default_scale`.
    """
    if replicas is None:
        replicas = default_replicas(js)
    if max_bytes_scale is None:
        max_bytes_scale = default_scale()
    for stream in STREAMS:
        if stream.optional and not await is_permitted(js, stream.name):
            continue
        config = stream_config(stream, replicas)
        config.max_bytes = int(stream.max_bytes * max_bytes_scale)
        try:
            await js.stream_info(stream.name)
        except NotFoundError:
            await _create(js.add_stream(config), stream.name)
    for bucket in BUCKETS:
        try:
            await js.key_value(bucket.name)
        except (NotFoundError, BucketNotFoundError):
            config = bucket_config(bucket, replicas)
            config.max_bytes = int(bucket.max_bytes * max_bytes_scale)
            await _create(js.add_stream(config), bucket.name)


async def is_permitted(js: JetStreamContext, stream: str) -> bool:
    """False if the server does not let this connection ask for a stream: its configuration is of an earlier version."""
    client = js._nc  # pyright: ignore[reportPrivateUsage]  # there is no other way to it
    try:
        await request(client, f"$JS.API.STREAM.INFO.{stream}", timeout=_INFO_SECONDS)
    except NotAllowed as refused:
        log.warning("%s: `corral auth apply` makes a configuration with the stream %s", refused, stream)
        return False
    return True


async def until_laid_out(js: JetStreamContext) -> None:
    """Repeat `ensure_layout` until it succeeds.

    It waits for a server that is starting or failing, and for a cluster that is not complete yet.
    """
    logged = ""
    while True:
        heed_cancellation()
        try:
            await ensure_layout(js)
        except (NatsError, OSError, TimeoutError) as error:
            why = str(error) or type(error).__name__
            if isinstance(error, APIError) and error.err_code in _TOO_FEW_SERVERS:
                why = (
                    f"the cluster has too few servers for {default_replicas(js)} copies "
                    f"(set {REPLICAS_VARIABLE}=1 for one copy)"
                )
            if why != logged:
                log.warning("streams can't be created yet, retrying: %s", why)
                logged = why
            await asyncio.sleep(0.5)
        else:
            return


_TOO_FEW_SERVERS: Final = frozenset({10005, 10074})
"""Error codes: no suitable peers for placement; more than one replica on a server outside of a cluster."""


async def _create(creation: Any, name: str) -> None:
    """Create a stream; it is no error if another service has created it at the same time."""
    try:
        await creation
    except BadRequestError as error:
        if error.err_code != 10058:  # stream name already in use
            raise
        log.debug("%s was created by another service meanwhile", name)
