"""The publisher: sends the outbox to the bus in order, with message ids, and with many messages in flight.

Each connection is used until it is lost, and is then discarded with all that it still had to send: a client that
reconnects by itself would flush what it had buffered before what was lost, and so break the order. Messages without an
acknowledgement are sent again first over the next connection, with the same ids; the stream stores an id once.

When the leader of a replicated stream fails, messages in flight are lost, but later ones over the same connection are
stored. So a message that a later one has passed is sent again at once. The numbers in flight of a run never span more
than the history's deduplication looks back (`MAX_OUT_OF_ORDER`), so that it can tell such a message from a duplicate.

A stream forgets an id after its duplicate window. A message that may have been sent before that is looked up first: the
id of the stream's last message on the same subject tells how far the run got.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, NamedTuple

import msgspec
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.errors import MaxPayloadError
from nats.js import JetStreamContext
from nats.js.errors import APIError, NotFoundError

from ...bus.connect import connect
from ...bus.health import LastSeen
from ...bus.layout import ensure_layout
from ...bus.permissions import may_make_streams
from ...bus.tasks import cancel_all, heed_cancellation
from ...schemas import codec, subjects
from ...schemas.limits import MAX_OUT_OF_ORDER
from .outbox import Entry, Outbox

log = logging.getLogger("corral.collector")

WINDOW_MESSAGES: Final = 512
WINDOW_BYTES: Final = 4 * 2**20
ACK_WAIT_SECONDS: Final = 5.0
DOUBT_SECONDS: Final = 60.0
"""Half of the streams' duplicate window: a message sent longer ago is looked up before it is sent again."""
CLOSE_SECONDS: Final = 1.0
"""Longest time to wait at the end for a server that may be gone or frozen."""
BACKOFF_SECONDS: Final = 0.25
BACKOFF_MAX_SECONDS: Final = 5.0

_STREAMS: Final = {
    subjects.SAMPLES: subjects.TELEMETRY_STREAM,
    subjects.PROCESSES: subjects.TELEMETRY_STREAM,
    subjects.AGENTS: subjects.TELEMETRY_STREAM,
    subjects.INVENTORY: subjects.INVENTORY_STREAM,
    subjects.EVENTS: subjects.FACTS_STREAM,
}
_MESSAGE_ID: Final = "Nats-Msg-Id"


class _AckError(msgspec.Struct):
    code: int = 0
    err_code: int = 0
    description: str = ""


class _Ack(msgspec.Struct):
    stream: str = ""
    seq: int = 0
    duplicate: bool = False
    error: _AckError | None = None


class _Sent(NamedTuple):
    """A message in flight: its id, the stream that stores it, and when it was sent."""

    message_id: str
    stream: str
    at: float


class Publisher:
    """Publishes the messages of an outbox for as long as it runs.

    Args:
        outbox: messages to send.
        url: URL of the bus.
        name: shown in the server's connection list.
        on_connected: awaited with each new connection before anything is published over it; may raise to end `run`.
        while_connected: each runs concurrently with the publishing while the connection lasts; may raise to end `run`.
        before_close: awaited for `CLOSE_SECONDS` at most, when `run` is cancelled while it is connected.

    Attributes:
        published_messages: messages acknowledged since the start.
        acknowledged: time since the last acknowledgement.
        connected: True while the bus takes messages.
        news: set when there are messages to send, or a refusal to handle.
        idle: set when everything is acknowledged, or the connection is lost.
    """

    def __init__(
        self,
        outbox: Outbox,
        url: str | None,
        *,
        name: str,
        on_connected: Callable[[Client], Awaitable[None]] | None = None,
        while_connected: Sequence[Callable[[Client], Awaitable[None]]] = (),
        before_close: Callable[[Client], Awaitable[None]] | None = None,
    ) -> None:
        self.outbox = outbox
        self.published_messages = 0
        self.acknowledged = LastSeen()
        self.connected = False
        self._url = url
        self._name = name
        self._on_connected = on_connected
        self._while_connected = while_connected
        self._before_close = before_close
        self._logged: set[str] = set()
        self.news = asyncio.Event()
        self.idle = asyncio.Event()
        self.decode_ack = msgspec.json.Decoder(_Ack).decode

    def wake(self) -> None:
        """Signal that the outbox has new messages."""
        self.idle.clear()
        self.news.set()

    async def drained(self, *, patient: bool = True) -> None:
        """Wait until the bus has acknowledged everything; if not patient, no longer than the connection lasts."""
        while len(self.outbox) and (patient or self.connected):
            await self.idle.wait()
            self.idle.clear()

    async def run(self) -> None:
        """Connect and publish, again after each loss of the connection, until cancelled."""
        failures = 0
        while True:
            heed_cancellation()
            lost = asyncio.Event()
            nc: Client | None = None
            try:
                nc = await self._connect(lost)
                if self._on_connected is not None:
                    await self._on_connected(nc)
                failures = 0
                await self._session(nc, lost)
                log.warning("lost the bus; messages are buffered")
            except asyncio.CancelledError:
                if nc is not None and nc.is_connected and self._before_close is not None:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(CLOSE_SECONDS):
                            await self._before_close(nc)
                raise
            except (OSError, NatsError, TimeoutError) as error:
                if failures == 0:
                    log.warning("the bus can't be used, messages are buffered: %s", error)
                failures += 1
            finally:
                self.connected = False
                self.idle.set()
                self.outbox.spill()
                if nc is not None:
                    await _discard(nc)
            # Full jitter, so that a fleet does not come back all at once.
            await asyncio.sleep(random.uniform(0, min(BACKOFF_SECONDS * 2**failures, BACKOFF_MAX_SECONDS)))

    async def _connect(self, lost: asyncio.Event) -> Client:
        async def on_lost() -> None:
            lost.set()

        async def tell(error: Exception) -> None:
            if not isinstance(error, OSError) and str(error) not in self._logged:
                self._logged.add(str(error))
                log.warning("bus: %s: %s", type(error).__name__, error)

        return await connect(
            self._url,
            name=self._name,
            wait_seconds=0,
            allow_reconnect=False,
            disconnected_cb=on_lost,
            closed_cb=on_lost,
            error_cb=tell,
        )

    async def _session(self, nc: Client, lost: asyncio.Event) -> None:
        """Publish over one connection until it is lost."""
        sender = _Session(self, nc)
        tasks: list[asyncio.Task[Any]] = [
            asyncio.create_task(sender.run(), name="publish"),
            asyncio.create_task(lost.wait(), name="lost"),
        ]
        tasks += [asyncio.create_task(_call(function, nc), name="session") for function in self._while_connected]
        try:
            self.connected = True
            self.outbox.unspill()
            self.news.set()
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await cancel_all(tasks)


