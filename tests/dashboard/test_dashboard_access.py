"""Access control of the dashboard, on a real server over HTTP and websockets."""

from __future__ import annotations

import asyncio
import re
import stat
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import websockets
from corral.dashboard.security.accounts import Accounts, AccountsError, Role
from corral.dashboard.security.guard import safe_target
from corral.dashboard.security.sessions import Sessions
from hypothesis import given
from hypothesis import strategies as st
from support.browser import PASSWORD, DashboardProcess
from support.local_cluster import LocalCluster, corral

PAGES = (
    "/",
    "/jobs",
    "/job/1",
    "/leases",
    "/analytics",
    "/reports",
    "/events",
    "/host/sim-0001",
    "/reports/usage.csv",
    "/request",
    "/fit",
    "/device/GPU-1",
    "/export/x/csv",
    "/_nicegui/x",
    "/nothing",
)


def page_id(client: httpx.Client) -> str:
    """Open a page and give back NiceGUI's id of it."""
    text = client.get("/").text
    found = re.search(r"client_id.: ?.([0-9a-f-]{36})", text)
    assert found, text[:500]
    return found[1]


async def knock(dashboard: DashboardProcess, page: str, cookie: str, origin: str) -> int:
    """Open the websocket of a page; 101 where it opens, else the status that refuses."""
    query = (
        f"client_id={page}&next_message_id=0&document_id=d&tab_id=t&implicit_handshake=true&EIO=4&transport=websocket"
    )
    url = f"{dashboard.url.replace('http', 'ws')}_nicegui_ws/socket.io/?{query}"
    headers = {"Cookie": f"corral_session={cookie}", "Origin": origin}
    try:
        async with websockets.connect(url, additional_headers={k: v for k, v in headers.items() if v}, proxy=None):
            return 101
    except websockets.InvalidStatus as refused:
        return refused.response.status_code


def test_strangers_get_the_login_and_nothing_else(dashboard: DashboardProcess) -> None:
    with dashboard.http() as stranger:
        for path in (*PAGES, "/loginx", "/healthy", "/nothing"):
            assert stranger.get(path).status_code == 401, path
            answer = stranger.get(path, headers={"Accept": "text/html"})
            assert answer.status_code == 303, path
            assert answer.headers["location"].startswith("/login?next=%2F"), path
        assert stranger.get("/login").status_code == stranger.get("/assets/corral.css").status_code == 200
        forged = stranger.get("/", headers={"Cookie": "corral_session=WyJhIiwib2xnYSIsImIiLDllOV0.x"})
        assert forged.status_code == 401
    assert asyncio.run(knock(dashboard, "a", "", dashboard.origin)) == 403


def test_every_answer_tells_the_browser_how_little_it_may(dashboard: DashboardProcess) -> None:
    with dashboard.logged_in("vera") as client:
        answers = [client.get("/"), client.get("/login"), client.get("/nothing"), client.get("/assets/corral.css")]
        page = answers[0]
        for answer in answers:
            headers = answer.headers
            policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
            assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
            assert "unsafe-inline" not in policy["script-src"]
            assert policy["form-action"] == "'self'"
            assert headers["x-frame-options"] == "DENY"
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["referrer-policy"] == "same-origin"
            assert "access-control-allow-origin" not in headers
            assert "server" not in headers
        nonces = set(re.findall(r"'nonce-([^']+)'", page.headers["content-security-policy"]))
        assert set(re.findall(r'<script nonce="([^"]+)"', page.text)) == nonces
        assert len(re.findall(r"<script", page.text)) == page.text.count(f'nonce="{nonces.pop()}"')
        assert client.get("/").headers["content-security-policy"] != page.headers["content-security-policy"]


def test_what_did_not_come_from_our_pages_is_refused(dashboard: DashboardProcess) -> None:
    with dashboard.logged_in("olga") as client:
        mine, cookie = page_id(client), client.cookies["corral_session"]
        for origin in ("https://evil.example", "null", "http://127.0.0.1:1", ""):
            for path in ("/logout", "/login", "/"):
                assert client.post(path, headers={"Origin": origin}).status_code == 403, (origin, path)
            assert asyncio.run(knock(dashboard, mine, cookie, origin)) == 403, origin
        elsewhere = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
        assert client.get("/", headers=elsewhere).status_code == 403
        assert client.get("/", headers=elsewhere | {"Sec-Fetch-Mode": "navigate"}).status_code == 200
        # Another name that points here, as a page elsewhere may arrange for its own (DNS rebinding).
        assert client.get("/", headers={"Host": "evil.example"}).status_code == 421
        assert asyncio.run(knock(dashboard, mine, cookie, dashboard.origin)) == 101


def test_a_page_belongs_to_the_session_that_opened_it(dashboard: DashboardProcess) -> None:
    with dashboard.logged_in("olga") as olga, dashboard.logged_in("vera") as vera:
        assert asyncio.run(knock(dashboard, page_id(olga), vera.cookies["corral_session"], dashboard.origin)) == 403


