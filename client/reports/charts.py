"""Charts of a usage report, drawn by ReportLab: as SVG for pages, and as they are for PDF."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final
from xml.sax.saxutils import escape

from reportlab.graphics import renderSVG
from reportlab.graphics.charts.barcharts import HorizontalBarChart, VerticalBarChart
from reportlab.graphics.charts.legends import Legend
from reportlab.graphics.shapes import Drawing
from reportlab.lib.colors import Color, HexColor

from .tables import short_label
from .usage import UsageReport

WIDTH: Final = 720
HEIGHT: Final = 210
TOP: Final = 10
"""Rows that the chart of rows shows."""
_SERIES: Final = (("active", "#2f6fb5"), ("idle", "#e08a2c"), ("unknown", "#b6bcc4"))
_INK: Final = HexColor("#4a5058")
_GRID: Final = HexColor("#dfe3e8")
_Chart = VerticalBarChart | HorizontalBarChart
_LABELS: Final = 16


def over_time(report: UsageReport) -> Drawing:
    """GPU-hours by hour, day, week or month of the period, stacked."""
    chart = VerticalBarChart()
    chart.x, chart.y, chart.width, chart.height = 52, 34, WIDTH - 64, HEIGHT - 64
    bars = report.bars
    step = -(-len(bars) // _LABELS)
    names = [_short(bar.name) if at % step == 0 else "" for at, bar in enumerate(bars)]
    _fill(chart, names, [[float(getattr(bar, f"{name}_gpu_hours")) for bar in bars] for name, _ in _SERIES])
    return _drawing(chart, HEIGHT)


def by_row(report: UsageReport) -> Drawing:
    """GPU-hours of the rows with the most of them, stacked, the most at the top."""
    rows = sorted(report.rows, key=lambda row: -row.granted_gpu_hours)[:TOP]
    rows = [row for row in rows if row.leases][::-1]
    chart = HorizontalBarChart()
    height = 60 + 22 * max(len(rows), 1)
    chart.x, chart.y, chart.width, chart.height = 230, 24, WIDTH - 250, height - 54
    names = [short_label(row, report.scope.by) for row in rows]
    _fill(chart, names, [[float(getattr(row, f"{name}_gpu_hours")) for row in rows] for name, _ in _SERIES])
    # Browsers without Helvetica show wider letters.
    chart.categoryAxis.labels.dx = -22
    return _drawing(chart, height)


def svg(drawing: Drawing, title: str, name: str) -> str:
    """A drawing as an SVG element for a page.

    Args:
        drawing: the drawing.
        title: for readers who can't see it.
        name: unique in the page.
    """
    text = renderSVG.drawToString(drawing)
    text = text[text.index("<svg") :]
    text = text.replace("<title>...</title>", f"<title>{escape(title)}</title>").replace("<desc>...</desc>", "")
    return text.replace('id="clip"', f'id="{name}-clip"').replace("#clip", f"#{name}-clip").replace(
        'id="group"', f'id="{name}"'
    )  # fmt: skip


def _fill(chart: _Chart, names: list[str], values: list[list[float]]) -> None:
    chart.data = [tuple(series) or (0.0,) for series in values]
    chart.barSpacing, chart.groupSpacing = 0, 4
    for at, (_, color) in enumerate(_SERIES):
        chart.bars[at].fillColor = HexColor(color)
        chart.bars[at].strokeColor = None
    category, axis = chart.categoryAxis, chart.valueAxis
    category.style = "stacked"
    category.categoryNames = names or [""]
    category.visibleTicks = False
    axis.valueMin, axis.rangeRound = 0, "ceiling"
    if not any(map(sum, values)):
        axis.valueMax = 1
    axis.visibleGrid, axis.gridStrokeColor = True, _GRID
    axis.labelTextFormat = _number
    for part in (category, axis):
        part.strokeColor = _GRID
        part.labels.fontSize, part.labels.fillColor = 8, _INK


def _drawing(chart: _Chart, height: int) -> Drawing:
    drawing = Drawing(WIDTH, height)
    drawing.add(chart)
    drawing.add(_legend(height))
    return drawing


def _legend(height: int) -> Legend:
    legend = Legend()
    legend.x, legend.y = 52, height - 6
    legend.boxAnchor, legend.alignment, legend.columnMaximum = "nw", "right", 1
    legend.fontSize, legend.fillColor, legend.strokeColor = 8, _INK, None
    legend.dx = legend.dy = 8
    legend.deltax = 70
    pairs: Sequence[tuple[Color, str]] = [(HexColor(color), name) for name, color in _SERIES]
    legend.colorNamePairs = list(pairs)
    return legend


def _number(value: float) -> str:
    return f"{value:,.10g}"


def _short(name: str) -> str:
    """A day without its year."""
    return name[5:] if len(name) == len("2026-10-07") else name
