"""Metrics of a device over time, with the leases and events of that time."""

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
"""ECharts, as NiceGUI brings it."""


class Timeline(Element, component="timeline.js", esm=LIBRARY | ECHARTS):
    """Line charts on one time axis.

    Args:
        on_ready: called once the browser can draw.
        on_zoom: called with start and end, seconds since the epoch, of a stretch that was dragged over.
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
        """Draw; times are seconds since the epoch, those of leases and events milliseconds."""
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
