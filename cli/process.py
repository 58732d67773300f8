"""`corral process`: write the history and answer SQL."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from .exits import FAILED, USAGE, CommandError
from .options import NatsUrl


def process(
    db: Annotated[
        Path, typer.Option("--db", envvar="CORRAL_DB", metavar="FILE", help="The history; made where it is missing.")
    ] = Path("corral.duckdb"),
    archive: Annotated[
        Path | None,
        typer.Option(envvar="CORRAL_ARCHIVE", metavar="FOLDER", help="For Parquet files; `archive` beside the file."),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(envvar="CORRAL_MEMORY", metavar="SIZE", help="That the database may take.")
    ] = None,
    nats: NatsUrl = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False,
) -> None:
    """Turn telemetry into history in a DuckDB file, and answer SQL, until stopped.

    [bold]Examples[/bold]
      corral process                                    ./corral.duckdb
      corral process --db /var/lib/corral/history.duckdb --memory 8GiB

    It may be stopped or killed at any time: it goes on behind the last message that is in the file.
    """
    from ..schemas.units import parse_bytes

    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        settings: dict[str, Any] = {"archive": archive, "memory_bytes": parse_bytes(memory) if memory else None}
    except ValueError as error:
        raise CommandError(str(error), USAGE) from error
    _run(db, nats, settings)


def _run(db: Path, nats: str | None, settings: dict[str, Any]) -> None:
    import uvloop

    from ..processors.service import process as work
    from ..processors.storage import StorageError

    async def until_stopped() -> None:
        task = asyncio.create_task(work(db, nats_url=nats, **settings))
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, task.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await task

    try:
        uvloop.run(until_stopped())
    except StorageError as error:
        raise CommandError(str(error), FAILED) from error
