"""The bus: every subject, stream and bucket, named and bounded in one place, and how to reach it.

Subjects carry the version of the schema, the kind and the host, so that a server can tell by the subject alone who may
publish what. Streams are declared as data (`STREAMS`, `BUCKETS`) and made by `ensure_layout`, which any part may call
at any time: it creates what is missing and widens nothing that an operator has narrowed.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import re
import ssl
from typing import Any, Final

from msgspec import Struct
from nats.aio.client import Client
from nats.errors import AuthorizationError
from nats.errors import Error as NatsError
from nats.js import JetStreamContext, api
from nats.js.errors import APIError, BadRequestError, BucketNotFoundError, NotFoundError

from . import credentials as who
from . import permitted, websockets
from .connection import Connection
from .credentials import CREDENTIALS_VARIABLE

log = logging.getLogger("corral.bus")

DEFAULT_URL: Final = "nats://127.0.0.1:4222"
URL_VARIABLE: Final = "CORRAL_NATS_URL"
REPLICAS_VARIABLE: Final = "CORRAL_REPLICAS"
SCALE_VARIABLE: Final = "CORRAL_STREAMS_SCALE"
CLUSTER_REPLICAS: Final = 3
"""Copies of streams and buckets on servers that form a cluster: one server may be lost, and nothing with it."""

PREFIX: Final = "corral.v1"

# Telemetry: collector → stream. The last token is the host.
SAMPLES: Final = f"{PREFIX}.samples"
PROCESSES: Final = f"{PREFIX}.processes"
AGENTS: Final = f"{PREFIX}.agents"
# Facts: seldom and kept longer.
INVENTORY: Final = f"{PREFIX}.inventory"
EVENTS: Final = f"{PREFIX}.events"
LEASE_EVENTS: Final = f"{PREFIX}.leases"
"""`corral.v1.leases.<kind>.<lease id>`, published by the planner."""
DEAD_LETTERS: Final = f"{PREFIX}.dead"
"""`corral.v1.dead.<code>`, published by processors."""

# Services: request/reply. The planner is the micro service `corral-planner`, the processor `corral-history`.
PLAN: Final = f"{PREFIX}.plan"
QUERY: Final = f"{PREFIX}.query"
"""Also `corral.v1.query.<user>`, which makes the asker certain where the server checks it; so with copies below."""
QUERY_CANCEL: Final = f"{PREFIX}.history.cancel"
SNAPSHOT: Final = f"{PREFIX}.history.snapshot"
SNAPSHOT_READ: Final = f"{PREFIX}.history.read"
HISTORY_STATUS: Final = f"{PREFIX}.history.status"
QUERY_ACK: Final = f"{PREFIX}.history.ack"
"""`corral.v1.history.ack.<processor>.<query>`: parts of an answer are acknowledged here (`QueryRequest.window`)."""
HEALTH: Final = f"{PREFIX}.health"
"""Any service on itself: also `….<service>` and `….<service>.<instance>`; see `schemas/health.py`."""
PLANNER_SERVICE: Final = "corral-planner"
HISTORY_SERVICE: Final = "corral-history"


class PlanSubject:
    """Where the planner listens. `request`, `withdraw`, `renew` and `release` also listen on `<subject>.<owner>`: a
    server that lets a client publish only under its own name makes the owner certain, and a body that names another is
    refused. `explain` also listens on `<subject>.<user>`, and counts by that."""

    REQUEST: Final = f"{PLAN}.request"
    EXPLAIN: Final = f"{PLAN}.explain"
    WITHDRAW: Final = f"{PLAN}.withdraw"
    RENEW: Final = f"{PLAN}.renew"
    RELEASE: Final = f"{PLAN}.release"
    LEASES: Final = f"{PLAN}.leases"
    DEVICES: Final = f"{PLAN}.devices"
    FLEET: Final = f"{PLAN}.fleet"
    QUEUE: Final = f"{PLAN}.queue"
    DRAIN: Final = f"{PLAN}.drain"
    EVICT: Final = f"{PLAN}.evict"


def unnamed(subject: str) -> str:
    """Where a question comes in that was asked from another account without a name at the end of its subject.

    The server renames it on its way: the service that gets it there does nothing but say which name is missing, and
    one that does not know of this gets nothing.
    """
    if subject.startswith(f"{PLAN}."):
        return f"{PLAN}.unnamed.{subject.removeprefix(PLAN + '.')}"
    return f"{PREFIX}.history.unnamed.{subject.rpartition('.')[2]}"


TELEMETRY_STREAM: Final = "CORRAL_TELEMETRY"
INVENTORY_STREAM: Final = "CORRAL_INVENTORY"
FACTS_STREAM: Final = "CORRAL_FACTS"
DEAD_STREAM: Final = "CORRAL_DEAD"

PLANNER_BUCKET: Final = "corral_planner"
"""The planner's durable state: leader, leases, answers, drains. One bucket, so that one revision can fence them all."""
HOSTS_BUCKET: Final = "corral_hosts"
"""Which agent speaks for a host; an entry that its agent does not renew goes away."""

