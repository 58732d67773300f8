"""Rate limits of failed logins: they delay only the client that guesses, by its own address behind a proxy too."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from corral.bus.addresses import network
from corral.dashboard.security.accounts import Accounts, Role
from corral.dashboard.security.login import LoginPages
from corral.dashboard.security.login_attempts import FREE, FREE_OF_PLACE, MAX_SECONDS, Attempts
from corral.dashboard.security.proxies import with_proxy_headers
from corral.dashboard.security.sessions import BROWSER_COOKIE, Sessions
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route


def test_a_guesser_waits_longer_each_time_and_nobody_else_does() -> None:
    attempts = Attempts()
    now, waits = 0.0, [0.0]
    for _ in range(20):
        attempts.failed("tom", "10.0.0.1", "", now)
        waits.append(attempts.wait_seconds("tom", "10.0.0.1", "", now))
        now += waits[-1]
    assert waits[:FREE] == [0.0] * FREE
    assert waits == sorted(waits)
    assert waits[FREE] == 60
    assert waits[-1] == MAX_SECONDS
    # Neither tom from elsewhere nor others from there.
    assert attempts.wait_seconds("tom", "10.0.0.2", "", now) == 0
    assert attempts.wait_seconds("tom", "10.0.0.1", "his browser", now) == 0
    attempts = Attempts()
    for number in range(FREE_OF_PLACE):
        attempts.failed(f"user{number}", "2001:db8::1", "", now)
    assert attempts.wait_seconds("ann", "2001:db8::2", "", now) > 0, "one network is one place"
    assert attempts.wait_seconds("ann", "2001:db8:0:1::2", "", now) == 0


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=60, max_size=120))
def test_no_number_of_addresses_keeps_somebody_out_for_good(addresses: list[int]) -> None:
    attempts = Attempts()
    for number, address in enumerate(addresses):
        attempts.failed("tom", str(address), "", number / 10)
    now = len(addresses) / 10
    assert attempts.wait_seconds("tom", "his own", "where he was before", now) == 0
    assert attempts.wait_seconds("tom", "a new one", "", now) <= 60
    attempts.failed("tom", "his own", "", now)
    attempts.succeeded("tom", "his own", "")
    assert attempts.wait_seconds("ann", "his own", "", now) == 0


async def seen(headers: list[tuple[str, str]], trusted: list[str], peer: str = "10.0.0.5") -> str:
    async def answer(request: Request) -> PlainTextResponse:
        assert request.client is not None
        return PlainTextResponse(request.client.host)

    app: Any = with_proxy_headers(Starlette(routes=[Route("/", answer)]), trusted)
    transport = httpx.ASGITransport(app=app, client=(peer, 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        return (await client.get("/", headers=headers)).text


@pytest.mark.parametrize(
    ("headers", "trusted", "address"),
    [
        ([("X-Forwarded-For", "1.2.3.4")], [], "10.0.0.5"),
        ([("X-Forwarded-For", "1.2.3.4")], ["10.0.0.9"], "10.0.0.5"),
        ([("X-Forwarded-For", "1.2.3.4")], ["10.0.0.0/8"], "1.2.3.4"),
        ([("X-Forwarded-For", "9.9.9.9, 1.2.3.4")], ["10.0.0.5"], "1.2.3.4"),
        ([("X-Forwarded-For", "9.9.9.9, 1.2.3.4, 10.0.0.7")], ["10.0.0.0/8"], "1.2.3.4"),
        ([("X-Forwarded-For", "9.9.9.9"), ("X-Forwarded-For", "1.2.3.4:5678")], ["10.0.0.5"], "1.2.3.4"),
        ([("Forwarded", 'for=9.9.9.9;proto=http, for="[2001:db8::1]:80";by=x')], ["10.0.0.5"], "2001:db8::1"),
        ([("Forwarded", "for=9.9.9.9"), ("X-Forwarded-For", "1.2.3.4")], ["10.0.0.5"], "1.2.3.4"),
        ([("Forwarded", "proto=https")], ["10.0.0.5"], "10.0.0.5"),
    ],
)
def test_only_trusted_proxies_say_who_comes(headers: list[tuple[str, str]], trusted: list[str], address: str) -> None:
    assert asyncio.run(seen(headers, trusted)) == address


@pytest.mark.parametrize("trusted", ["10.0.0.5", "10.0.0.0/8"])
def test_a_proxy_is_known_on_a_socket_of_both_kinds_of_address(trusted: str) -> None:
    assert asyncio.run(seen([("X-Forwarded-For", "1.2.3.4")], [trusted], "::ffff:10.0.0.5")) == "1.2.3.4"


def test_a_proxy_is_an_address_or_a_network() -> None:
    assert network("10.0.0.5/8") == "10.0.0.0/8"
    for wrong in ("proxy.example", "*", "", "10.0.0.0/33"):
        with pytest.raises(ValueError, match="expected a form"):
            network(wrong)


def test_an_attacker_behind_the_proxy_locks_nobody_else_out(tmp_path: Path) -> None:
    accounts = Accounts(tmp_path)
    accounts.save("tom", Role.VIEWER, "a long password of his")
    sessions = Sessions(tmp_path, accounts, 60)
    door = LoginPages(accounts, sessions, seconds=60, secure=False, ended=lambda _: None, proxied=True)
    app: Any = with_proxy_headers(Starlette(routes=list(door.routes())), ["10.0.0.5"])

    async def attempt(address: str, password: str, cookies: dict[str, str] | None = None) -> httpx.Response:
        transport = httpx.ASGITransport(app=app, client=("10.0.0.5", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://x", cookies=cookies) as client:
            form = {"name": "tom", "password": password}
            return await client.post("/login", data=form, headers={"X-Forwarded-For": f"8.8.8.8, {address}"})

    async def story() -> None:
        first = await attempt("1.1.1.1", "a long password of his")
        assert first.status_code == 303
        browser = {BROWSER_COOKIE: first.cookies[BROWSER_COOKIE]}
        codes = [(await attempt("6.6.6.6", f"guess {number}")).status_code for number in range(FREE + 1)]
        assert codes == [403] * FREE + [429]
        waiting = await attempt("6.6.6.6", "a long password of his")
        assert waiting.status_code == 429
        assert int(waiting.headers["Retry-After"]) <= 60
        # The person elsewhere, and in a browser of theirs even from the attacker's own address.
        assert (await attempt("1.1.1.2", "a long password of his")).status_code == 303
        assert (await attempt("6.6.6.6", "a long password of his", browser)).status_code == 303
        forged = {BROWSER_COOKIE: browser[BROWSER_COOKIE].swapcase()}
        assert (await attempt("6.6.6.6", "a long password of his", forged)).status_code == 429

    asyncio.run(story())
