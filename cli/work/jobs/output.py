"""`corral logs`: what jobs print, from the bus, with the names of their tasks where there are several."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from typing import Annotated, BinaryIO

import typer

from ....client import Client, LogPiece
from ....client.jobs.names import Selection, parse_selection
from ....schemas.values.units import format_bytes
from ....schemas.work.jobs import task_name
from ... import exits
from ...options import NatsUrl, Timeout, connected, run, say


def logs(
    job: Annotated[str, typer.Argument(metavar="JOB", help="Job or tasks: 1234, 1234_7, 1234_[0-9].")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    head: Annotated[
        int | None, typer.Option("--head", metavar="LINES", min=0, help="Only the first lines of each task.")
    ] = None,
    tail: Annotated[
        int | None, typer.Option("--tail", "-n", metavar="LINES", min=0, help="Only the last lines of each task.")
    ] = None,
    host: Annotated[str | None, typer.Option("--host", help="Only of this host.")] = None,
    attempt: Annotated[
        int | None,
        typer.Option(
            "--attempt", metavar="N", min=1, help="An earlier attempt, from 1. Default: the last of each task."
        ),
    ] = None,
    nats: NatsUrl = None,
    timeout: Timeout = 10.0,
) -> None:
    """Show what a job prints: the begin and the end, which the bus keeps even if the host is gone; with -f also live.

    With several tasks or hosts, each line has the name of its task. What the bus has not kept is said on standard
    error, with the file on the host that has it.

    Examples:
      corral logs 1234
      corral logs -f 1234
      corral logs 1234_7 --tail 20
      corral logs -f '1234_[0-9]'
      corral logs 1234 --attempt 1                     what it printed before it was retried
    """
    if head is not None and (tail is not None or follow):
        raise exits.CommandError("--head goes with neither --tail nor --follow", exits.USAGE)
    if attempt is not None and follow:
        raise exits.CommandError("--attempt goes without --follow, which shows each attempt as it runs", exits.USAGE)

    async def work() -> None:
        async with connected(nats, timeout=timeout) as client:
            await print_logs(
                client, parse_selection(job), follow=follow, head=head, tail=tail, host=host, attempt=attempt
            )

    run(work())


async def print_logs(
    client: Client,
    which: str | Selection,
    *,
    follow: bool = False,
    head: int | None = None,
    tail: int | None = None,
    host: str | None = None,
    attempt: int | None = None,
) -> None:
    """Print what a job, or some of its tasks, have printed.

    Args:
        client: the client.
        which: job or tasks.
        follow: go on until they have ended.
        head: only the first lines of each.
        tail: only the last lines of each, of what is stored.
        host: only of this host.
        attempt: number of an attempt, from 1; None for the last of each task.
    """
    chosen = parse_selection(which) if isinstance(which, str) else which
    listing = await client.jobs.get(chosen)
    if chosen.indexes and not listing.tasks:
        raise exits.CommandError(
            f"job {chosen.job_id} has no such task: see corral job {chosen.job_id}", exits.NOT_YOURS
        )
    several_tasks = bool(listing.job.array) and len(chosen.indexes) != 1
    several_hosts = listing.job.hosts > 1 and host is None
    printer = Printer(
        sys.stdout.buffer,
        lambda piece: " ".join(
            ([task_name(chosen.job_id, piece.index)] if several_tasks else []) + ([piece.host] if several_hosts else [])
        ),
        head=head,
        tail=None if follow else tail,
    )
    if follow and tail is not None:
        # What is stored is cut first; what comes then is printed whole.
        seen = Printer(sys.stdout.buffer, printer.name, tail=tail)
        positions: dict[tuple[int, str], tuple[int, int]] = {}
        async for piece in client.jobs.logs(chosen, host=host):
            seen.write(piece)
            positions[piece.index, piece.host] = (piece.attempt, piece.offset + len(piece.data))
        seen.end()
        async for piece in client.jobs.logs(chosen, follow=True, host=host):
            if (piece.attempt, piece.offset) >= positions.get((piece.index, piece.host), (0, 0)):
                printer.write(piece)
        printer.end()
        return
    async for piece in client.jobs.logs(chosen, follow=follow, host=host, attempt=attempt):
        printer.write(piece)
    printer.end()


class Printer:
    """Prints pieces of output: as they are where there is one, else line by line with names.

    Args:
        out: where the output goes.
        name: name of what printed a piece; empty if there is only one.
        head: print only so many first lines of each.
        tail: print only so many last lines of each, at the end.
    """

    def __init__(
        self, out: BinaryIO, name: Callable[[LogPiece], str], head: int | None = None, tail: int | None = None
    ) -> None:
        self.name = name
        self._out = out
        self._head = head
        self._tail = tail
        self._kept: dict[str, deque[bytes]] = {}
        self._begun: dict[str, bytes] = {}
        self._lines: dict[str, int] = {}

    def write(self, piece: LogPiece) -> None:
        """Print what is whole of a piece, and say what is missing before it."""
        name = self.name(piece)
        if piece.missed and self._tail is None and not self._is_over(name):
            self._flush(name)
            self._out.flush()
            where = f", in {piece.file} on {piece.host}" if piece.file else f" on {piece.host}"
            who = f"{name}: " if name else ""
            say(f"corral: {who}{format_bytes(piece.missed)} were not kept here{where}")
        if not name and self._head is None and self._tail is None:
            self._out.write(piece.data)
            self._out.flush()
            return
        begun = b"" if piece.missed else self._begun.pop(name, b"")
        *lines, rest = (begun + piece.data).split(b"\n")
        for line in lines:
            self._print(name, line)
        self._begun[name] = rest
        self._out.flush()

    def end(self) -> None:
        """Print what has no line feed yet, and the last lines of each."""
        for name in list(self._begun):
            self._flush(name)
        for name, lines in self._kept.items():
            for line in lines:
                self._print_now(name, line)
        self._out.flush()

    def _flush(self, name: str) -> None:
        if rest := self._begun.pop(name, b""):
            self._print(name, rest)

    def _is_over(self, name: str) -> bool:
        return self._head is not None and self._lines.get(name, 0) >= self._head

    def _print(self, name: str, line: bytes) -> None:
        if self._tail is not None:
            self._kept.setdefault(name, deque(maxlen=self._tail)).append(line)
        elif not self._is_over(name):
            self._lines[name] = self._lines.get(name, 0) + 1
            self._print_now(name, line)

    def _print_now(self, name: str, line: bytes) -> None:
        self._out.write((f"{name} | ".encode() if name else b"") + line + b"\n")
