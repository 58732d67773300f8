"""Heat map of the fleet, with one cell per device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from msgspec import to_builtins
from nicegui.element import Element
from nicegui.events import GenericEventArguments

from ..cells import Layout, Metric, Update
from . import LIBRARY


class HeatMap(Element, component="heatmap.js", esm=LIBRARY):
    """A canvas with a cell for each device.

    Args:
        metric: metric that determines the color of the cells.
        on_ready: called when the browser is ready to draw, to send the layout.
        on_peek: called with the position of the device under the pointer.
        on_open: called with the position of the device that was chosen.
    """

    def __init__(
        self,
        metric: Metric,
        *,
        on_ready: Callable[[], None],
        on_peek: Callable[[int], None],
        on_open: Callable[[int], None],
    ) -> None:
        super().__init__()
        self._props["metric"] = str(metric)
        self.on("ready", on_ready, [])
        self.on("peek", lambda event: _number(event, on_peek), throttle=0.06, leading_events=True)
        self.on("open", lambda event: _number(event, on_open))

    def color_by(self, metric: Metric) -> None:
        """Set the metric of the colors; its levels are to be sent with the layout."""
        self._props["metric"] = str(metric)

    def set_layout(self, layout: Layout, levels: str, health: str) -> None:
        """Send a new layout, after a change of devices, groups or metric; levels and health are base64, a byte each."""
        self.run_method("setLayout", to_builtins(layout), levels, health)

    def change(self, levels: Update | None, health: Update | None) -> None:
        """Send changed levels and health states for the same layout."""
        if levels or health:
            self.run_method("change", *(to_builtins(update) if update else None for update in (levels, health)))

    def details(self, number: int, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Send the tooltip of a device: its title and rows of name and value."""
        self.run_method("details", number, title, [list(row) for row in rows])


def _number(event: GenericEventArguments, then: Callable[[int], None]) -> None:
    args: Any = event.args
    if isinstance(args, int) and not isinstance(args, bool):
        then(args)
