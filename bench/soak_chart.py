"""A chart of a soak's record: one panel a question, as plain SVG that needs no program."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

WIDTH, HEIGHT, LEFT, RIGHT, TOP, GAP = 860, 150, 64, 170, 34, 46
COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed")


class Panel(NamedTuple):
    """What one panel shows: a title, and column → label and factor."""

    title: str
    columns: dict[str, tuple[str, float]]


PANELS = (
    Panel(
        "resident memory, MiB",
        {
            "nats_rss": ("nats-server", 2**-20),
            "planner_rss": ("planner", 2**-20),
            "processor_rss": ("processor", 2**-20),
            "collector_rss": ("collector", 2**-20),
        },
    ),
    Panel("a request's answer, ms", {"p50_ms": ("median", 1.0), "p99_ms": ("99 in 100 within", 1.0)}),
    Panel("newest sample in the history, seconds old", {"lag_seconds": ("age", 1.0)}),
    Panel("disk, GiB", {"bus_bytes": ("streams", 2**-30), "history_bytes": ("history", 2**-30)}),
)


def draw(record: Path, chart: Path, subtitle: str) -> None:
    """Write a chart of a record."""
    with record.open(newline="") as file:
        rows = list(csv.DictReader(file))
    minutes = [float(row["seconds"]) / 60 for row in rows]
    parts: list[str] = []
    y = TOP + 24
    for panel in PANELS:
        series = {
            label: [float(row[name]) * factor if row[name] else None for row in rows]
            for name, (label, factor) in panel.columns.items()
        }
        parts += _panel(panel.title, series, minutes, y)
        y += HEIGHT + GAP
    chart.parent.mkdir(parents=True, exist_ok=True)
    chart.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}" '
        'font-family="system-ui, sans-serif" font-size="12" fill="#374151">\n'
        f'<rect width="{WIDTH}" height="{y}" fill="#ffffff"/>\n'
        f'<text x="{LEFT}" y="20" font-size="13" font-weight="600">{subtitle}</text>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _panel(title: str, series: dict[str, list[float | None]], minutes: Sequence[float], y: float) -> list[str]:
    top = _nice(max((value for values in series.values() for value in values if value is not None), default=1.0))
    width, end = WIDTH - LEFT - RIGHT, max(minutes[-1], 1e-9)
    parts = [f'<text x="{LEFT}" y="{y - 8}" font-weight="600">{title}</text>']
    for step in range(5):
        level = y + HEIGHT - HEIGHT * step / 4
        parts.append(f'<path d="M{LEFT} {level:.1f}h{width}" stroke="#e5e7eb"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{level + 4:.1f}" text-anchor="end">{top * step / 4:g}</text>')
    for step in range(7):
        at = LEFT + width * step / 6
        parts.append(f'<text x="{at:.0f}" y="{y + HEIGHT + 15}" text-anchor="middle">{end * step / 6:.3g}</text>')
    parts.append(f'<text x="{LEFT + width + 12}" y="{y + HEIGHT + 15}">minutes</text>')
    for number, (label, values) in enumerate(series.items()):
        points = " ".join(
            f"{LEFT + width * at / end:.1f},{y + HEIGHT - HEIGHT * value / top:.1f}"
            for at, value in zip(minutes, values, strict=True)
            if value is not None
        )
        colour = COLOURS[number]
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        x, line = LEFT + width + 12, y + 12 + 17 * number
        parts.append(f'<path d="M{x} {line - 4}h16" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{x + 22}" y="{line}">{label}</text>')
    return parts


def _nice(most: float) -> float:
    """A round number at or above it, that four steps divide well."""
    scale = 1.0
    while scale < most:
        scale *= 10
    scale /= 10
    return next(step * scale for step in (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10, 12) if step * scale >= most)
