"""Fleet page: heat map with a cell for each device, totals, and devices that need attention."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from nicegui import ui
from starlette.requests import Request

from ...client.fleet_view import DeviceState, device_state, gpus_free
from ...client.notebook import short_model
from ...schemas.operations import DeviceStatus
from ...schemas.values.units import format_bytes
from .. import cells
from ..cells import GroupBy, Metric
from ..components.heatmap import HeatMap
from ..components.host_links import device_path, host_link
from ..fleet import NO_DEVICES, Fleet
from ..html import Segments, remember, search, table, tag, url
from ..jobs import JobCounts
from ..page_frame import Frame, Notice

_METRICS = (("health", "State"), ("utilization", "Utilization"), ("memory", "Memory"), ("temperature", "Temperature"))
_GROUPS = (("host", "Host"), ("model", "Model"), ("owner", "Owner"))
_ATTENTION = 8


def register(frame: Callable[[Request, str], Frame]) -> None:
    """Register the page."""

    @ui.page("/")
    async def page(request: Request, metric: str = "health", group: str = "host", q: str = "") -> None:
        around = frame(request, "Fleet")
        await around.fleet.ready()
        with around.show("/"):
            FleetPage(around, _one(Metric, metric), _one(GroupBy, group), q[:256])


def _one(kind: Any, text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        return next(iter(kind))


class FleetPage:
    """The fleet page in one browser."""

    def __init__(self, frame: Frame, metric: Metric, group: GroupBy, words: str) -> None:
        self.frame = frame
        self.fleet: Fleet = frame.fleet
        self.metric, self.group, self.words = metric, group, words
        self._drawable = False
        self._drawn: Any = None
        self._levels = self._health = b""
        with tag("div", "head"):
            with tag("div"):
                tag("h1", text="Fleet")
                self._sub = tag("div", "sub", "")
            search(words, self._search, "Filter by host, model, owner, state")
        self._notice = Notice()
        with tag("div") as self._content:
            self._content.classes("main").style("padding:0;max-width:none")
            self._tiles = _Tiles()
            self._state_counts = _StateCounts()
            with tag("section", "panel"):
                with tag("div", "panel-head"):
                    Segments(_METRICS, metric, self._color, "Color by")
                    with tag("div", "bar"):
                        tag("span", "seg-label", "by")
                        Segments(_GROUPS, group, self._group_by, "Group by")
                self._map = HeatMap(metric, on_ready=self._ready, on_peek=self._peek, on_open=self._open)
                self._nothing = tag("div", "empty slim", "No device matches the filter.")
            self._attention = _Attention()
        self._refresh()
        frame.on_refresh(self._refresh)

    # Events from the browser

    def _ready(self) -> None:
        self._drawable, self._drawn = True, None
        self._draw()

    def _color(self, metric: str) -> None:
        self.metric = Metric(metric)
        self._map.color_by(self.metric)
        self._changed()

    def _group_by(self, group: str) -> None:
        self.group = GroupBy(group)
        self._changed()

    def _search(self, words: str) -> None:
        self.words = words
        self._changed()

    def _changed(self) -> None:
        metric = self.metric if self.metric is not Metric.HEALTH else ""
        group = self.group if self.group is not GroupBy.HOST else ""
        remember("/", metric=metric, group=group, q=self.words)
        self._draw()

    def _peek(self, number: int) -> None:
        if 0 <= number < len(self.fleet.devices):
            device = self.fleet.devices[number]
            self._map.details(number, f"{device.host} · GPU {device.index}", _details(device, self.fleet))

    def _open(self, number: int) -> None:
        if 0 <= number < len(self.fleet.devices):
            ui.navigate.to(device_path(self.fleet.devices[number].uuid))

    # Updates to the browser

    def _refresh(self) -> None:
        fleet = self.fleet
        problem = fleet.problem
        nothing = not fleet.devices
        self._content.set_visibility(not nothing)
        self._notice.tell(problem or (NO_DEVICES if nothing and fleet.summary else None), whole=nothing)
        if nothing:
            return
        self._sub.set_text(_subtitle(fleet))
        self._tiles.show(fleet)
        self._state_counts.show(fleet)
        self._attention.show(fleet)
        self._draw()
        ui.timer(0, self._ask_jobs, once=True)

    async def _ask_jobs(self) -> None:
        self._tiles.show_jobs(await self.frame.jobs.counts())

    def _draw(self) -> None:
        if not self._drawable or not self.fleet.devices:
            return
        devices, leases = self.fleet.devices, self.fleet.leases
        levels, health = self.fleet.levels(self.metric), self.fleet.levels(Metric.HEALTH)
        held = [lease.lease_id for lease in leases] if self.group is GroupBy.OWNER or self.words else None
        # A filter may depend on states, so a change of states can change the layout.
        states = health if self.words else None
        drawn = (self.fleet.shape, self.metric, self.group, self.words, held, states)
        if drawn != self._drawn:
            grouped = cells.groups(devices, leases, self.group, self.words)
            self._nothing.set_visibility(not grouped)
            layout = cells.layout(devices, grouped)
            self._map.set_layout(layout, *(base64.b64encode(raw).decode() for raw in (levels, health)))
            self._drawn = drawn
        else:
            self._map.change(cells.update(self._levels, levels), cells.update(self._health, health))
        self._levels, self._health = levels, health


def _subtitle(fleet: Fleet) -> str:
    summary = fleet.summary
    if summary is None:
        return ""
    models = sorted(summary.models.items(), key=lambda item: -item[1])
    named = ", ".join(f"{count:,} × {short_model(name)}" for name, count in models[:3])
    more = f" and {len(models) - 3} more models" if len(models) > 3 else ""
    return f"{summary.hosts:,} hosts: {named}{more}"


def _details(device: DeviceStatus, fleet: Fleet) -> list[tuple[str, str]]:
    used = device.memory_used_bytes
    return [
        ("State", cells.state_words(device)),
        *(("Held by", who) for who in held_by(device, fleet)[:3]),
        ("Model", short_model(device.model)),
        ("Utilization", number(device.utilization_percent, "%")),
        ("Memory", f"{'–' if used is None else format_bytes(used)} of {format_bytes(device.memory_total_bytes)}"),
        ("Temperature", number(device.temperature_celsius, " °C")),
        ("Power", number(device.power_watts, " W")),
    ]


def held_by(device: DeviceStatus, fleet: Fleet) -> list[str]:
    """Holders of a device's leases; without any, the processes on a device that is in use, with their users."""
    if device.leases:
        return [fleet.holders.get(lease, lease) for lease in device.leases]
    processes = (fleet.processes_on(device) or ()) if device.in_use else ()
    return [f"{one.user or 'somebody'}: {one.name or one.pid} (no lease)" for one in processes]


