"""Messages as ingest receives them, and those that it refuses."""

from __future__ import annotations

from typing import NamedTuple


class Incoming(NamedTuple):
    """A message as it was received.

    Attributes:
        subject: where it was published.
        payload: its bytes.
        sequence: its place in the stream.
        headers: of the message, if any.
        stored_ns: when the server stored it, nanoseconds since the epoch; 0 where that is not known.
    """

    subject: str
    payload: bytes
    sequence: int
    headers: dict[str, str] | None = None
    stored_ns: int = 0


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
