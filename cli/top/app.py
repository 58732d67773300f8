"""The full-screen `corral top`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Footer, Input, Static, TabbedContent, TabPane

from ...client import CorralError
from ...client.fleet_view import FleetView
from ...client.notebook import short_model
from ...schemas import operations, requests
from ..render import local_time
from .device_details import device_page
from .rows import SORTS, ProcessRow, ProcessTable, by_host, filter_and_sort, summary_line
from .tables import Rows, device_columns, host_columns, lease_columns, process_columns, queue_columns

VIEWS = ("devices", "hosts", "leases", "queue", "processes")


class ConfirmDialog(ModalScreen[bool]):
    """Confirmation dialog: Enter or y confirms, Escape, n or q cancels."""

    DEFAULT_CSS = """
    ConfirmDialog { align: center middle; }
    ConfirmDialog > Vertical { width: 70; max-width: 95%; height: auto; padding: 1 2; }
    ConfirmDialog > Vertical { background: $panel; border: round $warning; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter,y", "dismiss(True)", "Yes"),
        Binding("escape,n,q", "dismiss(False)", "No"),
    ]

    def __init__(self, question: str) -> None:
        super().__init__()
        self._question = question

    def compose(self) -> ComposeResult:
        """Compose the question and its keys."""
        with Vertical():
            yield Static(Text(self._question))
            yield Static(Text("Enter confirms, Escape cancels", "dim"))


class ReasonDialog(ModalScreen[str | None]):
    """Dialog that asks for a reason, which also confirms the action: Enter confirms, Escape cancels."""

    DEFAULT_CSS = """
    ReasonDialog { align: center middle; }
    ReasonDialog > Vertical { width: 70; max-width: 95%; height: auto; padding: 1 2; }
    ReasonDialog > Vertical { background: $panel; border: round $warning; }
    ReasonDialog Input { margin-top: 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "No")]

    def __init__(self, question: str) -> None:
        super().__init__()
        self._question = question

    def compose(self) -> ComposeResult:
        """Compose the question and the input field."""
        with Vertical():
            yield Static(Text(self._question))
            yield Input(placeholder="reason (users see it) · Enter confirms, Escape cancels")

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Close the dialog with the reason, unless it is empty."""
        if event.value.strip():
            self.dismiss(event.value.strip())


