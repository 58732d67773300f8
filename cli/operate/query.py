"""`corral query`: SQL over the history, as a table, JSON, CSV or an Arrow file."""

from __future__ import annotations

import contextlib
import os
import sys
import uuid
from collections.abc import AsyncGenerator, Generator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Final

import msgspec
import typer

from ...schemas.query import MAX_ROWS, QueryEnd, QueryRequest, ResultFormat
from ...schemas.values.units import parse_seconds
from ..exits import FAILED, QUERY_FAILED, TIMED_OUT, USAGE, CommandError
from ..options import AsJson, NatsUrl, connected, console, run, say
from ..render import local_time

VERTICAL_ROWS: Final = 10
"""Maximum number of rows that are shown vertically if too wide for the terminal; of more, only columns that fit."""


def query(
    sql: Annotated[
        str | None,
        typer.Argument(metavar="[SQL]", help="One SELECT, FROM, WITH, DESCRIBE, SHOW, SUMMARIZE or EXPLAIN statement."),
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", metavar="FILE", help="Read the SQL from a file; - for stdin.")
    ] = None,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    arrow: Annotated[
        Path | None, typer.Option("--arrow", metavar="FILE", help="Write an Arrow IPC stream to a file; - for stdout.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            "-n",
            min=1,
            max=MAX_ROWS,
            help="Maximum number of rows. Default: 1,000 in a table, otherwise all.",
        ),
    ] = None,
    timeout: Annotated[str, typer.Option("--timeout", metavar="TIME", help="Timeout of the query: 30s, 5m.")] = "30s",
    nats: NatsUrl = None,
) -> None:
    """Query the history in SQL. Ctrl-C cancels the query.

    Examples:
      corral query "SHOW TABLES"                        what there is
      corral query "FROM questions"                     what the views answer
      corral query "FROM fleet_by_hour" -n 24           a view's answer
      corral query "FROM idle_while_leased" --json      for scripts
      corral query -f report.sql --csv > report.csv     any number of rows
      corral query "FROM samples" --arrow out.arrow     for pandas and others
    """
    if sum((as_json, as_csv, arrow is not None)) > 1:
        raise CommandError("--json, --csv and --arrow exclude each other", USAGE)
    format = ResultFormat.CSV if as_csv else ResultFormat.ARROW if arrow is not None else ResultFormat.JSON
    table = not (as_json or as_csv or arrow is not None)
    try:
        seconds = parse_seconds(timeout)
    except ValueError as error:
        raise CommandError(f"--timeout: {error}", USAGE) from None
    if not 0 < seconds <= 600:
        raise CommandError(f"--timeout {timeout}: must be above 0 and at most 10m", USAGE)
    request = QueryRequest(
        sql=read_sql(sql, file),
        format=format,
        limit=limit or (1_000 if table else MAX_ROWS),
        timeout_seconds=seconds,
        query_id=uuid.uuid4().hex,
        window=8,
    )
    if table:
        body, end = run(_collect(nats, request))
        show_table(body, end)
    else:
        end = run(_copy(nats, request, arrow, whole=limit is None))
    if end.truncated:
        say(f"Only the first {end.rows:,} rows: there are more (--limit).")


