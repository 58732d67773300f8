"""What the gateway defends itself against: odd requests, slow and greedy clients, a bus that checks nobody."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from corral.bus.access import certificates
from corral.cli.local.server import EmbeddedServer
from corral.gateway.settings import Settings, SettingsError
from corral.schemas import codec, subjects
from corral.schemas.requests import LeaseEvent, LeaseEventKind
from msgspec.structs import replace
from support.gateway_rig import bearer, bus_of, in_process, token
from support.lease_examples import START, granted
from support.secured_bus import SecuredBus

SECONDS = 30.0
Answer = tuple[int, dict[str, str], bytes]


@pytest.fixture(scope="module")
def bus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredBus]:
    made = bus_of(tmp_path_factory.mktemp("limits") / "bus")
    made.server.start()
    yield made
    made.server.kill()


@pytest.fixture
async def gateway(bus: SecuredBus) -> AsyncIterator[str]:
    limits = {"header_seconds": 0.6, "body_seconds": 0.6, "connections": 32, "requests_per_caller": 2}
    async with in_process(bus.server.url, bus.credentials("http"), **limits) as url:
        yield url


def place(url: str) -> tuple[str, int]:
    parsed = httpx.URL(url)
    return parsed.host, parsed.port or 0


async def raw(url: str, *pieces: bytes, pause: float = 0.0) -> bytes:
    """Whatever comes back for some bytes, until the server closes the connection."""
    reader, writer = await asyncio.open_connection(*place(url))
    try:
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(pause)
        async with asyncio.timeout(SECONDS):
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


def head(method: str, path: str, *headers: str, host: str = "127.0.0.1") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", f"Host: {host}", *headers, "", ""]).encode("latin-1")


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer else 0


async def until(look: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(SECONDS):
        while not await look():  # noqa: ASYNC110 - what is waited for is in a server
            await asyncio.sleep(0.05)


async def test_the_bus_decides_whom_it_lets_in_and_what_for(bus: SecuredBus, gateway: str) -> None:
    async with httpx.AsyncClient(base_url=gateway, timeout=SECONDS) as client:
        for text, code, path, body in (
            ("", 401, "request", {}),
            ("corral_AAAA", 401, "request", {}),
            (token(bus, "planner"), 403, "request", {}),
            (token(bus, "vera"), 403, "request", {}),
            (token(bus, "alice"), 403, "drain", {"drain": True, "hosts": ["*"], "reason": "x"}),
            (token(bus, "alice"), 403, "job_override", {"action": {"job_id": "1", "verb": "cancel"}}),
            # Nobody plans here: a caller whom the bus lets ask is told so.
            (token(bus, "alice"), 503, "request", {"gpus": 1}),
            (token(bus, "alice"), 503, "query", {"sql": "SELECT 1"}),
            (token(bus, "alice"), 400, "query", {"sql": 1}),
        ):
            headers = bearer(text) if text else {}
            answer = await client.post(f"/v1/{path}", json=body, headers=headers)
            assert answer.status_code == code, (path, answer.text)
            error = answer.json()
            assert error["type"] == "error"
            assert error["message"]
            assert ("Retry-After" in answer.headers) == (code == 503)
            assert answer.headers["Cache-Control"] == "no-store"
            assert not any(name.lower().startswith("access-control") for name in answer.headers)
    stranger = bus_of(bus.folder.parent / "another")
    async with httpx.AsyncClient(base_url=gateway, timeout=SECONDS) as client:
        for name in ("alice", "olga"):
            answer = await client.get("/v1/fleet", headers=bearer(token(stranger, name)))
            assert answer.status_code == 401
    assert {refused.partition(":")[0] for refused in bus.violations()} <= {"alice"}


async def test_wrong_tokens_are_limited_by_address_and_keep_out_no_one_who_is_in(bus: SecuredBus, gateway: str) -> None:
    own = bearer(token(bus, "alice"))
    async with httpx.AsyncClient(base_url=gateway, timeout=SECONDS) as client:
        assert (await client.get("/v1/fleet", headers=own)).status_code == 503
        wrong = [(await client.get("/v1/fleet", headers=bearer(f"corral_{n}"))).status_code for n in range(24)]
        assert wrong == [401] * 20 + [429] * 4
        late = await client.get("/v1/fleet", headers=bearer(token(bus, "bob")))
        assert late.status_code == 429
        assert int(late.headers["Retry-After"]) > 30
        assert (await client.get("/v1/fleet", headers=own)).status_code == 503


async def test_requests_that_mean_two_things_are_refused(bus: SecuredBus, gateway: str) -> None:
    own = f"Authorization: Bearer {token(bus, 'alice')}"
    two = head("POST", "/v1/request", own, "Content-Length: 5", "Transfer-Encoding: chunked", "Connection: close")
    cases: list[tuple[bytes, tuple[int, ...]]] = [
        (head("GET", "/v1/%66leet", own, "Connection: close"), (404,)),
        (head("GET", "/v1/../v1/fleet", own, "Connection: close"), (404,)),
        (head("GET", "//v1/fleet", own, "Connection: close"), (404,)),
        (head("GET", "http://127.0.0.1/v1/fleet", own, "Connection: close"), (404,)),
        (head("GET", "/v1/fleet", own, "Connection: close", host="evil.example"), (421,)),
        (head("GET", "/v1/fleet", own, "Host: 127.0.0.1", "Connection: close"), (400,)),
        (head("GET", "/v1/fleet", own, own, "Connection: close"), (401,)),
        (head("GET", "/v1/fleet", "Authorization: Basic YTpi", "Connection: close"), (401,)),
        (head("GET", "/v1/fleet?access_token=x", own, "Connection: close"), (400,)),
        (head("GET", "/v1/fleet", own, "Content-Length: 2", "Connection: close") + b"{}", (400,)),
        (head("OPTIONS", "/v1/fleet", "Origin: https://evil.example", "Connection: close"), (405,)),
        (head("TRACE", "/v1/fleet", own, "Connection: close"), (405,)),
        (head("POST", "/v1/request", own, "Content-Length: 2", "Connection: close") + b"{}", (415,)),
        (head("POST", "/v1/request", own, "Content-Length: -1", "Connection: close"), (400,)),
        (head("POST", "/v1/request", own, "Content-Length: 1", "Content-Length: 2", "Connection: close"), (400,)),
        (two + b"0\r\n\r\n", (400, 415)),
        (head("GET", "/v1/fleet", own, "X: a\rb", "Connection: close"), (400,)),
        (head("GET", "/v1/fleet", own, "X: " + "a" * 20_000, "Connection: close"), (400, 413)),
        (head("GET", "/v1/leases?owner=" + "a" * 70_000, own, "Connection: close"), (400, 413)),
        (head("GET", "/v1/leases?" + "&".join("hosts=a" for _ in range(1500)), own, "Connection: close"), (503,)),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", (400,)),
    ]
    for sent, expected in cases:
        answer = await raw(gateway, sent)
        assert status(answer) in expected, (sent[:80], answer[:300])
        assert b"corral_" not in answer, "a token never comes back"


async def test_bodies_are_bounded_and_have_to_come_in_time(bus: SecuredBus, gateway: str) -> None:
    headers = [f"Authorization: Bearer {token(bus, 'alice')}", "Content-Type: application/json"]
    refused = await raw(gateway, head("POST", "/v1/request", *headers, "Content-Length: 1048577"))
    assert status(refused) == 413
    chunk = b"%x\r\n%s\r\n" % (2**16, b" " * 2**16)
    chunked = head("POST", "/v1/request", *headers, "Transfer-Encoding: chunked")
    assert status(await raw(gateway, chunked, *[chunk] * 17)) == 413
    late = await raw(gateway, head("POST", "/v1/request", *headers, "Content-Length: 100"), b"{")
    assert (status(late), b'"slow"' in late) == (408, True)
    deep = b"[" * 200_000
    answer = await raw(
        gateway, head("POST", "/v1/request", *headers, f"Content-Length: {len(deep)}", "Connection: close"), deep
    )
    assert status(answer) == 400
    # Whoever has no token is not read from at all.
    nobody = await raw(gateway, head("POST", "/v1/request", headers[1], "Content-Length: 900000"))
    assert (status(nobody), b"connection: close" in nobody) == (401, True)


async def test_connections_that_say_nothing_are_closed_and_those_of_an_address_counted(gateway: str) -> None:
    began = asyncio.get_running_loop().time()
    partial = (b"", b"GET /v1/fleet HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ")
    assert await asyncio.gather(*(raw(gateway, each) for each in partial)) == [b"", b""]
    # A header each 0.2 s would hold a connection for ever.
    drip = [b"GET / HTTP/1.1\r\n", *[b"X: y\r\n"] * 100]
    assert await raw(gateway, *drip[:6], pause=0.2) == b""
    # Nor does an answer give time without end for the request after it.
    second = await raw(gateway, head("GET", "/-/healthy") + b"GET /-/healthy HT")
    assert second.count(b"HTTP/1.1 200") == 1
    assert asyncio.get_running_loop().time() - began < SECONDS
    held = [await asyncio.open_connection(*place(gateway)) for _ in range(8)]
    try:
        assert await raw(gateway, head("GET", "/-/healthy", "Connection: close")) == b""
    finally:
        for _, writer in held:
            writer.close()
            await writer.wait_closed()

    async def let_in() -> bool:
        return status(await raw(gateway, head("GET", "/-/healthy", "Connection: close"))) == 200

    await until(let_in)


async def test_a_caller_has_a_limit_of_its_own(bus: SecuredBus, gateway: str) -> None:
    async with httpx.AsyncClient(base_url=gateway, timeout=SECONDS, headers=bearer(token(bus, "alice"))) as alice:
        async with alice.stream("GET", "/v1/lease_events"), alice.stream("GET", "/v1/job_events"):
            third = await alice.get("/v1/fleet")
            assert third.status_code == 429
            other = await alice.get("/v1/fleet", headers=bearer(token(bus, "bob")))
            assert other.status_code == 503

        async def let_in() -> bool:
            return (await alice.get("/v1/fleet")).status_code == 503

        await until(let_in)


async def test_a_client_that_takes_nothing_loses_its_connection(bus: SecuredBus) -> None:
    """Events that are published without end, to a client that reads none of them."""
    planner = await bus.connect("planner")
    limits = {"send_seconds": 0.5}
    async with in_process(bus.server.url, bus.credentials("http"), **limits) as url:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, place(url))
        asked = head("GET", "/v1/lease_events", f"Authorization: Bearer {token(bus, 'alice')}")
        await loop.sock_sendall(sock, asked)
        assert b"200 OK" in await loop.sock_recv(sock, 64)
        lease = granted().lease
        large = replace(lease, labels={f"l{n}": "x" * 200 for n in range(60)})
        event = codec.encode(LeaseEvent(kind=LeaseEventKind.RENEWED, time=START, lease=large), codec.JSON)
        subject = subjects.lease_subject("renewed", lease.lease_id)

        async def reset() -> bool:
            for _ in range(200):
                await planner.publish(subject, event)
            await planner.flush()
            return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0

        await until(reset)
        sock.close()
    await planner.close()


async def test_it_ends_in_order_while_the_bus_says_nothing(bus: SecuredBus) -> None:
    assert bus.server.process is not None
    async with asyncio.timeout(2 * SECONDS):
        async with in_process(bus.server.url, bus.credentials("http")) as url:
            client = httpx.AsyncClient(base_url=url, timeout=SECONDS, headers=bearer(token(bus, "alice")))
            assert (await client.get("/v1/fleet")).status_code == 503
            following = client.stream("GET", "/v1/lease_events")
            assert (await following.__aenter__()).status_code == 200
            os.kill(bus.server.process.pid, signal.SIGSTOP)
        os.kill(bus.server.process.pid, signal.SIGCONT)
    with contextlib.suppress(httpx.HTTPError):
        await following.__aexit__(None, None, None)
    await client.aclose()


async def test_it_serves_before_the_bus_is_there_and_says_that_it_is_not(bus: SecuredBus) -> None:
    async with (
        in_process("nats://127.0.0.1:1", bus.credentials("http")) as url,
        httpx.AsyncClient(base_url=url, timeout=SECONDS) as client,
    ):
        ready = await client.get("/-/ready")
        assert (ready.status_code, "not reachable" in ready.text) == (503, True)
        assert (await client.get("/-/healthy")).status_code == 200


async def test_tokens_prove_nothing_to_a_bus_that_checks_nobody(bus: SecuredBus, server: EmbeddedServer) -> None:
    async with (
        in_process(server.url) as url,
        httpx.AsyncClient(base_url=url, timeout=SECONDS, headers=bearer(token(bus, "alice"))) as client,
    ):
        answer = await client.get("/v1/fleet")
        assert (answer.status_code, "asks for no credentials" in answer.text) == (503, True)


async def test_it_speaks_tls_and_follows_a_proxy_that_it_trusts(bus: SecuredBus, tmp_path: Path) -> None:
    ca = certificates.make_ca()
    own = certificates.issue(ca, "gateway", ["127.0.0.1"])
    (tmp_path / "gate.crt").write_bytes(own.certificate)
    (tmp_path / "gate.key").write_bytes(own.key)
    context = ssl.create_default_context(cadata=ca.certificate.decode())
    files: dict[str, Any] = {"certificate": tmp_path / "gate.crt", "key": tmp_path / "gate.key"}
    limits: dict[str, Any] = {**files, "trusted_proxies": ("127.0.0.0/8",)}
    async with (
        in_process(bus.server.url, bus.credentials("http"), **limits) as url,
        httpx.AsyncClient(base_url=url, verify=context, timeout=SECONDS) as client,
    ):
        assert url.startswith("https://")

        async def wrong(address: str) -> int:
            return (await client.get("/v1/fleet", headers={**bearer("x"), "X-Forwarded-For": address})).status_code

        assert [await wrong("192.0.2.1") for _ in range(21)] == [401] * 20 + [429]
        assert await wrong("192.0.2.2") == 401
        # What a client writes to the left of its own address says nothing.
        assert await wrong("192.0.2.7, 192.0.2.1") == 429
        ready = await client.get("/-/ready")
        assert "max-age" in ready.headers["Strict-Transport-Security"]


def test_plain_http_is_for_this_machine_alone_unless_asked_for() -> None:
    for settings, refused in (
        (Settings(), ""),
        (Settings(host="0.0.0.0"), "could read tokens"),
        (Settings(host="::", plain=True), ""),
        (Settings(host="10.0.0.1", certificate=Path("a")), "go together"),
    ):
        check: Callable[[], None] = settings.check
        if refused:
            with pytest.raises(SettingsError, match=refused):
                check()
        else:
            check()
    assert Settings().allowed_names >= {"localhost", "127.0.0.1", "::1"}
    assert Settings(host="0.0.0.0", names=("gate.example",)).allowed_names == {"gate.example"}