def number(value: float | None, unit: str) -> str:
    """Format a measured value; a dash if it is unknown."""
    return "–" if value is None else f"{value:.0f}{unit}"


class _Tiles:
    """Tiles with the totals of the fleet."""

    def __init__(self) -> None:
        self._tiles: dict[str, tuple[Any, Any, Any]] = {}
        with tag("div", "tiles"):
            for name in ("Utilization", "Memory in use", "Free GPUs", "Power", "Leases", "Waiting", "Jobs"):
                link = {"href": "/jobs?state=active"} if name == "Jobs" else {}
                with tag("a" if link else "div", "tile", **link) as tile:
                    tag("div", "tile-name", name)
                    with tag("div", "tile-value"):
                        value, unit = tag("span", text=""), tag("small", text="")
                    self._tiles[name] = (value, unit, tag("div", "tile-more", ""))
        self._jobs = tile
        self._jobs.set_visibility(False)

    def show_jobs(self, counts: JobCounts | None) -> None:
        """Update the tile of jobs, which is hidden while their number is unknown."""
        self._jobs.set_visibility(counts is not None)
        if counts is not None:
            self._set_tile("Jobs", f"{counts.going:,}", " running", f"{counts.waiting:,} waiting")

    def show(self, fleet: Fleet) -> None:
        """Update the tiles."""
        summary = fleet.summary
        if summary is None:
            return
        total, used = summary.memory_total_bytes, summary.memory_used_bytes
        power, heat = summary.power_watts_total, summary.temperature_celsius_mean
        kilo = power is not None and power >= 10_000
        owners = len({lease.owner for lease in fleet.leases})
        first = fleet.queue[0] if fleet.queue else None
        self._set_tile("Utilization", number(summary.utilization_percent_mean, ""), "%", "mean of all GPUs")
        self._set_tile(
            "Memory in use", f"{100 * used / total:.0f}" if total else "–", "%",
            f"{format_bytes(used)} of {format_bytes(total)}",
        )  # fmt: skip
        self._set_tile(
            "Free GPUs", f"{gpus_free(summary, fleet.devices):,.4g}", f" of {summary.devices:,}",
            f"{summary.devices - summary.usable_devices:,} not usable" if summary.devices > summary.usable_devices
            else "all usable",
        )  # fmt: skip
        self._set_tile(
            "Power", "–" if power is None else f"{power / 1000:,.1f}" if kilo else f"{power:,.0f}",
            " kW" if kilo else " W", "" if heat is None else f"{heat:.0f} °C on average",
        )  # fmt: skip
        self._set_tile("Leases", f"{summary.active_leases:,}", "", f"of {owners} owner{'' if owners == 1 else 's'}")
        self._set_tile(
            "Waiting", f"{summary.waiting_requests:,}", "", f"next: {first.owner}" if first else "the queue is empty"
        )

    def _set_tile(self, name: str, value: str, unit: str, more: str) -> None:
        for place, text in zip(self._tiles[name], (value, unit, more), strict=True):
            if place.text != text:
                place.set_text(text)


