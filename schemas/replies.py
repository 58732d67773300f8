"""Headers of a service's answers: the content type of the request, and for errors a numeric status and description."""

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
"""HTTP status by the code of an error; 500 for any other code."""
_MOST_DESCRIPTION: Final = 256


def status(code: str) -> str:
    """HTTP status of an error's code; 500 for an unknown one."""
    return STATUS.get(code, "500")


def description(message: str) -> str:
    """Format an error message for a header: one line of ASCII, cut to 256 characters."""
    line = " ".join(message.split())
    return line.encode("ascii", "replace").decode()[:_MOST_DESCRIPTION]


def error_headers(code: str, message: str) -> dict[str, str]:
    """Headers of an error, as NATS services give them."""
    return {ERROR_HEADER: description(message), ERROR_CODE_HEADER: status(code)}


def headers(reply: Struct | None, content_type: str, warnings: Sequence[str] = ()) -> dict[str, str]:
    """The headers of an answer.

    Args:
        reply: the answer; None for bytes that are no message.
        content_type: content type of the answer.
        warnings: warnings about the request.
    """
    found = {codec.CONTENT_TYPE_HEADER: content_type}
    if isinstance(reply, Error):
        found |= error_headers(reply.code, reply.message)
    if warnings:
        found[codec.WARNINGS_HEADER] = codec.warnings_header(list(warnings))
    return found


def asked_in(given: dict[str, str] | None) -> str:
    """Content type of the answer to a request with these headers; JSON where they name one that is not supported."""
    try:
        return codec.content_type(given)
    except codec.DecodeError:
        return codec.JSON
