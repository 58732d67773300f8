"""Components for query results: lanes of leases, a table and a chart. Data is sent once the browser is ready."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nicegui.element import Element
from nicegui.events import GenericEventArguments

from ..cells import packed
from . import LIBRARY
from .timeline import ECHARTS


class WhenReady(Element):
    """Element that keeps the last method call until the browser is ready."""

    def __init__(self) -> None:
        super().__init__()
        self._able = False
        self._waiting: tuple[Any, ...] | None = None
        self.on("ready", self._ready, [])

    @property
    def is_ignoring_events(self) -> bool:
        """Always false: an element that is hidden until it has data must still report that it is ready."""
        return False

    @property
    def able(self) -> bool:
        """True if the browser is ready."""
        return self._able

    def _ready(self) -> None:
        self._able = True
        if self._waiting is not None:
            self.run_method(*self._waiting)
            self._waiting = None

    def tell(self, *call: Any) -> None:
        """Call a method in the browser, now or once it is ready; a later call replaces one that is waiting."""
        if self._able:
            self.run_method(*call)
        else:
            self._waiting = call


class Lanes(WhenReady, component="lanes.js", esm=LIBRARY):
    """Chart of leases over time, with one lane per device.

    Args:
        on_open: called with the number of the lane that was chosen.
    """

    def __init__(self, on_open: Callable[[int], Any]) -> None:
        super().__init__()

        def opened(event: GenericEventArguments) -> Any:
            args: Any = event.args
            return on_open(args) if isinstance(args, int) and not isinstance(args, bool) else None

        self.on("open", opened)

    def show(self, names: Sequence[str], bars: Sequence[tuple[int, dict[str, Any]]], start: float, end: float) -> None:
        """Draw the lanes. A bar is its lane's number and a row of `lease_spans`; start and end are epoch seconds."""
        leases: dict[str, int] = {}
        described: list[list[str]] = []
        for _, span in bars:
            if span["lease_id"] not in leases:
                leases[span["lease_id"]] = len(described)
                described.append([span["lease_id"], span["owner"], span["name"] or "", span["state"]])
        self.tell(
            "show",
            {
                "names": list(names),
                "described": described,
                "lanes": packed([lane for lane, _ in bars], "H"),
                "leases": packed([leases[span["lease_id"]] for _, span in bars], "H"),
                "from": packed([float(span["started"]) for _, span in bars], "d"),
                "to": packed([float(span["ended"]) for _, span in bars], "d"),
                "start": 1000 * start,
                "end": 1000 * end,
            },
        )


class Grid(WhenReady, component="grid.js", esm=LIBRARY):
    """A table that can be sorted in the browser."""

    def fill(self, columns: Sequence[dict[str, Any]], rows: Sequence[Sequence[Any]]) -> None:
        """Show rows; each column has `name`, `numeric` and `help`."""
        self.tell("fill", list(columns), [list(row) for row in rows])


class Chart(WhenReady, component="chart.js", esm=LIBRARY | ECHARTS):
    """A chart of bars, which may be stacked, of lines, or of bars over time that are stacked."""

    def show(
        self,
        kind: str,
        labels: Sequence[Any],
        series: Sequence[dict[str, Any]],
        unit: str,
        window: tuple[float, float] | None = None,
    ) -> None:
        """Draw the chart.

        Args:
            kind: `bar`, `bars` for stacked ones, `line`, or `stack` for stacked bars over time.
            labels: texts for `bar` and `bars`, epoch milliseconds otherwise.
            series: series, each with `name`, `values`, and possibly `color`, the number of a color of the palette.
            unit: unit of the values.
            window: start and end of the time axis, in epoch milliseconds; None for those of the labels.
        """
        self.tell(
            "show", {"kind": kind, "labels": list(labels), "series": list(series), "unit": unit, "window": window}
        )
