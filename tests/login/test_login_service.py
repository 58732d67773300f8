"""Logins with a real provider, a real bus and the real commands."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import corral.client
import httpx
import msgspec
import nkeys
import pytest
from corral.bus.access.folder import Authority, AuthorityError, make_key
from corral.bus.access.roles import Role
from corral.bus.connect import connect
from corral.bus.tasks import cancel_all
from corral.client.config import read
from corral.client.health import ask_health
from corral.login import health, issuing
from corral.login.issuing import Issuer, NoServer
from corral.login.messages import LoggedIn, Logout, Started, Waiting, logout_text
from corral.login.provider import Provider
from corral.login.rules import LoginRefused, Person, Rules, read_rules
from corral.schemas.health import ServiceHealth
from corral.schemas.requests import Error
from nats.aio.client import Client
from support.openid_provider import OpenIdProvider, openid_provider, user_code
from support.secured_bus import SecuredBus

RULES = Rules(issuer="https://id.example", client_id="corral")


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenIdProvider]:
    with openid_provider(tmp_path_factory.mktemp("provider")) as made:
        yield made


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[SecuredBus]:
    made = SecuredBus(tmp_path)
    made.add(Role.PLANNER, "planner")
    made.add(Role.OPERATOR, "login", serves=True)
    made.server.start()
    yield made
    made.server.kill()


@pytest.fixture
def planner(bus: SecuredBus) -> Iterator[None]:
    """A planner, with a group."""
    with bus.part("planner", "plan"):
        until(lambda: bus.corral("login", "group", "set", "lab/vision").returncode == 0)
        yield


@pytest.fixture
def service(bus: SecuredBus, provider: OpenIdProvider, tmp_path: Path) -> Iterator[str]:
    """URL of a login service, as a process."""
    rules = provider.rules(tmp_path / "login.toml")
    options = ("--rules", str(rules), "--dir", str(bus.authority.folder), "--bus", bus.server.url)
    with bus.part("login", "login-service", *options, "--listen", "127.0.0.1:0"):
        log = tmp_path / "login.log"
        yield until(lambda: log.read_text().partition("corral login ")[2].partition("\n")[0])


class Login:
    """`corral login` as a process, in a home of its own."""

    def __init__(self, bus: SecuredBus, home: Path, *arguments: str) -> None:
        home.mkdir(exist_ok=True)
        self.config = home / "corral.toml"
        self._output = home / "output"
        self.environment = bus.environment(CORRAL_CONFIG=str(self.config), PYTHONUNBUFFERED="1")
        del self.environment["CORRAL_NATS_URL"]
        with self._output.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "corral.cli.main", "login", *arguments],
                env=self.environment,
                stdout=out,
                stderr=out,
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    def code(self) -> str:
        return user_code(until(lambda: self.output if "confirm the code" in self.output else ""))

    def end(self) -> int:
        return self.process.wait(60)


def is_private(file: str) -> bool:
    return Path(file).stat().st_mode & 0o777 == 0o600


def is_there(file: str) -> bool:
    return Path(file).exists()


def in_place(file: str, text: str) -> str:
    """Put a text into a file, and return the one before."""
    before = Path(file).read_text()
    Path(file).write_text(text)
    return before


def until(found: Callable[[], Any]) -> Any:
    """What is found at last."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if value := found():
            return value
        time.sleep(0.02)
    raise TimeoutError("nothing was found")


async def closed(nc: Client) -> None:
    """Wait until the server has closed a connection for good, or refuses it."""
    async with asyncio.timeout(60):
        while nc.is_connected:  # noqa: ASYNC110 - nats-py tells of the end only where it was asked to at the start
            await asyncio.sleep(0.02)


@pytest.mark.long
async def test_who_logs_in_acts_under_their_name_until_they_log_out(
    bus: SecuredBus, provider: OpenIdProvider, planner: None, service: str, tmp_path: Path
) -> None:
    login = Login(bus, tmp_path / "ann", service, "--as", "lab")
    await asyncio.to_thread(provider.confirm, "ann", await asyncio.to_thread(login.code))
    assert await asyncio.to_thread(login.end) == 0, login.output
    assert "logged in as ann (requester, group lab/vision)" in login.output
    context = read([login.config]).contexts["lab"]
    assert is_private(context.creds)
    assert "SU" not in (tmp_path / "login.log").read_text()  # seeds stay with who made them

    async with corral.client.connect(context.nats, credentials=context.creds, timeout=20) as client:
        [group] = (await client.groups(name="lab/vision")).groups
        assert group.group.members == ["ann"]
        with pytest.raises(corral.client.Rejected):
            await client.request(gpus=1)
        with pytest.raises(corral.client.Refused):
            await client.request(gpus=1, owner="ben")
    nc = await connect(context.nats, credentials=context.creds)

    out = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "corral.cli.main", "logout"],
        env=login.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 0, out.stderr
    await closed(nc)
    assert not read([login.config]).contexts
    assert not is_there(context.creds)
    await nc.close()


