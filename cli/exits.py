"""Exit codes of the `corral` command, and the errors that lead to each. They are part of its interface."""

from __future__ import annotations

from typing import Final

OK: Final = 0
FAILED: Final = 1
USAGE: Final = 2
NO_SERVER: Final = 3
REJECTED: Final = 4
NOT_YOURS: Final = 5
NO_SERVICE: Final = 6
TIMED_OUT: Final = 7
QUERY_FAILED: Final = 8
LEASE_LOST: Final = 9
NOT_EXECUTABLE: Final = 126
NOT_FOUND: Final = 127
INTERRUPTED: Final = 130
SESSION_LOST: Final = 255
"""As `ssh` has it."""

MEANINGS: Final[dict[int, str]] = {
    OK: "done",
    FAILED: "unexpected error (`CORRAL_DEBUG=1` prints its traceback); `corral doctor` found a problem",
    USAGE: "wrong usage, or an invalid field in a request",
    NO_SERVER: "no NATS server answers",
    REJECTED: "the work request was rejected, or exceeds a rate limit",
    NOT_YOURS: "not found (lease, device, host), owned or held by someone else, or not permitted",
    NO_SERVICE: "the NATS server answers, but no planner, processor or notifier does",
    TIMED_OUT: "no answer in time",
    QUERY_FAILED: "the query is invalid, not permitted, or was stopped",
    LEASE_LOST: "`corral run`, `corral submit --wait`: the lease ended before the command did",
    NOT_EXECUTABLE: "`corral run`: the command can't be run",
    NOT_FOUND: "`corral run`: there is no such command",
    INTERRUPTED: "interrupted",
    SESSION_LOST: "`corral attach`: the session ended before its command did",
}


class CommandError(Exception):
    """A command failed: the message is shown as one line, and `code` is the exit code."""

    def __init__(self, message: str, code: int = FAILED) -> None:
        super().__init__(message)
        self.code = code


_EXTRAS: Final[dict[str, str]] = {
    "collectors": "simulated",
    "processors": "processor",
    "planner": "planner",
    "pynvml": "collector",
    "amdsmi": "amd",
    "gguf": "fit",
    "login": "oidc",
    "textual": "top",
    "cryptography": "auth",
    "highspy": "simulate",
    "nicegui": "dashboard",
    "reportlab": "report",
    "apprise": "notify",
    "prometheus_client": "exporter",
    "opentelemetry": "otlp",
}
"""Extra that installs a library or the dependencies of a part; a host has only the extras of the parts it runs."""


def _missing(error: ModuleNotFoundError) -> str | None:
    """Message that names the extra to install for a missing library; None if no extra installs it."""
    library = (error.name or "").split(".")[0]
    trace = error.__traceback__
    parts: list[str] = [library]
    while trace is not None:
        parts.append(trace.tb_frame.f_globals.get("__name__", "").removeprefix("corral.").split(".")[0])
        trace = trace.tb_next
    if library == "corral":
        return None
    extra = next((_EXTRAS[part] for part in parts if part in _EXTRAS), None)
    return extra and f"this needs {library}, which is not installed: pip install 'corral[{extra}]'"


def code_and_message(error: BaseException) -> tuple[int, str]:
    """Exit code and one-line message for an error."""
    from ..bus.connect import BusUnavailable, WrongSetting
    from ..client import errors
    from ..client.config import ConfigError
    from .local.server import ServerError

    # Of several errors that were raised together, the first one is reported.
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, CommandError):
        return error.code, str(error)
    if isinstance(error, ModuleNotFoundError) and (message := _missing(error)):
        return FAILED, message
    if isinstance(error, errors.InvalidRequest):
        return USAGE, f"{error}" + (f" ({error.field})" if error.field and error.field not in str(error) else "")
    if isinstance(error, errors.LeaseLost):
        return LEASE_LOST, str(error)
    for kind, code in (
        (errors.Rejected, REJECTED),
        (errors.NotFound, NOT_YOURS),
        (errors.NotOwner, NOT_YOURS),
        (errors.Refused, NOT_YOURS),
        (errors.Conflict, NOT_YOURS),
        (errors.TooManyRequests, REJECTED),
        (errors.NoService, NO_SERVICE),
        (ConfigError, USAGE),
        (errors.Unavailable, NO_SERVER),
        (BusUnavailable, NO_SERVER),
        (WrongSetting, USAGE),
        (errors.TimedOut, TIMED_OUT),
        (errors.QueryFailed, QUERY_FAILED),
        (errors.CorralError, FAILED),
        (ServerError, FAILED),
    ):
        if isinstance(error, kind):
            return code, str(error)
    return FAILED, f"{type(error).__name__}: {error}"