class _StateCounts:
    """Links with the number of devices in each state that needs attention; each link shows these devices."""

    def __init__(self) -> None:
        self._place = tag("div", "bar")
        self._shown: list[tuple[DeviceState, int]] | None = None

    def show(self, fleet: Fleet) -> None:
        """Update the list."""
        counts = Counter(fleet.states)
        shown = [(state, counts[state]) for state in _WORST if counts[state]]
        if shown == self._shown:
            return
        self._shown = shown
        self._place.clear()
        self._place.set_visibility(bool(shown))
        with self._place:
            for state, count in shown:
                target = url("/", metric="health", q=state.name.lower())
                tag("a", f"chip {_TONES[state]}", f"{count:,} {_STATES[state]}", href=target)


class _Attention:
    """List of devices that need attention, and of hosts that start no jobs."""

    def __init__(self) -> None:
        self._place = tag("section", "panel")
        self._shown: Any = None

    def show(self, fleet: Fleet) -> None:
        """Update the list."""
        found = cells.alike(fleet.devices, _WORST)
        count = sum(len(each) for each in found)
        lines = [_row(each, fleet) for each in found[:_ATTENTION]]
        hosts = fleet.summary.unready_runners if fleet.summary is not None else {}
        shown = count, [(each[0].uuid, len(each), *line[2:]) for each, line in zip(found, lines, strict=False)], hosts
        if shown == self._shown:
            return
        self._shown = shown
        self._place.clear()
        self._place.set_visibility(bool(found or hosts))
        with self._place:
            with tag("div", "panel-head"):
                tag("h2", text="Needs attention")
                tag("span", "note", f"{count:,} device{'' if count == 1 else 's'}")
            for host, why in hosts.items():
                with tag("p", "note"):
                    host_link(host)
                    tag("span", text=f" starts no jobs: {why}")
            if not found:
                return
            table(("Device", "State", "Model", "Held by"), [line[:4] for line in lines])
            if len(found) > _ATTENTION:
                more = sum(len(each) for each in found[_ATTENTION:])
                tag("a", "note link", f"and {more:,} more", href=url("/", metric="health"))


def _row(devices: Sequence[DeviceStatus], fleet: Fleet) -> tuple[Any, ...]:
    """Line about devices of one host that are in the same state; the last cell, the state as text, is not shown."""
    first = devices[0]
    words = cells.state_words(first)

    def where() -> None:
        if len(devices) == 1:
            tag("a", "", f"{first.host} · GPU {first.index}", href=device_path(first.uuid))
        else:
            host_link(first.host, f"{first.host} · {len(devices)} GPUs")

    def state() -> None:
        tag("span", f"chip {_TONES.get(device_state(first), 'warn')}", words)

    holders = dict.fromkeys(who for device in devices for who in held_by(device, fleet))
    return where, state, short_model(first.model), ", ".join(holders) or "–", words


_WORST = (DeviceState.UNHEALTHY, DeviceState.STALE, DeviceState.DRAINED, DeviceState.THROTTLED)
_STATES = {
    DeviceState.UNHEALTHY: "unhealthy",
    DeviceState.STALE: "without samples",
    DeviceState.DRAINED: "drained",
    DeviceState.THROTTLED: "throttled",
}
_TONES = {
    DeviceState.UNHEALTHY: "bad",
    DeviceState.STALE: "",
    DeviceState.DRAINED: "warn",
    DeviceState.THROTTLED: "warn",
}
