"""Frame of every page: navigation, user, theme and state of the fleet; also checks of permissions for actions."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable, Generator
from datetime import UTC
from typing import Any, Final, TypeVar

from nicegui import Client as Page
from nicegui import ui
from nicegui.element import Element
from starlette.requests import Request

from ..client import Client, CorralError
from .fleet import Fleet, Problem
from .html import button, empty, initial_text, on_typing, tag
from .jobs import JobBoard
from .security.accounts import Role
from .security.guard import session_of
from .security.sessions import GUEST_ID, Session, Sessions
from .zones import follow_zone, prefer_utc, zone_name, zone_of

log = logging.getLogger("corral.dashboard")

T = TypeVar("T")

NAVIGATION: Final = (
    ("/", "Fleet", "grid_view"),
    ("/jobs", "Jobs", "playlist_play"),
    ("/leases", "Leases", "view_timeline"),
    ("/events", "Events", "notifications_none"),
    ("/groups", "Groups", "groups"),
    ("/reports", "Usage", "receipt_long"),
    ("/analytics", "Analytics", "query_stats"),
    ("/request", "Request", "add_circle_outline"),
    ("/fit", "Fit", "splitscreen"),
)
THEME_COOKIE: Final = "corral_theme"
SESSION_OF_PAGE: Final = "corral_session_id"
_HEAD: Final = '<link rel="stylesheet" href="/assets/corral.css"><meta name="robots" content="noindex">'


class NotAllowed(PermissionError):
    """The session has ended, or its role doesn't permit the action."""


