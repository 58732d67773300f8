"""Dead letters: messages that could not be stored are published to a separate stream, with the reason."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Sequence
from typing import Final

from nats.js import JetStreamContext

from ...schemas import codec, subjects
from ...schemas.telemetry import DeadLetter
from .incoming import Refusal

log = logging.getLogger("corral.ingest")

PAYLOAD_BYTES: Final = 256 * 1024
PUBLISH_SECONDS: Final = 5.0
_AT_ONCE: Final = 64
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9_-]+")


class DeadLetters:
    """Publishes refused messages and counts them.

    Args:
        js: of the bus.

    Attributes:
        total: refused since the start.
        unpublished: of these, the ones that could not be published; the database still counts them.
    """

    def __init__(self, js: JetStreamContext) -> None:
        self._js = js
        self.total = 0
        self.unpublished = 0

    async def publish(self, stream: str, refused: Sequence[Refusal]) -> None:
        """Publish refused messages. Failures are logged, not raised.

        Stream and sequence form the message id, so that a repeated dead letter is deduplicated.
        """
        self.total += len(refused)
        for at in range(0, len(refused), _AT_ONCE):
            part = refused[at : at + _AT_ONCE]
            results = await asyncio.gather(*(self._one(stream, refusal) for refusal in part), return_exceptions=True)
            failures = [result for result in results if isinstance(result, Exception)]
            if failures:
                self.unpublished += len(failures)
                log.error("%d dead letters could not be published: %s", len(failures), failures[0])
        if refused:
            first = refused[0]
            log.warning(
                "%s: refused %d messages; the first is %d on %s (%s): %s",
                stream,
                len(refused),
                first.message.sequence,
                first.message.subject,
                first.code,
                first.reason,
                extra={"subject": first.message.subject, "stream": stream, "sequence": first.message.sequence},
            )

    async def _one(self, stream: str, refusal: Refusal) -> None:
        message = refusal.message
        letter = DeadLetter(
            subject=message.subject,
            stream=stream,
            stream_sequence=message.sequence,
            reason=refusal.reason[:1000],
            code=refusal.code,
            payload=message.payload[:PAYLOAD_BYTES],
            time_ns=time.time_ns(),
        )
        code = _UNSAFE.sub("_", refusal.code) or "invalid"
        await self._js.publish(
            f"{subjects.DEAD_LETTERS}.{code}",
            codec.encode(letter),
            timeout=PUBLISH_SECONDS,
            headers={
                "Nats-Msg-Id": f"{stream}:{message.sequence}",
                codec.CONTENT_TYPE_HEADER: codec.MSGPACK,
            },
        )
