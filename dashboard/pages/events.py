"""Events page: faults, leases, preemptions and changes of hosts in a time, newest first; drains, and services."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from nicegui import ui
from starlette.requests import Request

from ...client import CorralError
from .. import event_log
from ..components.events_table import events_table
from ..components.host_links import host_link
from ..components.services_table import ask_services, services_table
from ..event_log import KINDS, SHOWN, Happened
from ..fleet import problem_of
from ..history import RANGES, Window
from ..html import Segments, button, remember, search, tag
from ..page_frame import Frame, Notice
from ..zones import local, zone_name

_EVERY_SECONDS = 10.0
_SERVICES_SECONDS = 30.0
_USUAL = "24h"


def register(frame: Callable[[Request, str], Frame]) -> None:
    """Register the page."""

    @ui.page("/events")
    async def page(request: Request, kind: str = "", range: str = "", to: str = "", q: str = "") -> None:
        around = frame(request, "Events")
        window = Window.of(range, request.query_params.get("from", ""), to, _USUAL)
        with around.show("/events"):
            EventsPage(around, window, kind if kind in dict(KINDS) else "", q[:256])


class EventsPage:
    """The events page in one browser."""

    def __init__(self, frame: Frame, window: Window, kind: str, words: str) -> None:
        self.frame = frame
        self.window, self.kind, self.words = window, kind, words
        self._asking = False
        self._number = 0
        self._asked_at = 0.0
        self._shown: list[Happened] | None = None
        self._drained_shown: Any = None
        self._services_shown: Any = None
        with tag("div", "head"):
            with tag("div"):
                tag("h1", text="Events")
                self._sub = tag("div", "sub", "Asking…")
            search(words, self._search, "Filter by host, owner, message")
        self._notice = Notice()
        with tag("section", "panel") as self._drained:
            with tag("div", "panel-head"):
                tag("h2", text="Drained now")
            self._drains = tag("div")
        with tag("section", "panel"):
            with tag("div", "panel-head"):
                Segments(KINDS, kind, self._of_kind, "Kind")
                with tag("div", "bar"):
                    button("", lambda: self._go(self.window.moved(-0.5)), "quiet", "chevron_left", title="Earlier")
                    self._when = tag("span", "note", "")
                    button("", lambda: self._go(self.window.moved(0.5)), "quiet", "chevron_right", title="Later")
                    self._ranges = Segments(RANGES[1:], window.name, self._choose, "Time")
            self._list = tag("div")
        with tag("section", "panel") as self._services_panel:
            with tag("div", "panel-head"):
                tag("h2", text="Services")
            self._services = tag("div")
        self._services_panel.set_visibility(False)
        self._refresh()
        frame.on_refresh(self._refresh)
        ui.timer(_SERVICES_SECONDS, self._ask_services)
        ui.timer(0, self._ask_services, once=True)
        ui.timer(0, self._ask, once=True)

    def _search(self, words: str) -> Any:
        self.words = words
        return self._changed()

    def _of_kind(self, kind: str) -> Any:
        self.kind = kind
        return self._changed()

    def _choose(self, name: str) -> Any:
        return self._go(Window.of(name, "", "", _USUAL))

    def _go(self, window: Window) -> Any:
        self.window = window
        return self._changed()

    async def _changed(self) -> None:
        self._ranges.show(self.window.name)
        when = {} if self.window.name == _USUAL else self.window.query
        remember("/events", kind=self.kind, **when, q=self.words)
        await self._ask()

    def _refresh(self) -> None:
        drained: dict[tuple[str, str], int] = {}
        for device in self.frame.fleet.devices:
            if device.drain_reason:
                key = device.host, device.drain_reason
                drained[key] = drained.get(key, 0) + 1
        if drained != self._drained_shown:
            self._drained_shown = drained
            self._drained.set_visibility(bool(drained))
            self._drains.clear()
            with self._drains:
                for (host, reason), count in drained.items():
                    with tag("div"):
                        host_link(host)
                        tag("span", "note", f" · {count} GPU{'' if count == 1 else 's'}: {reason}")
        # A time that follows the present is asked again while somebody looks.
        if self.window.end is None and not self._asking and time.monotonic() - self._asked_at > _EVERY_SECONDS:
            ui.timer(0, self._ask, once=True)

    async def _ask_services(self) -> None:
        try:
            found = await self.frame.ask(ask_services)
        except CorralError:  # the other question says so
            return
        shown = [(each.service, each.host, each.role, each.ready, each.reasons) for each in found]
        if shown != self._services_shown:
            self._services_shown = shown
            self._services_panel.set_visibility(bool(found))
            self._services.clear()
            with self._services:
                services_table(found)

    async def _ask(self) -> None:
        self._number += 1
        number = self._number
        self._asking = True
        try:
            found, more = await self.frame.ask(
                lambda client: event_log.happened(client, self.window, self.kind, self.words)
            )
        except CorralError as error:
            self._notice.tell(problem_of(error, self.frame.fleet.url))
            return
        finally:
            self._asking = False
            self._asked_at = time.monotonic()
        if number != self._number:
            return
        self._notice.tell(None)
        start, end = self.window.bounds
        self._when.set_text(
            "up to now" if self.window.end is None else f"{local(start)} to {local(end)} {zone_name(end)}"
        )
        count = f"the newest {SHOWN}, of more" if more else f"{len(found):,}"
        self._sub.set_text(f"{count} in this time. Times in {zone_name()}")
        if found != self._shown:
            self._shown = found
            self._list.clear()
            with self._list:
                if found:
                    events_table(found)
                else:
                    tag("div", "empty slim", "Nothing happened in this time that matches.")
