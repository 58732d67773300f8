"""`corral attach`: a shell, or a command, inside a running job."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import termios
import threading
import tty
from collections.abc import Coroutine, Generator
from concurrent.futures import CancelledError
from typing import Annotated, Any, Final

import typer

from ....bus.tasks import cancel_all
from ....client import CorralError, NotOwner, Refused
from ....client.attach import AttachedSession
from ....client.jobs.names import parse_selection
from ....schemas.work.attach import AttachEnd, AttachExit, TerminalSize
from ... import exits
from ...options import NatsUrl, Timeout, connected, run, say

_READ_BYTES: Final = 32 * 1024


def attach(
    job: Annotated[str, typer.Argument(metavar="JOB", help="Job or task of an array: 1234, 1234_7.")],
    command: Annotated[
        list[str] | None, typer.Argument(metavar="[COMMAND]...", help="Command behind --; default: a shell.")
    ] = None,
    host: Annotated[str | None, typer.Option("--host", help="Host of a task on several; default: the first.")] = None,
    override: Annotated[bool, typer.Option("--override", help="As an operator, in a job of another owner.")] = False,
    nats: NatsUrl = None,
    timeout: Timeout = 10.0,
) -> None:
    """Open a shell, or run a command, inside a running job: on its host, as its account, with its GPUs.

    It has the environment and the working directory of the job, and its confinement; it ends with the job. With a
    terminal at both ends it gets a terminal, and else pipes. What it has started ends with it.

    The exit code is that of the command, 128 plus the number of the signal that ended it, and 255 if the session ends
    otherwise.

    Examples:
      corral attach 1234
      corral attach 1234_7 -- nvidia-smi
      corral attach 1234 --host node2 -- py-spy dump --pid 4711
    """
    chosen = parse_selection(job)

    async def work() -> int:
        async with connected(nats, timeout=timeout) as client:
            has_terminal = sys.stdin.isatty() and sys.stdout.isatty()
            try:
                session = await client.jobs.attach(
                    chosen,
                    command or (),
                    host=host,
                    terminal=_size() if has_terminal else None,
                    terminal_type=os.environ.get("TERM", "") if has_terminal else "",
                    operator=override,
                )
            except (NotOwner, Refused) as error:
                if override:
                    raise
                raise type(error)(f"{error} (operators: --override)", error.code, error.field) from None
            try:
                return await _relay(session, has_terminal=has_terminal)
            except CorralError as error:
                say(f"corral: {error}")
                return exits.SESSION_LOST

    raise typer.Exit(run(work()))


async def _relay(session: AttachedSession, *, has_terminal: bool) -> int:
    """Relay input and output until the session has ended. Returns the exit code."""
    loop = asyncio.get_running_loop()
    closed = asyncio.Event()
    numbers = (signal.SIGTERM, signal.SIGHUP)
    tasks: list[asyncio.Task[Any]] = []

    def later(work: Coroutine[Any, Any, object]) -> None:
        tasks.append(asyncio.create_task(work))

    for number in numbers:
        loop.add_signal_handler(number, closed.set)
    if has_terminal:
        loop.add_signal_handler(signal.SIGWINCH, lambda: later(session.resize(_size())))
    else:
        loop.add_signal_handler(signal.SIGINT, lambda: later(session.signal(signal.SIGINT)))
    try:
        with _raw(sys.stdin.fileno()) if has_terminal else contextlib.nullcontext():
            output = asyncio.create_task(_print(session))
            later(_type(session, sys.stdin.fileno()))
            later(closed.wait())
            waiting = tasks[-1]
            await asyncio.wait({output, waiting}, return_when=asyncio.FIRST_COMPLETED)
            if output.done():
                output.result()
            else:
                output.cancel()
    finally:
        await cancel_all(tasks)
        await session.close()
    return _code(session.exit, session)


def _code(end: AttachExit | None, session: AttachedSession) -> int:
    if end is None:
        return exits.SESSION_LOST
    if end.message:
        say(f"corral: {session.place.name}: {end.message}")
    if end.signal is not None:
        return 128 + end.signal
    if end.exit_code is not None and end.end in (AttachEnd.EXITED, AttachEnd.NOT_EXECUTED):
        return end.exit_code
    return exits.SESSION_LOST


async def _print(session: AttachedSession) -> None:
    """Print what comes, in a thread: a reader that is slow shall not keep the session from answering."""
    async for output, errors in session.output():
        for data, file in ((output, 1), (errors, 2)):
            if data:
                await asyncio.to_thread(_write_all, file, data)


def _write_all(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


async def _type(session: AttachedSession, file: int) -> None:
    """Send what is read from a file, until its end. A thread reads, since a file may be one that can't be polled."""
    loop = asyncio.get_running_loop()
    read: asyncio.Queue[bytes] = asyncio.Queue(1)

    def reading() -> None:
        with contextlib.suppress(OSError, RuntimeError, CancelledError):
            while True:
                data = os.read(file, _READ_BYTES)
                asyncio.run_coroutine_threadsafe(read.put(data), loop).result()
                if not data:
                    return

    threading.Thread(target=reading, daemon=True).start()
    while data := await read.get():
        await session.write(data)
    await session.write(b"", ended=True)


def _size() -> TerminalSize:
    try:
        size = os.get_terminal_size(sys.stdout.fileno())
    except OSError:
        return TerminalSize()
    return TerminalSize(rows=size.lines, columns=size.columns)


@contextlib.contextmanager
def _raw(file: int) -> Generator[None]:
    """Have a terminal pass all that is typed on as it is, Control-C too."""
    before = termios.tcgetattr(file)
    tty.setraw(file)
    try:
        yield
    finally:
        termios.tcsetattr(file, termios.TCSADRAIN, before)