class Frame:
    """One page in one browser.

    Attributes:
        fleet: state that all pages share.
        jobs: jobs, as all pages share them.
        session: session of the user.
        request: request that opened the page.
    """

    def __init__(self, fleet: Fleet, jobs: JobBoard, sessions: Sessions, request: Request, title: str) -> None:
        self.fleet = fleet
        self.jobs = jobs
        self.session: Session = session_of(request)
        self.request = request
        self._sessions = sessions
        self._page: Page = ui.context.client
        self._page.title = f"{title} · Corral"
        # The guard accepts a websocket for a page only from the session that opened the page.
        self._page.storage[SESSION_OF_PAGE] = self.session.id
        follow_zone(request.cookies)
        self._pulses: list[Any] = []
        self._updates: list[Callable[[], None]] = []
        self._dresses: list[Callable[[], Any]] = []

    def may(self, role: Role) -> bool:
        """True if this session is still valid and has the permissions of a role."""
        session = self._sessions.renewed(self.session)
        return session is not None and session.role.covers(role)

    def may_read(self, owner: str) -> bool:
        """True if this session may read what the jobs of an owner execute and print: their own, or as an operator."""
        # Without a login everybody has the same name, which says nothing of who it is.
        needed = Role.REQUESTER if self.session.id == GUEST_ID else Role.VIEWER
        return self.may(needed if self.session.name == owner else Role.OPERATOR)

    def require(self, role: Role) -> Session:
        """Check on the server, before each action that changes something, that the session has a role's permissions.

        Returns:
            The session, with its current role.

        Raises:
            NotAllowed: the session has ended, or its role doesn't permit the action.
        """
        session = self._sessions.renewed(self.session)
        if session is None:
            raise NotAllowed("Your session has ended: log in again.")
        if not session.role.covers(role):
            raise NotAllowed(f"This requires the role {role}; yours is {session.role}.")
        return session

    @contextlib.contextmanager
    def show(self, here: str) -> Generator[None]:
        """Show the frame around the content of a page, which is created in the block."""
        ui.add_head_html(_HEAD)
        theme = self.request.cookies.get(THEME_COOKIE, "auto")
        dark = ui.dark_mode({"dark": True, "light": False}.get(theme))
        with tag("div", "shell"):
            with tag("aside", "side"):
                with tag("a", "brand", href="/"):
                    tag("img", src="/assets/icon.svg", alt="")
                    tag("span", text="Corral")
                with tag("nav", "nav", aria_label="Pages"):
                    for path, name, icon in NAVIGATION:
                        current = path == here
                        with tag("a", f"nav-item{' here' if current else ''}", href=path,
                                 aria_current="page" if current else None):  # fmt: skip
                            ui.icon(icon)
                            tag("span", text=name)
                self._foot(dark, "side-foot")
            with tag("div", "main"):
                yield
                self._foot(dark, "side-foot phone-foot")
        self._follow()

    def _foot(self, dark: ui.dark_mode, classes: str) -> None:
        def next_theme() -> None:
            chosen = {None: "dark", True: "light", False: "auto"}[dark.value]
            dark.value = {"dark": True, "light": False, "auto": None}[chosen]
            ui.run_javascript(f"document.cookie = '{THEME_COOKIE}={chosen};path=/;max-age=31536000;samesite=lax'")
            words.set_text(_THEMES[chosen])
            for dress in self._dresses:
                ui.timer(0.1, dress, once=True)

        with tag("div", classes):
            self._pulses.append(tag("span", "pulse", "", role="status"))
            with button("", next_theme, "quiet small", "contrast", title="Dark, light, or the system's setting"):
                chosen = {None: "auto", True: "dark", False: "light"}[dark.value]
                words = tag("span", text=_THEMES[chosen])
            utc = zone_of(self.request.cookies) is UTC
            title = "Show times in your zone" if utc else "Show times in UTC"
            button(f"Times in {zone_name()}", lambda: prefer_utc(not utc), "quiet small", "schedule", title=title)
            with tag("div", "who"):
                with tag("span"):
                    tag("b", text=self.session.name)
                    tag("div", text=str(self.session.role))
                if self.session.id != GUEST_ID:
                    with tag("form", method="post", action="/logout"), tag("button", "btn quiet small", type="submit"):
                        tag("span", text="Log out")

    async def ask(self, question: Callable[[Client], Awaitable[T]]) -> T:
        """Call the client on behalf of the session's user; raises the same errors as `Fleet.ask`."""
        return await self.fleet.ask(question, self.session.name)

    # Following the fleet

    def on_refresh(self, update: Callable[[], None]) -> None:
        """Call `update`, which updates a part of the page, after every refresh of the fleet's state."""
        self._updates.append(update)

    def on_theme(self, dress: Callable[[], Any]) -> None:
        """Call `dress` after the user has chosen another theme."""
        self._dresses.append(dress)

    def on_close(self, do: Callable[[], None]) -> None:
        """Call `do` once the page is gone."""
        self._page.on_delete(lambda: do())

    def _follow(self) -> None:
        page = self._page

        def changed() -> None:
            if page.is_deleted or not page.has_socket_connection:
                return
            with page:
                if self._sessions.renewed(self.session) is None:
                    page.open("/login")
                    return
                self._show_pulse()
                for update in self._updates:
                    update()

        # On a phone the row of pages is wider than the screen.
        ui.run_javascript("document.querySelector('.nav-item.here')?.scrollIntoView({inline:'center',block:'nearest'})")
        stop = self.fleet.watch(changed)
        page.on_delete(lambda: stop())
        self._show_pulse()

    def _show_pulse(self) -> None:
        problem = self.fleet.problem
        if problem is None:
            summary = self.fleet.summary
            words = f"{summary.devices:,} devices, live" if summary else "Looking…"
        else:
            words = problem.title
        for pulse in self._pulses:
            if pulse.text != words:
                pulse.set_text(words)
                pulse.classes(remove="gone", add="" if problem is None else "gone")

    # Actions

    async def attempt(self, what: Callable[[], Awaitable[Any]], done: str) -> bool:
        """Carry out an action that changes the fleet, and notify the user of its result. Returns true on success."""
        try:
            await what()
        except NotAllowed as error:
            ui.notify(str(error), type="negative")
            return False
        except CorralError as error:
            ui.notify(str(error), type="negative", multi_line=True)
            return False
        ui.notify(done, type="positive")
        self.fleet.refresh_soon()
        return True

    def confirm(
        self,
        title: str,
        text: str,
        verb: str,
        do: Callable[[str], Awaitable[bool]],
        reason: str | None = None,
        usual: str = "",
    ) -> None:
        """Show a dialog that confirms an action.

        Args:
            title: title of the dialog.
            text: what the action does.
            verb: label of the button.
            do: carries it out with what the user has written, and returns true on success.
            reason: label of a field that the user must fill in; None without one.
            usual: what is in the field at first.
        """
        # The dialog belongs to the page, not to the row of the button, which may be removed while the dialog is open.
        with self._page, ui.dialog() as dialog, tag("div", "q-card dialog"):
            tag("h2", text=title)
            tag("p", text=text)
            given = {"reason": usual}
            if reason is not None:
                field = tag("input", "field", placeholder=reason, aria_label=reason, maxlength=200, autofocus=True,
                            **initial_text(usual))  # fmt: skip
                on_typing(field, lambda text: given.update(reason=text[:200]), pause=0.0)

            async def go() -> None:
                if reason is not None and not given["reason"].strip():
                    ui.notify(f"{reason} is needed.", type="warning")
                    return
                if await do(given["reason"].strip()):
                    dialog.close()

            with tag("div", "bar"):
                button("Cancel", dialog.close, "quiet")
                button(verb, go, "primary")
        dialog.on("hide", lambda: dialog.delete())
        dialog.open()


_THEMES: Final = {"auto": "System theme", "dark": "Dark", "light": "Light"}


class Notice:
    """Part of a page that shows a trouble; hidden while there is none."""

    def __init__(self) -> None:
        self._place: Element = tag("div")
        self._shown: Problem | None = None
        self._place.set_visibility(False)

    def tell(self, problem: Problem | None, whole: bool = False) -> None:
        """Show a trouble, or hide the notice if it is None; `whole` shows a full panel instead of a banner."""
        if problem == self._shown:
            return
        self._shown = problem
        self._place.clear()
        self._place.set_visibility(problem is not None)
        if problem is None:
            return
        with self._place:
            if whole:
                with tag("div", "panel"):
                    empty(problem)
                return
            with tag("div", "banner", role="status"):
                ui.icon("warning_amber")
                tag("b", text=problem.title)
                tag("span", text=problem.detail)
                for command in problem.commands[:1]:
                    tag("code", text=command)
