"""The planner's bucket: all durable state, with each write fenced by the leader's term.

The bucket `corral_planner` is one stream, so one revision can fence all of it. A term is the revision of the key
`leader`, which is written once when a planner becomes leader and never again while it leads. Every other write names
it (`Nats-Expected-Last-Subject-Sequence` for the subject of `leader`). Once another planner has written that key, the
server refuses the write, under the stream's lock: the writes of a deposed leader have no effect.

Writes are pipelined: each is a message with an acknowledgement, and many are in flight at a time. On a stream with
replicas one group follows the other: there the server has only one write in flight to the replicas that names a
subject, and turns others away undecided. Writes that wait meanwhile become the next group: an atomic batch with one
fence and one acknowledgement (NATS ADR-50, servers from 2.12; with older ones each write is a group). A batch that is
refused for another reason than the fence is split, so that each write gets an outcome of its own.

A write without an acknowledgement (the server was killed, for instance) is sent again until its outcome is certain;
the server deduplicates it by message id. One that no server would take, such as a message that is too large, fails at
once.

A write is acknowledged when the server has handed it to the operating system: it survives the end of any process, also
by `kill -9`. For power loss see `sync_interval` of the server (2 minutes by default; `always` syncs each write), or use
three replicas.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final, TypeVar

import msgspec
from msgspec import Struct
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import BadHeaderError, BadSubjectError, MaxPayloadError
from nats.errors import Error as NatsError
from nats.js import api
from nats.js.errors import APIError, NotFoundError

from ...bus.connect import BusUnavailable
from ...bus.connection import Connection
from ...bus.permissions import request
from ...bus.stream_reader import read
from ...bus.tasks import BackgroundTasks
from ...schemas import codec, subjects
from ...schemas.instruments import SECONDS, SIZES, Histogram
from .bucket import BUCKET, FULL_PART, RECORD_PART, correct_settings

T = TypeVar("T")

log = logging.getLogger("corral.planner.store")

LEADER: Final = "leader"
HEARTBEAT: Final = "heartbeat"
WATERMARK: Final = "told"
"""Watermark: the revision up to which the events of all changes are on the facts stream."""
DRAINS: Final = "drains"
DRAIN_SPANS: Final = "drain_spans"
"""When the drains began, and ends whose events the stream may not have."""
GROUPS: Final = "groups"
WINDOWS: Final = "windows"
REPLACED: Final = "windows_replaced"
"""Devices that booked windows got in place of others."""
HEALTH: Final = "health"
SERVICE_TIME: Final = "service_time"
"""Service time, by which leases end (see `service_time.py`)."""
EVENT_KEY: Final = "event_key"
"""Key that makes the message ids of lease events (see `leases/events.py`)."""
DURATIONS: Final = "durations"
"""Digest of the durations of past leases, as the history gave it last."""
USAGE: Final = "usage"
"""Past use of owners, for fair share."""
LEASE_PREFIX: Final = "lease."
ANSWER_PREFIX: Final = "answer."

_STREAM: Final = f"KV_{subjects.PLANNER_BUCKET}"
_KEYS: Final = f"$KV.{subjects.PLANNER_BUCKET}."
_LEADER_SUBJECT: Final = f"{_KEYS}{LEADER}"
_EXPECTED: Final = "Nats-Expected-Last-Subject-Sequence"
_EXPECTED_SUBJECT: Final = "Nats-Expected-Last-Subject-Sequence-Subject"
_WRONG_SEQUENCE: Final = 10071
_UNDECIDED: Final = 10164
"""Error code: another write that names the same subject is in flight to the replicas, and nothing was compared."""
_FULL: Final = 10077
"""Error code: the bucket is full."""
_UNDECIDED_SECONDS: Final = 0.002
_DUPLICATE_IN_BATCH: Final = 10201
"""Error code: at least one write of a batch is stored already."""
_MAX_GROUP: Final = 250
"""Limit on the writes of a batch: a server takes 1,000, but acknowledges none before the last is stored."""
_GROUP_BYTES: Final = 4 * 2**20
_SUBJECT: Final = re.compile(r"[^\s.*>\x00-\x1f\x7f]+(\.[^\s.*>\x00-\x1f\x7f]+)*")
_CLAIM_TRIES: Final = 50
_ANOTHER_LEADS: Final = "another planner leads"
_RESEND_SECONDS: Final = 2.0
_PURGE_SECONDS: Final = 5.0
_SILENT_SECONDS: Final = 5.0
"""Time without an acknowledgement after which the connection may be dead, and is renewed."""
_DUPLICATE_WINDOW_SECONDS: Final = 60.0
"""Deduplication window of the server: far longer than a write may stay in flight."""


class Entry(Struct, frozen=True):
    """An entry of the bucket.

    Attributes:
        key: without the bucket's prefix.
        value: bytes.
        revision: sequence in the bucket's stream.
        stored_at: by the server's clock, in seconds since the epoch.
    """

    key: str
    value: bytes
    revision: int
    stored_at: float = 0.0


class Deposed(Exception):
    """Another planner leads: the write was refused."""


class WriteFailed(Exception):
    """The bucket refused a write, which had no effect."""


class _ApiError(Struct, frozen=True):
    code: int = 0
    err_code: int = 0
    description: str = ""


class _Ack(Struct, frozen=True):
    seq: int = 0
    error: _ApiError | None = None


_decode_ack: Final = msgspec.json.Decoder(_Ack).decode

Outcome = int | Deposed | WriteFailed
"""Outcome of a write: its revision, or the error."""


def unsendable(subject: str, value: bytes, headers: Mapping[str, str], max_bytes: int) -> str:
    """Reason why no server would ever take a message; empty if one would.

    Args:
        subject: of the message.
        value: body of the message.
        headers: of the message; a server counts them with the body, and closes the connection if that is too much.
        max_bytes: `max_payload` of the server.
    """
    if _SUBJECT.fullmatch(subject) is None:
        return f"{subject!r} is no name for an entry"
    # Most messages are far from the limit: 4 bytes a character are the most.
    characters = sum(map(len, headers)) + sum(map(len, headers.values()))
    if len(value) + 4 * (characters + len(headers) + 3) <= max_bytes:
        return ""
    # As on the wire: a first line, `name: value` a line, an empty line.
    lines = sum(len(name.encode()) + len(text.encode()) + 4 for name, text in headers.items())
    size = len(value) + len("NATS/1.0\r\n\r\n") + lines
    if size > max_bytes:
        return f"it takes {size} bytes, and the server lets {max_bytes} through (max_payload)"
    return ""


class Write:
    """A write of an entry. `async with` sends it, waits for its outcome, and gives the revision to the block.

    It is in flight until the block ends: what must follow a write, such as the event of a lease, belongs in the block,
    and `Store.known_revision` stays before it until then. A write that was sent takes effect, whatever happens to the
    task meanwhile: so a cancellation, or another error that interrupts it, is raised after the block.

    Raises:
        Deposed: another planner leads; the block is not entered.
        WriteFailed: the bucket refused it; the block is not entered.
    """

    __slots__ = (
        "_interrupted",
        "_store",
        "_waiter",
        "alone",
        "first",
        "followed",
        "headers",
        "known_revision",
        "number",
        "outcome",
        "requested_at",
        "resolved",
        "sent_at",
        "subject",
        "times",
        "value",
    )

    def __init__(self, store: Store, subject: str, value: bytes, headers: dict[str, str], first: bool) -> None:
        self.subject = subject
        self.value = value
        self.headers = headers
        self.first = first
        self.followed = True
        self.number = 0
        self.known_revision = 0
        self.outcome: Outcome | None = None
        self.resolved = False
        self.alone = False
        self.requested_at = 0.0
        self.sent_at = 0.0
        self.times = 0
        self._store = store
        self._waiter: asyncio.Future[None] | None = None
        self._interrupted: BaseException | None = None

    async def __aenter__(self) -> int:
        send = self._store.start(self)
        while self.outcome is None:
            try:
                await (self.wait() if self.number else send)
            except GeneratorExit:
                raise
            except BaseException as error:
                if not self.number:  # it was not sent
                    raise
                self._interrupted = error
        if isinstance(self.outcome, int):
            return self.outcome
        self._store.finish(self)
        raise self._interrupted or self.outcome

    async def __aexit__(self, *_: object) -> None:
        self._store.finish(self)
        if self._interrupted is not None:
            raise self._interrupted

    async def wait(self) -> Outcome:
        """Wait for the outcome."""
        if self.outcome is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        assert self.outcome is not None
        return self.outcome

    def complete(self, outcome: Outcome) -> None:
        """Set the outcome, and wake the task that waits for it."""
        self.outcome = outcome
        if not self.followed:
            self._store.finish(self)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Store:
    """Reads and writes the bucket over one connection.

    Args:
        nc: the connection; call `resend` after a reconnection.

    Attributes:
        write_seconds: time from asking for a write to its outcome.
        write_group: number of writes in flight when one is asked for, itself included.
        write_failures: number of writes that were refused.
        max_bytes: capacity of the bucket; 0 or less for no limit.
        used_bytes: size of the bucket, as measured last.
    """

    def __init__(self, nc: Client) -> None:
        self._nc = nc
        self._js = nc.jetstream()
        self._inbox = nc.new_inbox()
        self._cut = len(self._inbox) + 1
        self._pending: dict[int, Write] = {}
        self._count = 0
        self._newest = 0
        self._heard_at = 0.0
        self._subscription: Subscription | None = None
        self._loop = asyncio.get_running_loop()
        self._settled = asyncio.Event()
        self._settled.set()
        self._created_at: Any = None
        self._replicated = False
        self._max_group = 1
        self._waiting: deque[int] = deque()
        self._group: list[int] = []
        self._batches = 0
        self._abandoned = False
        self._resend_timer: asyncio.TimerHandle | None = None
        self._tasks = BackgroundTasks()
        self.write_seconds = Histogram(SECONDS)
        self.write_group = Histogram(SIZES)
        self.write_failures = 0
        self.max_bytes = 0
        self.used_bytes = 0

    @property
    def has_room(self) -> bool:
        """True if there is room for new entries, beside what is left free to change existing ones."""
        return self.max_bytes <= 0 or self.used_bytes < self.max_bytes * FULL_PART

    @property
    def max_record_bytes(self) -> int:
        """Size limit of a record in bytes, so that it can be written anew; `max_payload` of the server is another."""
        return 2**30 if self.max_bytes <= 0 else int(self.max_bytes * RECORD_PART)

    async def measure(self) -> None:
        """Measure the size of the bucket."""
        self.used_bytes = (await self._js.stream_info(_STREAM)).state.bytes

    async def purge(self, keys: str) -> None:
        """Delete the value of a key for good. It is not fenced: only for what no later leader may need.

        A value that was replaced comes back when the replacement is deleted or expires and the server is killed then:
        a server (as of 2.15) records the deletion of the last value alone. So this is for keys that are written once.

        Args:
            keys: a key, or keys by wildcard.

        Raises:
            permissions.NotAllowed: the server's configuration is of an earlier version.
            NatsError, TimeoutError: the server did not confirm it.
        """
        body = msgspec.json.encode({"filter": f"{_KEYS}{keys}"})
        answer = await request(self._nc, f"$JS.API.STREAM.PURGE.{_STREAM}", body, timeout=_PURGE_SECONDS)
        error = _decode_ack(answer.data).error
        if error is not None:
            raise NatsError(error.description)

    async def purge_answers(self) -> bool:
        """Delete all cached rejections, which works also in a full bucket that takes no more writes.

        Returns:
            True if that was done. Permissions of an earlier version do not let planners do it.
        """
        try:
            await self._js.purge_stream(_STREAM, subject=f"{_KEYS}{ANSWER_PREFIX}>")
        except (NatsError, TimeoutError) as error:
            log.warning("remembered refusals can't be deleted to make room: %r", error)
            return False
        return True

    @property
    def unanswered_seconds(self) -> float:
        """Seconds for which the oldest write has waited for its acknowledgement; 0 without any."""
        oldest = next((write for write in self._pending.values() if not write.resolved), None)
        return 0.0 if oldest is None else self._loop.time() - oldest.requested_at

    @property
    def in_flight(self) -> int:
        """Number of writes in flight, whose outcome is not handled yet."""
        return len(self._pending)

    @property
    def known_revision(self) -> int:
        """A revision up to which the outcome of every write of this planner is known and has been handled."""
        for write in self._pending.values():
            return write.known_revision
        return self._newest

    async def open(self) -> None:
        """Configure the bucket (per-message TTL, deduplication for a minute, and the rules of `bucket`), and open it.

        Raises:
            bus.BusUnavailable: the server is too old for that, or a setting is wrong and can't be changed.
        """
        info = await self._js.stream_info(_STREAM)
        self._created_at, config = info.created, info.config
        self._replicated = (config.num_replicas or 1) > 1
        changed = correct_settings(config, BUCKET)
        if (
            changed
            or not config.allow_msg_ttl
            or config.duplicate_window != _DUPLICATE_WINDOW_SECONDS
            or (self._replicated and not config.allow_atomic)
        ):
            config.allow_msg_ttl = True
            config.duplicate_window = _DUPLICATE_WINDOW_SECONDS
            config.allow_atomic = self._replicated or config.allow_atomic
            config = (await self._js.update_stream(config)).config
            if not config.allow_msg_ttl:
                raise BusUnavailable(
                    f"NATS server {self._nc.connected_server_version} keeps every lease for ever: the planner needs "
                    "2.11 or newer, where a message may have a time to live"
                )
            for sentence in changed:
                log.warning("%s", sentence)
        self.used_bytes = info.state.bytes
        self._max_group = _MAX_GROUP if config.allow_atomic else 1
        self.max_bytes = config.max_bytes or 0
        self._subscription = await self._nc.subscribe(f"{self._inbox}.*", cb=self._on_ack)

    async def exists(self) -> bool:
        """Check that the bucket is the one that was opened; False if it is gone, or was made anew."""
        try:
            return (await self._js.stream_info(_STREAM)).created == self._created_at
        except NotFoundError:
            return False

    async def close(self) -> None:
        """Stop listening for acknowledgements."""
        if self._subscription is not None and not self._nc.is_closed:
            await self._subscription.unsubscribe()

    def write(self, key: str, value: bytes, term: int, *, message_id: str = "", ttl_seconds: float = 0.0) -> Write:
        """A write of an entry, to be sent by `async with`.

        Args:
            key: of the entry.
            value: new value.
            term: revision of the leader's key; if that has another one, the outcome is `Deposed`.
            message_id: for deduplication by the server.
            ttl_seconds: time to live of the entry; 0 keeps it.
        """
        headers = {_EXPECTED: str(term), _EXPECTED_SUBJECT: _LEADER_SUBJECT}
        if message_id:
            headers["Nats-Msg-Id"] = message_id
        if ttl_seconds:
            headers["Nats-TTL"] = f"{max(1, round(ttl_seconds))}s"
        # The heartbeat goes first: a leader must not become uncertain because it has much to write.
        return Write(self, f"{_KEYS}{key}", value, headers, first=key == HEARTBEAT)

    async def put(self, key: str, value: bytes, term: int, *, message_id: str = "", ttl_seconds: float = 0.0) -> int:
        """Write an entry of which nothing follows, and return its revision. The arguments are those of `write`.

        Raises:
            Deposed: another planner leads.
            WriteFailed: the bucket refused it.
        """
        write = self.write(key, value, term, message_id=message_id, ttl_seconds=ttl_seconds)
        write.followed = False  # also if this is cancelled: it then goes on without a task
        await self.start(write)
        outcome = await write.wait()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def start(self, write: Write) -> None:
        """Send a write, or queue it behind the group that is in flight."""
        now = self._loop.time()
        if not self._pending:
            self._heard_at = now
        self._count += 1
        number = write.number = self._count
        if self._abandoned:
            write.resolved = True
            write.complete(Deposed(_ANOTHER_LEADS))
            return
        write.known_revision = self._newest
        write.requested_at = now
        self._pending[number] = write
        self._settled.clear()
        self.write_group.observe(len(self._pending))
        if not self._replicated:
            await self._send(number, write)
            return
        write.alone = bool(unsendable(write.subject, write.value, write.headers, self._nc.max_payload))
        self._waiting.insert(0 if write.first else len(self._waiting), number)
        if not self._group:
            await self._next_group()

    def finish(self, write: Write) -> None:
        """End a write, once all that follows from its outcome is done."""
        self._pending.pop(write.number, None)
        if not self._pending:
            self._settled.set()

    async def claim(self, value: bytes, revision: int) -> int | None:
        """Write the leader's key, if it still has the revision that was seen (0: none).

        Returns:
            The new term; None if another planner was faster, or if no try of 50 was decided.
        """
        purged = False
        for _ in range(_CLAIM_TRIES):
            try:
                ack = await self._js.publish(f"{_KEYS}{LEADER}", value, headers={_EXPECTED: str(revision)})
                return ack.seq
            except APIError as error:
                if error.err_code == _WRONG_SEQUENCE:
                    return None
                if error.err_code == _FULL and not purged:
                    purged = await self.purge_answers()
                elif error.err_code != _UNDECIDED:
                    raise
            await asyncio.sleep(_UNDECIDED_SECONDS)
        return None

    async def get(self, key: str) -> Entry | None:
        """Entry of a key, as the stream's leader has it; None if there is none."""
        try:
            found = await self._js.get_last_msg(_STREAM, f"{_KEYS}{key}", direct=False)
        except NotFoundError:
            return None
        return Entry(key, found.data or b"", found.seq or 0, found.time.timestamp() if found.time else 0.0)

    async def read_all(self, until: int) -> AsyncIterator[Entry]:
        """Read the latest entry of every key, up to and including a revision that is known to exist."""
        config = api.ConsumerConfig(deliver_policy=api.DeliverPolicy.LAST_PER_SUBJECT)
        async for stored in read(self._nc, _STREAM, f"{_KEYS}>", config, until):
            yield Entry(stored.subject[len(_KEYS) :], stored.data, stored.sequence, stored.stored_at)

    async def resend(self, older_than_seconds: float = 0.0) -> None:
        """Send unacknowledged writes again, oldest first: those sent at least so many seconds ago."""
        before = self._loop.time() - older_than_seconds
        if self._replicated:
            if self._group and self._pending[self._group[0]].sent_at <= before:
                await self._send_group()
            return
        for number in list(self._pending):
            write = self._pending.get(number)
            if write is not None and write.sent_at <= before and not write.resolved:
                await self._send(number, write)

    async def maintain(self) -> float:
        """Resend overdue writes, and renew a connection that seems dead; returns the seconds until the next time."""
        if self._pending and self._nc.is_connected:
            if self._loop.time() - self._heard_at > _SILENT_SECONDS and isinstance(self._nc, Connection):
                self._heard_at = self._loop.time()
                await self._nc.renew()
            await self.resend(_RESEND_SECONDS)
        return _RESEND_SECONDS / 4

    def abandon(self, *, for_good: bool = False) -> None:
        """Give up on the unacknowledged writes, since another planner leads: their outcome is `Deposed`.

        Args:
            for_good: further writes are not sent, with the same outcome: this planner ends.
        """
        self._abandoned = self._abandoned or for_good
        writes = [write for write in self._pending.values() if not write.resolved]
        self._pending.clear()
        self._waiting.clear()
        self._group.clear()
        self._settled.set()
        for write in writes:
            write.resolved = True
            write.complete(Deposed(_ANOTHER_LEADS))

    async def settled(self) -> None:
        """Wait until no write is in flight."""
        await self._settled.wait()

    async def _send(self, number: int, write: Write) -> None:
        why = await self._publish(write, f"{self._inbox}.{number}", write.headers)
        if why and write.times == 1:  # an earlier attempt may have been stored
            write.resolved = True
            log.error("write %s can't be sent: %s", write.subject, why)
            await self._resolve(number, write, WriteFailed(why))

    async def _resolve(self, number: int, write: Write, outcome: Outcome) -> None:
        if self._group == [number]:
            await self._next_group()
        self._complete(write, outcome)

    async def _publish(self, write: Write, reply: str, headers: dict[str, str]) -> str:
        """Publish a write; returns the reason if it can never be sent, and an empty text if it is or will be sent."""
        write.times += 1
        write.sent_at = self._loop.time()
        why = unsendable(write.subject, write.value, headers, self._nc.max_payload)
        if why:
            return why
        try:
            await self._nc.publish(write.subject, write.value, reply=reply, headers=headers)
        except (BadSubjectError, BadHeaderError, MaxPayloadError) as error:
            return repr(error)
        except Exception as error:  # the buffer is full while the server is away, say: `maintain` sends it again
            log.debug("write %s waits: %r", write.subject, error)
        return ""

    async def _next_group(self) -> None:
        """Send the next group: as many of the waiting writes as may go together."""
        size = 0
        self._group = []
        while self._waiting and len(self._group) < self._max_group:
            write = self._pending[self._waiting[0]]
            size += len(write.value)
            if self._group and (write.alone or size > _GROUP_BYTES):
                break
            self._group.append(self._waiting.popleft())
            if write.alone:
                break
        if self._group:
            await self._send_group()

    async def _send_group(self) -> None:
        writes = [self._pending[number] for number in self._group]
        if len(writes) == 1:
            await self._send(self._group[0], writes[0])
            return
        # Another id each time it is sent, to tell the acknowledgement of an earlier attempt apart.
        self._batches = number = self._batches + 1
        batch = f"{self._inbox[-22:]}.{number}"
        for place, write in enumerate(writes, start=1):
            headers = {**write.headers, "Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(place)}
            if place > 1:
                # Compared once, when the batch is committed, for all of it.
                del headers[_EXPECTED], headers[_EXPECTED_SUBJECT]
            last = place == len(writes)
            if last:
                headers["Nats-Batch-Commit"] = "1"
            if await self._publish(write, f"{self._inbox}.-{number}" if last else "", headers):
                # The batch is never committed, so none of it is stored: each write is sent alone, with its own outcome.
                await self._split_group(self._group, writes[:place])
                return

    async def _split_group(self, numbers: list[int], tried: list[Write]) -> None:
        """Split a group: send each write alone. The attempt of the `tried` has stored none, and does not count."""
        for write in tried:
            write.times -= 1
        for number in numbers:
            self._pending[number].alone = True
        self._waiting.extendleft(reversed(numbers))
        await self._next_group()

    async def _on_ack(self, message: Msg) -> None:
        self._heard_at = self._loop.time()
        number = int(message.subject[self._cut :])
        if number < 0:
            await self._on_batch_ack(-number, message)
            return
        write = self._pending.get(number)
        if write is None or write.resolved:
            return
        outcome = _outcome(message, write)
        if outcome is None:
            write.sent_at = 0.0  # no other acknowledgement will come: resend
            self._resend_soon(message)
            return
        write.resolved = True
        await self._resolve(number, write, outcome)

    async def _on_batch_ack(self, batch: int, message: Msg) -> None:
        """Handle the acknowledgement of a batch: all of it is stored, in consecutive revisions, or none of it."""
        if batch != self._batches or len(self._group) < 2:
            return
        numbers = list(self._group)
        writes = [self._pending[number] for number in numbers]
        ack = _decode_ack(message.data) if message.data else None
        if ack is None or (ack.error is not None and ack.error.err_code == _UNDECIDED):
            for write in writes:
                write.sent_at = 0.0
            self._resend_soon(message)
            return
        if ack.error is not None and ack.error.err_code != _WRONG_SEQUENCE:
            new = ack.error.err_code != _DUPLICATE_IN_BATCH
            await self._split_group(numbers, [write for write in writes if new and write.times == 1])
            return
        for write in writes:
            write.resolved = True
        await self._next_group()
        first = ack.seq - len(numbers) + 1
        for place, write in enumerate(writes):
            self._complete(write, first + place if ack.error is None else Deposed(ack.error.description))

    def _complete(self, write: Write, outcome: Outcome) -> None:
        self.write_seconds.observe(self._loop.time() - write.requested_at)
        self.write_failures += isinstance(outcome, WriteFailed)
        if isinstance(outcome, int) and outcome > self._newest:
            self._newest = outcome
        write.complete(outcome)

    def _resend_soon(self, message: Msg) -> None:
        """Schedule a resend of writes that the server turned away undecided."""
        if self._replicated and message.data and self._resend_timer is None:
            self._resend_timer = self._loop.call_later(_UNDECIDED_SECONDS, self._send_again)

    def _send_again(self) -> None:
        self._resend_timer = None
        self._tasks.start(self.resend())


def _outcome(message: Msg, write: Write) -> Outcome | None:
    """Outcome of a write by an acknowledgement; None if it is still open."""
    data = message.data
    if not data:  # no responders: the stream is not there just now
        return None
    ack = _decode_ack(data)
    error = ack.error
    if error is None:
        return ack.seq
    if error.err_code == _WRONG_SEQUENCE:
        return Deposed(error.description)
    if error.err_code == _UNDECIDED:
        return None
    if write.times > 1:
        # An earlier attempt may have been stored: this refusal does not tell.
        return None
    return WriteFailed(f"{error.description} ({error.err_code})")


def is_lease(key: str) -> bool:
    """True if a key is that of a lease."""
    return key.startswith(LEASE_PREFIX)


def answer_key(request_id: str) -> str:
    """Key of a cached rejection."""
    return f"{ANSWER_PREFIX}{request_id}"


def lease_key(lease_id: str) -> str:
    """Key of a lease."""
    return f"{LEASE_PREFIX}{lease_id}"


def decode_or_none(key: str, value: bytes, type: type[T]) -> T | None:
    """Decode an entry's value; None if it is empty (deleted), or, with an error in the log, if it can't be decoded."""
    if not value:
        return None
    try:
        return codec.decode(value, type, codec.JSON)
    except codec.DecodeError as error:
        log.error("the entry %s of the bucket can't be read and is left out: %s", key, error)
        return None
