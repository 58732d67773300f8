"""Answers over HTTP: replies of the bus with their status, and errors in the same form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import msgspec
from msgspec import Struct
from nats.aio.msg import Msg

from ..client.errors import CorralError, Refused, ServiceError, TimedOut, TooManyRequests, Unavailable
from ..schemas import codec, replies
from ..schemas.requests import Error, RejectionCode

REJECTED: Final = 409
_STATUS: Final = {
    "unauthenticated": 401,
    "method_not_allowed": 405,
    "not_acceptable": 406,
    "slow": 408,
    "misdirected": 421,
    "unsupported": 415,
    # To HTTP 408 means that the client was too slow, and that it may send the same again at once.
    "timeout": 504,
    # A job that the fleet could never hold; of a work request it is a rejection.
    RejectionCode.IMPOSSIBLE.value: REJECTED,
}
"""HTTP status by the code of an error, where it is not that of `replies.STATUS`."""
_RETRY_SECONDS: Final = 1
"""Time after which a client may try again where a service is away."""


class Answer(Struct, frozen=True):
    """An answer.

    Attributes:
        status: of HTTP.
        body: its bytes.
        headers: with the content type.
    """

    status: int
    body: bytes
    headers: dict[str, str]


class _Peek(Struct, frozen=True):
    """Fields of an answer that the status depends on."""

    type: str = ""
    code: str = ""
    retry_after_seconds: float | None = None


class Failed(Exception):
    """A request that the gateway itself can't pass on, with the error that answers it."""

    def __init__(self, code: str, message: str, field: str = "", retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.error = Error(code=code, message=message, field=field, retry_after_seconds=retry_after_seconds)


def status_of(code: str) -> int:
    """HTTP status of an error's code; 500 for an unknown one."""
    return _STATUS.get(code) or int(replies.status(code))


def error_answer(error: Error, headers: Mapping[str, str] | None = None) -> Answer:
    """The answer for an error."""
    return Answer(status_of(error.code), codec.encode(error, codec.JSON), _error_headers(error) | dict(headers or {}))


def error_of(error: Exception) -> Error:
    """The error that an exception of the client stands for."""
    if isinstance(error, Failed):
        return error.error
    if isinstance(error, codec.DecodeError):
        return Error(code=error.code, message=str(error), field=error.field)
    if isinstance(error, TooManyRequests):
        return Error(
            code=error.code, message=str(error), field=error.field, retry_after_seconds=error.retry_after_seconds
        )
    if isinstance(error, ServiceError):
        code = error.code or ("refused" if isinstance(error, Refused) else "internal")
        return Error(code=code, message=str(error), field=error.field)
    if isinstance(error, TimedOut):
        return Error(code="timeout", message=str(error))
    if isinstance(error, Unavailable):
        return Error(code="unavailable", message=str(error))
    assert isinstance(error, CorralError)
    return Error(code="internal", message=str(error))


def answer_of(reply: Msg, *, rejections_fail: bool) -> Answer:
    """The answer for a reply of a service.

    Args:
        reply: as it came.
        rejections_fail: a rejection has an error's status.
    """
    given = reply.headers or {}
    headers = {codec.CONTENT_TYPE_HEADER: given.get(codec.CONTENT_TYPE_HEADER, codec.JSON)}
    if warnings := given.get(codec.WARNINGS_HEADER):
        headers[codec.WARNINGS_HEADER] = warnings
    try:
        peek = msgspec.json.decode(reply.data, type=_Peek)
    except msgspec.MsgspecError:
        peek = _Peek()
    if replies.ERROR_CODE_HEADER in given and peek.type != "error":  # of the library that the service is made with
        message = given.get(replies.ERROR_HEADER) or "the service failed"
        code = "unavailable" if given[replies.ERROR_CODE_HEADER] == "503" else "internal"
        return error_answer(Error(code=code, message=message))
    if peek.type == "error":
        error = Error(code=peek.code, message="", retry_after_seconds=peek.retry_after_seconds)
        return Answer(status_of(peek.code), reply.data, headers | _error_headers(error))
    rejected = peek.type == "rejection" and rejections_fail
    return Answer(REJECTED if rejected else 200, reply.data, headers)


def message_answer(message: Struct, *, status: int = 200) -> Answer:
    """The answer for a message that the gateway has decoded; its warnings are in a header, too."""
    headers = {codec.CONTENT_TYPE_HEADER: codec.JSON}
    warnings: list[str] = getattr(message, "warnings", [])
    if warnings:
        headers[codec.WARNINGS_HEADER] = codec.warnings_header(warnings)
    return Answer(status, codec.encode(message, codec.JSON), headers)


def _error_headers(error: Error) -> dict[str, str]:
    headers = {codec.CONTENT_TYPE_HEADER: codec.JSON}
    if error.retry_after_seconds is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_seconds)))
    elif status_of(error.code) in (429, 503):
        headers["Retry-After"] = str(_RETRY_SECONDS)
    if error.code == "unauthenticated":
        headers["WWW-Authenticate"] = 'Bearer realm="corral"'
    return headers
