"""The connection to the bus survives what ends, or holds up, one of nats-py's own."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from pathlib import Path
from typing import Any

import pytest
import uvloop
from corral.bus.chunked_transport import install_chunked_parser
from corral.bus.connect import connect
from corral.cli.local.server import EmbeddedServer
from nats.aio.client import Client
from support.stalling_proxy import StallingProxy


async def test_a_flush_ends_with_the_connection_that_follows_the_one_it_began_on(server: EmbeddedServer) -> None:
    proxy = StallingProxy(server.port)
    await proxy.start()
    connection = await connect(proxy.url)
    try:
        stalled = asyncio.create_task(proxy.stall(1.0, cut=False))
        await asyncio.sleep(0)
        flushing = asyncio.create_task(connection.flush(timeout=600))
        pings: Any = connection
        while not pings._pongs:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        proxy.cut()
        async with asyncio.timeout(60):
            await flushing
        assert connection.stats["reconnects"] == 1
        await stalled
    finally:
        with contextlib.suppress(Exception):
            await connection.close()
        await proxy.stop()


async def test_a_flush_follows_what_was_sent_before_it(server: EmbeddedServer) -> None:
    """Otherwise the server may lack a subscription that the flush has ended for."""
    sent = bytearray()
    proxy = StallingProxy(server.port, sent)
    await proxy.start()
    connection = await connect(proxy.url)
    try:
        sent.clear()
        await connection.subscribe("subject")
        await connection.publish("other", b"message")
        await connection.flush(60)
        assert bytes(sent) == b"SUB subject  1\r\nPUB other  7\r\nmessage\r\nPING\r\n"
    finally:
        await connection.close()
        await proxy.stop()


async def test_a_server_that_dies_while_it_is_connected_to_is_tried_again(server: EmbeddedServer) -> None:
    """uvloop, on which services run, has an error of its own for a connection that was reset a moment ago."""
    met = asyncio.Event()

    async def dying(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.01)  # until the client waits for the first line
        writer.write(b'INFO {"server_id": "x", "version": "2.15.1", "proto": 1, "headers": true}\r\n')
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()
        met.set()

    async def scenario() -> None:
        connection = await connect(server.url, reconnect_time_wait=0.01)
        server.kill()
        listening = await asyncio.start_server(dying, "127.0.0.1", server.port)
        async with asyncio.timeout(60):
            await met.wait()
        listening.close()
        await listening.wait_closed()
        server.start()
        async with asyncio.timeout(60):
            while not connection.is_connected:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await connection.flush(60)
        await connection.close()

    await asyncio.to_thread(uvloop.run, scenario())


@pytest.mark.parametrize("in_chunks", [True, False])
async def test_a_message_that_a_connection_ended_in_is_not_finished_by_the_next(
    server: EmbeddedServer, in_chunks: bool
) -> None:
    """The read loop may take in a last part of a message in the moment in which writing finds the connection broken."""
    connection = await connect(server.url, reconnect_time_wait=0.01)
    assert not in_chunks or install_chunked_parser(connection)
    try:
        messages = await connection.subscribe("x")
        internals: Any = connection
        await internals._process_op_err(BrokenPipeError())
        await internals._ps.parse(b'MSG x 1 100\r\n{"owner": "ann", "request_id"')
        await connection.flush(60)
        await connection.publish("x", b"whole")
        assert (await messages.next_msg(60)).data == b"whole"
        assert connection.stats["reconnects"] == 1
    finally:
        await connection.close()


async def test_an_attempt_that_fails_while_it_is_cancelled_is_the_last(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An await that has failed already swallows the cancellation, as `asyncio.wait_for` does before Python 3.12."""
    connection: Any = await connect(server.url, reconnect_time_wait=0.01)
    trying = asyncio.Event()

    async def swallow(*_: object) -> None:
        trying.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(3600)
        raise ConnectionRefusedError

    monkeypatch.setattr(Client, "_connect_to_server", swallow)
    server.kill()
    async with asyncio.timeout(60):
        await trying.wait()
        attempts = connection._reconnection_task
        attempts.cancel()
        await asyncio.wait({attempts})
    await connection.close()


async def test_what_a_vanished_server_never_took_does_not_hold_up_the_next(
    server: EmbeddedServer, tmp_path: Path
) -> None:
    proxy = StallingProxy(server.port)
    await proxy.start()
    other = EmbeddedServer(tmp_path / "other")
    other.start()
    urls, options = f"{proxy.url},{other.url}", {"dont_randomize": True, "ping_interval": 0.2}
    connection = await connect(urls, pending_size=2**30, **options)
    try:
        stalled = asyncio.create_task(proxy.stall(600.0, cut=False))
        await asyncio.sleep(0)
        for _ in range(60):  # more than what the buffers of both sockets hold
            await connection.publish("s", bytes(500_000))
        while not connection.stats["reconnects"]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert connection.connected_url is not None
        assert connection.connected_url.port == other.port
        # And neither does it hold up the end.
        other.kill()
        await connection.close()
        assert connection.is_closed
        stalled.cancel()
    finally:
        await proxy.stop()
        other.kill()