@pytest.mark.long
async def test_who_has_no_role_or_refuses_gets_no_credentials(
    bus: SecuredBus, provider: OpenIdProvider, service: str, tmp_path: Path
) -> None:
    before = set(Authority(bus.authority.folder).registry.users)
    cases = {
        "eve": ("accept", "none of your groups"),
        "ann": ("deny", "the login was refused"),
        "planner": ("accept", "is the name of a user with a key of its own"),
    }
    logins = {name: Login(bus, tmp_path / name, service) for name in cases}
    for name, (decision, _) in cases.items():
        await asyncio.to_thread(provider.confirm, name, await asyncio.to_thread(logins[name].code), decision)
    for name, (_, message) in cases.items():
        assert await asyncio.to_thread(logins[name].end) == 5
        assert message in logins[name].output
        assert not logins[name].config.exists()
    assert set(Authority(bus.authority.folder).registry.users) == before


@pytest.mark.long
async def test_the_service_tells_what_is_wrong_with_a_message(service: str) -> None:
    async with httpx.AsyncClient(base_url=service, timeout=30) as http:
        for path, body, status, code in (
            ("/v1/login/start", b"{}", 400, "invalid_request"),
            ("/v1/login/start", b"x" * 10_000, 400, "invalid_request"),
            ("/v1/login/poll", b'{"session": "none"}', 410, "expired"),
            ("/v1/login/start", b'{"key": "U' + b"A" * 55 + b'", "owner": "ben"}', 400, "invalid_request"),
        ):
            answer = await http.post(path, content=body)
            assert (answer.status_code, answer.json()["code"]) == (status, code)
        started = (await http.post("/v1/login/start", json={"key": make_key()[1]})).json()
        # The provider is not asked more often than it wants.
        for _ in range(3):
            waiting = await http.post("/v1/login/poll", json={"session": started["session"]})
            assert waiting.json()["type"] == "waiting"
        key = make_key()[1]
        forged = {"user": "planner", "at": datetime.now(UTC).isoformat(), "signature": "AAAA"}
        assert (await http.post("/v1/logout", json=forged)).json() == {"ended": False}
        assert key not in (await http.get("/health")).text


async def taken(bus: SecuredBus, credentials: Path) -> Client:
    """A connection, once the server has heard of its key."""
    async with asyncio.timeout(60):
        while True:
            try:
                return await connect(bus.server.url, credentials=str(credentials), wait_seconds=2)
            except ConnectionError:
                await asyncio.sleep(0.05)


