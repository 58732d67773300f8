"""Host page: its devices, leases and jobs now, versions and topology, what changed on it and what happened."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from nicegui import Client as Page
from nicegui import ui
from starlette.requests import Request

from ...client import CorralError
from ...client.fleet_view import DeviceState, device_state
from ...client.notebook import short_model
from ...schemas.operations import DeviceStatus
from ...schemas.requests import Grant, Lease
from ...schemas.values.units import format_bytes
from ...schemas.work.jobs import attempt_of_request
from .. import cells, event_log, host_history
from ..components.events_table import events_table
from ..components.host_links import device_path, host_path
from ..components.job_rows import job_link
from ..event_log import Happened
from ..fleet import problem_of
from ..history import RANGES, Window
from ..host_history import Links
from ..html import Segments, button, remember, table, tag, url
from ..page_frame import Frame, Notice
from ..security.accounts import Role
from ..zones import local
from .device import TONES
from .fleet import held_by, number

_EVERY_SECONDS = 15.0
_USUAL = "7d"
_EVENTS = 50


def register(frame: Callable[[Request, str], Frame]) -> None:
    """Register the page."""

    @ui.page("/host/{name}")
    async def page(request: Request, name: str, range: str = "", to: str = "") -> None:
        around = frame(request, name[:128])
        await around.fleet.ready()
        window = Window.of(range, request.query_params.get("from", ""), to, _USUAL)
        with around.show("/"):
            HostPage(around, name[:128], window)


class HostPage:
    """The host page in one browser."""

    def __init__(self, frame: Frame, name: str, window: Window) -> None:
        self.frame = frame
        self.name = name
        self.window = window
        # Questions that are asked at the same time are tasks of their own, which belong to no page by themselves.
        self._page: Page = ui.context.client
        self._record: dict[str, Any] | None = None
        self._linked = False
        self._asking = False
        self._asked_at = 0.0
        self._shown: dict[str, Any] = {}
        self._events_shown: list[Happened] | None = None
        self._head = tag("div")
        self._notice = Notice()
        with tag("div", "main").style("padding:0;max-width:none") as self._content:
            with tag("section", "panel"):
                with tag("div", "panel-head"):
                    tag("h2", text="Devices")
                self._devices = tag("div")
            with tag("section", "panel"):
                with tag("div", "panel-head"):
                    tag("h2", text="Leases on it now")
                self._leases = tag("div")
            with tag("div", "split"):
                with tag("section", "panel"):
                    with tag("div", "panel-head"):
                        tag("h2", text="Versions")
                    self._versions = tag("div")
                    with self._versions:
                        tag("div", "note", "Asking…")
                with tag("section", "panel"):
                    with tag("div", "panel-head"):
                        tag("h2", text="Links between devices")
                    self._links = tag("div")
                    with self._links:
                        tag("div", "note", "Asking…")
            with tag("section", "panel"):
                with tag("div", "panel-head"):
                    tag("h2", text="What happened on it")
                    self._ranges = Segments(RANGES[1:], window.name, self._choose, "Time")
                self._history_notice = Notice()
                self._held = tag("div", "note", "Asking…")
                self._events = tag("div")
        self._refresh()
        frame.on_refresh(self._refresh)
        ui.timer(0, self._ask, once=True)

    async def _choose(self, name: str) -> None:
        self.window = Window.of(name, "", "", _USUAL)
        self._ranges.show(self.window.name)
        remember(host_path(self.name), **({} if self.window.name == _USUAL else self.window.query))
        await self._ask()

    # As the planner sees it now

    def _refresh(self) -> None:
        fleet = self.frame.fleet
        self._notice.tell(fleet.problem)
        devices = [device for device in fleet.devices if device.host == self.name]
        leases = [lease for lease in fleet.leases if any(grant.host == self.name for grant in lease.grants)]
        may = self.frame.may(Role.OPERATOR)
        # Of a host that never was there is nothing more to say.
        self._content.set_visibility(bool(devices or self._record or self._record is None))
        rows = [self._device_cells(device) for device in devices]
        unready = fleet.summary.unready_runners.get(self.name, "") if fleet.summary else ""
        # Each part by itself: buttons stay where they are while measurements change.
        drained = [bool(device.drain_reason) for device in devices]
        if self._changed("head", (drained, may, unready, self._record)):
            self._show_head(devices, may, unready)
        if self._changed("devices", rows):
            self._show_devices(devices, rows)
        if self._changed("leases", [(lease.lease_id, len(lease.grants), local(lease.expires_at)) for lease in leases]):
            self._show_leases(leases)
        if self.window.end is None and not self._asking and time.monotonic() - self._asked_at > _EVERY_SECONDS:
            ui.timer(0, self._ask, once=True)

    def _changed(self, part: str, shown: Any) -> bool:
        changed = part not in self._shown or self._shown[part] != shown
        self._shown[part] = shown
        return changed

    def _device_cells(self, device: DeviceStatus) -> tuple[str, ...]:
        used = device.memory_used_bytes
        return (
            # Its user, who has no lease, is in the next column.
            cells.state_words(device).partition(":")[0]
            if device_state(device) is DeviceState.IN_USE
            else cells.state_words(device),
            ", ".join(held_by(device, self.frame.fleet)) or "–",
            short_model(device.model),
            number(device.utilization_percent, "%"),
            f"{'–' if used is None else format_bytes(used)} of {format_bytes(device.memory_total_bytes)}",
            number(device.temperature_celsius, " °C"),
            number(device.power_watts, " W"),
        )

    def _show_head(self, devices: Sequence[DeviceStatus], may: bool, unready: str) -> None:
        self._head.clear()
        found = self._record or {}
        labels = ", ".join(f"{name}={value}" for name, value in _pairs(found.get("labels")))
        with self._head, tag("div", "head"):
            with tag("div"):
                tag("h1", text=self.name)
                words = f"{len(devices)} GPU{'' if len(devices) == 1 else 's'}" if devices else "not in the fleet now"
                if self._record is not None and not found and not devices:
                    words = "No host of this name is in the fleet or in the history."
                tag("div", "sub", ", ".join(part for part in (words, found.get("address"), labels) if part))
                if unready:
                    tag("div", "note", f"It starts no jobs: {unready}")
            with tag("div", "bar"):
                if devices:
                    tag("a", "btn", "On the map", href=url("/", q=self.name))
                if may and devices:
                    if all(device.drain_reason for device in devices):
                        button("Undrain", self._undrain, icon="play_arrow")
                    else:
                        button("Drain", self._drain, "danger", icon="block")

    def _show_devices(self, devices: Sequence[DeviceStatus], rows: Sequence[tuple[str, ...]]) -> None:
        def device(one: DeviceStatus) -> Callable[[], Any]:
            return lambda: tag("a", "", f"GPU {one.index}", href=device_path(one.uuid))

        def state(one: DeviceStatus, words: str) -> Callable[[], Any]:
            return lambda: tag("span", f"chip {TONES[device_state(one)]}", words)

        self._devices.clear()
        with self._devices:
            if not devices:
                tag("div", "note", "None now.")
                return
            heads = ("Device", "State", "Held by", "Model", "Utilization", "Memory", "Temperature", "Power")
            lines = [(device(one), state(one, words), *more) for one, (words, *more) in zip(devices, rows, strict=True)]
            table(heads, lines, numeric=(4, 5, 6, 7))

    def _show_leases(self, leases: Sequence[Lease]) -> None:
        def name(one: Lease) -> Any:
            attempt = attempt_of_request(one.request_id)
            return (lambda: job_link(attempt, one.name)) if attempt else one.name or "–"

        def lease(one: Lease) -> Callable[[], Any]:
            return lambda: tag("a", "mono", one.lease_id, href=url("/leases", q=one.lease_id))

        self._leases.clear()
        with self._leases:
            if not leases:
                tag("div", "note", "None.")
                return
            rows = [
                (
                    one.owner,
                    name(one),
                    ", ".join(str(grant.index) for grant in one.grants if grant.device and grant.host == self.name)
                    or "–",
                    local(one.granted_at, "%d %b %H:%M %Z"),
                    local(one.expires_at, "%d %b %H:%M %Z"),
                    lease(one),
                )
                for one in leases
            ]
            table(("Owner", "Name", "GPUs", "Since", "Ends", "Lease"), rows)

    def _has(self, grant: Grant) -> bool:
        return grant.host == self.name

    def _drain(self) -> None:
        async def do(reason: str) -> bool:
            async def act() -> None:
                user = self.frame.require(Role.OPERATOR)
                await self.frame.ask(lambda c: c.drain(hosts=[self.name], reason=reason, operator=user.name))

            return await self.frame.attempt(act, f"{self.name} is drained")

        text = "Its devices get no new work. Existing leases continue."
        self.frame.confirm(f"Drain {self.name}?", text, "Drain", do, "Reason")

    async def _undrain(self) -> None:
        uuids = [device.uuid for device in self.frame.fleet.devices if device.host == self.name]

        async def act() -> None:
            user = self.frame.require(Role.OPERATOR)
            await self.frame.ask(lambda c: c.undrain(hosts=[self.name], devices=uuids, operator=user.name))

        await self.frame.attempt(act, f"{self.name} is undrained")

    # As the history has it

    async def _ask(self) -> None:
        """Query the history; each part is shown when its answer comes."""
        self._asking = True
        window = self.window
        try:
            await asyncio.gather(self._ask_record(window), self._ask_links(), self._ask_events(window))
        except CorralError as error:
            self._history_notice.tell(problem_of(error, self.frame.fleet.url))
            return
        finally:
            self._asking = False
            self._asked_at = time.monotonic()
        self._history_notice.tell(None)

    async def _ask_record(self, window: Window) -> None:
        found = await self.frame.ask(lambda client: host_history.record(client, self.name, window))
        if found == self._record:
            return
        self._record = found
        with self._page:
            self._show_versions(found)
            leases, owners = found.get("leases", 0), found.get("owners", 0)
            held = f"{_count(leases, 'lease')} of {_count(owners, 'owner')}" if leases else "No leases"
            self._held.set_text(f"{held} in this time.")
            self._refresh()

    async def _ask_links(self) -> None:
        if self._linked:
            return
        found = await self.frame.ask(lambda client: host_history.links(client, self.name))
        self._linked = True
        self._show_links(found)

    async def _ask_events(self, window: Window) -> None:
        events, _ = await self.frame.ask(lambda client: event_log.happened(client, window, "", "", self.name))
        if events == self._events_shown or window != self.window:
            return
        self._events_shown = events
        self._events.clear()
        with self._events:
            if events:
                events_table(events[:_EVENTS], places=False)
            if len(events) > _EVENTS:
                tag("a", "note link", "All of them", href=url("/events", **window.query, q=self.name))

    def _show_versions(self, found: dict[str, Any]) -> None:
        def at(name: str) -> str | None:
            return found.get(name) and local(found[name], "%d %b %Y %H:%M %Z")

        version = found.get("agent_corral_version")
        facts = [
            ("Driver", found.get("driver")),
            ("Kernel", found.get("kernel")),
            ("Firmware", found.get("firmware")),
            ("Collector", version and f"{version}, {found['agent_source']}"),
            ("Reads every", found.get("interval_seconds") and f"{found['interval_seconds']:g} s"),
            ("Read errors", version and str(found["agent_read_errors"])),
            ("Samples dropped", version and str(found["agent_dropped_samples"])),
            ("CPU cores", found.get("cpus")),
            ("RAM", found.get("memory_bytes") and format_bytes(found["memory_bytes"])),
            ("First seen", at("first_seen")),
            ("Last inventory", at("last_seen")),
        ]
        self._versions.clear()
        with self._versions, tag("div", "facts"):
            for name, value in facts:
                if value:
                    with tag("div"):
                        tag("div", "fact-name", name)
                        tag("div", "fact-value", str(value))
            if not any(value for _, value in facts):
                tag("div", "note", "Not known.")

    def _show_links(self, found: Links) -> None:
        self._links.clear()
        with self._links:
            if len(found.indexes) < 2:
                tag("div", "note", "One device, or not known.")
                return
            rows = [
                (str(one), *(found.kinds.get((one, other), "·") for other in found.indexes)) for one in found.indexes
            ]
            table(["", *map(str, found.indexes)], rows)
            words = "NV: NVLink, with their number · PIX: one PCIe switch · PXB: several · PHB: host bridge · "
            tag("div", "note", words + "NODE: one NUMA node · SYS: across nodes").style("margin-top:8px")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _pairs(labels: Any) -> list[tuple[str, str]]:
    """Labels as pairs: answers have them as pairs, or without pyarrow as an object."""
    return list(labels.items()) if isinstance(labels, dict) else list(labels or ())
