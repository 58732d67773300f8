"""Quack: DuckDB's remote protocol as an endpoint of the history, for any DuckDB client.

    ATTACH 'quack:history-host:9494' AS history (TOKEN '…');
    FROM history.fleet_by_hour;

DuckDB's extension serves the protocol, and Corral authorizes each statement first: a callback puts it through the same
guard as queries on the bus. So clients may only read the history's tables and views. A token of at least
`TOKEN_CHARACTERS` characters is required.

Bounds: DuckDB runs these queries in its own threads, so the bus's queue and time limits do not hold for them; memory
does. Quack speaks HTTP without TLS: on anything but loopback, put a TLS proxy in front.
"""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import logging
import secrets
import socket
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import duckdb
from duckdb import DuckDBPyConnection
from msgspec import Struct

from .guard.errors import QueryError
from .guard.guard import SqlGuard

log = logging.getLogger("corral.quack")

DEFAULT_PORT: Final = 9494
TOKEN_CHARACTERS: Final = 16
CALLBACK: Final = "corral_authorise"

CATALOGUE_QUERIES: Final = frozenset(
    " ".join(query.split())
    for query in (
        "SELECT catalog_name, schema_name FROM information_schema.schemata "
        "WHERE catalog_name NOT IN ('system', 'temp') ORDER BY ALL",
        "SELECT schema_name, sql, 'table' FROM duckdb_tables() UNION ALL "
        "SELECT schema_name, view_name, 'view' FROM duckdb_views()",
    )
)
"""Queries that a client sends when it attaches, verbatim: names and columns, and no text of a view: it names paths."""


class Settings(Struct, frozen=True):
    """Settings of the endpoint.

    Attributes:
        address: as `parse_address` takes it.
        token: that clients must give.
    """

    address: str
    token: str


class QuackError(RuntimeError):
    """The endpoint can't be opened; the message says why and what to do."""


def parse_address(text: str) -> tuple[str, int]:
    """Parse `HOST:PORT`, `HOST` or `:PORT` into host and port.

    Raises:
        QuackError: it is none of these.
    """
    host, sign, port = text.rpartition(":")
    if not sign:
        host, port = text, str(DEFAULT_PORT)
    if not port.isdigit() or not 0 < int(port) < 65536 or "'" in host:
        raise QuackError(f"{text!r} is no address for Quack: write it like 127.0.0.1:{DEFAULT_PORT}")
    return host or "127.0.0.1", int(port)


def read_token(path: Path) -> str:
    """Read the token from its file, which only its owner may be able to read.

    Raises:
        QuackError: it is missing, too open or too short.
    """
    try:
        mode = path.stat().st_mode
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise QuackError(f"the token for Quack can't be read from {path}: {error}") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise QuackError(f"{path} can be read by others: chmod 600 {path}")
    if len(token) < TOKEN_CHARACTERS or not token.isprintable() or " " in token:
        raise QuackError(
            f"the token in {path} has to be at least {TOKEN_CHARACTERS} printable characters without spaces, "
            f"such as this new one: {secrets.token_urlsafe(32)}"
        )
    return token


def load(connection: DuckDBPyConnection) -> None:
    """Load the extensions into an instance, from their Python packages. Call it before `hardening.lock`.

    Raises:
        QuackError: they are not installed, or are made for another version of DuckDB.
    """
    for name in ("httpfs", "quack"):
        spec = importlib.util.find_spec(f"duckdb_extension_{name}")
        if spec is None or spec.origin is None:
            raise QuackError(f"DuckDB's extension {name} is not installed: pip install 'corral[quack]'")
        folder = Path(spec.origin).parent / "extensions"
        file = folder / f"v{duckdb.__version__}" / f"{name}.duckdb_extension"
        if not file.exists():
            made_for = ", ".join(sorted(path.name for path in folder.glob("v*"))) or "nothing"
            raise QuackError(
                f"DuckDB is {duckdb.__version__}, and its extension {name} was made for {made_for}: "
                "pip install 'corral[quack]' brings versions that fit"
            )
        connection.execute("LOAD '" + str(file).replace("'", "''") + "'")


class QuackEndpoint:
    """A Quack server on one instance.

    Args:
        connection: to the instance, with the extensions loaded and its settings not yet locked.
        connect: gives a new cursor on it.
        address: as `parse_address` takes it.
        token: that clients must give.
        private: tables that readers should not see.

    Raises:
        QuackError: the address can't be listened on.
    """

    def __init__(
        self,
        connection: DuckDBPyConnection,
        connect: Callable[[], DuckDBPyConnection],
        address: str,
        token: str,
        private: Sequence[str] = (),
    ) -> None:
        self._own = connect()
        self._guard = SqlGuard(connect, private)
        self.host, self.port = parse_address(address)
        if not _is_free(self.host, self.port):
            raise QuackError(f"{self.host}:{self.port} can't be listened on for Quack: the port may be in use")
        self.uri = f"quack:{self.host}:{self.port}"
        untyped: Any = connection  # DuckDB's stubs want its own types where it takes their names
        untyped.create_function(
            CALLBACK, self._authorize, ["VARCHAR", "VARCHAR"], "BOOLEAN", side_effects=True, null_handling="special"
        )
        connection.execute(f"SET GLOBAL quack_authorization_function = '{CALLBACK}'")
        loopback = _is_loopback(self.host)
        try:
            connection.execute(
                "CALL quack_serve(?, token = ?, allow_other_hostname = ?)", [self.uri, token, not loopback]
            ).fetchall()
        except duckdb.Error as error:
            raise QuackError(f"{self.uri} can't be opened: {error}") from None
        if not loopback:
            log.warning("%s speaks HTTP without TLS: put a TLS proxy in front of it", self.uri)
        log.info("DuckDB clients may ATTACH '%s'", self.uri)

    def _authorize(self, connection_id: str | None, sql: str | None) -> bool:
        """Authorize a statement; DuckDB calls it for each one. False if the check refuses the statement, or fails."""
        if sql is None:
            return False
        if " ".join(sql.split()) in CATALOGUE_QUERIES:
            return True
        try:
            self._guard.check(sql, 1)
        except QueryError as error:
            log.info("Quack: refused (%s): %s", error, sql[:200])
            return False
        except Exception:
            log.exception("Quack: refused, since the check failed: %s", sql[:200])
            return False
        return True

    def close(self) -> None:
        """Stop listening, and close the cursor."""
        with contextlib.suppress(duckdb.Error):
            self._own.execute("CALL quack_stop(?)", [self.uri]).fetchall()
        self._own.close()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_free(host: str, port: int) -> bool:
    """True if an address can be listened on. Quack would share a port in use, and the first server get all clients."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError:
        return False
    return True
