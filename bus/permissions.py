"""Permissions of a connection, and fast failure of refused requests: the server's refusal names only the subject."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Generator
from typing import Any, Final
from weakref import WeakKeyDictionary

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from .credentials import Identity
from .tasks import heeding

_VIOLATION: Final = re.compile(r'permissions violation for (publish|subscription) to "([^"]+)"', re.IGNORECASE)
_SEES_TO_STREAMS: Final = ("", "planner", "processor", "admin")
"""Roles that may create streams; without a role nothing is restricted, as far as is known."""


ACROSS: Final = "_R_."
"""Prefix of the reply subjects that the server generates for requests from another account."""


class NotAllowed(NatsError):
    """The server does not let this connection publish on a subject.

    Attributes:
        subject: that was refused.
    """

    def __init__(self, subject: str, identity: Identity) -> None:
        who = f"{identity.user} ({identity.role})" if identity.user else "these credentials"
        super().__init__(f"the bus does not let {who} publish on {subject}")
        self.subject = subject


class _Waiting:
    """Futures that wait for an answer, by subject in lower case, since nats-py reports refused subjects like that."""

    def __init__(self) -> None:
        self.by_subject: dict[str, set[asyncio.Future[Any]]] = {}


_identities: WeakKeyDictionary[Client, Identity] = WeakKeyDictionary()
_waiting: WeakKeyDictionary[Client, _Waiting] = WeakKeyDictionary()


def identity_of(nc: Client) -> Identity:
    """Identity of a connection; an empty one if it was not made by `bus.connect`."""
    return _identities.get(nc) or Identity()


def may_make_streams(nc: Client) -> bool:
    """True if a connection may create streams and buckets, as far as its credentials say."""
    return identity_of(nc).role in _SEES_TO_STREAMS


def with_name(subject: str, name: str) -> str:
    """Error message for a request on a subject that lacks a name.

    Args:
        subject: that was used.
        name: kind of the name that it lacks: `owner`, `user` or `operator`.
    """
    whose = "the owner of your credentials" if name == "owner" else "the user whose credentials they are"
    return f"On this bus the subject says who asks: ask on {subject}.<{name}>, {whose}"


def admit(nc: Client, identity: Identity) -> None:
    """Register the identity of a connection, and track its requests for refusals."""
    _identities[nc] = identity
    _waiting[nc] = _Waiting()


def refused(nc: Client, error: Exception) -> None:
    """Cancel the futures that wait for an answer on a subject which the server has refused to publish on."""
    found = _VIOLATION.search(str(error))
    waiting = _waiting.get(nc)
    if found is None or waiting is None or found[1].lower() != "publish":
        return
    for future in waiting.by_subject.get(found[2].lower(), ()):
        if not future.done():
            future.cancel()


@contextlib.contextmanager
def refusals(nc: Client, subject: str) -> Generator[asyncio.Future[None]]:
    """A future that is cancelled when the server refuses what is published on a subject within the block."""
    stopped: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    waiting = _waiting.get(nc)
    key = subject.lower()
    if waiting is not None:
        waiting.by_subject.setdefault(key, set()).add(stopped)
    try:
        yield stopped
    finally:
        if waiting is not None:
            waiting.by_subject[key].discard(stopped)
            if not waiting.by_subject[key]:
                del waiting.by_subject[key]


async def request(nc: Client, subject: str, payload: bytes = b"", *, timeout: float, headers: Any = None) -> Msg:
    """Send a request as `nc.request` does, but fail at once if the server refuses it.

    Raises:
        NotAllowed: it was refused.
        nats.errors.Error: as `nc.request`.
    """
    waiting = _waiting.get(nc)
    if waiting is None:
        return await heeding(nc.request(subject, payload, timeout=timeout, headers=headers))
    asking = asyncio.ensure_future(nc.request(subject, payload, timeout=timeout, headers=headers))
    try:
        with refusals(nc, subject) as stopped:
            await asyncio.wait({asking, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if stopped.cancelled() and not asking.done():
                raise NotAllowed(subject, identity_of(nc))
            return await asking
    finally:
        if not asking.done():
            asking.cancel()
