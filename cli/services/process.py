"""`corral process`: runs the processor, which writes the history and answers SQL."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Coroutine
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from ..exits import FAILED, USAGE, CommandError
from ..options import NatsUrl
from .logs import LogFormat, LogFormatOption, LogLevel, LogLevelOption, Verbose, configure
from .run_service import STOP_WITHIN, StopWithin, run_service, stop_seconds

if TYPE_CHECKING:
    from nats.aio.client import Client

    from ...processors.query.quack import Settings as RemoteSettings
    from ...processors.service import History
    from ...processors.storage import Retention

_KEEP: Final = "Retention (0: forever)"
_REMOTE: Final = "Endpoint for DuckDB clients"
_SHARED: Final = "History shared by several processors"


def process(
    db: Annotated[
        Path, typer.Option("--db", envvar="CORRAL_DB", metavar="FILE", help="Database file; created if it is missing.")
    ] = Path("corral.duckdb"),
    archive: Annotated[
        Path | None,
        typer.Option(envvar="CORRAL_ARCHIVE", metavar="FOLDER", help="For Parquet files; `archive` next to the file."),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(envvar="CORRAL_MEMORY", metavar="SIZE", help="Memory limit of the database.")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(envvar="CORRAL_THREADS", metavar="N", min=1, help="Threads of the database; one per core."),
    ] = None,
    reports: Annotated[
        Path | None,
        typer.Option(
            envvar="CORRAL_REPORTS", metavar="FILE", help="Reports to make regularly, in TOML (docs/how-to/reports.md)."
        ),
    ] = None,
    nats: NatsUrl = None,
    keep_raw: Annotated[
        str,
        typer.Option(
            envvar="CORRAL_KEEP_RAW",
            metavar="TIME",
            help="Raw samples in the database; then their day is archived.",
            rich_help_panel=_KEEP,
        ),
    ] = "2d",
    keep_archive: Annotated[
        str, typer.Option(envvar="CORRAL_KEEP_ARCHIVE", metavar="TIME", help="Archived days.", rich_help_panel=_KEEP)
    ] = "365d",
    keep_10s: Annotated[
        str, typer.Option(envvar="CORRAL_KEEP_10S", metavar="TIME", help="Rollups of 10 s.", rich_help_panel=_KEEP)
    ] = "7d",
    keep_1m: Annotated[
        str, typer.Option(envvar="CORRAL_KEEP_1M", metavar="TIME", help="Rollups of 1 min.", rich_help_panel=_KEEP)
    ] = "90d",
    keep_1h: Annotated[
        str, typer.Option(envvar="CORRAL_KEEP_1H", metavar="TIME", help="Rollups of 1 h.", rich_help_panel=_KEEP)
    ] = "0",
    force_retention: Annotated[
        bool,
        typer.Option(
            "--force-retention",
            help="Once, delete all expired data by this machine's clock alone.",
            rich_help_panel=_KEEP,
        ),
    ] = False,
    quack: Annotated[
        str | None,
        typer.Option(envvar="CORRAL_QUACK", metavar="HOST:PORT", help="Address to listen on.", rich_help_panel=_REMOTE),
    ] = None,
    quack_token_file: Annotated[
        Path | None,
        typer.Option(
            envvar="CORRAL_QUACK_TOKEN_FILE",
            metavar="FILE",
            help="Token that clients must give; only you may be able to read the file.",
            rich_help_panel=_REMOTE,
        ),
    ] = None,
    lake: Annotated[
        str | None,
        typer.Option(
            envvar="CORRAL_LAKE",
            metavar="CATALOG",
            help="DuckLake instead of --db: its catalog in PostgreSQL.",
            rich_help_panel=_SHARED,
        ),
    ] = None,
    lake_data: Annotated[
        str | None,
        typer.Option(
            envvar="CORRAL_LAKE_DATA",
            metavar="FOLDER",
            help="Where its Parquet files are, the same for all processors: a path, or s3://bucket/prefix.",
            rich_help_panel=_SHARED,
        ),
    ] = None,
    partitions: Annotated[
        int,
        typer.Option(
            envvar="CORRAL_PARTITIONS",
            metavar="N",
            min=1,
            max=1024,
            help="Partitions of the samples: at most as many processors share them.",
            rich_help_panel=_SHARED,
        ),
    ] = 8,
    stop_within: StopWithin = STOP_WITHIN,
    log_format: LogFormatOption = LogFormat.AUTO,
    log_level: LogLevelOption = LogLevel.INFO,
    verbose: Verbose = False,
) -> None:
    """Turn telemetry into history in a DuckDB file, and answer SQL, until stopped.

    Examples:
      corral process                                    ./corral.duckdb
      corral process --db /var/lib/corral/history.duckdb --memory 8GiB --keep-raw 7d
      corral process --quack 127.0.0.1:9494 --quack-token-file token
      corral process --lake "postgres:dbname=corral host=db" --lake-data /shared/corral
      corral process --lake "postgres:dbname=corral host=db" --lake-data s3://bucket/corral

    It may be stopped or killed at any time: it continues after the last message that is in the file.
    """
    from ...schemas.values.units import parse_bytes, parse_seconds

    sys.meta_path.insert(0, _NoPandas())
    # Arrow's own allocator keeps what it has had once.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    identity = configure("processor", log_format, log_level, verbose=verbose)
    within = stop_seconds(stop_within)

    def kept(text: str) -> float | None:
        return parse_seconds(text) or None

    try:
        from ...processors.storage import Retention

        retention = Retention(
            raw=kept(keep_raw) or 365_000 * 86400.0,
            archive=kept(keep_archive),
            ten_seconds=kept(keep_10s),
            minutes=kept(keep_1m),
            hours=kept(keep_1h),
        )
        if retention.minutes is not None and retention.minutes < 3 * 3600:
            raise ValueError(f"--keep-1m {keep_1m}: hours are computed from minutes; keep them for 3h at least")
        memory_bytes = parse_bytes(memory) if memory else None
    except ValueError as error:
        raise CommandError(str(error), USAGE) from error
    if lake is None:
        remote = _remote(quack, quack_token_file)
        history = _embedded(db, archive, memory_bytes, threads, retention, force_retention, remote)
    elif lake_data is None:
        raise CommandError("--lake needs --lake-data: the folder of its files, or s3://bucket/prefix", USAGE)
    else:
        history = _lake(lake, lake_data, partitions, memory_bytes, threads, retention, force_retention)
    beside: Callable[[Client], Coroutine[Any, Any, None]] | None = None
    if reports is not None:
        from .scheduled_reports import make_when_due, read_schedule

        schedule, prices = read_schedule(reports.expanduser())
        beside = lambda nc: make_when_due(history, schedule, prices, nc)  # noqa: E731
    _run(history, nats, identity.named, within, beside)


class _NoPandas(MetaPathFinder):
    """Import hook that hides pandas. If pandas is installed, DuckDB imports it at the first statement with a parameter,
    and pyarrow with the first array, which would cost 0.3 s and 50 MiB without a use."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        if fullname == "pandas":
            raise ModuleNotFoundError("pandas is not used here", name=fullname)
        return None


