"""Messages of a caller, passed on to the bus as they came, and their replies."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any, Final, cast

import nats.errors
from nats.aio.msg import Msg

from ..bus.credentials import ANY_OWNER
from ..client.errors import CorralError
from ..client.owned_calls import OwnedCalls
from ..client.rpc import RETRY_SECONDS
from ..schemas import codec, replies
from ..schemas.requests import OwnerName
from .answers import Answer, Failed, answer_of
from .callers import Caller
from .routes import Route

_JSON: Final = {codec.CONTENT_TYPE_HEADER: codec.JSON}
_OWNER_IN: Final = {"submit": ("request", "owner")}
"""Place of the name in a message, by channel, where the channel does not say it."""


class Passing(OwnedCalls):
    """Calls whose bodies are passed on as bytes.

    Args:
        caller: whose connection is used.
    """

    def __init__(self, caller: Caller) -> None:
        super().__init__(
            caller.nc,
            owner=caller.client.owner,
            timeout=caller.client.timeout,
            patience=caller.client.patience,
            owned_subjects=True,
        )

    async def reply(self, subject: str, payload: bytes) -> Msg:
        """The reply to a message; while a service restarts, it is sent again for a while.

        Raises:
            CorralError: there is none, or the server refuses the message.
        """
        for attempt in self._patiently():
            try:
                found = await self._ask(subject, payload, _JSON)
                if (found.headers or {}).get(replies.ERROR_CODE_HEADER) != "503" or not attempt():
                    return found
            except nats.errors.NoRespondersError as error:
                if not attempt():
                    raise self._bus_error(error, subject) from None
            except (nats.errors.Error, OSError) as error:
                raise self._bus_error(error, subject) from error
            await asyncio.sleep(RETRY_SECONDS)
        raise AssertionError("unreachable")


async def passed(caller: Caller, route: Route, body: bytes) -> Answer:
    """Pass a message on, and return its answer.

    Raises:
        CorralError: no service answers, or the server refuses it.
        DecodeError: it is no JSON object.
        Failed: it does not name the owner whom it is for.
    """
    subject = subject_of(route, caller, body)
    if route.name == "submit":
        body = _with_submit_id(body)
    reply = await Passing(caller).reply(subject, body)
    return answer_of(reply, rejections_fail=route.name != "withdraw")


def _with_submit_id(body: bytes) -> bytes:
    """A job with an id if it has none, so that it may be sent again without being submitted twice."""
    tree: dict[str, Any] = codec.decode(body, cast("type[Any]", dict[str, Any]), codec.JSON)
    if tree.get("submit_id") is not None:
        return body
    return codec.encode_again({**tree, "submit_id": uuid.uuid4().hex}, codec.JSON)


def subject_of(route: Route, caller: Caller, body: bytes) -> str:
    """Subject of a message: its channel's, with the caller's own name where the channel has one.

    Credentials for any owner may name another in the message; the server and the services check it again.

    Raises:
        DecodeError: the message is no JSON object.
        Failed: it does not name the owner whom it is for, or the caller's credentials have none.
    """
    channel = route.channel
    assert channel is not None
    subject = channel.subject
    if not channel.parameters:
        return subject
    (name,) = channel.parameters
    return subject.replace(f"{{{name}}}", _name_of(name, route, caller, body))


def _name_of(name: str, route: Route, caller: Caller, body: bytes) -> str:
    identity = caller.identity
    if name == "user":
        return identity.user
    if identity.owner != ANY_OWNER:
        if name == "operator":
            return identity.user
        if not identity.owner:
            raise Failed("refused", f"A {identity.role or 'user without an owner'} makes no requests")
        return identity.owner
    channel = route.channel
    assert channel is not None
    place = _OWNER_IN.get(channel.name, (channel.said_by_subject,))
    named: Any = codec.decode(body, cast("type[Any]", dict[str, Any]), codec.JSON) if body else {}
    for part in place:
        named = cast("dict[str, Any]", named).get(part) if isinstance(named, dict) else None
    path = f"$.{'.'.join(place)}"
    if not named:
        if name == "operator":
            return identity.user
        text = f"Your credentials are for any owner: name the one whom this is for - at `{path}`"
        raise Failed("invalid", text, path)
    return checked_owner(named, path)


def checked_owner(owner: object, path: str) -> str:
    """An owner that can stand in a subject.

    Raises:
        DecodeError: it can't.
    """
    try:
        text = codec.decode(codec.encode(owner, codec.JSON), cast("type[str]", OwnerName), codec.JSON)
    except codec.DecodeError as error:
        raise codec.DecodeError(f"{error} - at `{path}`", "invalid", path) from None
    if text.endswith(".") or ".." in text:
        raise codec.DecodeError(f"An owner has no empty part between dots - at `{path}`", "invalid", path)
    return text


__all__ = ["CorralError", "Passing", "checked_owner", "passed", "subject_of"]
