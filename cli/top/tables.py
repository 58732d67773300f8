"""Table widget for thousands of rows, of which only the visible ones are rendered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Final

from msgspec import Struct
from rich.console import Console
from rich.style import Style
from rich.text import Text
from textual.binding import Binding, BindingType
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from ...client.fleet_view import FleetView, holder
from ...client.notebook import short_model
from ...schemas import operations, requests
from .. import render
from .rows import HISTORY, HostRow, ProcessRow, sparkline

_HEAD: Final = Style(bold=True, dim=True)
_CURSOR: Final = Style(bgcolor="#1f4f3f")


class Column(Struct, frozen=True, kw_only=True):
    """A column of a table.

    Attributes:
        title: heading.
        width: minimum width in characters.
        cell: returns the text of a row's cell.
        right: align to the right, as for numbers.
        need: columns with the highest value are dropped first on a narrow screen.
        grows: share the remaining width.
        tail: show the end of a text that is too long, instead of its beginning.
        cut_mark: begin a text whose end is shown with `…`.
        optional: shown only if some row has a text in it.
    """

    title: str
    width: int
    cell: Callable[[Any], Text | str]
    right: bool = False
    need: int = 0
    grows: bool = False
    tail: bool = False
    cut_mark: bool = False
    optional: bool = False


class Rows(ScrollView, can_focus=True):
    """A table with a cursor that stays on its row when the order changes.

    Args:
        columns: all columns; those that don't fit aren't shown.
        key: returns the unique key of a row.
        id: id of the widget.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", show=False),
        Binding("down,j", "move(1)", show=False),
        Binding("pageup", "move_page(-1)", show=False),
        Binding("pagedown", "move_page(1)", show=False),
        Binding("home,g", "move_to(0)", show=False),
        Binding("end,G", "move_to(-1)", show=False),
        Binding("enter", "choose", show=False),
    ]
    DEFAULT_CSS = """
    Rows { overflow-x: hidden; }
    """

    class Chosen(Message):
        """Message: Enter was pressed on a row, or it was double-clicked."""

        def __init__(self, row: Any) -> None:
            super().__init__()
            self.row = row

    def __init__(self, columns: Sequence[Column], key: Callable[[Any], str], *, id: str) -> None:
        super().__init__(id=id)
        self._all_columns = columns
        self._columns = [column for column in columns if not column.optional]
        self._key = key
        self._rows: Sequence[Any] = ()
        self._at = 0

    @property
    def current(self) -> Any:
        """The row under the cursor; None if there are no rows."""
        return self._rows[self._at] if self._rows else None

    def show(self, rows: Sequence[Any]) -> None:
        """Replace the rows; the cursor stays on its row, if that still exists."""
        key = self._key(self.current) if self._rows else None
        self._rows = rows
        self._columns = [
            column for column in self._all_columns if not column.optional or any(column.cell(row) for row in rows)
        ]
        self._at = min(self._at, max(0, len(rows) - 1))
        if key is not None:
            self._at = next((at for at, row in enumerate(rows) if self._key(row) == key), self._at)
        self.virtual_size = Size(self.size.width, len(rows) + 1)
        self.refresh()

    def action_move(self, by: int) -> None:
        """Move the cursor."""
        self.action_move_to(max(0, min(self._at + by, len(self._rows) - 1)))

    def action_move_page(self, by: int) -> None:
        """Move the cursor by pages."""
        self.action_move(by * max(1, self.size.height - 2))

    def action_move_to(self, at: int) -> None:
        """Put the cursor on a row; -1 is the last."""
        self._at = max(0, len(self._rows) - 1 if at < 0 else at)
        # The heading covers the first line, so the row above must be scrolled into view too.
        self.scroll_to_region(Region(0, self._at, 1, 2), animate=False, force=True)
        self.refresh()

    def action_choose(self) -> None:
        """Open the row under the cursor."""
        if self._rows:
            self.post_message(self.Chosen(self.current))

    def on_click(self, event: Any) -> None:
        """Move the cursor to the clicked row; a double click opens the row."""
        at = self.scroll_offset.y + event.y - 1
        if event.y >= 1 and 0 <= at < len(self._rows):
            if at == self._at and event.chain > 1:
                self.action_choose()
            self._at = at
            self.refresh()

    def render_line(self, y: int) -> Strip:
        """Render one line of the screen: the heading, or a row."""
        width = self.scrollable_content_region.width
        shown = fitting(self._columns, width)
        if y == 0:
            return _strip(
                [(column, width_, Text(column.title)) for column, width_ in shown], width, _HEAD, self.app.console
            )
        at = self.scroll_offset.y + y - 1
        if at >= len(self._rows):
            return Strip.blank(width, self.rich_style)
        row = self._rows[at]
        cells = [(column, width_, _text(column.cell(row))) for column, width_ in shown]
        style = _CURSOR if at == self._at and self.has_focus else Style()
        return _strip(cells, width, style, self.app.console)


