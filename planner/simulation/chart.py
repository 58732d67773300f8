"""A chart of replays: for each rule the share of jobs that were done within a time, as plain SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Final

from .timed import Replay

WIDTH: Final = 860
HEIGHT: Final = 420
LEFT: Final = 56
RIGHT: Final = 190
TOP: Final = 40
BOTTOM: Final = 46
COLORS: Final = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")
_POINTS: Final = 400


def draw(path: Path, replays: Sequence[Replay], title: str) -> None:
    """Write a chart.

    Raises:
        OSError: it can't be written.
    """
    path.write_text(svg(replays, title), encoding="utf-8")


def svg(replays: Sequence[Replay], title: str) -> str:
    """Chart of the distribution of JCT, by rule."""
    curves = [(replay.rule, sorted(run.ended_at - run.job.submit_seconds for run in replay.runs)) for replay in replays]
    every = [jct for _, curve in curves for jct in curve]
    low = math.floor(math.log10(max(1.0, min(every, default=1.0))))
    high = max(low + 1, math.ceil(math.log10(max(1.0, max(every, default=10.0)))))
    wide, tall = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(seconds: float) -> float:
        return LEFT + wide * (math.log10(max(1.0, seconds)) - low) / (high - low)

    def y(share: float) -> float:
        return TOP + tall * (1 - share)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="system-ui, sans-serif" font-size="12" fill="#374151">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="22" font-size="13" font-weight="600">{escape(title)}</text>',
    ]
    for share in (0, 0.25, 0.5, 0.75, 1):
        parts.append(_line(LEFT, y(share), LEFT + wide, y(share)))
        parts.append(f'<text x="{LEFT - 8}" y="{y(share) + 4:.1f}" text-anchor="end">{share:.0%}</text>')
    for power in range(low, high + 1):
        at = x(10.0**power)
        parts.append(_line(at, TOP, at, TOP + tall))
        parts.append(f'<text x="{at:.1f}" y="{TOP + tall + 18}" text-anchor="middle">{_seconds(10.0**power)}</text>')
    parts.append(f'<text x="{LEFT + wide / 2:.1f}" y="{HEIGHT - 8}" text-anchor="middle">time to completion</text>')
    for number, (rule, curve) in enumerate(curves):
        color = COLORS[number % len(COLORS)]
        step = max(1, len(curve) // _POINTS)
        points = [(jct, (at + 1) / len(curve)) for at, jct in enumerate(curve) if not at % step or at == len(curve) - 1]
        line = " ".join(f"{x(jct):.1f},{y(share):.1f}" for jct, share in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.8"/>')
        mean = sum(curve) / len(curve) if curve else 0.0
        parts.append(
            f'<text x="{LEFT + wide + 12}" y="{TOP + 14 + 34 * number}" fill="{color}">{escape(rule)}'
            f'<tspan x="{LEFT + wide + 12}" dy="15" fill="#374151">mean {mean:,.0f} s</tspan></text>'
        )
    return "\n".join([*parts, "</svg>", ""])


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#e5e7eb"/>'


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f} s"
