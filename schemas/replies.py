"""How a service answers: in the type of the question, with a numeric status and a description where it is an error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec import Struct

from . import codec
from .requests import Error

ERROR_HEADER: Final = "Nats-Service-Error"
ERROR_CODE_HEADER: Final = "Nats-Service-Error-Code"
STATUS: Final = {
    "invalid": "400",
    "undecodable": "400",
    "refused": "403",
    "not_owner": "403",
    "not_found": "404",
    "timeout": "408",
    "conflict": "409",
    "ended": "410",
    "too_large": "413",
    "too_many_requests": "429",
    "cancelled": "499",
    "internal": "500",
    "unavailable": "503",
    "busy": "503",
}
"""The status of an error's code, after HTTP; 500 for any other."""
_MOST_DESCRIPTION: Final = 256


def status(code: str) -> str:
    """The numeric status of an error's code."""
    return STATUS.get(code, "500")


def description(message: str) -> str:
    """An error in the one line of ASCII that a header may be."""
    line = " ".join(message.split())
    return line.encode("ascii", "replace").decode()[:_MOST_DESCRIPTION]


def error_headers(code: str, message: str) -> dict[str, str]:
    """What the headers of an error say, as the services of NATS have it."""
    return {ERROR_HEADER: description(message), ERROR_CODE_HEADER: status(code)}


def headers(reply: Struct | None, content_type: str, warnings: Sequence[str] = ()) -> dict[str, str]:
    """The headers of an answer.

    Args:
        reply: what is answered; None for bytes that are no message.
        content_type: of its bytes.
        warnings: about the question.
    """
    found = {codec.CONTENT_TYPE_HEADER: content_type}
    if isinstance(reply, Error):
        found |= error_headers(reply.code, reply.message)
    if warnings:
        found[codec.WARNINGS_HEADER] = codec.warnings_header(list(warnings))
    return found


def asked_in(given: dict[str, str] | None) -> str:
    """The type that an answer to a question with these headers has; JSON where they name one that nobody speaks."""
    try:
        return codec.content_type(given)
    except codec.DecodeError:
        return codec.JSON
