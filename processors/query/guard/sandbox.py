"""Process that checks readers' statements: `python -m corral.processors.query.guard.sandbox DESCRIPTOR`.

It forks a child for each schema, which holds an empty copy of the database, and itself forks workers. A worker checks
one statement after the other: it sets limits of processor time and memory, parses and checks the statement, plans it
and answers. If a statement reaches a limit the kernel ends the worker, whatever DuckDB is doing at that time, and the
connection closes without an answer.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
from functools import partial
from typing import Final

import duckdb
import msgspec
from duckdb import DuckDBPyConnection
from msgspec import Struct

from . import mirror, statement
from .errors import QueryError, as_query_error
from .forkserver import address_space_bytes, limited, prepare_this_process, read_frame, serve, write_frame

NICENESS: Final = 10
"""As that of the threads that run queries."""

RETIRED_BYTES: Final = 16 * 2**20
"""A worker that has grown by this takes no further statement: the memory that it has freed is not limited."""


class Bounds(Struct, frozen=True):
    """Limits on the check of one statement.

    Attributes:
        cpu_seconds: processor time to check it, and the same again to plan it. The history's own DuckDB takes about as
            long as that to plan it again, and to optimize the plan.
        wall_seconds: time altogether, for a machine that is busy.
        check_bytes: memory to check it. Its tree takes about 100 bytes a character.
        plan_bytes: memory to plan it. A column takes about 700 bytes.
    """

    cpu_seconds: float = 1.0
    wall_seconds: float = 30.0
    check_bytes: int = 256 * 2**20
    plan_bytes: int = 32 * 2**20


class Question(Struct, frozen=True):
    """A statement to check: as the reader sent it, and the rows that will be read at most."""

    sql: str
    limit: int
    bounds: Bounds


class Verdict(Struct):
    """Result of a check: the statement, or an error.

    Attributes:
        statement: if it passed.
        code, message: of the error.
        last: true if the worker takes no further statement.
    """

    statement: statement.Statement | None = None
    code: str = ""
    message: str = ""
    last: bool = False


READY: Final = b"ready"
"""What a schema's child sends once it takes statements; anything else is an error text."""


def main() -> None:
    """Fork a child for each schema that the process at the other end of the control socket sends."""
    control = socket.socket(fileno=int(sys.argv[1]))
    os.setpriority(os.PRIO_PROCESS, 0, max(NICENESS, os.getpriority(os.PRIO_PROCESS, 0)))
    prepare_this_process()
    duckdb.default_connection().close()  # it has threads, which a fork would lose
    for name in ("pandas", "pyarrow"):
        sys.modules[name] = None  # pyright: ignore[reportArgumentType]  # so have these, which DuckDB imports for functions
    gc.collect()
    gc.freeze()
    serve(control, _hold_schema)


def _hold_schema(control: socket.socket) -> None:
    schema = msgspec.msgpack.decode(read_frame(control), type=mirror.Mirror)
    try:
        connection, counter = mirror.build(schema)
    except duckdb.Error as error:
        write_frame(control, str(error).encode())
        return
    statement.bind(
        connection, counter, statement.check(connection, schema.names, "SELECT 1", 1)
    )  # loads what is loaded lazily
    gc.collect()
    gc.freeze()
    write_frame(control, READY)
    serve(control, partial(_work, connection, counter, schema.names))


def _work(connection: DuckDBPyConnection, counter: mirror.Counter, names: mirror.Names, caller: socket.socket) -> None:
    """Check statements until the caller closes the connection."""
    started_bytes = address_space_bytes()
    while body := read_frame(caller):
        verdict = _verdict(connection, counter, names, msgspec.msgpack.decode(body, type=Question))
        verdict.last = address_space_bytes() - started_bytes > RETIRED_BYTES
        write_frame(caller, msgspec.msgpack.encode(verdict))
        if verdict.last:
            return


def _verdict(
    connection: DuckDBPyConnection, counter: mirror.Counter, names: mirror.Names, question: Question
) -> Verdict:
    bounds = question.bounds
    wall_seconds = bounds.wall_seconds + 1  # the caller gives up before, and can say so
    try:
        with limited(bounds.cpu_seconds, wall_seconds, bounds.check_bytes):
            checked = statement.check(connection, names, question.sql, question.limit)
        with limited(bounds.cpu_seconds, wall_seconds, bounds.plan_bytes):
            statement.bind(connection, counter, checked)
    except QueryError as error:
        return Verdict(code=error.code, message=str(error))
    except (duckdb.Error, RuntimeError) as error:
        failure = as_query_error(error)
        return Verdict(code=failure.code, message=str(failure))
    return Verdict(checked)


if __name__ == "__main__":
    main()