class DevicePage(ModalScreen[None]):
    """Details of one device: its metrics, their history, its leases and processes."""

    DEFAULT_CSS = """
    DevicePage { align: center middle; }
    DevicePage > VerticalScroll { width: 95%; height: 90%; padding: 0 1; background: $panel; border: round $success; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,enter,q", "dismiss(None)", "Back")]

    def __init__(self, view: FleetView, uuid: str) -> None:
        super().__init__()
        self._fleet = view
        self._uuid = uuid

    def compose(self) -> ComposeResult:
        """Compose the scrollable text."""
        with VerticalScroll():
            yield Static(id="device")

    def on_mount(self) -> None:
        """Update the text every 0.5 s."""
        self.set_interval(0.5, self._write)
        self._write()

    def _write(self) -> None:
        self.query_one("#device", Static).update(device_page(self._fleet, self._uuid, max(20, self.size.width - 30)))


class TopApp(App[None]):
    """The full-screen application.

    Args:
        board: data to show.
        sort: initial sort key of devices, one of `SORTS`.
        words: initial filter.
        interval: seconds between refreshes, at least.
    """

    TITLE = "corral top"
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #summary { height: 1; padding: 0 1; background: $panel; }
    #notice { height: 1; padding: 0 1; color: $text-muted; }
    #filter { height: 3; display: none; }
    #filter.open { display: block; }
    TabbedContent { height: 1fr; }
    TabPane { padding: 0; }
    Rows { height: 1fr; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q,ctrl+c", "quit", "Quit"),
        Binding("1", "view('devices')", show=False),
        Binding("2", "view('hosts')", show=False),
        Binding("3", "view('leases')", show=False),
        Binding("4", "view('queue')", show=False),
        Binding("5", "view('processes')", show=False),
        Binding("tab", "next_view", "View", priority=True),
        Binding("s", "sort", "Sort"),
        Binding("r", "reverse", "Reverse"),
        Binding("slash", "filter", "Filter", key_display="/"),
        Binding("escape", "clear", show=False),
        Binding("p", "pause", "Pause"),
        Binding("d", "drain", "Drain"),
        Binding("x", "end", "End lease"),
    ]

    def __init__(self, view: FleetView, *, sort: str = "host", words: str = "", interval: float = 1.0) -> None:
        super().__init__()
        self._fleet = view
        self._processes = ProcessTable(view)
        self._sort = sort
        self._words = words
        self._interval = interval
        self._reversed = False
        self._paused = False
        self._tables: dict[str, Rows] = {
            "devices": Rows(device_columns(view), lambda device: device.uuid, id="devices-rows"),
            "hosts": Rows(host_columns(), lambda row: row.host, id="hosts-rows"),
            "leases": Rows(lease_columns(), lambda lease: lease.lease_id, id="leases-rows"),
            "queue": Rows(queue_columns(), lambda entry: entry.request_id, id="queue-rows"),
            "processes": Rows(process_columns(), lambda row: row.key, id="processes-rows"),
        }

    def compose(self) -> ComposeResult:
        """Compose the summary, the five views, the filter, the notice and the keys."""
        yield Static(id="summary")
        with TabbedContent(id="views"):
            for name in VIEWS:
                with TabPane(name.title(), id=name):
                    yield self._tables[name]
        yield Input(self._words, placeholder="words: host, model, lease, owner, free, leased, drained …", id="filter")
        yield Static(id="notice")
        yield Footer()

    def on_mount(self) -> None:
        """Start the refreshes and the subscription to processes."""
        self.run_worker(self._refresh_forever(), name="refresh")
        self.run_worker(self._follow_processes(), name="processes")
        self._write()
        self._tables["devices"].focus()

    async def _follow_processes(self) -> None:
        await self._fleet.follow_processes()
        with contextlib.suppress(CorralError):  # without a history, each host's next message has them
            await self._fleet.recall_processes()

    async def _refresh_forever(self) -> None:
        while True:
            await asyncio.sleep(self._fleet.pause_seconds(self._interval))
            if not self._paused:
                await self._fleet.refresh()
                self._write()

    def _write(self) -> None:
        if not self.query("#summary"):  # the program ends, and its widgets are gone before what refreshes them
            return
        seen = self._fleet.last
        notice = Text()
        if seen is not None:
            self.query_one("#summary", Static).update(summary_line(seen, self._fleet.mean_past))
            devices = filter_and_sort(seen.devices, self._sort, self._reversed, self._words, seen.holders)
            self._tables["devices"].show(devices)
            self._tables["hosts"].show(by_host(devices))
            self._tables["leases"].show(seen.leases)
            self._tables["queue"].show(seen.queue)
            processes = self._processes.rows()
            self._tables["processes"].show(processes)
            notice.append(f"by {self._sort}{' ↑' if self._reversed else ''}")
            if self._words:
                notice.append(f" · filter: {self._words} ({len(devices)} of {len(seen.devices)})", "yellow")
            notice.append(f" · {local_time(seen.time, '%H:%M:%S %Z')}")
            stray = sum(bool(row.concern) for row in processes)
            if stray:
                notice.append(f" · {stray} lease violations (5)", "yellow")
        if self._paused:
            notice.append(" · paused", "yellow")
        if self._fleet.error:
            notice = Text(str(self._fleet.error), "red")
        self.query_one("#notice", Static).update(notice)

    @property
    def _view(self) -> str:
        return self.query_one("#views", TabbedContent).active or "devices"

    def action_view(self, name: str) -> None:
        """Show a view."""
        self.query_one("#views", TabbedContent).active = name
        self._tables[name].focus()

    def action_next_view(self) -> None:
        """Show the next view."""
        if len(self.screen_stack) == 1:
            self.action_view(VIEWS[(VIEWS.index(self._view) + 1) % len(VIEWS)])

    def action_sort(self) -> None:
        """Sort by the next column."""
        names = list(SORTS)
        self._sort = names[(names.index(self._sort) + 1) % len(names)]
        self._write()

    def action_reverse(self) -> None:
        """Reverse the sort order."""
        self._reversed = not self._reversed
        self._write()

    def action_pause(self) -> None:
        """Pause the refreshes, or resume them."""
        self._paused = not self._paused
        self._write()

    def action_filter(self) -> None:
        """Open the filter."""
        box = self.query_one("#filter", Input)
        box.add_class("open")
        box.focus()

    def action_clear(self) -> None:
        """Clear and close the filter."""
        box = self.query_one("#filter", Input)
        box.value = ""
        box.remove_class("open")
        self._tables[self._view].focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        """Apply the filter while it is typed."""
        if event.input.id == "filter":
            self._words = event.value
            self._write()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Close the filter, keep it in effect, and return to the rows."""
        if event.input.id == "filter":
            event.input.remove_class("open")
            self._tables[self._view].focus()

    def on_rows_chosen(self, event: Rows.Chosen) -> None:
        """Open the details of a device, or of a process's device; for a host or a lease, show its devices."""
        row = event.row
        if isinstance(row, operations.DeviceStatus | ProcessRow):
            uuid = row.uuid if isinstance(row, operations.DeviceStatus) else row.process.device
            self.push_screen(DevicePage(self._fleet, uuid))
        elif not isinstance(row, operations.QueueEntry):
            self.query_one("#filter", Input).value = row.lease_id if isinstance(row, requests.Lease) else row.host
            self.action_view("devices")

    def action_drain(self) -> None:
        """Drain the selected device or host, or undrain a drained device, after confirmation."""
        row = self._tables[self._view].current
        if isinstance(row, operations.DeviceStatus):
            what: dict[str, Any] = {"devices": [row.uuid]}
            name = f"{row.host} #{row.index} ({short_model(row.model)})"
            if row.drain_reason:
                self._ask(
                    f"Undrain {name}? It is drained: {row.drain_reason}",
                    lambda: self._fleet.client.undrain(**what),
                    f"{name} is undrained",
                )
                return
        elif self._view == "hosts" and row is not None:
            what, name = {"hosts": [row.host]}, row.host
        else:
            self.notify("Select a device or a host to drain (views 1 and 2)", severity="warning")
            return

        def drain(reason: str | None) -> None:
            if reason is not None:
                self.run_worker(self._act(self._fleet.client.drain(reason=reason, **what), f"{name} is drained"))

        self.push_screen(ReasonDialog(f"Drain {name}? Existing leases continue."), drain)

    def action_end(self) -> None:
        """End the selected lease or request, after confirmation: withdraw or release the user's, evict another's."""
        row = self._tables[self._view].current
        client = self._fleet.client
        if isinstance(row, operations.QueueEntry):
            if row.owner != client.owner:
                self.notify(f"Only {row.owner} may withdraw this request", severity="warning")
                return
            request_id = row.request_id
            self._ask(
                f"Withdraw request {request_id} ({row.name or 'no name'}, {row.gpus} GPUs)?",
                lambda: client.withdraw(request_id),
                f"{request_id} is withdrawn",
            )
            return
        lease_id = ""
        if isinstance(row, requests.Lease):
            lease_id = row.lease_id
        elif isinstance(row, operations.DeviceStatus) and row.leases:
            lease_id = row.leases[0]
        elif isinstance(row, ProcessRow) and row.lease:
            lease_id = row.process.lease
        if not lease_id:
            self.notify("No lease is selected", severity="warning")
            return
        leases = self._fleet.last.leases if self._fleet.last is not None else []
        if any(lease.lease_id == lease_id and lease.owner == client.owner for lease in leases):
            self._ask(
                f"Release your lease {lease_id}? Its work is stopped.",
                lambda: client.release(lease_id),
                f"{lease_id} is released",
            )
            return

        def evict(reason: str | None) -> None:
            if reason is not None:
                self.run_worker(self._act(self._fleet.client.evict(lease_id, reason=reason), f"{lease_id} is evicted"))

        self.push_screen(ReasonDialog(f"Evict lease {lease_id}? Its work is stopped."), evict)

    def _ask(self, question: str, doing: Callable[[], Awaitable[Any]], done: str) -> None:
        """Ask for confirmation, and carry out an action if it is given."""

        def answered(yes: bool | None) -> None:
            if yes:
                self.run_worker(self._act(doing(), done))

        self.push_screen(ConfirmDialog(question), answered)

    async def _act(self, doing: Any, done: str) -> None:
        try:
            await doing
        except CorralError as error:
            self.notify(str(error), severity="error")
        else:
            self.notify(done)
            await self._fleet.refresh()
            self._write()
