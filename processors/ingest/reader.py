"""Read a stream's messages in order and without gaps, from a durable pull consumer.

The database is the source of truth about what is stored, and the consumer follows it: at the start, after a
reconnection, and when a gap shows, the consumer is created again after the last message that was received. A message
and all before it are acknowledged at once, after the commit. The buffer of fetched messages is bounded in bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from functools import partial
from itertools import repeat
from operator import lt
from typing import Final

from nats.aio import client as client_module
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js import api
from nats.js.errors import NotFoundError

from ...bus.chunked_transport import install_chunked_parser, tap, untap
from ...bus.connection import Connection
from ...bus.stream_reader import created, deliveries, delivery, pull
from ...bus.tasks import heed_cancellation
from .incoming import Incoming

log = logging.getLogger("corral.ingest")

# Buffer of the client's stream reader, which has no option for it. 32 KiB are less than one message of 60 ticks.
client_module.DEFAULT_BUFFER_SIZE = 2**20

PULL_MESSAGES: Final = 4096
PULL_SECONDS: Final = 30.0
HEARTBEAT_SECONDS: Final = 2.0
ACK_WAIT_SECONDS: Final = 600.0
"""Time after which the server delivers a message again that is not acknowledged: much longer than messages wait for a
transaction while nobody reads, and a transaction for a disk that is full. A message that is lost on the way is missed
by the numbers of the next one, and not by this."""
FORGET_SECONDS: Final = 7 * 86400.0
"""The server deletes a consumer that is not used for this long, as when its database is gone."""
BEHIND_SECONDS: Final = 2.0
API_SECONDS: Final = 3.0
MAX_ACK_PENDING: Final = 65536
PLENTY_BYTES: Final = 4 * 2**20
"""Payload that is not kept waiting for more: a transaction of as much costs little more than its rows."""
PLENTY_MESSAGES: Final = PULL_MESSAGES // 2
"""The same as a number of messages; the next pull is sent after at most as many."""
_MAX_SUBJECTS: Final = 200_000
CATCH_UP_TRIES: Final = 6
CATCH_UP_SECONDS: Final = 1.0


class StreamReplaced(Exception):
    """The stream is not the one that was read until now: it was created again, set back, or is gone."""


class Reader:
    """Reads one stream for one history.

    Args:
        nc: connection to the bus.
        stream: name of the stream.
        durable: name of the consumer.
        filter_subjects: only these; all by default.
        buffer_bytes: payload above which no more is fetched.
        with_headers: true if messages keep their headers.

    Attributes:
        created: when the stream was created, as text: a stream that is created again counts from 1 again.
        stored_ns: when the server stored the last message received, by the server's clock; 0 before the first.
        pending: messages in the stream that have not been received yet, as far as known.
        repeated: messages that were delivered again.
        received: sequence of the last message that was received, or after which reading started.
        taken: sequence of the last message that was taken; 0 before the first.
    """

    def __init__(
        self,
        nc: Client,
        stream: str,
        durable: str,
        *,
        filter_subjects: tuple[str, ...] = (),
        buffer_bytes: int = 64 * 2**20,
        with_headers: bool = False,
    ) -> None:
        install_chunked_parser(nc)
        self._nc = nc
        self._js = nc.jetstream(timeout=API_SECONDS)
        self.stream = stream
        self.durable = durable
        self._filters = filter_subjects
        self._buffer_bytes = buffer_bytes
        self._with_headers = with_headers
        self._buffer: deque[Incoming] = deque()
        self._waiting_bytes = 0
        self._arrived = asyncio.Event()
        self._attention = asyncio.Event()
        self._wanted = False
        self._sub: Subscription | None = None
        self._inbox = ""
        self._outstanding = 0
        self._requested_at = 0.0
        self._heard_at = 0.0
        self.received = 0
        self.taken = 0
        self._received_ns = 0
        self._mark_ns = 0
        self._overtaken = False
        self._delivered = 0
        self._broken = ""
        self._reconnects = 0
        self._last_ack = 0
        self.created = ""
        self.pending = 0
        self._replaced = ""
        self._last_sequence = 0
        self.stored_ns = 0
        self._idle = True
        self.repeated = 0
        self._repeated_reply = b""
        """The last message that was delivered again, until it is acknowledged."""
        self._subjects: dict[bytes, str] = {}

    @property
    def lag_seconds(self) -> float:
        """Time since the server stored the last message received, in seconds, while more are pending; 0 if none are."""
        if not self.pending or self._idle or not self.stored_ns:
            return 0.0
        return max(0.0, time.time() - self.stored_ns * 1e-9)

    async def identify(self) -> tuple[str, int]:
        """Creation time of the stream, as text, and its last sequence.

        If the stream was found to be set back, it is at most the last sequence of that moment, since the stream grows.
        """
        info = await self._js.stream_info(self.stream)
        self.created = created(info)
        last = min(self._last_sequence, info.state.last_seq) if self._replaced else info.state.last_seq
        return self.created, last

    async def start(self, after: int, stored_ns: int = 0) -> None:
        """Start reading after a sequence; the buffer is cleared.

        Args:
            after: the sequence; 0 reads from the start.
            stored_ns: when the server stored the message with that sequence. That message is then fetched and compared
                first: if another one is there, the stream was set back and has grown since. 0 if it is not known.
        """
        self._buffer.clear()
        self._waiting_bytes = 0
        self.received = after
        self._received_ns = self._mark_ns = stored_ns if after else 0
        self._overtaken = False
        self._delivered = 0
        self._broken = ""
        self._replaced = ""
        self._reconnects = self._nc.stats["reconnects"]
        await self._unsubscribe()
        with contextlib.suppress(NotFoundError):
            await self._js.delete_consumer(self.stream, self.durable)
        info = await self._js.add_consumer(
            self.stream,
            api.ConsumerConfig(
                durable_name=self.durable,
                description="history: acknowledged once it is in the database",
                deliver_policy=api.DeliverPolicy.BY_START_SEQUENCE if after else api.DeliverPolicy.ALL,
                opt_start_seq=(after if self._mark_ns else after + 1) if after else None,
                ack_policy=api.AckPolicy.ALL,
                ack_wait=ACK_WAIT_SECONDS,
                max_ack_pending=MAX_ACK_PENDING,
                inactive_threshold=FORGET_SECONDS,
                filter_subjects=list(self._filters) or None,
            ),
        )
        self.pending = info.num_pending or 0
        self._inbox = self._nc.new_inbox()
        # Bound to its inbox: messages still queued by the previous subscription must not be taken for new ones.
        self._sub = await self._nc.subscribe(
            self._inbox, cb=partial(self._on_message, self._inbox), pending_msgs_limit=-1, pending_bytes_limit=-1
        )
        tap(self._nc, self._sub, partial(self._on_chunk, self._inbox))
        self._outstanding = 0
        await self._pull()

    def hurry(self) -> None:
        """End the wait for more messages in `take`, at present or at its next call."""
        self._wanted = True
        self._notice()

    def _notice(self) -> None:
        """End every wait: something other than a message came."""
        self._arrived.set()
        self._attention.set()

    async def take(self, max_bytes: int, linger_seconds: float, unread_seconds: float = 0.0) -> list[Incoming]:
        """Return the next messages: at least one.

        Args:
            max_bytes: of payload; one message may be larger.
            linger_seconds: how long to wait for more after the first message; longer while the stream has more.
            unread_seconds: how long to wait for more until `hurry` is called, unless there is plenty.

        Raises:
            StreamReplaced: all that was received has been taken, and the stream is another one.
        """
        while not self._buffer:
            if self._replaced:
                raise StreamReplaced(self._replaced)
            self._wanted = False
            await self._wait(HEARTBEAT_SECONDS)
        began = time.monotonic()
        while not self._in_demand() and (left := began + unread_seconds - time.monotonic()) > 0:
            await self._wait(min(left, HEARTBEAT_SECONDS), self._attention)
        deadline = began + linger_seconds
        until = deadline + BEHIND_SECONDS
        while self._waiting_bytes < max_bytes and not self._replaced and not self._wanted:
            if self.pending and deadline < until:
                # Behind anyway: large transactions catch up sooner.
                deadline = min(until, time.monotonic() + linger_seconds)
            if (left := deadline - time.monotonic()) <= 0:
                break
            await self._wait(left)
        self._wanted = False
        taken = self._cut(max_bytes)
        await self._pull()
        return taken

    def take_rest(self) -> list[Incoming]:
        """Return all messages that wait, after `stop`."""
        return self._cut(self._waiting_bytes)

    def _cut(self, max_bytes: int) -> list[Incoming]:
        """Take messages out of the buffer: at least one if there is any."""
        count = size = 0
        for message in self._buffer:
            more = size + len(message.payload)
            if count and more > max_bytes:
                break
            count, size = count + 1, more
        taken = [self._buffer.popleft() for _ in range(count)]
        self._waiting_bytes -= size
        if taken:
            self.taken = taken[-1].sequence
        return taken

    async def acknowledge(self, reply: bytes) -> None:
        """Acknowledge a message and all before it as stored. Lost acknowledgements do no harm."""
        with contextlib.suppress(Exception):
            await self._nc.publish(reply.decode(), b"+ACK")

    async def stop(self) -> None:
        """Stop reading; the consumer stays."""
        await self._unsubscribe()

    async def _unsubscribe(self) -> None:
        if self._sub is not None:
            untap(self._nc, self._sub)
            with contextlib.suppress(Exception):
                await self._sub.unsubscribe()

    def _in_demand(self) -> bool:
        """True if messages that wait are to be stored now: they are wanted, many, or the first of many."""
        return (
            self._wanted
            or bool(self._replaced or self.pending)
            or self._waiting_bytes >= PLENTY_BYTES
            or len(self._buffer) >= PLENTY_MESSAGES
        )

    async def _wait(self, seconds: float, event: asyncio.Event | None = None) -> None:
        """Wait for the next message; or for another event, which does not come with every message."""
        event = event or self._arrived
        event.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await event.wait()
        if self._nc.stats["reconnects"] != self._reconnects:
            self._broken = self._broken or "the connection was lost"
        elif self._outstanding and time.monotonic() - self._heard_at > 3 * HEARTBEAT_SECONDS:
            self._broken = self._broken or "the server is silent"
        if self._repeated_reply:
            reply, self._repeated_reply = self._repeated_reply, b""
            await self.acknowledge(reply)
        if self._broken:
            await self._recover()
        else:
            await self._pull()
        heed_cancellation()

    async def _recover(self) -> None:
        """Create the consumer again after the last message received. Messages in the buffer are kept, in order."""
        log.info("%s: reading again from %d: %s", self.stream, self.received + 1, self._broken)
        waiting, size = list(self._buffer), self._waiting_bytes
        self._buffer.clear()
        self._waiting_bytes = 0
        try:
            self._replaced = await self._is_another()
            if self._replaced:
                self._inbox = ""
                return
            await self.start(self.received, self._received_ns)
        except Exception as error:
            # nats-py has its own timeouts and disconnection errors
            log.warning("%s: %s: %s", self.stream, type(error).__name__, error)
            self._broken = "the last try failed"
            if isinstance(error, TimeoutError) and isinstance(self._nc, Connection):
                await self._nc.renew()
            await asyncio.sleep(0.5)
        finally:
            # Before those that came meanwhile; also when cancelled, since what waits is stored then.
            self._buffer.extendleft(reversed(waiting))
            self._waiting_bytes += size

    async def _is_another(self) -> str:
        """Reason why the server's stream is not the one that was read until now; empty if it is."""
        for tries in range(CATCH_UP_TRIES):
            try:
                info = await self._js.stream_info(self.stream)
            except NotFoundError:
                return "the stream is gone"
            if created(info) != self.created:
                return "the stream was created again"
            self._last_sequence = info.state.last_seq
            if self._overtaken:
                self._last_sequence = self.received - 1
                return f"the stream was rolled back, and has grown since: its message {self.received} is another one"
            if self._last_sequence >= self.received:
                return ""
            # A leader that was just elected may not have read its log to the end.
            if (info.config.num_replicas or 1) == 1 or tries == CATCH_UP_TRIES - 1:
                break
            await asyncio.sleep(CATCH_UP_SECONDS)
        return f"the stream was rolled back from {self.received} to {self._last_sequence}"

    async def _pull(self) -> None:
        if self._waiting_bytes >= self._buffer_bytes or self._outstanding > PULL_MESSAGES // 2:
            return
        if self._broken or self._replaced:
            return
        self._outstanding += PULL_MESSAGES
        self._heard_at = time.monotonic()
        try:
            await pull(
                self._nc,
                self.stream,
                self.durable,
                self._inbox,
                PULL_MESSAGES,
                PULL_SECONDS,
                idle_heartbeat=int(HEARTBEAT_SECONDS * 1e9),
                max_bytes=max(self._buffer_bytes // 4, 2 * self._nc.max_payload),
            )
        except Exception as error:
            self._broken = f"{type(error).__name__}: {error}"

    async def _on_message(self, inbox: str, message: Msg) -> None:
        if inbox != self._inbox:
            return
        if message.subject == inbox or not message.reply:
            self._on_status(message)
            return
        self._receive(message.subject.encode(), message.reply.encode(), message.data, message.headers)

    def _on_chunk(self, inbox: str, messages: list[tuple[bytes, bytes, bytes]]) -> None:
        """Take messages without headers as they are received; see `chunked_transport.tap`."""
        if inbox != self._inbox or self._receive_all(messages):
            return
        for subject, reply, payload in messages:
            if reply:
                self._receive(subject, reply, payload, None)

    def _receive_all(self, messages: list[tuple[bytes, bytes, bytes]]) -> bool:
        """Receive messages that follow the last one without a gap, as nearly all do; False if they do not."""
        subjects, replies, payloads = zip(*messages, strict=True)
        places = deliveries(replies)
        if places is None or self._broken or self._mark_ns:
            return False
        sequences, numbers, stored_ns = (places[at::4] for at in range(3))
        follows = range(self._delivered + 1, self._delivered + 1 + len(messages))
        if numbers != list(follows) or not all(map(lt, (self.received, *sequences), sequences)):
            return False
        self._heard_at = time.monotonic()
        self._idle = False
        self._delivered = numbers[-1]
        self._outstanding = max(0, self._outstanding - len(messages))
        self.pending = places[-1]
        self.received = sequences[-1]
        self.stored_ns = self._received_ns = stored_ns[-1]
        names = map(self._named, subjects)
        self._buffer.extend(map(Incoming, names, payloads, sequences, repeat(None), stored_ns, replies))
        self._waiting_bytes += sum(map(len, payloads))
        self._arrived.set()
        self._notice_plenty()
        return True

    def _named(self, subject: bytes) -> str:
        """A subject as text, the same object each time."""
        named = self._subjects.get(subject)
        if named is None:
            if len(self._subjects) >= _MAX_SUBJECTS:
                self._subjects.clear()
            named = self._subjects[subject] = subject.decode()
        return named

    def _notice_plenty(self) -> None:
        if self._waiting_bytes >= PLENTY_BYTES or len(self._buffer) >= PLENTY_MESSAGES:
            self._attention.set()

    def _receive(self, subject: bytes, reply: bytes, payload: bytes, headers: dict[str, str] | None) -> None:
        self._heard_at = time.monotonic()
        sequence, delivered, self.stored_ns, self.pending = delivery(reply)
        self._idle = False
        if self._broken:
            return
        if delivered != self._delivered + 1:
            self._broken = f"message {self._delivered + 1} of the consumer did not come"
            self._notice()
            return
        self._delivered = delivered
        if self._outstanding:
            self._outstanding -= 1
        if sequence <= self.received:
            if not self._mark_ns:
                self.repeated += 1
            elif sequence == self.received and self.stored_ns != self._mark_ns:
                self._overtaken = True
                self._broken = "the message read last is another one now"
                self._notice()
            self._mark_ns = 0
            self._repeated_reply = reply
            self._arrived.set()
            return
        self._mark_ns = 0
        self.received, self._received_ns = sequence, self.stored_ns
        kept = headers if self._with_headers else None
        self._buffer.append(Incoming(self._named(subject), payload, sequence, kept, self.stored_ns, reply))
        self._waiting_bytes += len(payload)
        if not self._arrived.is_set():
            self._arrived.set()
        self._notice_plenty()

    def _on_status(self, message: Msg) -> None:
        """Handle a status message of a pull: 100 is a heartbeat, any other status ends the pull."""
        self._heard_at = time.monotonic()
        headers = message.headers or {}
        status = headers.get("Status", "")
        description = headers.get("Description", "")
        if status == "100":
            # The server sends it only if it has nothing to deliver, whatever `pending` says.
            self._idle = True
            last = headers.get("Nats-Last-Consumer")
            if last is not None and int(last) > self._delivered and not self._broken:
                self._broken = f"messages {self._delivered + 1} to {last} of the consumer did not come"
                self._notice()
            return
        left = headers.get("Nats-Pending-Messages")
        self._outstanding = max(0, self._outstanding - (int(left) if left is not None else PULL_MESSAGES))
        if status in ("404", "408") or "MaxBytes" in description or "Batch Completed" in description:
            self._notice()
            return
        self._broken = f"{status} {description}".strip() or "the server ended the pull"
        self._notice()
