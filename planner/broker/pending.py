"""A request that is being decided, and all who wait for its answer."""

from __future__ import annotations

from typing import Final, Protocol

from msgspec import Struct

from ...bus.permissions import ACROSS
from ...schemas.requests import WorkRequest
from .heavy import Heavy
from .queue import Waiting

_MOST_CALLERS: Final = 64
"""Who asks again has most often given up on its earlier question."""
_MOST_ACROSS: Final = 4
"""Over accounts the same one has another subject each time that it asks again."""


class Caller(Protocol):
    """Who asked, and waits for one answer."""

    @property
    def reply_to(self) -> str:
        """Where the answer goes."""
        ...

    @property
    def line(self) -> str:
        """Names the one who asks again and again under an id while it waits; empty for one that does not say."""
        ...

    async def answer(self, reply: Struct) -> None:
        """Answer."""
        ...

    def forward(self, body: Struct) -> None:
        """Let another planner answer, since this one leads no more."""
        ...


class Opened:
    """A request that is being decided, with all who asked it.

    Args:
        digest: of its body.
        request: with its id.
        caller: who asked first.
        named: the id is the caller's own: it may be asked again under it.
        heavy: where its work items are, if they are much work.

    Attributes:
        callers: who waits for the answer.
        entry: its place in line; None while it has none.
        unseen: it is being withdrawn, and has not come: `request` names its owner and no more.
    """

    __slots__ = ("callers", "digest", "entry", "heavy", "named", "request", "unseen")

    def __init__(
        self, digest: str, request: WorkRequest, caller: Caller, named: bool, heavy: Heavy | None = None
    ) -> None:
        self.digest = digest
        self.request = request
        self.callers = [caller]
        self.named = named
        self.heavy = heavy
        self.entry: Waiting | None = None
        self.unseen = False

    @property
    def key(self) -> tuple[str, str]:
        """Names it: an id is its owner's own."""
        return self.request.owner, self.request.request_id or ""

    def join(self, caller: Caller) -> list[Caller]:
        """One more waits for the answer. Each place gets it once, and of too many the oldest gets none.

        Returns:
            Earlier questions of the very same one, which wait no more: where answers come over accounts, each question
            has a subject of its own, that the server keeps until it is answered.
        """
        others = [other for other in self.callers if other.reply_to != caller.reply_to]
        before = [other for other in others if caller.line and other.line == caller.line]
        most = _MOST_ACROSS if caller.reply_to.startswith(ACROSS) else _MOST_CALLERS
        self.callers = [other for other in others if other not in before][1 - most :]
        self.callers.append(caller)
        return before

    def told(self) -> list[Caller]:
        """Those who wait for the answer, and get another one in its place."""
        waiting = [caller for caller in self.callers if not isinstance(caller, Onlooker)]
        self.callers = [caller for caller in self.callers if isinstance(caller, Onlooker)]
        return waiting


class Onlooker:
    """Waits for the answer to a request without having sent that very body, which is what another planner is asked."""

    def __init__(self, body: Struct, caller: Caller) -> None:
        self._body = body
        self._caller = caller

    @property
    def reply_to(self) -> str:
        """Where the answer goes."""
        return self._caller.reply_to

    @property
    def line(self) -> str:
        """Nobody in line."""
        return ""

    async def answer(self, reply: Struct) -> None:
        """Answer."""
        await self._caller.answer(reply)

    def forward(self, body: Struct) -> None:
        """Let another planner answer what was sent."""
        self._caller.forward(self._body)
