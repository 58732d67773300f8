"""`corral snapshot`: downloads a consistent copy of the history."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final

import typer

from ...bus.connect import connect
from ...schemas import codec, subjects
from ..exits import FAILED, NO_SERVICE, TIMED_OUT, USAGE, CommandError
from ..options import AsJson, NatsUrl, console, print_json, run, say


def snapshot(
    out: Annotated[Path, typer.Argument(metavar="FILE", help="The DuckDB file to write.")],
    archive: Annotated[bool, typer.Option(help="Include the samples of archived days.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
    as_json: AsJson = False,
    timeout: Annotated[str, typer.Option(metavar="TIME", help="Timeout for making the copy.")] = "10m",
    nats: NatsUrl = None,
) -> None:
    """Download a consistent copy of the history as a DuckDB file, while ingest continues.

    Examples:
      corral snapshot history-copy.duckdb
      duckdb history-copy.duckdb "FROM fleet_by_hour"

    The copy is one moment of every table, in a file that any DuckDB opens.
    """
    from ...schemas.values.units import format_bytes, parse_seconds

    try:
        seconds = parse_seconds(timeout)
    except ValueError as error:
        raise CommandError(f"--timeout: {error}", USAGE) from error
    if out.exists() and not force:
        raise CommandError(f"{out} exists already: use another file, or --force", USAGE)
    if not out.absolute().parent.is_dir():
        raise CommandError(f"there is no folder {out.absolute().parent}", USAGE)
    with _progress() as on_progress:
        made = run(_fetch(out, archive, seconds, nats, on_progress))
    if as_json:
        print_json({"file": str(out), "bytes": made["bytes"], "samples": made["samples"]})
    else:
        say(f"{out}: {made['samples']:,} samples, {format_bytes(made['bytes'])}")


_PIECES_AT_ONCE: Final = 8


@contextmanager
def _progress() -> Generator[Callable[[int, int], None]]:
    """Show a progress bar on a terminal, and nothing in a pipe: the processor makes the copy, then it is downloaded."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    shown = console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=shown, transient=True, disable=not shown.is_terminal) as bar:
        task = bar.add_task("making the copy", total=None)

        def on_progress(done: int, whole: int) -> None:
            bar.update(task, description="copying", completed=done, total=whole)

        yield on_progress


async def _fetch(
    out: Path, archive: bool, seconds: float, nats: str | None, on_progress: Callable[[int, int], None]
) -> dict[str, int]:
    from nats.errors import NoRespondersError
    from nats.errors import TimeoutError as NatsTimeoutError

    from ...client.query import user_subject
    from ...schemas.query import Snapshot, SnapshotRead, SnapshotRequest
    from ...schemas.replies import ERROR_CODE_HEADER
    from ...schemas.requests import Error

    nc = await connect(nats, name="corral-cli", wait_seconds=1.5, max_reconnect_attempts=3)
    part = out.with_name(out.name + ".part")
    try:
        try:
            body = codec.encode(SnapshotRequest(archive=archive), codec.JSON)
            reply = await nc.request(user_subject(nc, subjects.SNAPSHOT), body, timeout=seconds)
        except NoRespondersError:
            raise CommandError("no processor answers: start one with `corral process`", NO_SERVICE) from None
        except NatsTimeoutError:
            raise CommandError(f"no snapshot after {seconds:g} s (--timeout)", TIMED_OUT) from None
        if b'"type":"error"' in reply.data[:64]:
            raise CommandError(codec.decode(reply.data, Error, codec.JSON).message, FAILED)
        made = codec.decode(reply.data, Snapshot, codec.JSON)

        async def piece(offset: int) -> bytes:
            read = codec.encode(SnapshotRead(snapshot_id=made.snapshot_id, offset=offset), codec.JSON)
            answer = await nc.request(user_subject(nc, subjects.SNAPSHOT_READ), read, timeout=30)
            if ERROR_CODE_HEADER in (answer.headers or {}):
                raise CommandError(codec.decode(answer.data, Error, codec.JSON).message, FAILED)
            return answer.data

        size = len(await piece(0)) or 1
        with part.open("wb") as file:
            for start in range(0, made.bytes, size * _PIECES_AT_ONCE):
                offsets = range(start, min(start + size * _PIECES_AT_ONCE, made.bytes), size)
                for data in await asyncio.gather(*(piece(offset) for offset in offsets)):
                    file.write(data)
                on_progress(file.tell(), made.bytes)
            file.flush()
            os.fsync(file.fileno())
            if file.tell() != made.bytes:
                raise CommandError(f"only {file.tell():,} of {made.bytes:,} bytes arrived: try again", FAILED)
        part.replace(out)
        done = SnapshotRead(snapshot_id=made.snapshot_id, done=True)
        await nc.publish(user_subject(nc, subjects.SNAPSHOT_READ), codec.encode(done, codec.JSON))
        return {"bytes": made.bytes, "samples": made.samples}
    finally:
        part.unlink(missing_ok=True)
        await nc.close()