@contextlib.contextmanager
def scripted(*answers: tuple[int, object]) -> Iterator[str]:
    """A login service that gives these answers, one after the other; its URL."""
    left = list(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            status, answer = left.pop(0)
            body = msgspec.json.encode(answer)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    assert left == []


def test_a_login_goes_on_while_the_provider_is_away_and_ends_with_what_is_for_good(tmp_path: Path) -> None:
    started = Started(
        session="s",
        user_code="AB-CD",
        verification_uri="https://id.example/device",
        verification_uri_complete="",
        expires_seconds=60.0,
        interval_seconds=0.01,
    )
    away = Error(code="unavailable", message="the provider does not answer")
    done = LoggedIn(
        user="ann-1",
        owner="ann",
        role="requester",
        group="",
        expires_at=datetime.now(UTC) + timedelta(hours=1),
        nats="",
        ca="",
    )
    waiting = Waiting(interval_seconds=0.01)
    for last, code, words in (
        ((200, done), 0, "logged in as ann"),
        ((500, Error(code="failed", message="no server could be told")), 1, "no server could be told"),
    ):
        with scripted((200, started), (200, waiting), (503, away), (503, away), (200, waiting), last) as url:
            config = tmp_path / f"{code}.toml"
            ran = subprocess.run(
                [sys.executable, "-m", "corral.cli.main", "login", url],
                env=os.environ | {"CORRAL_CONFIG": str(config)},
                capture_output=True,
                text=True,
                check=False,
            )
        assert (ran.returncode, config.exists()) == (code, code == 0), ran.stderr
        assert words in ran.stderr
        assert ran.stderr.count("the provider does not answer; still waiting") == 1


async def test_a_login_ends_when_its_time_is_over_and_the_oldest_gives_way(bus: SecuredBus) -> None:
    rules = Rules(issuer="https://id.example", client_id="corral", hours=1.0)
    issuer = Issuer(bus.authority.folder, rules)
    keys = [make_key() for _ in range(18)]
    users = [await issuer.issue(Person(owner="ann@lab.example", role=Role.REQUESTER), key) for _, key in keys]
    left = Authority(bus.authority.folder).registry.users
    assert [user.name in left for user in users] == [False] * 2 + [True] * 16
    seed = users[-1]
    file = bus.folder / "ann.creds"
    file.write_text(f"# inbox: _INBOX.{seed.name}\n{keys[-1][0]}\n")
    nc = await taken(bus, file)
    authority = Authority(bus.authority.folder)
    authority.registry.users[seed.name] = type(seed)(
        **{name: getattr(seed, name) for name in seed.__struct_fields__ if name != "expires"},
        expires=(datetime.now(UTC) + timedelta(seconds=1)).isoformat(),
    )
    authority._save()  # pyright: ignore[reportPrivateUsage]
    ending = asyncio.create_task(issuer.run())
    await closed(nc)
    assert seed.name not in Authority(bus.authority.folder).registry.users
    ending.cancel()
    await asyncio.gather(ending, return_exceptions=True)
    await nc.close()


async def test_health_checks_say_what_keeps_people_from_logging_in(
    bus: SecuredBus, provider: OpenIdProvider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORRAL_NATS_CREDS", bus.credentials("login"))
    monkeypatch.setattr(health, "CHECK_SECONDS", 0.05)
    rules = read_rules(provider.rules(tmp_path / "login.toml"))
    issuer, asked = Issuer(bus.authority.folder, rules), Provider(rules)
    checks = health.LoginHealth(asked, issuer, lambda: 3)
    checks.outcomes["refused"] += 1
    working = [asyncio.create_task(checks.run(bus.server.url)), asyncio.create_task(issuer.run())]
    nc = await bus.connect("login")

    async def says(*words: str) -> list[ServiceHealth]:
        """Wait for as many reasons as words, each of which has its word."""
        async with asyncio.timeout(60):
            while True:
                found = await ask_health(nc, "login")
                reasons = [reason for one in found for reason in one.reasons]
                if found and len(reasons) == len(words) and all(map(str.__contains__, reasons, words)):
                    return found

    [one] = await says()
    measures = {(measure.name, measure.labels.get("outcome")): measure.value for measure in one.measures}
    assert (measures["logins", "refused"], measures["logins", "issued"], measures["logins_running", None]) == (1, 0, 3)
    asked.rules = Rules(issuer="http://127.0.0.1:9", client_id="corral")
    await says("127.0.0.1:9")
    monkeypatch.setattr(issuing, "_AGAIN_SECONDS", 0.05)
    pid_file = Path(bus.authority.registry.pid_file)
    pid = in_place(str(pid_file), "0")
    issuer._untold = True
    issuer._changed.set()
    await says("127.0.0.1:9", "logins that have ended may still be taken")
    asked.rules = rules
    in_place(str(pid_file), pid)
    await says()
    await cancel_all(working)
    await nc.close()


async def test_a_logout_that_the_server_has_not_heard_of_is_told_again(
    bus: SecuredBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(issuing, "_AGAIN_SECONDS", 0.1)
    issuer = Issuer(bus.authority.folder, RULES)
    seed, key = make_key()
    user = await issuer.issue(Person(owner="zoe", role=Role.REQUESTER), key)
    file = bus.folder / "zoe.creds"
    file.write_text(f"# inbox: _INBOX.{user.name}\n{seed}\n")
    nc = await taken(bus, file)
    # As while a server restarts, which has read the users already.
    pid = in_place(bus.authority.registry.pid_file, "0")
    at = datetime.now(UTC)
    signature = base64.b64encode(nkeys.from_seed(bytearray(seed, "ascii")).sign(logout_text(user.name, at))).decode()
    ending = asyncio.create_task(issuer.run())
    with pytest.raises(NoServer):
        await issuer.log_out(Logout(user=user.name, at=at, signature=signature))
    assert not nc.is_closed
    in_place(bus.authority.registry.pid_file, pid)
    await closed(nc)
    ending.cancel()
    await asyncio.gather(ending, return_exceptions=True)
    await nc.close()


async def test_what_can_not_be_issued_leaves_nothing_behind(bus: SecuredBus, tmp_path: Path) -> None:
    issuer = Issuer(bus.authority.folder, RULES)
    who = Person(owner="ann", role=Role.REQUESTER)
    _, key = make_key()
    with pytest.raises(LoginRefused, match="no public key"):
        await issuer.issue(who, key[:-1] + ("A" if key[-1] != "A" else "B"))
    await issuer.issue(who, key)
    with pytest.raises(LoginRefused, match="new key"):
        await issuer.issue(Person(owner="ben", role=Role.REQUESTER), key)
    bus.server.kill()
    before = set(Authority(bus.authority.folder).registry.users)
    with pytest.raises(NoServer):
        await issuer.issue(who, make_key()[1])
    assert set(Authority(bus.authority.folder).registry.users) == before
    mutual = Authority.create(tmp_path / "mutual", hosts=["127.0.0.1"], mutual=True)
    with pytest.raises(AuthorityError, match="--mutual"):
        Issuer(mutual.folder, RULES)
