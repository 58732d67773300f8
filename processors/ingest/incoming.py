"""Messages as ingest receives them, and those that it refuses."""

from __future__ import annotations

from typing import NamedTuple

from msgspec import Struct


class Incoming(Struct, frozen=True, gc=False):
    """A message as it was received. The garbage collector does not visit it: many wait at once, none in a cycle.

    Attributes:
        subject: where it was published.
        payload: its bytes.
        sequence: its place in the stream.
        headers: of the message, if any.
        stored_ns: when the server stored it, nanoseconds since the epoch; 0 where that is not known.
        reply: subject to acknowledge it on; empty where that is not known.
    """

    subject: str
    payload: bytes
    sequence: int
    headers: dict[str, str] | None = None
    stored_ns: int = 0
    reply: bytes = b""


class Refusal(NamedTuple):
    """A message that can't be stored.

    Attributes:
        message: which.
        code: as in `DeadLetter.code`.
        reason: in words, with the path of the field.
    """

    message: Incoming
    code: str
    reason: str