class _Session:
    """Publishing over one connection."""

    def __init__(self, publisher: Publisher, nc: Client) -> None:
        self._publisher = publisher
        self._outbox = publisher.outbox
        self._nc = nc
        self._js: JetStreamContext = nc.jetstream()
        self._inbox = nc.new_inbox()
        self._refused: _AckError | None = None
        self._room = asyncio.Event()
        self._stored: dict[str, tuple[str, int]] = {}
        self._number = 0
        self._loop = asyncio.get_running_loop()
        # Messages in flight over this connection, oldest first, by the last token of their reply subject.
        self._sent: dict[str, _Sent] = {}
        self._last_ack = self._loop.time()

    async def run(self) -> None:
        subscription = await self._nc.subscribe(f"{self._inbox}.*", cb=self._on_ack, pending_msgs_limit=-1)
        failures = 0
        try:
            while True:
                heed_cancellation()
                self._publisher.news.clear()
                await self._send_all()
                if self._refused is not None:
                    failures += 1
                    await self._settle(failures)
                    continue
                failures = 0
                await self._wait_for(self._publisher.news)
        finally:
            if not self._nc.is_closed:
                await subscription.unsubscribe()

    async def _send_all(self) -> None:
        outbox = self._outbox
        while self._refused is None:
            heed_cancellation()
            if outbox.in_flight >= WINDOW_MESSAGES or outbox.in_flight_bytes >= WINDOW_BYTES:
                self._room.clear()
                await self._wait_for(self._room)
                continue
            entry = outbox.take()
            if entry is None:
                return
            if self._is_doubtful(entry) and await self._is_stored(entry):
                outbox.done(entry.message_id)
                self._gone()
                continue
            while self._refused is None and self._is_far_ahead(entry):
                self._room.clear()
                await self._wait_for(self._room)
            if self._refused is None:
                await self._send(entry)

    async def _send(self, entry: Entry) -> None:
        self._number += 1
        token = str(self._number)
        now = self._loop.time()
        self._sent[token] = _Sent(entry.message_id, _STREAMS[entry.subject.rpartition(".")[0]], now)
        if entry.sent_at is None:
            entry.sent_at = now
        try:
            await self._nc.publish(
                entry.subject,
                entry.payload,
                f"{self._inbox}.{token}",
                {_MESSAGE_ID: entry.message_id, codec.CONTENT_TYPE_HEADER: codec.MSGPACK},
            )
        except MaxPayloadError:
            log.error(
                "a message of %d bytes for %s is larger than the server takes (%d) and was dropped",
                len(entry.payload),
                entry.subject,
                self._nc.max_payload,
                extra={"subject": entry.subject},
            )
            del self._sent[token]
            self._outbox.drop(entry.message_id)
            self._gone()

    def _gone(self) -> None:
        self._room.set()
        if not len(self._outbox):
            self._publisher.idle.set()

    async def _on_ack(self, message: Msg) -> None:
        sent = self._sent.pop(message.subject[len(self._inbox) + 1 :], None)
        if sent is None:
            return
        message_id = sent.message_id
        self._last_ack = self._loop.time()
        if not message.data:  # no stream takes the subject: the server answers 503 in the headers alone
            self._refused = self._refused or _AckError(503, 0, "no stream stores the subject")
        else:
            error = self._publisher.decode_ack(message.data).error
            if error is None:
                if self._outbox.done(message_id):
                    self._publisher.published_messages += 1
                self._publisher.acknowledged.now()
                self._look_for_passed(sent)
                self._gone()
                return
            if error.code == 400 and error.err_code == 10054:  # larger than the stream takes
                log.error("the stream refuses a message for good and it was dropped: %s", error.description)
                self._outbox.drop(message_id)
                self._gone()
                return
            self._refused = self._refused or error
        # This one is certainly not stored, even if later ones are.
        self._outbox.refused(message_id)
        self._room.set()
        self._publisher.news.set()

    def _look_for_passed(self, stored: _Sent) -> None:
        """Mark as lost the messages that were sent before an acknowledged one: a stream acknowledges in order."""
        number = _number(stored.message_id)
        lost = [
            sent.message_id
            for sent in self._sent.values()
            if sent.stream == stored.stream and sent.at <= stored.at and _is_before(_number(sent.message_id), number)
        ]
        for message_id in lost:
            self._outbox.passed(message_id)
        if lost:
            self._refused = self._refused or _AckError(0, 0, f"{len(lost)} messages were lost on their way")
            self._room.set()
            self._publisher.news.set()

    def _is_far_ahead(self, entry: Entry) -> bool:
        """True if the oldest message in flight is so far behind that it could no longer be told from a duplicate."""
        oldest = next(iter(self._sent.values()), None)
        if oldest is None:
            return False
        (run, number), (other, first) = _number(entry.message_id), _number(oldest.message_id)
        return run == other and number - first >= MAX_OUT_OF_ORDER

    async def _settle(self, failures: int) -> None:
        """Pause after a refusal of the bus, then send again from the first message that is not acknowledged.

        A stream that does not exist is created first, where permissions allow it.
        """
        assert self._refused is not None
        level = logging.WARNING if failures == 1 else logging.DEBUG
        log.log(level, "the bus takes no messages now (%s); buffering", self._refused.description)
        if self._refused.code == 503 and self._refused.err_code == 0 and may_make_streams(self._nc):
            await ensure_layout(self._js)
        self._outbox.spill()
        self._sent.clear()
        await asyncio.sleep(random.uniform(0, min(BACKOFF_SECONDS * 2**failures, BACKOFF_MAX_SECONDS)))
        self._outbox.unspill()
        self._refused = None

    async def _wait_for(self, event: asyncio.Event) -> None:
        """Wait for an event, but no longer than the bus may stay silent.

        Raises:
            TimeoutError: messages are in flight and none was acknowledged for too long.
        """
        while True:
            oldest = next((sent.at for sent in self._sent.values()), None)
            if oldest is not None and self._loop.time() - max(oldest, self._last_ack) > ACK_WAIT_SECONDS:
                raise TimeoutError(f"no acknowledgement within {ACK_WAIT_SECONDS:.0f} s")
            if event.is_set():
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ACK_WAIT_SECONDS / 2):
                    await event.wait()

    def _is_doubtful(self, entry: Entry) -> bool:
        sent = entry.sent_at
        return not entry.passed and (entry.doubtful or (sent is not None and self._loop.time() - sent > DOUBT_SECONDS))

    async def _is_stored(self, entry: Entry) -> bool:
        """True if the stream's last message on this subject is this one or a later one of the same run."""
        run, number = _number(entry.message_id)
        stored = self._stored.get(entry.subject)
        if stored is None:
            stored = self._stored[entry.subject] = await self._last(entry.subject)
        return stored[0] == run and number <= stored[1]

    async def _last(self, subject: str) -> tuple[str, int]:
        stream = _STREAMS[subject.rpartition(".")[0]]
        try:
            last = await self._js.get_last_msg(stream, subject, direct=True)
        except (NotFoundError, APIError):
            return "", 0
        message_id = (last.headers or {}).get(_MESSAGE_ID, "")
        return _number(message_id) if message_id.rpartition("-")[2].isdecimal() else ("", 0)


def _number(message_id: str) -> tuple[str, int]:
    """Parse run and number from a message id `<nonce>.<run>-<number>`; an older collector's id has no nonce."""
    run, _, number = message_id.rpartition("-")
    return run.rpartition(".")[2], int(number)


def _is_before(one: tuple[str, int], other: tuple[str, int]) -> bool:
    """True if a message comes before another one of the same run."""
    return one[0] == other[0] and one[1] < other[1]


async def _call(function: Callable[[Client], Awaitable[None]], nc: Client) -> None:
    await function(nc)


async def _discard(nc: Client) -> None:
    """Close a connection without flushing what is left: it is sent again over the next one."""
    closing: Any = nc.close()
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            await closing
    except (TimeoutError, OSError, NatsError):
        log.debug("closing the lost connection failed", exc_info=True)
