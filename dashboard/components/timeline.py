"""Timeline of a device's metrics, with its leases and events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from msgspec import to_builtins
from nicegui.element import Element
from nicegui.elements import echart
from nicegui.events import GenericEventArguments

from ..history import Series
from . import LIBRARY

ECHARTS: Final = {"nicegui-echart": str(Path(echart.__file__).parent / "dist")}
"""The copy of ECharts in NiceGUI, as an ES module."""


class Timeline(Element, component="timeline.js", esm=LIBRARY | ECHARTS):
    """Line charts on one time axis.

    Args:
        on_ready: called when the browser is ready to draw.
        on_zoom: called with start and end, in epoch seconds, of a range that was selected by dragging.
    """

    def __init__(self, *, on_ready: Callable[[], Any], on_zoom: Callable[[float, float], Any]) -> None:
        super().__init__()

        def zoomed(event: GenericEventArguments) -> Any:
            args: Any = event.args
            if isinstance(args, list) and len(args) == 2 and all(isinstance(one, int | float) for one in args):  # pyright: ignore[reportUnknownVariableType]
                return on_zoom(float(args[0]), float(args[1]))
            return None

        self.on("ready", on_ready, [])
        self.on("zoom", zoomed)

    def show(
        self,
        series: Sequence[Series],
        start: float,
        end: float,
        leases: Sequence[dict[str, Any]],
        events: Sequence[dict[str, Any]],
        memory_bytes: int,
    ) -> None:
        """Draw the charts. Start and end are epoch seconds; times of leases and events are epoch milliseconds."""
        self.run_method(
            "show",
            {
                "series": to_builtins(series),
                "start": 1000 * start,
                "end": 1000 * end,
                "leases": list(leases),
                "events": list(events),
                "memory": memory_bytes,
            },
        )
