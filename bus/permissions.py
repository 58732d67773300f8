"""What a connection may do, as the server says it: it refuses a message without telling who waits for its answer."""

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

_VIOLATION: Final = re.compile(r'permissions violation for (publish|subscription) to "([^"]+)"', re.IGNORECASE)
_SEES_TO_STREAMS: Final = ("", "planner", "processor", "admin")
"""Roles that may make streams; without a role nobody has narrowed anything, as far as one knows."""


ACROSS: Final = "_R_."
"""Reply subjects that the server makes up for those who ask from another account."""


class NotAllowed(NatsError):
    """The server does not let this connection publish there.

    Attributes:
        subject: that was refused.
    """

    def __init__(self, subject: str, identity: Identity) -> None:
        who = f"{identity.user} ({identity.role})" if identity.user else "these credentials"
        super().__init__(f"the bus does not let {who} publish on {subject}")
        self.subject = subject


class _Waiting:
    """Who waits for an answer, by the subject as the server repeats it, which nats-py sets in lower case."""

    def __init__(self) -> None:
        self.by_subject: dict[str, set[asyncio.Future[Any]]] = {}


_identities: WeakKeyDictionary[Client, Identity] = WeakKeyDictionary()
_waiting: WeakKeyDictionary[Client, _Waiting] = WeakKeyDictionary()


def identity_of(nc: Client) -> Identity:
    """Who a connection is; nobody in particular where it was not made by `bus.connect`."""
    return _identities.get(nc) or Identity()


def may_make_streams(nc: Client) -> bool:
    """Whether a connection may make streams and buckets, as far as its credentials say."""
    return identity_of(nc).role in _SEES_TO_STREAMS


def with_name(subject: str, name: str) -> str:
    """What one is told who has asked on a subject without a name.

    Args:
        subject: as they asked on it.
        name: whose it lacks: `owner`, `user` or `operator`.
    """
    whose = "the owner of your credentials" if name == "owner" else "the user whose credentials they are"
    return f"On this bus the subject says who asks: ask on {subject}.<{name}>, {whose}"


def admit(nc: Client, identity: Identity) -> None:
    """Remember who a connection is."""
    _identities[nc] = identity
    _waiting[nc] = _Waiting()


def refused(nc: Client, error: Exception) -> None:
    """Tell who waits for an answer that the server has refused the question."""
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
    """As `nc.request`, but a question that the server refuses ends at once.

    Raises:
        NotAllowed: it was refused.
        nats.errors.Error: as `nc.request`.
    """
    waiting = _waiting.get(nc)
    if waiting is None:
        return await nc.request(subject, payload, timeout=timeout, headers=headers)
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
