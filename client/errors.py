"""Exceptions of the client, one class for each way in which a caller may react."""

from __future__ import annotations

import os
from typing import Final

from ..schemas.instruments import ServiceKind
from ..schemas.requests import Error, Reason, Rejection, RejectionCode


class CorralError(Exception):
    """Base class of all errors that the client raises.

    Attributes:
        request_id: id of the work request that failed or got no answer; None if no work request was sent.
    """

    request_id: str | None = None


class Unavailable(CorralError, ConnectionError):
    """The bus can't be reached, or the connection was lost during a call."""


class NoService(Unavailable):
    """The bus can be reached, but no service answers (no planner or no processor is running).

    Attributes:
        service: the service that doesn't answer; None if it is none in particular.
    """

    def __init__(self, message: str, service: ServiceKind | None = None) -> None:
        super().__init__(message)
        self.service = service


class TimedOut(CorralError, TimeoutError):
    """No answer in time. The operation may still have been carried out.

    A work request with a `request_id` of the caller's and without a wait may have been granted: sent again under that
    id, it gets the same answer. Any other work request is withdrawn.
    """


class Rejected(CorralError):
    """A work request was rejected.

    Attributes:
        rejection: the planner's complete answer.
    """

    def __init__(self, rejection: Rejection) -> None:
        super().__init__(rejection.message)
        self.rejection = rejection

    @property
    def code(self) -> RejectionCode:
        """Code of the rejection."""
        return self.rejection.code

    @property
    def reasons(self) -> list[Reason]:
        """Reasons for the rejection, each with its number of devices."""
        return self.rejection.reasons

    @property
    def could_ever_fit(self) -> bool:
        """True if the same fleet, idle and healthy, could hold the request; then waiting may help."""
        return self.rejection.could_ever_fit


class ServiceError(CorralError):
    """A service answered with an error.

    Attributes:
        code: error code, as in `schemas.requests.Error`.
        field: path of the invalid field, such as `$.gpus`; empty if none.
    """

    def __init__(self, message: str, code: str = "", field: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.field = field


class InvalidRequest(ServiceError, ValueError):
    """A field of the request is invalid; `field` is its path."""


class NotFound(ServiceError, LookupError):
    """The lease, device or host doesn't exist, or no longer exists."""


class Ended(NotFound):
    """The lease has ended; also raised for a request id whose lease has ended."""


class NotOwner(ServiceError, PermissionError):
    """The lease or request belongs to another owner."""


class Conflict(ServiceError):
    """The request id was used with a different body, or another process holds its lease, or the state has changed."""


class Refused(ServiceError, PermissionError):
    """The caller isn't permitted to do this."""


class TooManyRequests(ServiceError):
    """The owner has exceeded a rate limit or a limit on open requests.

    Attributes:
        retry_after_seconds: seconds after which to retry; None if unknown.
    """

    retry_after_seconds: float | None = None


class QueryFailed(ServiceError):
    """The statement is invalid (`code` is `invalid`), not permitted (`refused`), too large, or was cancelled."""


class Forked(CorralError, RuntimeError):
    """A client, or a lease that it holds, was used in a fork of the process that created it.

    The connection belongs to the parent process, and so does the thread that handles the answers.
    """

    def __init__(self, made_in: int) -> None:
        super().__init__(
            f"this client belongs to process {made_in}, of which this one (pid {os.getpid()}) is a fork, and can't be "
            "used here: create a client in the child process, or use the start method 'spawn' instead of 'fork'"
        )


class LeaseLost(CorralError):
    """A lease ended while it was in use: it expired, was evicted, lost its host, or was released by another process.

    Attributes:
        lease_id: id of the lease.
        reason: reason for its end, as text.
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


def error_of(error: Error, service: ServiceKind) -> CorralError:
    """The exception that corresponds to an error reply of a service."""
    if error.code == "timeout":
        return TimedOut(error.message)
    if error.code in ("unavailable", "busy"):
        return NoService(error.message, service)
    if error.code == "too_many_requests":
        refusal = TooManyRequests(error.message, error.code, error.field)
        refusal.retry_after_seconds = error.retry_after_seconds
        return refusal
    return _BY_CODE.get(error.code, ServiceError)(error.message, error.code, error.field)
