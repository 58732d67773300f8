"""Leases page: active leases with their expiry, the queue with reasons, and a lane of past leases for each device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from nicegui import ui
from starlette.requests import Request

from ...client import CorralError
from ...schemas.operations import QueueEntry
from ...schemas.requests import Lease, ResizeKind
from ...schemas.values.units import format_seconds, parse_seconds
from ...schemas.work.jobs import attempt_of_request
from .. import cells, history
from ..components.copy_button import CopyButton
from ..components.host_links import host_link
from ..components.job_rows import job_link
from ..components.results import Lanes
from ..fleet import problem_of
from ..history import RANGES, Window
from ..html import Segments, button, remember, search, table, tag
from ..page_frame import Frame, Notice
from ..security.accounts import Role
from ..zones import local

_SHOWN = 100
_LANES = 2000
_SPANS = 10_000
_EVERY_SECONDS = 15.0


def register(frame: Callable[[Request, str], Frame]) -> None:
    """Register the page."""

    @ui.page("/leases")
    async def page(request: Request, range: str = "", to: str = "", q: str = "") -> None:
        around = frame(request, "Leases")
        await around.fleet.ready()
        window = Window.of(range, request.query_params.get("from", ""), to, "6h")
        with around.show("/leases"):
            LeasesPage(around, window, q[:256])


class LeasesPage:
    """The leases page in one browser."""

    def __init__(self, frame: Frame, window: Window, words: str) -> None:
        self.frame = frame
        self.window = window
        self.words = words
        self._lane_devices: list[str] = []
        self._drawn_at = 0.0
        self._queue_shown: Any = None
        self._leases_shown: Any = None
        self._left: dict[str, Any] = {}
        with tag("div", "head"):
            with tag("div"):
                tag("h1", text="Leases")
                self._sub = tag("div", "sub", "")
            search(words, self._search, "Filter by owner, name, host")
        self._notice = Notice()
        with tag("section", "panel") as self._waiting:
            with tag("div", "panel-head"):
                tag("h2", text="Who waits")
                self._waits = tag("span", "note", "")
            self._queue = tag("div")
        with tag("section", "panel") as self._holding:
            with tag("div", "panel-head"):
                tag("h2", text="Who holds what")
                self._holds = tag("span", "note", "")
            self._active = tag("div")
        with tag("section", "panel"):
            with tag("div", "panel-head"):
                with tag("div", "bar"):
                    tag("h2", text="By device")
                    self._lane_note = tag("span", "note", "")
                self._ranges = Segments(RANGES[1:], window.name, self._choose, "Time")
            self._lanes_notice = Notice()
            self._lanes = Lanes(self._open)
        self._refresh()
        frame.on_refresh(self._refresh)
        ui.timer(0, self._draw, once=True)

    def _search(self, words: str) -> Any:
        self.words = words
        self._leases_shown = self._queue_shown = None
        return self._changed()

    def _choose(self, name: str) -> Any:
        self.window = Window.of(name, "", "", "6h")
        return self._changed()

    async def _changed(self) -> None:
        remember("/leases", **({} if self.window.name == "6h" else self.window.query), q=self.words)
        self._refresh()
        await self._draw()

    def _open(self, lane: int) -> None:
        if 0 <= lane < len(self._lane_devices):
            ui.navigate.to(f"/device/{quote(self._lane_devices[lane], safe='')}")

    # Current leases and queue

    def _refresh(self) -> None:
        fleet = self.frame.fleet
        # Before the first refresh, nothing is shown about leases and queue.
        known = fleet.summary is not None
        self._notice.tell(fleet.problem, whole=not known)
        self._waiting.set_visibility(known)
        self._holding.set_visibility(known)
        if not known:
            return
        leases = [
            lease
            for lease in fleet.leases
            if self._matches(lease.owner, lease.name, lease.lease_id, lease.request_id, *_hosts(lease))
        ]
        owners = len({lease.owner for lease in fleet.leases})
        self._sub.set_text(
            f"{len(fleet.leases):,} active of {owners} owner{'' if owners == 1 else 's'}, {len(fleet.queue):,} waiting"
        )
        queue = [entry for entry in fleet.queue if self._matches(entry.owner, entry.name, entry.request_id)]
        self._show_queue(queue)
        self._show_leases(leases)
        if self.window.end is None and 0 < self._drawn_at < time.monotonic() - _EVERY_SECONDS:
            self._drawn_at = time.monotonic()
            ui.timer(0, self._draw, once=True)

    def _matches(self, *texts: str) -> bool:
        lowered = [text.lower() for text in texts]
        return all(any(word in text for text in lowered) for word in self.words.lower().split())

    def _show_queue(self, queue: Sequence[QueueEntry]) -> None:
        may = (self.frame.may(Role.REQUESTER), self.frame.may(Role.OPERATOR))
        shown = [
            (entry.request_id, may, entry.position, entry.message, _age(entry.waiting_seconds), _starts(entry))
            for entry in queue
        ]
        if shown == self._queue_shown:
            return
        self._queue_shown = shown
        self._queue.clear()
        self._waits.set_text(f"{len(queue):,} request{'' if len(queue) == 1 else 's'}" if queue else "empty")
        if not queue:
            return
        rows = [
            (
                *(str(one.position), one.owner, _name(one.name, one.request_id)),
                f"{one.gpus}–{one.gpus_max}" if one.gpus_max else str(one.gpus),
                *(_age(one.waiting_seconds), _starts(one), one.message, self._withdrawal(one)),
            )
            for one in queue[:_SHOWN]
        ]
        with self._queue:
            heads = ("#", "Owner", "Name", "GPUs", "Waits", "Starts in (80 %)", "Because", "")
            table(heads, rows, numeric=(3,), last_is_end=True)

    def _withdrawal(self, entry: QueueEntry) -> Any:
        """Button that withdraws a request, for its owner and for operators; jobs are cancelled on their own pages."""
        mine = entry.owner == self.frame.session.name and self.frame.may(Role.REQUESTER)
        if attempt_of_request(entry.request_id) is not None or not (mine or self.frame.may(Role.OPERATOR)):
            return ""
        return lambda: button("Withdraw", lambda: self._withdraw(entry), "small" if mine else "small danger")

    def _show_leases(self, leases: Sequence[Lease]) -> None:
        may = (self.frame.may(Role.REQUESTER), self.frame.may(Role.OPERATOR))
        shown = ([(lease.lease_id, len(lease.grants)) for lease in leases[:_SHOWN]], len(leases), may)
        if shown != self._leases_shown:
            self._leases_shown = shown
            self._left = {}
            self._active.clear()
            more = f", the oldest {_SHOWN} are shown" if len(leases) > _SHOWN else ""
            self._holds.set_text(f"{len(leases):,} lease{'' if len(leases) == 1 else 's'}{more}")
            with self._active:
                if leases:
                    heads = ("Owner", "Name", "GPUs", "Where", "Since", "Ends", "")
                    table(heads, [self._row(one) for one in leases[:_SHOWN]], numeric=(2,), last_is_end=True)
                else:
                    tag("div", "note", "No lease matches the filter." if self.words else "No active leases.")
            return
        for lease in leases[:_SHOWN]:
            place, text = self._left.get(lease.lease_id), _until(lease)
            if place is not None and place.text != text:
                place.set_text(text)

    def _row(self, lease: Lease) -> tuple[Any, ...]:
        devices = [grant for grant in lease.grants if grant.device]

        def where() -> None:
            with tag("div", "clip", title=_where(lease)):
                for at, (host, words) in enumerate(_places(lease).items()):
                    tag("span", text="; " if at else "")
                    host_link(host, words)

        def ends() -> None:
            self._left[lease.lease_id] = tag("span", text=_until(lease))

        def actions() -> None:
            mine = lease.owner == self.frame.session.name
            if mine and attempt_of_request(lease.request_id) is not None:
                pass  # the planner holds the leases of jobs, which are cancelled on their own pages
            elif mine and self.frame.may(Role.REQUESTER):
                button("Renew", lambda: self._renew(lease), "small")
                button("Release", lambda: self._release(lease), "small")
            elif self.frame.may(Role.OPERATOR):
                button("Evict", lambda: self._evict(lease), "small danger")
            if devices and self.frame.may(Role.OPERATOR):
                button("Drain", lambda: self._drain(lease), "small quiet", title="Drain its devices")
            CopyButton(lease.lease_id, "Copy id").classes("quiet")

        gpus = f"{sum(grant.share for grant in devices):g}"
        if lease.elastic is not None:
            gpus += f" ({lease.elastic.min}–{lease.elastic.max})"
        return lease.owner, _name(lease.name, lease.request_id), gpus, where, _since(lease.granted_at), ends, actions

    # Actions

    def _withdraw(self, entry: QueueEntry) -> None:
        named = f" for {entry.name}" if entry.name else ""

        async def do(_: str) -> bool:
            async def act() -> None:
                mine = entry.owner == self.frame.session.name
                self.frame.require(Role.REQUESTER if mine else Role.OPERATOR)
                await self.frame.ask(lambda client: client.withdraw(entry.request_id, owner=entry.owner))

            return await self.frame.attempt(act, f"The request of {entry.owner}{named} is withdrawn")

        text = f"{entry.owner} waits for {entry.gpus} GPUs{named}. The command that waits ends."
        self.frame.confirm("Withdraw this request?", text, "Withdraw", do)

    def _release(self, lease: Lease) -> None:
        async def do(_: str) -> bool:
            async def act() -> None:
                user = self.frame.require(Role.REQUESTER)
                await self.frame.ask(lambda client: client.release(lease.lease_id, owner=user.name))

            return await self.frame.attempt(act, f"{lease.lease_id} is released")

        self.frame.confirm("Release this lease?", _words(lease), "Release", do)

    def _renew(self, lease: Lease) -> None:
        async def do(length: str) -> bool:
            async def act() -> None:
                user = self.frame.require(Role.REQUESTER)
                await self.frame.ask(lambda client: client.renew(lease.lease_id, ttl=seconds, owner=user.name))

            try:
                seconds = parse_seconds(length)
            except ValueError as error:
                ui.notify(str(error), type="negative")
                return False
            return await self.frame.attempt(act, f"{lease.lease_id} is renewed for {format_seconds(seconds)}")

        text = (
            f"{_words(lease)} It then ends so long from now, unless it is renewed again; a command that holds it "
            "goes on renewing it."
        )
        self.frame.confirm("Renew this lease?", text, "Renew", do, "Length of time", format_seconds(lease.ttl_seconds))

    def _evict(self, lease: Lease) -> None:
        async def do(reason: str) -> bool:
            async def act() -> None:
                user = self.frame.require(Role.OPERATOR)
                await self.frame.ask(lambda client: client.evict(lease.lease_id, reason=reason, operator=user.name))

            return await self.frame.attempt(act, f"{lease.lease_id} of {lease.owner} is evicted")

        text = f"{_words(lease)} Its holder gets the reason, and its work is stopped."
        self.frame.confirm(f"Evict this lease of {lease.owner}?", text, "Evict", do, "Reason")

    def _drain(self, lease: Lease) -> None:
        uuids = [grant.device for grant in lease.grants if grant.device]

        async def do(reason: str) -> bool:
            async def act() -> None:
                user = self.frame.require(Role.OPERATOR)
                await self.frame.ask(lambda client: client.drain(devices=uuids, reason=reason, operator=user.name))

            return await self.frame.attempt(act, f"{len(uuids)} devices are drained")

        text = f"{_where(lease)}: they get no new work. The lease continues."
        self.frame.confirm("Drain the devices of this lease?", text, "Drain", do, "Reason")

    # Past leases

    async def _draw(self) -> None:
        window = self.window
        start, end = window.bounds
        try:
            spans = await self.frame.ask(lambda client: history.spans(client, window, "true", _SPANS))
        except CorralError as error:
            self._lanes_notice.tell(problem_of(error, self.frame.fleet.url), whole=True)
            return
        finally:
            self._drawn_at = time.monotonic()
        self._lanes_notice.tell(None)
        found = [
            span for span in spans if self._matches(span["owner"], span["name"] or "", span["lease_id"], span["host"])
        ]
        indices = {device.uuid: device.index for device in self.frame.fleet.devices}
        lanes = sorted(
            {(span["host"], indices.get(span["device"], -1), span["device"]) for span in found if span["device"]},
            key=lambda lane: (cells.natural(lane[0]), lane[1], lane[2]),
        )
        left_out = "" if len(lanes) <= _LANES else f"; the first {_LANES:,} are shown"
        left_out += "" if len(spans) < _SPANS else f"; of the newest {_SPANS:,} spans only"
        held, lanes = len(lanes), lanes[:_LANES]
        number = {device: at for at, (_, _, device) in enumerate(lanes)}
        self._lane_devices = [device for _, _, device in lanes]
        names = [f"{host} · {index if index >= 0 else device[:12]}" for host, index, device in lanes]
        bars = [(number[span["device"]], span) for span in found if span["device"] in number]
        self._lane_note.set_text(f"{held:,} devices were held{left_out}" if lanes else "no leases in this time")
        self._ranges.show(window.name)
        self._lanes.set_visibility(bool(lanes))
        self._lanes.show(names, bars, start, end)


def _name(name: str, request_id: str) -> Any:
    """Name of a lease or a request, as a link to its job if it is for one."""
    attempt = attempt_of_request(request_id)
    return (lambda: job_link(attempt, name)) if attempt else name or "–"


def _hosts(lease: Lease) -> list[str]:
    return sorted({grant.host for grant in lease.grants})


def _where(lease: Lease) -> str:
    return "; ".join(_places(lease).values())


def _places(lease: Lease) -> dict[str, str]:
    """Each host of a lease, with its devices in words."""
    hosts: dict[str, list[int]] = {}
    for grant in lease.grants:
        hosts.setdefault(grant.host, []).extend([grant.index] if grant.device else [])
    return {host: f"{host} · {_runs(sorted(indices))}" if indices else host for host, indices in hosts.items()}


def _runs(numbers: Sequence[int]) -> str:
    """Format numbers as ranges: `0–3, 6` for 0, 1, 2, 3 and 6."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def _words(lease: Lease) -> str:
    named = f", {lease.name}," if lease.name else ""
    return f"{lease.owner}{named} holds {_where(lease)} since {_since(lease.granted_at)}."


def _since(moment: datetime) -> str:
    return local(moment, "%d %b %H:%M %Z")


def _starts(entry: QueueEntry) -> str:
    """Expected start of a queued request, with the interval that holds 80 % of such starts."""
    forecast = entry.forecast
    if forecast is None or forecast.expected_start is None:
        return "–"
    now = datetime.now(UTC)
    times = (forecast.expected_start, forecast.earliest_start, forecast.latest_start)
    expected, first, last = ("?" if at is None else _age(max(0.0, (at - now).total_seconds())) for at in times)
    return f"{expected} ({first} to {last})"


def _until(lease: Lease) -> str:
    notice = lease.preemption
    ends_at = lease.expires_at if notice is None else min(lease.expires_at, notice.ends_at)
    left = f"in {_age(max(0.0, (ends_at - datetime.now(UTC)).total_seconds()))}"
    if notice is None and lease.resize is not None:
        count = len(lease.resize.grants)
        return f"{left}, offered {count}" if lease.resize.kind is ResizeKind.OFFER else f"{left}, {count} asked back"
    return left if notice is None else f"preempted {left}"


def _age(seconds: float) -> str:
    if seconds < 60:
        return "< 1 min"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.0f} d"
