"""Context of a request: the message as it came over NATS, its decoding and checks, and its answer."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from operator import attrgetter
from typing import Any, Final, cast

import msgspec
from msgspec import Struct
from nats.errors import Error as NatsError
from nats.micro.request import Request

from ...bus.permissions import ACROSS, with_name
from ...schemas import codec, replies
from ...schemas.operations import DeviceFilter, ExplainRequest, LeaseFilter, QueueFilter
from ...schemas.requests import Error, WorkRequest
from ...schemas.subjects import PlanSubject
from ...schemas.values import globs
from ...schemas.work.groups import GroupFilter
from ...schemas.work.jobs import JobFilter, JobSpec
from ...schemas.work.moves import MovesQuery
from ...schemas.work.windows import WindowAction, WindowFilter
from ..broker.idempotency import digest_of
from ..broker.large_requests import DecodedRequest, EncodedItems, decode_items, encoded_items, without_items
from ..broker.waiting.stored_queue import StoredCaller
from ..fleet.state import InvalidRequest
from ..limits import MAX_LABELS_BYTES

log = logging.getLogger("corral.planner")

MAX_REQUEST_BYTES: Final = 2**20
"""Larger messages are refused, even if the NATS server lets them through."""
MAX_ADDED_DEVICES: Final = 100_000
"""Devices that one what-if query may add."""
_MAX_CLIENT_NAME: Final = 128
"""Length at which the header that names a queued client is cut, in characters."""
HEADROOM_BYTES: Final = 16 * 1024
"""Room that is left in a message for all but the lease that it carries."""
_FILTERS: Final = (LeaseFilter, DeviceFilter, QueueFilter, GroupFilter, WindowFilter, MovesQuery, JobFilter)
"""Types for which an empty message means `{}`, no filter. For other types it is an error."""

Forward = Callable[[Request, bytes], None]
OnAnswer = Callable[[Struct, float, bool], None]
"""Called with the answer, the seconds since the request came, and true if the request allowed queueing."""


class RequestContext:
    """One message, with what is needed to decode and to answer it.

    Args:
        request: as it came.
        owner: that the subject names; None if it names none.
        max_bytes: size limit of a record; an answer may be a little larger.
        forward: sends the message, with a body, to the leader.
        answered: called with the answer.

    Attributes:
        content_type: of the message, and so of the answer.
        warnings: fields that were ignored.
        owner_field: field of the body that must equal the owner in the subject.
        user: that the subject names, for messages whose body may name other owners; empty if it names none.
    """

    __slots__ = (
        "_answered",
        "_body",
        "_client_name",
        "_forward",
        "_max_bytes",
        "_may_queue",
        "_received_at",
        "_request",
        "content_type",
        "owner",
        "owner_field",
        "user",
        "warnings",
    )

    def __init__(
        self,
        request: Request,
        owner: str | None,
        max_bytes: int,
        forward: Forward,
        answered: OnAnswer | None = None,
    ) -> None:
        self._answered = answered
        self._received_at = time.perf_counter()
        self._may_queue = False
        self._request = request
        self._max_bytes = max_bytes
        self._forward = forward
        self._body = b""
        self.owner = owner
        self.owner_field = "owner"
        self.user = ""
        self.content_type = codec.JSON
        self.warnings: list[str] = []
        self._client_name: str = ((request.headers or {}).get(codec.LINE_HEADER) or "")[:_MAX_CLIENT_NAME]

    def decode(self, type: type[Any]) -> Any:
        """Decode and check the body. The owner in the subject fills the body's field, and must equal it if that is set.

        Args:
            type: of the body.

        Raises:
            DecodeError: the body is too large, is not of the type, fails a check, or names another owner.
        """
        request = self._request
        self.content_type = codec.content_type(request.headers)
        data = self._body or request.data
        if not data and type in _FILTERS:
            data = codec.encode({}, self.content_type)
        if len(data) > MAX_REQUEST_BYTES:
            message = f"The message has {len(data)} bytes, {MAX_REQUEST_BYTES} are the most: give items as a count"
            raise codec.DecodeError(message, "too_large")
        if self.owner is None and not self.user:
            message, self.warnings = codec.decode_request(data, type, self.content_type)
            return self._checked(message)
        codec.refuse_empty(data)
        tree = codec.decode(data, dict[str, Any], self.content_type)
        if self.owner is not None:
            self._fill_owner(tree, self.owner)
        elif type is ExplainRequest and isinstance(work := tree.get("request"), dict):
            cast("dict[str, Any]", work).setdefault("owner", self.user)
        message, self.warnings = codec.decode_request(
            codec.encode_again(tree, self.content_type), type, self.content_type
        )
        named = self.owner if self.owner is None else attrgetter(self.owner_field)(message)
        if named != self.owner:
            raise codec.DecodeError(
                f"The subject says that {self.owner!r} asks, the body says {named!r}",
                "refused",
                f"$.{self.owner_field}",
            )
        return self._checked(message)

    def _fill_owner(self, tree: dict[str, Any], owner: str) -> None:
        """Set the field that names the owner, if it is missing."""
        *outer, field = self.owner_field.split(".")
        inner: Any = tree
        for name in outer:
            inner = inner.get(name)
            if not isinstance(inner, dict):
                return  # decoding says what is wrong with it
        if inner.setdefault(field, owner) == "" and field == "operator":
            inner[field] = owner  # empty is its default, so it may be written out

    async def refuse_unnamed(self, subject: str, name: str) -> None:
        """Refuse a message whose subject lacks a name (`owner`, `user` or `operator`), and say which subject to use."""
        self.content_type = replies.asked_in(self._request.headers)
        await self.answer(Error(code="refused", message=with_name(subject, name)))

    @property
    def reply_to(self) -> str:
        """Reply subject."""
        return self._request._msg.reply  # pyright: ignore[reportPrivateUsage]  # micro has no other way to it

    @property
    def stored(self) -> StoredCaller | None:
        """Address by which a later leader can answer; None across accounts, where only this planner may."""
        if self.reply_to.startswith(ACROSS) or not self.reply_to:
            return None
        return StoredCaller(
            reply_to=self.reply_to,
            content_type=self.content_type,
            client_name=self._client_name,
            subject=self._request.subject,
        )

    @property
    def subject(self) -> str:
        """Subject of the message."""
        return self._request.subject

    @property
    def client(self) -> str:
        """Client for fair queueing: the owner or user that the subject names, else the inbox of the reply subject."""
        return self.owner or self.user or self.reply_to.rpartition(".")[0]

    @property
    def client_name(self) -> str:
        """Name of a client that asks again while it is queued, from a header; empty if it gives none."""
        return self._client_name

    def drop_body(self) -> None:
        """Drop the body from memory: it may be large, and the request may be queued for a day."""
        message = self._request._msg  # pyright: ignore[reportPrivateUsage]
        message.data = b""
        message.headers = {codec.CONTENT_TYPE_HEADER: self.content_type}

    def keep_body(self) -> None:
        """Keep the undecoded body apart, for a copy of this process or another planner to decode."""
        self._body = self._request.data
        self.drop_body()

    def pack_request(self) -> bytes:
        """Decode a work request in a copy of this process, and pack the result for `unpack_request`."""

        def work() -> Struct:
            request: WorkRequest = self.decode(WorkRequest)
            return DecodedRequest(
                without_items(request), digest_of(request) if request.request_id else "", self.warnings
            )

        found = compute(work)
        return msgspec.msgpack.encode((found, None) if isinstance(found, Error) else (None, found))

    def unpack_request(self, packed: bytes) -> tuple[WorkRequest, EncodedItems] | Error:
        """Unpack the result of `pack_request`: the request without its items and access to them, or the error."""
        error, found = _taken(packed)
        if found is None:
            return error or Error(code="internal", message="The planner failed to read the request")
        self.warnings = found.warnings
        self._may_queue = found.request.wait_seconds > 0
        return found.request, encoded_items(found.digest, self._body, self.content_type)

    def _checked(self, message: Any) -> Any:
        """Check limits that the size of a message does not imply, and note if a work request allows queueing.

        Raises:
            DecodeError: patterns, labels, items or added devices are more than one message may have.
        """
        if isinstance(message, WorkRequest):
            self._may_queue = message.wait_seconds > 0
            self._check_work(message, "$")
        elif isinstance(message, JobSpec):
            self._check_work(message.request, "$.request")
        elif isinstance(message, ExplainRequest):
            self._check_work(message.request, "$.request")
            if sum(more.devices for more in message.with_more) > MAX_ADDED_DEVICES:
                text = f"More than {MAX_ADDED_DEVICES} devices to add - at `$.with_more`"
                raise codec.DecodeError(text, "too_large", "$.with_more")
        elif isinstance(message, WindowAction):
            if message.book is not None:
                globs.check(message.book.models, "$.book.models")
                globs.check(message.book.hosts, "$.book.hosts")
        elif isinstance(message, MovesQuery):
            globs.check(message.hosts, "$.hosts")
            globs.check(message.models, "$.models")
        elif isinstance(message, DeviceFilter):
            for name in ("hosts", "models", "devices"):
                globs.check(getattr(message, name), f"$.{name}")
        return message

    def _check_work(self, request: WorkRequest, path: str) -> None:
        globs.check(request.models, f"{path}.models")
        globs.check(request.hosts, f"{path}.hosts")
        size = sum(len(key.encode()) + len(value.encode()) for key, value in request.labels.items())
        if size > MAX_LABELS_BYTES:
            text = f"The labels have {size} bytes, {MAX_LABELS_BYTES} are the most - at `{path}.labels`"
            raise codec.DecodeError(text, "too_large", f"{path}.labels")
        work = request.distribution
        # Each item's number is in the answer, with a comma.
        if work is not None and isinstance(work.items, int) and _numbers_bytes(work.items) > self._max_bytes:
            text = f"{work.items} items do not fit in an answer of {self._max_bytes} bytes: give fewer, larger ones"
            raise codec.DecodeError(f"{text} - at `{path}.distribution.items`", "too_large", f"{path}.distribution")

    async def answer(self, reply: Struct) -> None:
        """Answer in the format of the question."""
        if self._answered is not None:
            self._answered(reply, time.perf_counter() - self._received_at, self._may_queue)
        reply, data = self.encode_answer(reply)
        await self._send(data, reply if isinstance(reply, Error) else None)

    def encode_answer(self, reply: Struct) -> tuple[Struct, bytes]:
        """Encode an answer, or the error that it is too large in its place; returns the answer and its bytes."""
        if self.warnings and "warnings" in reply.__struct_fields__:
            own: list[str] = getattr(reply, "warnings")  # noqa: B009
            reply = msgspec.structs.replace(reply, warnings=[*self.warnings, *own])
        data = codec.encode(reply if self.content_type == codec.JSON else decode_items(reply), self.content_type)
        if len(data) > self._max_bytes + HEADROOM_BYTES // 2:
            message = f"The answer takes {len(data)} bytes, more than a message may: ask for less, with a filter"
            reply = Error(code="too_large", message=message)
            data = codec.encode(reply, self.content_type)
        return reply, data

    def pack(self, work: Callable[[], Struct]) -> bytes:
        """Compute an answer in a copy of this process, which has no connection, and pack it for `answer_packed`."""
        reply, data = self.encode_answer(compute(work))
        error = reply if isinstance(reply, Error) else None
        return msgspec.msgpack.encode((error, data))

    async def answer_packed(self, packed: bytes) -> None:
        """Send an answer that `pack` has made."""
        error, data = _unpack(packed)
        await self._send(data, error)

    async def _send(self, data: bytes, error: Error | None) -> None:
        headers = replies.headers(error, self.content_type, self.warnings)
        try:
            await self._request.respond(data, headers)
        except (NatsError, ValueError) as failed:  # no reply subject, or the bus is away: a retry gets it
            log.debug("an answer was not sent: %s", failed)

    def forward(self, body: Struct) -> None:
        """Forward the message to the leader: its kept bytes, or else a body."""
        self._forward(self._request, self._body or codec.encode(body, self.content_type))

    def forward_message(self) -> None:
        """Forward the message as it came to the leader. A work request without a request id is dropped instead.

        It has no protection against being granted twice, while all other messages may be handled twice.
        """
        with contextlib.suppress(codec.DecodeError):
            body = codec.decode(self._request.data, dict[str, Any], codec.content_type(self._request.headers))
            for subject, key in ((PlanSubject.REQUEST, "request_id"), (PlanSubject.SUBMIT, "submit_id")):
                if self._request.subject.startswith(subject) and not body.get(key):
                    return
        self._forward(self._request, self._request.data)


def _numbers_bytes(count: int) -> int:
    """Bytes of the numbers below a count in JSON, each with its comma."""
    size, least, digits = 0, 0, 1
    while least < count:
        size += (min(count, 10**digits) - least) * (digits + 1)
        least, digits = 10**digits, digits + 1
    return size


_taken: Final = msgspec.msgpack.Decoder(tuple[Error | None, DecodedRequest | None]).decode
_unpack: Final = msgspec.msgpack.Decoder(tuple[Error | None, bytes]).decode


def compute(work: Callable[[], Struct]) -> Struct:
    """Compute an answer; a request that can't be decoded or is invalid gives the error as the answer."""
    try:
        return work()
    except codec.DecodeError as error:
        return Error(code=error.code, message=str(error), field=error.field)
    except InvalidRequest as error:
        return Error(code="invalid", message=str(error), field=error.field)
