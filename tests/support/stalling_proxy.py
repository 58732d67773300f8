"""A TCP proxy before a server that can stop forwarding: for the client behind it, a partition of the network."""

from __future__ import annotations

import asyncio
import contextlib


class StallingProxy:
    """Forwards connections to a server on this machine until it is told to stall.

    Args:
        port: of the server.
        sent: takes what clients send, if given.

    Attributes:
        url: of the proxy, for a NATS client.
    """

    def __init__(self, port: int, sent: bytearray | None = None) -> None:
        self.url = ""
        self._sent = sent
        self._port = port
        self._flows = asyncio.Event()
        self._flows.set()
        self._accepts = True
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen on a free port."""
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.url = f"nats://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        """Close all connections."""
        if self._server is not None:
            self._server.close()
        self.cut()

    async def stall(self, seconds: float, *, cut: bool) -> None:
        """Forward nothing for some seconds; bytes that are on their way arrive afterwards.

        Args:
            seconds: duration.
            cut: break all connections instead, and accept no new ones.
        """
        self._flows.clear()
        if cut:
            self._accepts = False
            self.cut()
        await asyncio.sleep(seconds)
        self._accepts = True
        self._flows.set()

    def cut(self) -> None:
        """Break all connections."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._accepts:
            writer.transport.abort()
            return
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, up_writer}
        await asyncio.gather(self._pump(reader, up_writer, self._sent), self._pump(up_reader, writer))
        self._writers -= {writer, up_writer}

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, sent: bytearray | None = None
    ) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while data := await reader.read(65536):
                if sent is not None:
                    sent += data
                await self._flows.wait()
                writer.write(data)
                await writer.drain()
        writer.transport.abort()
