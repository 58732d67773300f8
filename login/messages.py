"""Messages between `corral login` and the login service, as JSON over HTTP."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Final

from msgspec import Meta, Struct

START_PATH: Final = "/v1/login/start"
POLL_PATH: Final = "/v1/login/poll"
LOGOUT_PATH: Final = "/v1/logout"

PublicKey = Annotated[str, Meta(pattern=r"^U[A-Z2-7]{55}$")]
"""Public NKey of a user; the seed never leaves the client."""


class Start(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Begin of a login.

    Attributes:
        key: that the credentials shall be for.
    """

    key: PublicKey


class Started(Struct, frozen=True, kw_only=True):
    """A login that has begun.

    Attributes:
        session: secret id of the login.
        user_code: code that the person enters, or compares.
        verification_uri: page where to enter it.
        verification_uri_complete: page that has it; empty if there is none.
        expires_seconds: time in which it must be entered.
        interval_seconds: time to wait before the first question, and between two.
    """

    session: str
    user_code: str
    verification_uri: str
    verification_uri_complete: str
    expires_seconds: float
    interval_seconds: float


class Poll(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Question whether the person has logged in.

    Attributes:
        session: id of the login.
    """

    session: Annotated[str, Meta(max_length=128)]


class Waiting(Struct, frozen=True, kw_only=True, tag="waiting", tag_field="type"):
    """The person has not logged in yet.

    Attributes:
        interval_seconds: time to wait before the next question.
    """

    interval_seconds: float


class LoggedIn(Struct, frozen=True, kw_only=True, tag="logged_in", tag_field="type"):
    """Credentials of the bus for a time.

    Attributes:
        user: name of the user of the bus.
        owner: name that devices are requested under.
        role: of the user.
        group: group of the fleet; empty for none.
        expires_at: end of the login.
        nats: URL of the bus; empty if the service does not know how others reach it.
        ca: certificate that the bus's is signed by, in PEM; empty without TLS.
        warnings: of the service.
    """

    user: str
    owner: str
    role: str
    group: str
    expires_at: datetime
    nats: str
    ca: str
    warnings: list[str] = []


class Logout(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """End of a login before its time.

    Attributes:
        user: name of the user of the bus.
        at: time of the request, RFC 3339; within 5 minutes of the service's.
        signature: of `logout <user> <at>` by the user's key, base64.
    """

    user: Annotated[str, Meta(max_length=64)]
    at: datetime
    signature: Annotated[str, Meta(max_length=128)]


def logout_text(user: str, at: datetime) -> bytes:
    """Text that is signed to log out."""
    return f"logout {user} {at.isoformat()}".encode()