def fitting(columns: Sequence[Column], width: int) -> list[tuple[Column, int]]:
    """Columns that fit into a width, with the width of each; columns with `grows` share the remaining width."""
    kept = list(columns)
    while len(kept) > 1 and sum(column.width + 1 for column in kept) > width:
        kept.remove(max(kept, key=lambda column: column.need))
    left = width - sum(column.width + 1 for column in kept)
    growing = [column for column in kept if column.grows]
    share = left // len(growing) if growing and left > 0 else 0
    return [(column, column.width + (share if column.grows else 0)) for column in kept]


def _text(value: Text | str) -> Text:
    return value if isinstance(value, Text) else Text(value)


def _end(text: Text, room: int, mark: bool) -> Text:
    return Text("…") + text[-(room - 1) :] if mark and text.cell_len > room else text[-room:]


def _strip(cells: Sequence[tuple[Column, int, Text]], width: int, style: Style, console: Console) -> Strip:
    line = Text(no_wrap=True, end="")
    for column, room, text in cells:
        cell = _end(text, room, column.cut_mark) if column.tail else text.copy()
        cell.truncate(room, overflow="ellipsis", pad=False)
        gap = " " * (room - cell.cell_len)
        line.append_text(Text(gap) + cell if column.right else cell + Text(gap)).append(" ")
    segments = list(line.render(console))
    return Strip(segments).adjust_cell_length(width).apply_style(style)


def device_columns(view: FleetView) -> list[Column]:
    """Columns of the device table; it is meant for 80 characters or more."""

    def memory(device: operations.DeviceStatus) -> str:
        used = device.memory_used_bytes
        return f"{'–' if used is None else render.gib(used)}/{device.memory_total_bytes / 2**30:.0f}"

    def held_by(device: operations.DeviceStatus) -> str:
        """Holders of the device; else the users of its processes, which have no lease."""
        users = {process.user for process in view.processes_on(device) or ()} if device.in_use else set[str]()
        if users - {""}:
            return f"no lease: {', '.join(sorted(users - {''}))}"
        return render.held_by(device, view.last.holders if view.last else {})

    def memory_bar(device: operations.DeviceStatus) -> Text:
        used, total = device.memory_used_bytes, device.memory_total_bytes
        return render.bar(None if used is None or not total else 100 * used / total, 6)

    def utilization(device: operations.DeviceStatus) -> Text:
        value = device.utilization_percent
        style = "dim" if not value else "red" if value >= 90 else "yellow" if value >= 70 else "green"
        return Text(render.number(value), style)

    def past(device: operations.DeviceStatus) -> Text:
        return Text(sparkline(view.past.get(device.uuid, ()), HISTORY), "green")

    def temperature(device: operations.DeviceStatus) -> Text:
        value = device.temperature_celsius
        return Text(render.number(value), "red" if device.throttled or (value or 0) >= 85 else "")

    return [
        Column(title="HOST", width=9, cell=lambda d: d.host, grows=True),
        Column(title="#", width=2, cell=lambda d: str(d.index), right=True),
        Column(title="MODEL", width=9, cell=lambda d: short_model(d.model), need=2, grows=True),
        Column(title="STATE", width=8, cell=render.device_state, grows=True),
        Column(title="HELD BY", width=12, cell=held_by, grows=True),
        Column(title="UTIL%", width=5, cell=utilization, right=True),
        Column(title="LAST", width=5, cell=past, need=3, grows=True, tail=True),
        Column(title="GiB", width=7, cell=memory, right=True),
        Column(title="", width=6, cell=memory_bar, need=5),
        Column(title="AVAIL GiB", width=9, cell=lambda d: render.gib(d.memory_free_bytes), right=True, need=7),
        Column(title="°C", width=3, cell=temperature, right=True),
        Column(title="W", width=4, cell=lambda d: render.number(d.power_watts), right=True),
        Column(
            title="LEASE", width=16, cell=lambda d: " ".join(d.leases), need=8, tail=True, cut_mark=True, grows=True
        ),
    ]


