"""A client that has waited since before this planner led: it is answered on the reply subject that was stored."""

from __future__ import annotations

import logging

import msgspec
from msgspec import Struct
from nats.aio.client import Client
from nats.errors import Error as NatsError

from ...bus.tasks import BackgroundTasks
from ...schemas import codec, replies
from ...schemas.requests import Error
from ...schemas.subjects import PlanSubject
from ..broker.large_requests import decode_items
from ..broker.waiting.stored_queue import StoredCaller

log = logging.getLogger("corral.planner")


class StoredResponder:
    """Answers a stored caller.

    Args:
        nc: connection of the planner.
        caller: as stored.
        tasks: run what is forwarded.
        body: message of the request, if it was stored as it came.
        body_type: its content type.
    """

    def __init__(
        self, nc: Client, caller: StoredCaller, tasks: BackgroundTasks, body: bytes = b"", body_type: str = codec.JSON
    ) -> None:
        self._nc = nc
        self._caller = caller
        self._tasks = tasks
        self._body = body
        self._body_type = body_type

    @property
    def reply_to(self) -> str:
        """Reply subject."""
        return self._caller.reply_to

    @property
    def client_name(self) -> str:
        """Name of a client that asks again while it is queued; empty if it gave none."""
        return self._caller.client_name

    @property
    def stored(self) -> StoredCaller | None:
        """The caller as stored."""
        return self._caller

    async def answer(self, reply: Struct) -> None:
        """Send the answer."""
        content = self._caller.content_type
        data = codec.encode(reply if content == codec.JSON else decode_items(reply), content)
        error = reply if isinstance(reply, Error) else None
        try:
            await self._nc.publish(self.reply_to, data, headers=replies.headers(error, content, ()))
        except (NatsError, ValueError, msgspec.MsgspecError) as failed:  # a retry gets it
            log.debug("an answer was not sent: %s", failed)

    def forward(self, body: Struct) -> None:
        """Forward the request to the leader."""
        self._tasks.start(self._forward(body))

    async def _forward(self, body: Struct) -> None:
        content = self._body_type if self._body else self._caller.content_type
        subject = self._caller.subject or PlanSubject.REQUEST
        try:
            await self._nc.publish(
                subject,
                self._body or codec.encode(body, content),
                reply=self.reply_to,
                headers={codec.CONTENT_TYPE_HEADER: content},
            )
        except NatsError as failed:
            log.debug("a request was not forwarded: %s", failed)
