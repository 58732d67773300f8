"""Commands inside running jobs, as `corral attach` starts them."""

from __future__ import annotations

from corral.client.attach import Place, open_session
from corral.schemas.work.attach import LOST_SECONDS, TerminalSize
from nats.aio.client import Client


async def inside(
    nc: Client, run_id: str, *words: str, owner: str = "alice", host: str = "node-7", terminal: bool = False
) -> tuple[str, int]:
    """What a command inside a run prints, and its exit code."""
    session = await open_session(
        nc,
        Place(run_id, host, run_id),
        owner,
        words,
        override=False,
        terminal=TerminalSize() if terminal else None,
        terminal_type="vt100" if terminal else "",
        lost_seconds=LOST_SECONDS,
    )
    printed = b""
    async for some in session.output():
        printed += some.output + some.error_output
    assert session.exit is not None
    assert session.exit.exit_code is not None, session.exit
    return printed.decode(), session.exit.exit_code