def host_columns() -> list[Column]:
    """Columns of the host table."""

    def memory(row: HostRow) -> str:
        return f"{row.memory_used_bytes / 2**30:.0f}/{row.memory_total_bytes / 2**30:.0f}"

    return [
        Column(title="HOST", width=14, cell=lambda h: h.host, grows=True),
        Column(title="GPUS", width=4, cell=lambda h: str(h.devices), right=True),
        Column(title="LEASED", width=6, cell=lambda h: str(h.leased), right=True),
        Column(title="USABLE", width=6, cell=lambda h: str(h.usable), right=True),
        Column(title="UTIL%", width=5, cell=lambda h: render.number(h.utilization_percent), right=True),
        Column(title="", width=8, cell=lambda h: render.bar(h.utilization_percent), need=2),
        Column(title="MEM GiB", width=11, cell=memory, right=True),
        Column(title="MAX °C", width=6, cell=lambda h: render.number(h.temperature_celsius_max), right=True),
        Column(title="POWER W", width=7, cell=lambda h: render.number(h.power_watts), right=True),
        Column(title="MODELS", width=10, cell=lambda h: h.models, need=1, grows=True),
    ]


def lease_columns() -> list[Column]:
    """Columns of the lease table."""

    def where(lease: requests.Lease) -> str:
        hosts: dict[str, list[str]] = {}
        for grant in lease.grants:
            hosts.setdefault(grant.host, []).append(str(grant.index) if grant.device else "cpu")
        return " ".join(f"{host}:{','.join(indices)}" for host, indices in hosts.items())

    def gpus(lease: requests.Lease) -> str:
        return render.gpus_text(lease, shares=True)

    return [
        Column(title="OWNER", width=10, cell=lambda one: one.owner, grows=True),
        Column(title="GROUP", width=10, cell=lambda one: one.group, need=1, grows=True, optional=True),
        Column(title="NAME", width=12, cell=lambda one: one.name, grows=True),
        Column(title="GPUS", width=4, cell=gpus, right=True, grows=True),
        Column(title="LEFT", width=6, cell=render.left, right=True),
        Column(title="WHERE", width=18, cell=where, grows=True),
        Column(title="LEASE", width=14, cell=lambda one: one.lease_id, tail=True, cut_mark=True),
    ]


def process_columns() -> list[Column]:
    """Columns of the process table."""

    def memory(row: ProcessRow) -> str:
        used = row.process.memory_used_bytes
        return "–" if used is None else f"{used / 2**30:.1f}"

    return [
        Column(title="HOST", width=9, cell=lambda r: r.host, grows=True),
        Column(title="#", width=2, cell=lambda r: str(r.index), right=True),
        Column(title="HELD BY", width=12, cell=lambda r: holder(r.lease) if r.lease else "–", grows=True),
        Column(title="USER", width=8, cell=lambda r: r.process.user, need=2, grows=True),
        Column(title="PROCESS", width=10, cell=lambda r: r.process.name, grows=True),
        Column(title="PID", width=7, cell=lambda r: str(r.process.pid), right=True),
        Column(title="GiB", width=5, cell=memory, right=True),
        Column(title="SM%", width=4, cell=lambda r: render.number(r.process.sm_utilization_percent), right=True),
        Column(title="CONCERN", width=15, cell=lambda r: Text(r.concern, "yellow"), grows=True),
        Column(
            title="LEASE", width=16, cell=lambda r: r.process.lease or "–", need=3, tail=True, cut_mark=True, grows=True
        ),
    ]


def queue_columns() -> list[Column]:
    """Columns of the queue table."""
    return [
        Column(title="#", width=3, cell=lambda e: str(e.position), right=True),
        Column(title="OWNER", width=10, cell=lambda e: e.owner),
        Column(title="GROUP", width=10, cell=lambda e: e.group, need=2, optional=True),
        Column(title="NAME", width=12, cell=lambda e: e.name),
        Column(title="GPUS", width=4, cell=lambda e: str(e.gpus), right=True),
        Column(title="WAITS", width=6, cell=lambda e: render.duration(e.waiting_seconds), right=True),
        Column(title="STARTS IN", width=18, cell=render.starts, need=1),
        Column(title="WHY", width=20, cell=lambda e: e.message, grows=True),
    ]
