"""Client of the process that checks statements (`sandbox.py`): starts it, asks it, and replaces it if it ends."""

from __future__ import annotations

import atexit
import logging
import os
import socket
import subprocess
import sys
import threading
from collections import OrderedDict
from functools import partial
from typing import Final

import msgspec

from . import mirror, self_check
from .errors import QueryError, TooLarge, UnexpectedResult
from .forkserver import fork_remotely, is_open, read_frame, write_frame
from .sandbox import READY, Bounds, Question, Verdict
from .statement import Statement

log = logging.getLogger("corral.query")

IDLE_WORKERS: Final = 3
"""Workers that are kept for the next statements."""

KNOWN_STATEMENTS: Final = 128
KNOWN_CHARACTERS: Final = 4096
"""Number and length of statements whose result is kept: dashboards ask the same again and again."""

_SMALL: Final = Bounds(cpu_seconds=0.05)
"""Limits under which the self-check sees a statement without bounds stopped, in little time."""

KEPT_SCHEMAS: Final = 2
"""Schemas that are kept for the next guard of an equal one, beyond those in use."""

STOP_SECONDS: Final = 2.0

Key = tuple[str, int, float, int, int]
"""SQL, limit of rows, and the bounds that its result depends on."""


class Schema:
    """A process that holds a schema, and its workers; they end once nobody uses this object any more."""

    def __init__(self, mirrored: mirror.Mirror, control: socket.socket) -> None:
        self.mirrored = mirrored
        self._control = control
        self._idle: list[socket.socket] = []
        self._known: OrderedDict[Key, Statement | TooLarge] = OrderedDict()
        self._lock = threading.Lock()

    def __del__(self) -> None:
        for connection in (self._control, *self._idle):
            connection.close()

    @property
    def is_open(self) -> bool:
        """True while the process lives."""
        return is_open(self._control)

    def check(self, sql: str, limit: int, bounds: Bounds) -> Statement:
        """Have a statement checked by a worker, unless the result is known.

        Raises:
            QueryError: as `SqlGuard.check`.
            ConnectionError: the process is gone.
        """
        key = (sql, limit, bounds.cpu_seconds, bounds.check_bytes, bounds.plan_bytes)
        known = self._recall(key)
        if isinstance(known, Statement):
            return known
        if known is not None:
            raise QueryError(known.code, str(known))
        try:
            checked = self._ask(Question(sql, limit, bounds))
        except TooLarge as error:
            self._remember(key, error)
            raise
        self._remember(key, checked)
        return checked

    def _ask(self, question: Question) -> Statement:
        connection = self._worker()
        connection.settimeout(question.bounds.wall_seconds)
        try:
            write_frame(connection, _encoded(question))
            answer = read_frame(connection)
        except TimeoutError:
            connection.close()
            raise QueryError("timeout", "the SQL was not checked in time: the processor is busy, ask later") from None
        except ConnectionError:
            answer = b""
        except BaseException:
            connection.close()
            raise
        if not answer:
            connection.close()
            if not self.is_open:
                raise ConnectionError
            raise TooLarge(question.bounds.cpu_seconds, question.bounds.plan_bytes)
        verdict = msgspec.msgpack.decode(answer, type=Verdict)
        if verdict.last or len(self._idle) >= IDLE_WORKERS:
            connection.close()
        else:
            self._idle.append(connection)
        if verdict.statement is None:
            raise QueryError(verdict.code, verdict.message)
        return verdict.statement

    def _worker(self) -> socket.socket:
        """Connection to a worker that has nothing to do."""
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                return fork_remotely(self._control)
            if is_open(connection):
                return connection
            connection.close()

    def _recall(self, key: Key) -> Statement | TooLarge | None:
        with self._lock:
            known = self._known.get(key)
            if known is not None:
                self._known.move_to_end(key)
            return known

    def _remember(self, key: Key, result: Statement | TooLarge) -> None:
        if len(key[0]) > KNOWN_CHARACTERS:
            return
        with self._lock:
            self._known[key] = result
            if len(self._known) > KNOWN_STATEMENTS:
                self._known.popitem(last=False)


def _encoded(question: Question) -> bytes:
    try:
        return msgspec.msgpack.encode(question)
    except UnicodeEncodeError:
        raise QueryError("invalid", "the SQL is not valid Unicode text") from None


class Sandbox:
    """The process that checks statements, one for all guards of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._schemas: list[Schema] = []
        self._verified = False
        self._unfit = ""
        atexit.register(self.close)

    def schema(self, mirrored: mirror.Mirror) -> Schema:
        """The child that holds a schema, started unless it is one of those last asked for.

        Raises:
            QueryError: `unavailable` or `internal`.
        """
        with self._lock:
            self._schemas = [schema for schema in self._schemas if schema.is_open]
            found = next((schema for schema in self._schemas if schema.mirrored == mirrored), None)
            try:
                if not self._verified:
                    self._verify()
                if self._unfit:
                    raise QueryError("unavailable", self._unfit)
                found = found or Schema(mirrored, self._open(mirrored))
            except OSError as error:
                log.error("SQL can't be checked: %s", error)
                raise QueryError("internal", "the SQL could not be checked; the processor's log says why") from None
            self._schemas = [found, *(schema for schema in self._schemas if schema is not found)][:KEPT_SCHEMAS]
            return found

    def _verify(self) -> None:
        schema = Schema(self_check.SCHEMA, self._open(self_check.SCHEMA))
        try:
            self_check.verify(partial(schema.check, limit=self_check.LIMIT, bounds=Bounds()))
            self_check.verify_growth(partial(schema.check, limit=self_check.LIMIT, bounds=_SMALL))
        except UnexpectedResult as error:
            self._unfit = str(error)
            log.error("%s", error)
        self._verified = True

    def _open(self, schema: mirror.Mirror) -> socket.socket:
        if self._control is None or not is_open(self._control):
            self.close()
            self._process, self._control = _start()
        control = fork_remotely(self._control)
        write_frame(control, msgspec.msgpack.encode(schema))
        answer = read_frame(control)
        if answer != READY:
            control.close()
            log.error("SQL can't be checked: %s", answer.decode(errors="replace") or "the process ended")
            raise QueryError("internal", "the SQL could not be checked; the processor's log says why")
        return control

    def close(self) -> None:
        """End the process, if it runs."""
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def _start() -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start the process; it ends when its control socket is closed."""
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-P", "-m", f"{__package__}.sandbox", str(theirs.fileno())]
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # NumPy's threads would be lost in a fork
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], env=environment)
    return process, ours


SANDBOX: Final = Sandbox()
"""The process for all guards of this one."""