_GIB: Final = 2**30
_DAY: Final = 86400.0
_DUPLICATES_SECONDS: Final = 120.0


class Stream(Struct, frozen=True, kw_only=True):
    """A stream with its limits: whichever is reached first drops the oldest messages.

    Attributes:
        name: of the stream.
        subjects: that it stores.
        max_age_seconds: older messages go.
        max_bytes: on disk, per replica.
        duplicate_window_seconds: a message id that comes again within it is stored once.
        max_message_bytes: larger messages are refused.
        max_messages_per_subject: older messages of the same subject go; -1 keeps them.
        description: for people.
    """

    name: str
    subjects: tuple[str, ...]
    max_age_seconds: float
    max_bytes: int
    description: str
    duplicate_window_seconds: float = 120.0
    max_message_bytes: int = -1
    max_messages_per_subject: int = -1


class Bucket(Struct, frozen=True, kw_only=True):
    """A key-value bucket with its limits.

    Attributes:
        name: of the bucket.
        max_bytes: on disk, per replica.
        description: for people.
        ttl_seconds: entries that are not written again go away after it; 0 keeps them.
        history: values kept per key.
        rollup: a write may purge other entries with it, which the server does for any key of the bucket.
    """

    name: str
    max_bytes: int
    description: str
    ttl_seconds: float = 0.0
    history: int = 1
    rollup: bool = True


STREAMS: Final = (
    Stream(
        name=TELEMETRY_STREAM,
        subjects=(f"{SAMPLES}.*", f"{PROCESSES}.*", f"{AGENTS}.*"),
        max_age_seconds=_DAY,
        max_bytes=2 * _GIB,
        description="Samples, processes and agent reports on their way to the history",
    ),
    Stream(
        name=FACTS_STREAM,
        subjects=(f"{EVENTS}.*", f"{LEASE_EVENTS}.>"),
        max_age_seconds=30 * _DAY,
        max_bytes=_GIB // 2,
        description="Device events and lease events",
    ),
    # Each host says every minute what it has: of that, the last few are news to anyone.
    Stream(
        name=INVENTORY_STREAM,
        subjects=(f"{INVENTORY}.*",),
        max_age_seconds=30 * _DAY,
        max_bytes=_GIB // 4,
        max_messages_per_subject=8,
        description="What each host has",
    ),
    Stream(
        name=DEAD_STREAM,
        subjects=(f"{DEAD_LETTERS}.*",),
        max_age_seconds=7 * _DAY,
        max_bytes=_GIB // 8,
        description="Messages that could not be stored, with the reason",
    ),
)

