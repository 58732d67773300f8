"""Device page: inventory, metrics over seconds to years, processes, leases and events of one device."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from nicegui import ui
from starlette.requests import Request

from ...client import Client, CorralError
from ...client.fleet_view import DeviceState, device_state
from ...schemas.operations import DeviceStatus
from ...schemas.requests import Lease
from ...schemas.telemetry import ProcessSample
from ...schemas.values.units import format_bytes
from ...schemas.work.jobs import attempt_of_request
from .. import cells, history
from ..components.copy_button import CopyButton
from ..components.host_links import host_link
from ..components.job_rows import job_link
from ..components.timeline import Timeline
from ..fleet import Fleet, Problem, problem_of
from ..history import RANGES, Window
from ..html import Segments, button, remember, table, tag, url
from ..page_frame import Frame, Notice
from ..security.accounts import Role
from ..zones import local, zone_name
from .fleet import held_by, number

SHOWN = ("gpu_utilization_percent", "memory_used_bytes", "temperature_celsius", "power_watts")
_MOST_METRICS = 8
_BAD = ("reset", "hardware", "application")


def register(frame: Callable[[Request, str], Frame]) -> None:
    """Register the page."""

    @ui.page("/device/{uuid}")
    async def page(request: Request, uuid: str, range: str = "", to: str = "", m: str = "") -> None:
        around = frame(request, "Device")
        await around.fleet.ready()
        window = Window.of(range, request.query_params.get("from", ""), to, "1h")
        metrics = [name for name in m.split(",") if name in history.gauges()][:_MOST_METRICS] or list(SHOWN)
        with around.show("/"):
            DevicePage(around, uuid, window, metrics)


class DevicePage:
    """The device page in one browser."""

    def __init__(self, frame: Frame, uuid: str, window: Window, metrics: list[str]) -> None:
        self.frame = frame
        self.uuid = uuid
        self.window = window
        self.metrics = metrics
        self._drawn_at = 0.0
        self._drawing = False
        self._again = False
        self._ready = False
        self._shown: Any = None
        self._known: dict[str, Any] | None = None
        self._processes_shown: Any = None
        self._head = tag("div")
        self._notice = Notice()
        with tag("div", "main").style("padding:0;max-width:none") as self._content:
            with tag("section", "panel"):
                with tag("div", "panel-head"):
                    self._ranges = Segments(RANGES, window.name, self._choose, "Time")
                    with tag("div", "bar"):
                        button("", lambda: self._go(self.window.moved(-0.5)), "quiet", "chevron_left", title="Earlier")
                        self._when = tag("span", "note", "")
                        button("", lambda: self._go(self.window.moved(0.5)), "quiet", "chevron_right", title="Later")
                        button("", lambda: self._go(self.window.wider(2)), "quiet", "zoom_out", title="Show more time")
                        button("", lambda: self._go(self.window.wider(0.5)), "quiet", "zoom_in", title="Show less time")
                        self._adder()
                self._chart_notice = Notice()
                self._timeline = Timeline(on_ready=self._drawable, on_zoom=self._zoom)
                self._source = tag("div", "note", "")
            with tag("div", "split"):
                with tag("section", "panel"):
                    with tag("div", "panel-head"):
                        tag("h2", text="Processes")
                    self._processes = tag("div")
                with tag("section", "panel"):
                    with tag("div", "panel-head"):
                        tag("h2", text="Leases in this time")
                    self._leases = tag("div")
            with tag("section", "panel"):
                with tag("div", "panel-head"):
                    tag("h2", text="Events in this time")
                self._events = tag("div")
        self._refresh()
        frame.on_refresh(self._refresh)

    def _adder(self) -> None:
        with tag("select", "field", aria_label="Add a metric") as chooser:
            tag("option", "", "Add a metric…", value="")
            for name, metric in history.gauges().items():
                tag("option", "", name, value=name, title=metric.row.help)

        def add(event: Any) -> Any:
            name = str(event.args)
            if name in history.gauges():
                self.metrics = [one for one in self.metrics if one != name] if name in self.metrics else [
                    *self.metrics, name][:_MOST_METRICS]  # fmt: skip
                self.metrics = self.metrics or list(SHOWN)
                return self._go(self.window)
            return None

        chooser.on("change", add, js_handler="(event) => { emit(event.target.value); event.target.value = ''; }")

    # Time

    def _choose(self, name: str) -> Any:
        return self._go(Window.of(name, "", "", "1h"))

    def _zoom(self, start: float, end: float) -> Any:
        return self._go(Window.of("", str(start), str(end), "1h"))

    async def _go(self, window: Window) -> None:
        self.window = window
        self._ranges.show(window.name)
        metrics = ",".join(self.metrics) if self.metrics != list(SHOWN) else ""
        remember(f"/device/{quote(self.uuid, safe='')}", **window.query, m=metrics)
        await self._draw()

    async def _drawable(self) -> None:
        self._ready = True
        await self._draw()

    async def _draw(self) -> None:
        """Query the history and draw. A call while this is running makes it draw once more afterwards."""
        if self._drawing or not self._ready:
            self._again = self._drawing
            return
        self._drawing = True
        try:
            while True:
                self._again = False
                await self._ask()
                if not self._again:
                    break
        finally:
            self._drawing = False
            self._drawn_at = time.monotonic()

    async def _ask(self) -> None:
        window = self.window
        start, end = window.bounds
        device = self.frame.fleet.device(self.uuid)

        async def asked(client: Client) -> tuple[Any, Any, Any]:
            return await asyncio.gather(
                history.timelines(client, self.uuid, self.metrics, window),
                history.spans(client, window, f"device = {history.text(self.uuid)}", 200),
                history.events(client, self.uuid, device.host if device else "", window),
            )

        try:
            if device is None and self._known is None:
                self._known = await self.frame.ask(lambda client: history.identity(client, self.uuid)) or {}
                # Of a device that never was there is nothing more to say.
                self._content.set_visibility(bool(self._known))
                with self._processes:
                    tag("div", "note", "None: the device is not in the fleet now.")
                self._shown = None
                self._refresh()
            series, leases, events = await self.frame.ask(asked)
        except CorralError as error:
            self._chart_notice.tell(problem_of(error, self.frame.fleet.url))
            return
        marks = [{"t": event["t"], "bad": event["severity"] in _BAD} for event in events if event["severity"] != "info"]
        memory = device.memory_total_bytes if device else 0
        self._chart_notice.tell(_NO_SAMPLES if not any(one.times for one in series) else None)
        self._timeline.show(series, start, end, leases, marks, memory)
        self._when.set_text(_span(start, end) if window.end is not None else "up to now")
        table_name, bucket = history.source(window.seconds)
        points = f"drag over the chart to zoom in. Times are in {zone_name(end)}"
        self._source.set_text(
            f"Every sample; {points}." if not bucket else f"From {table_name}: mean, minimum and maximum; {points}."
        )
        self._show_leases(leases)
        self._show_events(events)

    # Current state

    def _refresh(self) -> None:
        fleet = self.frame.fleet
        device = fleet.device(self.uuid)
        self._notice.tell(fleet.problem)
        held = [lease for lease in fleet.leases if device and lease.lease_id in device.leases]
        may = self.frame.may(Role.OPERATOR)
        shown = (device and (cells.state_words(device), _facts(device, fleet)), [lease.lease_id for lease in held], may)
        if shown != self._shown:
            self._shown = shown
            self._head.clear()
            with self._head:
                self._show_head(device, held, may)
        if device is not None:
            processes = fleet.processes_on(device)
            if (processes, device.leases) != self._processes_shown:
                self._processes_shown = (processes, device.leases)
                self._processes.clear()
                with self._processes:
                    _show_processes(processes, fleet.holders)
        # A window that follows the present is redrawn whenever a four-hundredth of it has passed (2 to 60 s).
        if self._ready and self.window.end is None:
            pause = min(60.0, max(2.0, self.window.seconds / 400))
            if time.monotonic() - self._drawn_at > pause and not self._drawing:
                ui.timer(0, self._draw, once=True)

    def _show_head(self, device: DeviceStatus | None, held: Sequence[Lease], may: bool) -> None:
        with tag("div", "head").style("margin-bottom:16px"):
            with tag("div"):
                with tag("div", "bar"):
                    tag("h1", text=f"{device.host} · GPU {device.index}" if device else self._former())
                    if device:
                        tag("span", f"chip {TONES[device_state(device)]}", cells.state_words(device))
                with tag("div", "sub"):
                    if device:
                        host_link(device.host)
                        tag("span", text=f" · {device.model}")
                    else:
                        tag("span", text=self._why_gone())
            if device and may:
                with tag("div", "bar"):
                    if device.drain_reason:
                        button("Undrain", lambda: self._undrain(device), icon="play_arrow")
                    else:
                        button("Drain", lambda: self._drain(device), "danger", icon="block")
        if device:
            with tag("section", "panel"), tag("div", "facts"):
                for name, value in _facts(device, self.frame.fleet):
                    with tag("div"):
                        tag("div", "fact-name", name)
                        tag("div", "fact-value", value)
                _show_lease_ids(held)
                _show_jobs(held)
        else:
            tag("div", "note mono", self.uuid)

    def _former(self) -> str:
        return f"{self._known['host']} · GPU {self._known['index']}" if self._known else "Device"

    def _why_gone(self) -> str:
        if self._known is None:
            return "Loading…"
        if not self._known:
            return "No device with this UUID is in the fleet or in the history."
        seen = f", last seen {local(self._known['last_seen'], '%d %b %Y %H:%M %Z')}" if self._known["last_seen"] else ""
        return f"{self._known['name']}: no longer in the fleet{seen}. Its history is below."

    def _drain(self, device: DeviceStatus) -> None:
        async def do(reason: str) -> bool:
            async def act() -> None:
                user = self.frame.require(Role.OPERATOR)
                await self.frame.ask(lambda c: c.drain(devices=[device.uuid], reason=reason, operator=user.name))

            return await self.frame.attempt(act, f"{device.host} GPU {device.index} is drained")

        self.frame.confirm(
            f"Drain {device.host} GPU {device.index}?",
            "It gets no new work. Existing leases continue.",
            "Drain",
            do,
            "Reason",
        )

    async def _undrain(self, device: DeviceStatus) -> None:
        async def act() -> None:
            user = self.frame.require(Role.OPERATOR)
            await self.frame.ask(lambda c: c.undrain(devices=[device.uuid], operator=user.name))

        await self.frame.attempt(act, f"{device.host} GPU {device.index} is undrained")

    # Past leases and events

    def _show_leases(self, leases: list[dict[str, Any]]) -> None:
        self._leases.clear()
        with self._leases:
            if not leases:
                tag("div", "note", "No leases in this time.")
                return
            rows = [
                (
                    one["owner"], _work(one), _clock(one["started"] / 1000),
                    _length((one["ended"] - one["started"]) / 1000), one["state"],
                )
                for one in leases[:20]
            ]  # fmt: skip
            table(("Owner", "Name", "From", "For", "State"), rows)

    def _show_events(self, events: list[dict[str, Any]]) -> None:
        self._events.clear()
        with self._events:
            if not events:
                tag("div", "note", "None.")
                return

            def severity(event: dict[str, Any]) -> Callable[[], Any]:
                tone = "bad" if event["severity"] in _BAD else "warn" if event["severity"] == "warning" else ""
                return lambda: tag("span", f"chip {tone}", event["severity"])

            rows = [
                (
                    _clock(one["t"] / 1000), severity(one),
                    f"{one['kind']} {one['code'] or ''}{' (host)' if one['of_host'] else ''}", one["message"],
                )
                for one in events[:50]
            ]  # fmt: skip
            table(("Time", "Severity", "What", "In words"), rows)


_NO_SAMPLES = Problem(kind="samples", title="No samples", detail="The device was not measured in this time.")
TONES = {
    DeviceState.FREE: "good", DeviceState.SHARED: "busy", DeviceState.LEASED: "busy",
    DeviceState.THROTTLED: "warn", DeviceState.DRAINED: "warn",
    DeviceState.IN_USE: "use", DeviceState.RESERVED: "busy",
    DeviceState.STALE: "", DeviceState.UNHEALTHY: "bad", DeviceState.UNUSABLE: "",
}  # fmt: skip


def _facts(device: DeviceStatus, fleet: Fleet) -> list[tuple[str, str]]:
    used = device.memory_used_bytes
    return [
        ("Held by", ", ".join(held_by(device, fleet)) or "nobody"),
        ("Utilization", number(device.utilization_percent, "%")),
        ("Memory", f"{'–' if used is None else format_bytes(used)} of {format_bytes(device.memory_total_bytes)}"),
        ("Available", format_bytes(device.memory_free_bytes)),
        ("Temperature", number(device.temperature_celsius, " °C")),
        ("Power", number(device.power_watts, " W")),
        ("UUID", device.uuid),
    ]


def _work(span: dict[str, Any]) -> str | Callable[[], Any]:
    """Cell with what a lease was for: the task of a job as a link, else the name of its workload."""
    attempt = attempt_of_request(span["request_id"])
    return span["name"] or "–" if attempt is None else lambda: job_link(attempt, span["name"] or "")


def _show_lease_ids(held: Sequence[Lease]) -> None:
    if not held:
        return
    with tag("div"):
        tag("div", "fact-name", "Leases")
        with tag("div", "fact-value"):
            for lease in held:
                with tag("div", "bar").style("gap:6px"):
                    tag("a", "link", lease.lease_id, href=url("/leases", q=lease.lease_id))
                    CopyButton(lease.lease_id)


def _show_jobs(held: Sequence[Lease]) -> None:
    """Show the jobs that run on a device, as a fact of it; nothing without any."""
    found = [(attempt, lease) for lease in held if (attempt := attempt_of_request(lease.request_id)) is not None]
    if not found:
        return
    with tag("div"):
        tag("div", "fact-name", "Jobs")
        with tag("div", "fact-value"):
            for attempt, lease in found:
                with tag("div"):
                    job_link(attempt, lease.name)
                    tag("span", "note", f" of {lease.owner}")


def _show_processes(processes: list[ProcessSample] | None, holders: Mapping[str, str]) -> None:
    if processes is None:
        tag("div", "note", "Its collector has not reported processes yet; it does every few seconds.")
        return
    if not processes:
        tag("div", "note", "None.")
        return
    rows = [
        (
            holders.get(one.lease, "no lease"), one.user or "–", one.name or "–", str(one.pid),
            "–" if one.memory_used_bytes is None else format_bytes(one.memory_used_bytes), one.lease or "–",
        )
        for one in processes[:30]
    ]  # fmt: skip
    table(("Held by", "User", "Process", "PID", "Memory", "Lease"), rows, numeric=(3, 4))


def _clock(seconds: float) -> str:
    return local(seconds)


def _span(start: float, end: float) -> str:
    return f"{_clock(start)} to {_clock(end)} {zone_name(end)}"


def _length(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} d"
