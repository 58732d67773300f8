"""What can go wrong, one class for each thing that a caller would do about it."""

from __future__ import annotations

import os
from typing import Final

from ..schemas.requests import Error, Reason, Rejection, RejectionCode


class CorralError(Exception):
    """Anything that Corral raises at a caller.

    Attributes:
        request_id: of the work request that got no answer, or this one; None for what is no work request.
    """

    request_id: str | None = None


class Unavailable(CorralError, ConnectionError):
    """The bus can't be reached, or was lost in the middle of a call."""


class NoService(Unavailable):
    """The bus is there, but the part that should answer is not (no planner, no processor)."""


class TimedOut(CorralError, TimeoutError):
    """No answer in time. Something may still have been done: a request that was given a `request_id` and did not wait
    may have been granted, and asked again under that id it says so; any other is withdrawn."""


class Rejected(CorralError):
    """A work request was turned down.

    Attributes:
        rejection: the planner's answer as a whole.
    """

    def __init__(self, rejection: Rejection) -> None:
        super().__init__(rejection.message)
        self.rejection = rejection

    @property
    def code(self) -> RejectionCode:
        """Why, as a code."""
        return self.rejection.code

    @property
    def reasons(self) -> list[Reason]:
        """Why, counted by kind."""
        return self.rejection.reasons

    @property
    def could_ever_fit(self) -> bool:
        """Whether the same fleet, idle and healthy, could hold it: then waiting may help."""
        return self.rejection.could_ever_fit


class ServiceError(CorralError):
    """A service understood who asked and refused what was asked.

    Attributes:
        code: as in `schemas.requests.Error`.
        field: path of the field at fault, such as `$.gpus`; empty if none.
    """

    def __init__(self, message: str, code: str = "", field: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.field = field


class InvalidRequest(ServiceError, ValueError):
    """A field is wrong; `field` says which."""


class NotFound(ServiceError, LookupError):
    """There is no such lease, device or host (any more)."""


class Ended(NotFound):
    """The lease has ended, be it one that a request id was used for."""


class NotOwner(ServiceError, PermissionError):
    """Somebody else holds the lease."""


class Conflict(ServiceError):
    """The same request id came with another body, or the thing has changed meanwhile."""


class Refused(ServiceError, PermissionError):
    """This is not allowed to whoever asks."""


class TooManyRequests(ServiceError):
    """This owner asks too much at a time.

    Attributes:
        retry_after_seconds: ask again then; None if nobody knows.
    """

    retry_after_seconds: float | None = None


class QueryFailed(ServiceError):
    """The statement is wrong (`code` is `invalid`), not allowed (`refused`), too large, or was cancelled."""


class Forked(CorralError, RuntimeError):
    """A client, or a lease that it holds, was used in a fork of the process that made it: its connection is the
    parent's, and so is the thread that would answer."""

    def __init__(self, made_in: int) -> None:
        super().__init__(
            f"this client belongs to process {made_in}, of which this one (pid {os.getpid()}) is a fork, and can't be "
            "used here: make a client in the child, or start children by 'spawn' instead of 'fork'"
        )


class LeaseLost(CorralError):
    """A lease that the work relied on has ended: expired, evicted, its host lost, or released by another hand.

    Attributes:
        lease_id: which.
        reason: why, in words.
    """

    def __init__(self, lease_id: str, reason: str) -> None:
        super().__init__(f"lease {lease_id} is lost: {reason}")
        self.lease_id = lease_id
        self.reason = reason


_BY_CODE: Final[dict[str, type[ServiceError]]] = {
    "invalid": InvalidRequest,
    "undecodable": InvalidRequest,
    "too_large": InvalidRequest,
    "not_found": NotFound,
    "ended": Ended,
    "not_owner": NotOwner,
    "conflict": Conflict,
    "refused": Refused,
}


def error_of(error: Error) -> CorralError:
    """The exception for an error reply."""
    if error.code == "timeout":
        return TimedOut(error.message)
    if error.code in ("unavailable", "busy"):
        return NoService(error.message)
    if error.code == "too_many_requests":
        told = TooManyRequests(error.message, error.code, error.field)
        told.retry_after_seconds = error.retry_after_seconds
        return told
    return _BY_CODE.get(error.code, ServiceError)(error.message, error.code, error.field)