def read_sql(sql: str | None, file: Path | None) -> str:
    """Read the SQL from the argument, a file, or stdin.

    Raises:
        CommandError: it is given twice or not at all, is empty or too long, or the file can't be read.
    """
    if sql is not None and sql != "-" and file is not None:
        raise CommandError("give the SQL as an argument or with --file, not both", USAGE)
    if sql is not None and sql != "-":
        return _not_empty(sql)
    if file is not None and str(file) != "-":
        try:
            return _not_empty(file.read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise CommandError(f"can't read {file}: {error}", USAGE) from None
    if sql is None and file is None and sys.stdin.isatty():
        raise CommandError('no SQL given: corral query "SHOW TABLES" lists the tables', USAGE)
    return _not_empty(sys.stdin.read())


def _not_empty(sql: str) -> str:
    if not sql.strip():
        raise CommandError('the SQL is empty: corral query "SHOW TABLES" lists the tables', USAGE)
    if len(sql) > 100_000:
        raise CommandError(f"the SQL is {len(sql):,} characters long, and 100,000 at most", USAGE)
    return sql


async def _collect(nats: str | None, request: QueryRequest) -> tuple[bytes, QueryEnd]:
    pieces = bytearray()
    end = QueryEnd()
    async with connected(nats) as client, _failures():
        from ...client.query import parts

        async with contextlib.aclosing(parts(client.nc, request, margin_seconds=5)) as stream:
            async for piece, last in stream:
                pieces += piece
                end = last or end
    return bytes(pieces), end


async def _copy(nats: str | None, request: QueryRequest, path: Path | None, *, whole: bool) -> QueryEnd:
    """Write the parts of an answer as they arrive. A file gets its final name only when it is complete.

    Raises:
        CommandError: `whole` is true, and there are more rows than an answer can hold.
    """
    end = QueryEnd()
    with _output(path) as output:
        async with connected(nats) as client, _failures():
            from ...client.query import parts

            async with contextlib.aclosing(parts(client.nc, request, margin_seconds=5)) as stream:
                async for piece, last in stream:
                    output.write(piece)
                    end = last or end
        if whole and end.truncated:
            text = f"there are more than {MAX_ROWS:,} rows: select fewer, or set --limit"
            raise CommandError(text, QUERY_FAILED)
        if request.format is ResultFormat.JSON:
            output.write(b"\n")
    return end


@contextlib.contextmanager
def _output(path: Path | None) -> Generator[BinaryIO]:
    if path is None or str(path) == "-":
        stdout: BinaryIO = sys.stdout.buffer
        try:
            yield stdout
            stdout.flush()
        except BrokenPipeError:  # the reader, such as `| head`, has closed the pipe
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    partial = path.with_name(f".{path.name}.partial")
    try:
        file = partial.open("wb")
    except OSError as error:
        raise CommandError(f"can't write {path}: {error.strerror}", FAILED) from None
    try:
        with file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.asynccontextmanager
async def _failures() -> AsyncGenerator[None]:
    """Map timeouts and errors of a statement to their exit codes; a missing bus or processor keeps its exit code."""
    from ...client import errors

    try:
        yield
    except errors.TimedOut as error:
        raise CommandError(str(error), TIMED_OUT) from None
    except errors.ServiceError as error:
        raise CommandError(str(error), QUERY_FAILED) from None


class _Document(msgspec.Struct):
    columns: list[str]
    types: list[str]
    rows: list[list[Any]]


_NUMBERS: Final = ("INT", "FLOAT", "DOUBLE", "DECIMAL", "HUGEINT", "BIGNUM")


def show_table(body: bytes, end: QueryEnd) -> None:
    """Print a JSON result as a table: rows vertically, or fewer columns, if it is wider than the terminal."""
    from rich.table import Table
    from rich.text import Text

    document = msgspec.json.decode(body, type=_Document)
    if _is_plan(document):
        for row in document.rows:
            typer.echo(row[-1])
        return
    names, rows = _in_zone(document)
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [
        max([len(name), *(len(line) for row in cells for line in row[index].split("\n"))])
        for index, name in enumerate(names)
    ]
    room = console().width
    shown = len(names)
    if console().is_terminal and sum(widths) + 2 * len(widths) > room:
        if len(cells) <= VERTICAL_ROWS:
            _show_vertically(names, cells)
            _footer(end)
            return
        while shown > 1 and sum(widths[:shown]) + 2 * shown > room:
            shown -= 1
    table = Table(box=None, header_style="bold dim", pad_edge=False, padding=(0, 2, 0, 0))
    for name, type in list(zip(names, document.types, strict=True))[:shown]:
        number = any(word in type for word in _NUMBERS) and "[" not in type and "(" not in type.split("DECIMAL")[0]
        table.add_column(Text(name), justify="right" if number else "left", no_wrap=True, overflow="ellipsis")
    for row in cells:
        table.add_row(*(Text(cell) for cell in row[:shown]))
    console().print(table)
    if shown < len(names):
        say(f"{len(names) - shown} more columns don't fit: {', '.join(names[shown:])} (select fewer, or use --csv)")
    _footer(end)


def _in_zone(document: _Document) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows with times in the reader's zone: named in the heading, or in each cell if there are several."""
    names, rows = [*document.columns], [[*row] for row in document.rows]
    for at, type in enumerate(document.types):
        if type != "TIMESTAMP WITH TIME ZONE":
            continue
        times = [_time(row[at]) for row in rows]
        zones = {local_time(time, "%Z") for time in times if time is not None}
        if len(zones) == 1:
            names[at] += f" ({zones.pop()})"
        for row, time in zip(rows, times, strict=True):
            if time is not None:
                shown = local_time(time, "%Y-%m-%d %H:%M:%S")
                if time.microsecond:
                    shown += f".{time.microsecond:06}".rstrip("0")
                row[at] = f"{shown} {local_time(time, '%Z')}" if zones else shown
    return names, rows


def _time(value: Any) -> datetime | None:
    """A time of a result; None for NULL, for the infinite ones, and for those beyond Python's calendar."""
    try:
        return datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return None


def _is_plan(document: _Document) -> bool:
    return document.columns == ["explain_key", "explain_value"]


def _show_vertically(names: list[str], cells: list[list[str]]) -> None:
    width = max(map(len, names))
    for number, row in enumerate(cells, 1):
        console().print(f"[dim]── {number} {'─' * 20}[/]")
        for name, cell in zip(names, row, strict=True):
            typer.echo(f"{name:<{width}}  {cell}")


def _footer(end: QueryEnd) -> None:
    if sys.stderr.isatty():
        say(f"{end.rows:,} row{'' if end.rows == 1 else 's'} in {end.seconds:.3f} s")


def _cell(value: Any) -> str:
    match value:
        case None:
            return "–"
        case bool():
            return "true" if value else "false"
        case float():
            return f"{value:.3g}" if value and abs(value) < 1e-3 else f"{value:.3f}".rstrip("0").rstrip(".")
        case str():
            return _short_time(value)
        case list() | dict():
            return msgspec.json.encode(value).decode()
        case _:
            return str(value)


def _short_time(text: str) -> str:
    """Shorten a time such as `2026-11-24T10:00:00.000000Z` to `2026-11-24 10:00:00`; other text is unchanged."""
    if len(text) >= 19 and text[10] == "T" and text[4] == text[7] == "-" and text[13] == text[16] == ":":
        whole, _, fraction = text.rstrip("Z").replace("T", " ").partition(".")
        fraction = fraction.rstrip("0")
        return f"{whole}.{fraction}" if fraction else whole
    return text
