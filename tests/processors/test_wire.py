"""Bytes from the socket: cut anywhere, they are the same messages as nats-py's own parser makes of them."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest
from corral.bus import chunked_transport
from corral.bus.chunked_transport import ChunkParser, ChunkTransport, install_chunked_parser
from corral.bus.connect import connect
from corral.cli.local.server import EmbeddedServer
from hypothesis import given, settings
from hypothesis import strategies as st
from nats.aio.transport import TcpTransport
from nats.protocol.parser import Parser


class Heard:
    """What a parser tells its client."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        async def hear(*told: Any) -> None:
            self.events.append((name, *told))

        return hear


TOKENS = st.text("abcXYZ019._-$", min_size=1, max_size=12)
PAYLOADS = st.one_of(st.binary(max_size=40), st.sampled_from([b"\r\n", b"MSG a 1 2\r\n", b"PING\r\n" * 3, bytes(3000)]))


@st.composite
def lines(draw: st.DrawFn) -> bytes:
    kind = draw(st.sampled_from(["msg", "msg", "hmsg", "ping", "pong", "ok", "err", "info"]))
    subject, sid, payload = draw(TOKENS), draw(st.integers(1, 999)), draw(PAYLOADS)
    reply = draw(st.one_of(st.none(), TOKENS))
    head = f"{subject} {sid} " + (f"{reply} " if reply else "")
    if kind == "msg":
        return f"MSG {head}{len(payload)}\r\n".encode() + payload + b"\r\n"
    if kind == "hmsg":
        headers = b"NATS/1.0 100 Idle Heartbeat\r\nA: b\r\n\r\n"
        return f"HMSG {head}{len(headers)} {len(headers) + len(payload)}\r\n".encode() + headers + payload + b"\r\n"
    other = {"ping": "PING", "pong": "PONG", "ok": "+OK", "err": "-ERR 'Slow'", "info": 'INFO {"server_id": "x"}'}
    return other[kind].encode() + b"\r\n"


@settings(max_examples=80, deadline=None)
@given(st.lists(lines(), max_size=8), st.data())
def test_any_cut_makes_the_same_messages(found: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(found)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    expected, got = Heard(), Heard()
    asyncio.run(Parser(expected).parse(stream))
    parser: Any = ChunkParser(got)

    async def feed() -> None:
        for first, last in zip([0, *cuts], [*cuts, len(stream)], strict=True):
            await parser.parse(stream[first:last])

    asyncio.run(feed())
    assert got.events == expected.events

    # Taken past nats-py, by the number of the subscription: what has headers is not.
    tapped: list[tuple[bytes, bytes, bytes]] = []
    quiet = Heard()
    parser = ChunkParser(quiet)  # pyright: ignore[reportArgumentType]
    parser.taps = dict.fromkeys((b"%d" % number for number in range(1, 500)), tapped.extend)
    asyncio.run(feed())
    mine = [event for event in expected.events if event[0] == "_process_msg" and event[1] < 500 and not event[5]]
    assert tapped == [event[2:5] for event in mine]
    assert quiet.events == [event for event in expected.events if event not in mine]


async def test_a_connection_is_quickened_in_mid_stream_and_stays_so_when_it_reconnects(server: EmbeddedServer) -> None:
    sender = await connect(server.url)
    nc = await connect(server.url, reconnect_time_wait=0.1)
    got: list[bytes] = []

    async def hear(message: Any) -> None:
        got.append(message.data)

    await nc.subscribe("quick.*", cb=hear, pending_bytes_limit=-1)
    await nc.flush()
    expected = [bytes([number % 256]) * (number * 997 % 200_000) for number in range(200)]
    for number, payload in enumerate(expected):
        await sender.publish("quick.a", payload)
        if number == 50:
            install_chunked_parser(nc)
            install_chunked_parser(nc)
        if number % 20 == 0:
            await sender.flush()
    await sender.flush()
    async with asyncio.timeout(20):
        while len(got) < len(expected):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert got == expected
    inner: Any = nc
    before = nc.stats["reconnects"]
    inner._transport._io_writer.transport.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
    async with asyncio.timeout(20):
        while nc.stats["reconnects"] == before or not nc.is_connected:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await nc.flush()
    await sender.publish("quick.b", b"again")
    async with asyncio.timeout(20):
        while got[-1] != b"again":  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert type(inner._transport) is ChunkTransport
    await nc.close()
    await sender.close()


async def test_another_version_of_nats_py_receives_by_itself(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    # At the logger itself: a service that ran in this process before may have configured levels and handlers.
    monkeypatch.setattr(chunked_transport.log, "warning", lambda text, *values: told.append(text % values))
    nc = await connect(server.url)
    inner: Any = nc
    monkeypatch.setattr(chunked_transport, "TESTED_VERSIONS", ("1.0.0",))
    for _ in range(2):
        assert not install_chunked_parser(nc)
    assert type(inner._transport) is TcpTransport
    assert len(told) == 1
    assert "another than the chunked transport was tested with (1.0.0)" in told[0]
    monkeypatch.undo()
    monkeypatch.setenv(chunked_transport.VARIABLE, "off")
    assert not install_chunked_parser(nc)
    monkeypatch.delenv(chunked_transport.VARIABLE)
    assert install_chunked_parser(nc)
    assert type(inner._transport) is ChunkTransport
    await nc.close()


async def test_what_waits_is_bounded(server: EmbeddedServer) -> None:
    """A slow reader pauses the socket: the server sees it, not the memory."""
    nc = await connect(server.url)
    install_chunked_parser(nc)
    await nc.flush()
    inner: Any = nc
    reader = inner._transport._io_reader
    limit = reader._limit
    sender = await connect(server.url)
    blocked = asyncio.Event()

    async def slow(_: Any) -> None:
        await blocked.wait()

    await nc.subscribe("slow", cb=slow, pending_msgs_limit=-1, pending_bytes_limit=-1)
    await nc.flush()
    # Nothing is parsed meanwhile: the loop reads what it is given until the reader stops it.
    inner._reading_task.cancel()
    for _ in range(60):
        await sender.publish("slow", bytes(2**18))
    async with asyncio.timeout(20):
        while not reader._paused:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)
    assert 2 * limit < reader.waiting < 3 * limit + 2**20
    blocked.set()
    await nc.close()
    await sender.close()
