"""A real dashboard as a process, and a real browser in front of it."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from corral.dashboard.security.accounts import Accounts, Role
from corral.dashboard.security.login_links import login_link
from corral.dashboard.security.sessions import Sessions
from support.local_cluster import CORRAL, environment, wait_for

PASSWORD = "a long password"
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)


class DashboardProcess:
    """`corral dashboard` on a free port."""

    def __init__(self, state: Path, url: str, *options: str) -> None:
        self.state = state
        self.log = state.with_suffix(".log")
        self.options = options
        self.bus = url
        self.start()

    def start(self) -> None:
        (self.state / "url").unlink(missing_ok=True)
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                [*CORRAL, "dashboard", "--port", "0", "--interval", "250ms", "--state", str(self.state), *self.options],
                env=environment(CORRAL_NATS_URL=self.bus),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
        wait_for(lambda: (self.state / "url").exists() or self.process.poll() is not None)
        assert self.process.poll() is None, self.log.read_text()
        self.url = (self.state / "url").read_text()
        self.origin = self.url.rstrip("/")

    def command(self, *arguments: str, text: str = "") -> str:
        """`corral dashboard …` on this state folder."""
        done = subprocess.run(
            [*CORRAL, "dashboard", *arguments, "--state", str(self.state)],
            env=environment(), input=text, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def link(self) -> str:
        return login_link(self.state) or ""

    def user(self, name: str, role: str, password: str = PASSWORD) -> None:
        Accounts(self.state).save(name, Role(role), password)

    def assign(self, name: str, role: str) -> None:
        assert Accounts(self.state).assign(name, Role(role))

    def http(self) -> httpx.Client:
        """A client that follows nothing by itself and sends the origin that a page of ours would."""
        return httpx.Client(base_url=self.url, headers={"Origin": self.origin}, timeout=60)

    @contextmanager
    def entered(self, name: str, password: str = PASSWORD) -> Iterator[httpx.Client]:
        """By the form, as a browser does."""
        with self.http() as client:
            answer = client.post("/login", data={"name": name, "password": password})
            assert answer.status_code == 303, answer.text
            yield client

    @contextmanager
    def logged_in(self, name: str) -> Iterator[httpx.Client]:
        """With a session that is made here: passwords take their time by design."""
        accounts = Accounts(self.state)
        _, value = Sessions(self.state, accounts, 3600).start(accounts.all()[name])
        with self.http() as client:
            client.cookies.set("corral_session", value)
            yield client

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                return self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
        return self.process.wait()


class Tab:
    """A page in Chromium, with all that it asked for and complained about."""

    def __init__(self, page: Any, origin: str) -> None:
        self.page = page
        self.origin = origin
        self.asked: set[str] = set()
        self.complaints: list[str] = []
        page.set_default_timeout(60_000)
        page.on(
            "request",
            lambda request: self.asked.add(f"{urlsplit(request.url).scheme}://{urlsplit(request.url).netloc}"),
        )
        page.on("websocket", lambda socket: self.asked.add(f"ws://{urlsplit(socket.url).netloc}"))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda line: self.complaints.append(line.text) if line.type == "error" else None)

    def go(self, path: str) -> Any:
        self.page.goto(self.origin + path)
        return self.page

    def until(self, expression: str) -> Any:
        """Wait until JavaScript says something truthy, and give that back."""
        return self.page.wait_for_function(expression).json_value()

    def painted(self, selector: str) -> int:
        """How many colours a canvas shows."""
        return self.page.evaluate(
            """(selector) => {
                const canvas = document.querySelector(selector);
                const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
                const found = new Set();
                for (let at = 0; at < data.length; at += 4)
                    found.add(data[at] << 16 | data[at + 1] << 8 | data[at + 2]);
                return found.size;
            }""",
            selector,
        )


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless Chromium; the test is skipped where there is none."""
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def open_tab(
    browser: Any, dashboard: DashboardProcess, client: httpx.Client, width: int = 1280, height: int = 900, **more: Any
) -> Tab:
    """A tab that is logged in as an HTTP client is."""
    context = browser.new_context(viewport={"width": width, "height": height}, **more)
    cookie = client.cookies["corral_session"]
    context.add_cookies([{"name": "corral_session", "value": cookie, "url": dashboard.url, "httpOnly": True}])
    return Tab(context.new_page(), dashboard.origin)


def press(page: Any, button: str, opens: str) -> None:
    """Press a button until what it opens is there: a page that is being made anew loses a press."""
    from playwright.sync_api import TimeoutError as NotThere

    while True:
        page.click(button)
        try:
            page.wait_for_selector(opens, timeout=5_000)
        except NotThere:
            continue
        return


def settled(found: Any, seconds: float = 15.0) -> Any:
    """As `wait_for`, for what a browser is asked (its own clock runs meanwhile)."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.1)
    raise AssertionError(f"nothing within {seconds} s")