def _remote(address: str | None, token_file: Path | None) -> RemoteSettings | None:
    if address is None:
        return None
    from ...processors.query import quack

    if token_file is None:
        raise CommandError("--quack needs --quack-token-file: whoever has the token reads the whole history", USAGE)
    try:
        quack.parse_address(address)
        return quack.Settings(address, quack.read_token(token_file))
    except quack.QuackError as error:
        raise CommandError(str(error), USAGE) from error


def _embedded(
    db: Path,
    archive: Path | None,
    memory_bytes: int | None,
    threads: int | None,
    retention: Retention,
    force_retention: bool,
    remote: RemoteSettings | None,
) -> History:
    from ...processors.embedded import EmbeddedHistory

    return EmbeddedHistory(
        db,
        archive=archive,
        memory_bytes=memory_bytes,
        threads=threads,
        retention=retention,
        force_retention=force_retention,
        remote=remote,
    )


def _lake(
    catalog: str,
    data: str,
    partitions: int,
    memory_bytes: int | None,
    threads: int | None,
    retention: Retention,
    force_retention: bool,
) -> History:
    from ...processors.shared import LakeHistory
    from ...processors.storage.lake.lake import Lake

    folder = data if "://" in data else str(Path(data).absolute())
    lake = Lake(catalog, folder, memory_bytes=memory_bytes, threads=threads)
    return LakeHistory(lake, partitions, retention=retention, force_retention=force_retention)


def _run(
    history: History,
    nats: str | None,
    named: Callable[[str], None],
    within_seconds: float,
    beside: Callable[[Client], Coroutine[Any, Any, None]] | None,
) -> None:
    from ...bus.process import collect_garbage_seldom
    from ...processors.query.quack import QuackError
    from ...processors.service import process as work
    from ...processors.storage import StorageError, StoragePaused

    collect_garbage_seldom()
    try:
        run_service(work(history, nats_url=nats, named=named, beside=beside), within_seconds)
    except (StorageError, StoragePaused, QuackError) as error:
        raise CommandError(str(error), FAILED) from error