def test_a_link_logs_in_once_and_is_in_no_log(dashboard: DashboardProcess) -> None:
    link = urlsplit(dashboard.command("link"))
    with dashboard.http() as first, dashboard.http() as second:
        answer = first.get(f"{link.path}?{link.query}&next=/leases")
        assert (answer.status_code, answer.headers["location"]) == (303, "/leases")
        cookie = answer.headers["set-cookie"].lower()
        assert "httponly" in cookie
        assert "samesite=lax" in cookie
        assert first.get("/").status_code == 200
        assert second.get(f"{link.path}?{link.query}").status_code == 403
        assert second.get("/").status_code == 401
    token = link.query.removeprefix("token=")
    assert token not in dashboard.log.read_text()
    assert token not in Path(f"/proc/{dashboard.process.pid}/cmdline").read_text()
    for path in dashboard.state.iterdir():
        if path.is_file():
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_roles_follow_the_accounts_and_sessions_end(dashboard: DashboardProcess) -> None:
    dashboard.command("user", "tom", "--role", "operator", "--password-file", "-", text=PASSWORD)
    with dashboard.http() as tom:
        assert tom.post("/login", data={"name": "tom", "password": "a wrong password"}).status_code == 403
    with dashboard.entered("tom") as tom:
        assert tom.get("/").status_code == 200
        # An ended session ends for good, also for whoever kept its cookie.
        cookie = tom.cookies["corral_session"]
        assert tom.post("/logout").status_code == 303
        assert tom.get("/", headers={"Cookie": f"corral_session={cookie}"}).status_code == 401
    with dashboard.entered("tom") as tom:
        dashboard.user("tom", "operator", "another long password")
        assert tom.get("/").status_code == 401
    with dashboard.entered("tom", "another long password") as tom:
        dashboard.command("user", "tom", "--remove")
        assert tom.get("/").status_code == 401


def test_guessing_has_to_wait_at_the_same_time_as_well(cluster: LocalCluster, tmp_path: Path) -> None:
    """A check takes a while, and many may stand in line for it before the first has failed."""
    guarded = DashboardProcess(tmp_path / "state", cluster.url)
    try:
        guarded.user("tom", "viewer", "a long password of his")
        with guarded.http() as guesser, ThreadPoolExecutor(16) as threads:
            codes = [guesser.post("/login", data={"token": f"guess-{n}"}).status_code for n in range(7)]
            assert codes == [403] * 5 + [429] * 2
            link = urlsplit(guarded.link())
            assert guesser.get(f"{link.path}?{link.query}").status_code == 429
            assert guesser.post("/login", content=b"x" * 20_000).status_code == 413

            def guess(number: int) -> int:
                return guesser.post("/login", data={"name": "tom", "password": f"guess-{number}"}).status_code

            counted = Counter(threads.map(guess, range(16)))
        # Two are checked at a time: one more may have begun with the fifth.
        assert counted[403] in (5, 6)
        assert counted[429] == 16 - counted[403]
    finally:
        assert guarded.stop() == 0
    assert not (guarded.state / "url").exists()


def test_it_is_never_open_to_other_machines_without_a_login(tmp_path: Path) -> None:
    done = corral("dashboard", "--host", "0.0.0.0", "--no-login", "--state", str(tmp_path))
    assert done.returncode == 2
    assert "login" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_session_holds_as_long_as_it_should_and_no_longer(tmp_path: Path) -> None:
    now = [1000.0]
    accounts = Accounts(tmp_path)
    accounts.save("ann", Role.VIEWER, "a long password")
    sessions = Sessions(tmp_path, accounts, 60, clock=lambda: now[0])
    account = accounts.check("ann", "a long password")
    assert account is not None
    session, cookie = sessions.start(account)
    again = Sessions(tmp_path, Accounts(tmp_path), 60, clock=lambda: now[0])
    assert again.read(cookie) == session, "the secret is kept"
    assert Sessions(tmp_path / "other", accounts, 60, clock=lambda: now[0]).read(cookie) is None
    accounts.save("ann", Role.OPERATOR, "a long password!")
    assert sessions.read(cookie) is None, "another password ends sessions"
    account = accounts.check("ann", "a long password!")
    assert account is not None
    session, cookie = sessions.start(account)
    sessions.end(session)
    assert sessions.read(cookie) is None
    assert again.read(cookie) is not None, "one that has not read the file anew"
    assert Sessions(tmp_path, accounts, 60, clock=lambda: now[0]).read(cookie) is None, "also after a restart"
    _, cookie = sessions.start(account)
    now[0] += 59
    assert sessions.read(cookie) is not None
    now[0] += 1
    assert sessions.read(cookie) is None
    for at in range(0, len(cookie), 7):
        assert sessions.read(cookie[:at] + ("A" if cookie[at] != "A" else "B") + cookie[at + 1 :]) is None


def test_names_and_passwords_that_cannot_be_taken_say_why(tmp_path: Path) -> None:
    accounts = Accounts(tmp_path)
    for name, password in (
        ("a b", "a long password"),
        ("", "a long password"),
        ("a:b", "a long password"),
        ("ann", "short"),
    ):
        with pytest.raises(AccountsError):
            accounts.save(name, Role.VIEWER, password)
    began = time.monotonic()
    assert accounts.check("nobody", "a long password") is None
    assert time.monotonic() > began
    accounts.path.write_text("ann:viewer:plain\n")
    with pytest.raises(AccountsError, match="line 1"):
        Accounts(tmp_path).all()


@given(st.text(max_size=30))
def test_after_the_login_one_stays_here(target: str) -> None:
    parts = urlsplit("http://here.example" + safe_target(target))
    assert parts.netloc == "here.example"
    assert safe_target(target).startswith("/")
    assert not safe_target(target).startswith(("//", "/\\"))