BUCKETS: Final = (
    Bucket(name=PLANNER_BUCKET, max_bytes=_GIB // 2, description="Leader, leases, answers and drains of the planner"),
    # Each host writes its own entry, and shall not purge another's.
    Bucket(
        name=HOSTS_BUCKET,
        max_bytes=_GIB // 64,
        ttl_seconds=15.0,
        description="Which agent speaks for a host",
        rollup=False,
    ),
)

_HOST_UNSAFE: Final = re.compile(r"[^A-Za-z0-9_-]+")


def person_token(name: str) -> str:
    """A person's name as one token of a subject; each name has another."""
    return re.sub(r"[^A-Za-z0-9_-]", lambda found: "".join(f"={byte:02x}" for byte in found[0].encode()), name) or "="


def host_token(name: str) -> str:
    """A host name as a subject token: dots, wildcards, spaces and the like become `-`.

    Raises:
        ValueError: nothing is left of it.
    """
    token = _HOST_UNSAFE.sub("-", name.strip()).strip("-")[:128].rstrip("-")
    if not token:
        raise ValueError(f"{name!r} is no host name: it needs at least one letter or digit")
    return token


def samples_subject(host: str) -> str:
    """Where a host's samples go."""
    return f"{SAMPLES}.{host}"


def processes_subject(host: str) -> str:
    """Where a host's processes go."""
    return f"{PROCESSES}.{host}"


def agent_subject(host: str) -> str:
    """Where a collector's reports on itself go."""
    return f"{AGENTS}.{host}"


def inventory_subject(host: str) -> str:
    """Where a host's inventory goes."""
    return f"{INVENTORY}.{host}"


def events_subject(host: str) -> str:
    """Where a host's events go."""
    return f"{EVENTS}.{host}"


def lease_subject(kind: str, lease_id: str) -> str:
    """Where a lease event goes."""
    return f"{LEASE_EVENTS}.{kind}.{lease_id}"


class WrongSetting(ValueError):
    """A variable of the environment says something that is not possible; the message says what is."""


class BusUnavailable(ConnectionError):
    """No server answered."""


class BusClosed(BusUnavailable):
    """The server has closed a connection for good: what lives by it ends, and is started anew by its supervisor."""


def heed_cancellation() -> None:
    """End this task where it was cancelled and an await has swallowed that: loops without an end ask each time round.

    nats-py catches cancellations while it flushes and closes, and its requests wait with `asyncio.wait_for`, which
    until Python 3.12 returns the result where that and the cancellation come at once (python/cpython#86296).

    Raises:
        asyncio.CancelledError: it was cancelled.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def connect(
    url: str | None = None,
    *,
    name: str = "corral",
    credentials: str | None = None,
    ca: str | None = None,
    certificate: str | None = None,
    key: str | None = None,
    inbox_prefix: str | None = None,
    wait_seconds: float | None = 5.0,
    closed: asyncio.Event | None = None,
    **options: Any,
) -> Client:
    """Connect and keep reconnecting for ever.

    A server that refuses a client rather than goes away (its key was revoked, say) closes the connection for good;
    nothing can be done over it any more.

    Args:
        url: one server or several by comma; `CORRAL_NATS_URL`, then the local default.
        name: shown in the server's connection list.
        credentials: path of a credentials file; `CORRAL_NATS_CREDS` by default. What it says of its holder fills in
            the rest.
        ca: path of the certificate that the server's must be signed by; `CORRAL_NATS_CA` by default. With it, a
            server without TLS is not spoken to.
        certificate: path of one's own, where the server wants to see it; `CORRAL_NATS_CERT` by default.
        key: path of the certificate's key; `CORRAL_NATS_KEY` by default.
        inbox_prefix: of the subjects that answers come to; `CORRAL_INBOX_PREFIX` by default.
        wait_seconds: give up after so long where no server answers at the start; None tries for ever.
        closed: set once the connection is closed for good, by either side.
        options: further ones of `nats.connect`.

    Raises:
        BusUnavailable: no server answered in time, or it refuses the credentials; the message says what to do.
    """
    servers = [part.strip() for part in (url or os.environ.get(URL_VARIABLE) or DEFAULT_URL).split(",") if part.strip()]
    if websockets.wanted(servers):
        try:
            websockets.bring_in()
        except ImportError:
            raise BusUnavailable("a WebSocket to the bus needs aiohttp: pip install aiohttp") from None
    try:
        identity = who.identify(credentials, ca=ca, certificate=certificate, key=key, inbox=inbox_prefix)
        proofs = who.options(identity)
    except who.CredentialsError as error:
        raise BusUnavailable(str(error)) from None
    settings: dict[str, Any] = {
        "name": name,
        "connect_timeout": 2,
        "max_reconnect_attempts": -1,
        "reconnect_time_wait": 0.5,
        # A server that vanished without a word is noticed after 15 s at most.
        "ping_interval": 5,
        "max_outstanding_pings": 2,
        "error_cb": _log_error,
        **proofs,
        **options,
    }
    if closed is not None:
        settings["closed_cb"] = functools.partial(_set, closed)
    report = settings["error_cb"]
    loop = asyncio.get_running_loop()
    deadline = None if wait_seconds is None else loop.time() + wait_seconds
    last: list[Exception] = []
    connected = False
    client = Client()

    refused: list[float] = []

    async def remember(error: Exception) -> None:
        last[:] = [error]
        if connected and closed is not None and _refusal(error, identity):
            # It may be that keys are being changed just now: one refusal is none.
            refused[:] = [at for at in refused if loop.time() - at < 2 * REFUSED_SECONDS] + [loop.time()]
            if refused[-1] - refused[0] > REFUSED_SECONDS:
                closed.set()
        permitted.refused(client, error)
        await report(error)
        if not connected:
            heed_cancellation()
        if not connected and deadline is not None and (_refusal(error, identity) or loop.time() >= deadline):
            raise error

    settings["error_cb"] = remember
    pause = 0.1
    while True:
        try:
            # A client that reconnects for ever also tries its first connection for ever; one attempt is always whole.
            attempt = None if deadline is None else max(deadline, loop.time() + settings["connect_timeout"])
            async with asyncio.timeout_at(attempt):
                client = who.TlsClient() if identity.ca else Connection()
                permitted.admit(client, identity)
                await client.connect(servers, **settings)
            connected = True
            try:
                heed_cancellation()
            except asyncio.CancelledError:
                await client.close()
                raise
            return client
        except asyncio.CancelledError:
            raise
        except Exception as error:  # nats-py raises many kinds, and some as bare OSError
            why = last[-1] if last else error
            if deadline is not None and (refusal := _refusal(why, identity)):
                raise BusUnavailable(f"the NATS server at {', '.join(servers)} {refusal}") from error
            if deadline is not None and loop.time() + pause > deadline:
                raise BusUnavailable(
                    f"no NATS server answers at {', '.join(servers)} ({type(why).__name__}: {why}). "
                    f"Start one with `corral up`, or name yours with --nats or {URL_VARIABLE}."
                ) from error
        await asyncio.sleep(pause)
        pause = min(pause * 2, 2.0)


REFUSED_SECONDS: Final = 3.0
"""A client that is turned away for so long, over a connection that it had, is so for good."""


def first_of(group: BaseExceptionGroup[Any]) -> BaseException:
    """The first error in a group of groups."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]  # pyright: ignore[reportUnknownVariableType]
    return error


async def until_closed(nc: Client, closed: asyncio.Event) -> None:
    """Wait for the end of a connection that was made with `closed`.

    Raises:
        BusClosed: it has come.
    """
    await closed.wait()
    why = f" ({nc.last_error})" if nc.last_error else ""
    raise BusClosed(f"the NATS server has closed the connection for good{why}: it ends here, to be started anew")


async def _set(event: asyncio.Event) -> None:
    event.set()


def _refusal(error: Exception, identity: who.Identity) -> str:
    """What to say of a server that answers, and will not have this client however often it asks; else nothing."""
    if "authorization violation" in str(error).lower() or isinstance(error, AuthorizationError):
        refused = f"does not take the credentials in {identity.file}" if identity.file else "wants credentials"
        return (
            f"{refused}: `corral auth add` makes them; name them with `corral context add`, --creds or "
            f"{CREDENTIALS_VARIABLE}"
        )
    if isinstance(error, ssl.SSLError):
        return (
            f"and this client do not trust each other ({error.reason or error}): keep ca.crt beside the credentials, "
            f"or name the CA's certificate in {who.CA_VARIABLE}"
        )
    return ""


async def _log_error(error: Exception) -> None:
    log.warning("bus: %s: %s", type(error).__name__, error)


def stream_config(stream: Stream, replicas: int = 1) -> api.StreamConfig:
    """The server's form of a stream."""
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
    """The server's form of a bucket: as `create_key_value` of nats-py makes it, which allows rollups in each."""
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
        duplicate_window=min(_DUPLICATES_SECONDS, ttl_seconds or _DUPLICATES_SECONDS),
        num_replicas=replicas,
        allow_direct=True,
        allow_rollup_hdrs=bucket.rollup,
        allow_msg_ttl=True,
        deny_delete=True,
    )


