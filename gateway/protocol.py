"""HTTP/1.1 with what uvicorn lacks: limits on connections by address and on the time of headers, and an abort."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import Counter
from typing import Any, Final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..bus.addresses import is_in
from ..schemas import codec
from ..schemas.requests import Error
from .settings import Settings

ABORT_KEY: Final = "corral.abort"
"""Key of the scope: function that ends the connection at once; with true, also what the kernel has not sent yet."""
MAX_HEADER_BYTES: Final = 16 * 1024
_SHARE: Final = 4
"""Part of all connections that one address may have: one in so many."""


class Doors(Counter[str]):
    """Connections that are open, by address.

    Args:
        settings: with the limits.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self._most = settings.connections
        self._proxies = settings.trusted_proxies
        self._open = 0

    def enter(self, address: str) -> bool:
        """Count a connection; false if it is one too many."""
        share = self._most if is_in(address, self._proxies) else max(8, self._most // _SHARE)
        if self._open >= self._most or self[address] >= share:
            return False
        self._open += 1
        self[address] += 1
        return True

    def leave(self, address: str) -> None:
        """Count a connection that was counted as ended."""
        self._open -= 1
        self[address] -= 1
        if not self[address]:
            del self[address]


def protocol_of(settings: Settings) -> type[asyncio.Protocol]:
    """The protocol of a server with these settings."""
    doors = Doors(settings)

    class GuardedProtocol(H11Protocol):
        _address = ""
        _late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            peer: Any = transport.get_extra_info("peername")
            address = str(peer[0]) if peer else ""
            if not doors.enter(address):
                transport.abort()
                self.transport = transport
                return
            self._address = address
            super().connection_made(transport)
            self._await_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            if not self._address:
                return
            self._heard_headers()
            doors.leave(self._address)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if not self._address:
                return
            super().data_received(data)
            if self._answers():
                self._heard_headers()
            elif self.conn.their_state is not h11.IDLE or self.conn.trailing_data[0]:
                # The begin of a request, or the rest of a body that was not wanted.
                self._await_headers()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.conn.their_state is h11.SEND_BODY or (not self._answers() and self.conn.trailing_data[0]):
                self._await_headers()

        def _await_headers(self) -> None:
            if self._late is None:
                self._late = self.loop.call_later(settings.header_seconds, self._give_up)

        def _heard_headers(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

        def _give_up(self) -> None:
            self._late = None
            if not self._answers():
                self.transport.abort()

        def _answers(self) -> bool:
            cycle: Any = self.cycle  # None before the first request, whatever its type says
            return cycle is not None and not cycle.response_complete

        def handle_events(self) -> None:
            super().handle_events()
            scope: Any = self.scope  # None before the first request
            if scope is not None:
                scope[ABORT_KEY] = self._abort

        def _abort(self, reset: bool) -> None:
            own: Any = self.transport.get_extra_info("socket")
            if reset and own is not None and not self.transport.is_closing():
                # The kernel would keep what is unsent for a client that reads nothing.
                with contextlib.suppress(OSError, ValueError):  # it may be closed already
                    own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()

        def send_400_response(self, msg: str) -> None:
            body = codec.encode(Error(code="invalid", message=msg), codec.JSON)
            headers = [
                (b"content-type", codec.JSON.encode()),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
            ]
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                    self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

    return GuardedProtocol
