"""The bus side of sessions inside the runs of a host: who may open one, and the answers to its steps."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Collection
from pathlib import Path
from typing import Final, NamedTuple

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from ..bus.permissions import ACROSS, identity_of
from ..bus.tasks import BackgroundTasks, heed_cancellation
from ..schemas import codec, replies, subjects
from ..schemas.requests import Error
from ..schemas.work.attach import AttachEnd, AttachExit, AttachNews, AttachOpen, AttachOpened, AttachStep
from .executors import inside
from .host import Host
from .sessions import Session, SessionError

log = logging.getLogger("corral.runner")

MOST_SESSIONS: Final = 32
"""Open sessions of a host."""
MOST_ASKED: Final = 128
"""Steps of all sessions that wait for their answers."""
WATCH_SECONDS: Final = 0.5
_OVERRIDES: Final = frozenset({"override", "override_step"})
_STEPS: Final = frozenset({"step", "override_step"})


class Caller(NamedTuple):
    """Caller, as the subject names it, which the server checks.

    Attributes:
        name: of the owner, or of the operator.
        operator: true if it asks as an operator.
    """

    name: str
    operator: bool

    def __str__(self) -> str:
        return f"operator {self.name}" if self.operator else self.name


class AttachService:
    """Sessions inside the runs of a host.

    Args:
        nc: connection to the bus.
        host: the runs.
    """

    def __init__(self, nc: Client, host: Host) -> None:
        self._nc = nc
        self._host = host
        self._token = subjects.host_token(host.name)
        self._sessions: dict[str, Session] = {}
        self._asked = BackgroundTasks()

    async def run(self) -> None:
        """Answer until cancelled; then all sessions end."""
        subscription = await self._nc.subscribe(f"{subjects.ATTACH}.*.{self._token}.>", cb=self._on_message)
        try:
            while True:
                heed_cancellation()
                await asyncio.sleep(WATCH_SECONDS)
                for name, session in list(self._sessions.items()):
                    if session.gone:
                        session.end(AttachExit(end=AttachEnd.LOST, message="its client has asked nothing for too long"))
                        await session.close()
                        del self._sessions[name]
        finally:
            with contextlib.suppress(NatsError, OSError, ValueError):
                await subscription.unsubscribe()
            await self._asked.cancel()
            for session in self._sessions.values():
                await session.close()

    def changed(self, keys: Collection[str]) -> None:
        """End the sessions in runs whose commands have ended."""
        for session in self._sessions.values():
            if session.key in keys and not self._host.is_running(session.key):
                session.end(AttachExit(end=AttachEnd.JOB_ENDED, message="the job has ended"))

    async def _on_message(self, message: Msg) -> None:
        # Within an account an answer goes wherever the one who asks wants it, so to these subjects, too. A request has
        # a reply subject, and one of a person comes from another account.
        if not message.reply or (identity_of(self._nc).role and not message.reply.startswith(ACROSS)):
            return
        self._asked.start(self._answer(message), name="session step")

    async def _answer(self, message: Msg) -> None:
        content = replies.asked_in(message.headers)
        reply: AttachOpened | AttachNews | Error
        try:
            reply = await self._carry_out(message, content)
        except codec.DecodeError as error:
            reply = Error(code=error.code, message=str(error), field=error.field)
        with contextlib.suppress(NatsError, OSError):  # without a connection the client asks again
            data = codec.encode(reply, content)
            await self._nc.publish(message.reply, data, headers=replies.headers(reply, content))

    async def _carry_out(self, message: Msg, content: str) -> AttachOpened | AttachNews | Error:
        if len(self._asked) > MOST_ASKED:
            return Error(code="busy", message=f"{self._host.name} has too many sessions")
        verb, _, rest = message.subject.removeprefix(f"{subjects.ATTACH}.").partition(".")
        caller = Caller(rest.removeprefix(f"{self._token}."), verb in _OVERRIDES)
        if verb in _STEPS:
            step, _ = codec.decode_request(message.data, AttachStep, content)
            session = self._sessions.get(step.session)
            if session is None or session.caller != caller:
                return Error(code="ended", message="there is no such session: it has ended", field="$.session")
            return await session.step(step)
        asked, warnings = codec.decode_request(message.data, AttachOpen, content)
        answer = await self._open(asked, caller)
        if isinstance(answer, Error):
            return answer
        name, executor = answer
        return AttachOpened(session=name, executor=executor, warnings=warnings)

    async def _open(self, asked: AttachOpen, caller: Caller) -> tuple[str, str] | Error:
        known = self._host.running(asked.run_id)
        if known is None:
            return Error(code="not_found", message=f"nothing of {asked.run_id} runs on {self._host.name}")
        if not caller.operator and caller.name != known.run.owner:
            return Error(code="not_owner", message=f"job {known.run.job_id} belongs to another owner")
        if len(self._sessions) >= MOST_SESSIONS:
            text = f"{self._host.name} has {MOST_SESSIONS} sessions, which is the most"
            return Error(code="too_many_requests", message=text)
        name = secrets.token_urlsafe(24)
        session = self._sessions[name] = Session(known.key, caller, asked.lost_seconds)
        words, size = asked.command, asked.terminal
        wanted = {
            "words": inside(known.executor, known.key, words, asked.terminal_type if size is not None else None),
            "terminal": None if size is None else [size.rows, size.columns],
            "environment": {"TERM": asked.terminal_type or "dumb"} if size is not None else {},
        }
        folder = Path(self._host.journal.folder_of(known.key).path)
        try:
            await session.open(folder, f"attach-{secrets.token_hex(8)}", wanted, lambda: self._host.poke(known.key))
        except (SessionError, OSError) as error:
            del self._sessions[name]
            return Error(code="unavailable", message=f"no session can be opened on {self._host.name}: {error}")
        log.info("%s: %s has opened a session in %s", self._host.name, caller, asked.run_id)
        return name, known.executor