def default_replicas(js: JetStreamContext) -> int:
    """Copies of a new stream: `CORRAL_REPLICAS`; without it 3 where the server belongs to a cluster, else 1.

    Raises:
        WrongSetting: `CORRAL_REPLICAS` is no number from 1 to 5.
    """
    given = os.environ.get(REPLICAS_VARIABLE, "").strip()
    if given:
        if given not in {"1", "2", "3", "4", "5"}:
            raise WrongSetting(f"{REPLICAS_VARIABLE}={given!r} is not possible: write 1, 3 or 5")
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
    """Create the streams and buckets that are missing; leave alone those that are there.

    Args:
        js: of a connection that may manage streams.
        replicas: copies of each stream, 1, 3 or 5; None as `default_replicas` says.
        max_bytes_scale: factor on every byte limit; None as `default_scale` says.
    """
    if replicas is None:
        replicas = default_replicas(js)
    if max_bytes_scale is None:
        max_bytes_scale = default_scale()
    for stream in STREAMS:
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


async def until_laid_out(js: JetStreamContext) -> None:
    """`ensure_layout`, again and again: a server that starts or dies just then, or a cluster that is not whole yet, is
    waited for."""
    told = ""
    while True:
        heed_cancellation()
        try:
            await ensure_layout(js)
        except (NatsError, OSError, TimeoutError) as error:
            why = str(error) or type(error).__name__
            if isinstance(error, APIError) and error.err_code in _TOO_FEW_SERVERS:
                why = (
                    f"the cluster has too few servers for {default_replicas(js)} copies "
                    f"(set {REPLICAS_VARIABLE}=1 where it is not to have more)"
                )
            if why != told:
                log.warning("the streams can't be made yet, and are tried again: %s", why)
                told = why
            await asyncio.sleep(0.5)
        else:
            return


_TOO_FEW_SERVERS: Final = frozenset({10005, 10074})
"""No suitable peers for placement; replicas of more than one on a server that is alone."""


async def _create(creation: Any, name: str) -> None:
    """Two parts may start at once: whoever comes second finds the stream there."""
    try:
        await creation
    except BadRequestError as error:
        if error.err_code != 10058:  # stream name already in use
            raise
        log.debug("%s was created by another part meanwhile", name)
