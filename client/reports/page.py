"""A usage report as one HTML page without anything from elsewhere, and without scripts."""

from __future__ import annotations

from html import escape
from typing import Final

from . import charts, tables
from .usage import UsageReport

_STYLE: Final = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d9dee3; --paper: #fff; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9aa4af; --line: #30363d; --paper: #0d1117; --card: #161b22; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 88rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { margin: 0; font-size: 1.6rem; } h2 { margin: 2rem 0 .5rem; font-size: 1.15rem; }
p, figcaption { color: var(--soft); } p.when { margin: .2rem 0 1.2rem; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .6rem; margin: 0; }
dl div { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .8rem; }
dt { color: var(--soft); font-size: .85rem; } dd { margin: 0; font-size: 1.1rem; font-variant-numeric: tabular-nums; }
figure { margin: 0; background: #fff; border: 1px solid var(--line); border-radius: .5rem; padding: .6rem; }
figure svg { width: 100%; height: auto; display: block; }
svg text { font-family: Helvetica, Arial, "Liberation Sans", sans-serif !important; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .84rem; }
th, td { padding: .3rem .35rem; border-bottom: 1px solid var(--line); text-align: left; overflow-wrap: anywhere;
  min-width: 6.2rem; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; overflow-wrap: normal; }
tfoot td { font-weight: 700; border-top: 2px solid var(--line); }
.n { text-align: right; font-variant-numeric: tabular-nums; min-width: 0; } td.n { white-space: nowrap; }
@media print { body { max-width: none; margin: 0; } }
@media screen and (prefers-color-scheme: dark) {
  figure { background: var(--card); } figure svg { filter: invert(.93) hue-rotate(180deg); }
}
"""


def html(report: UsageReport) -> str:
    """The report as a page."""
    title = escape(tables.title(report))
    cards = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in tables.summary(report)
    )
    parts = [
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head><body>',
        f'<h1>{title}</h1><p class="when">{escape(tables.subtitle(report))}</p><dl>{cards}</dl>',
        *(_charts(report) if report.total.leases else ()),
        *map(_table, tables.sections(report)),
        *(f"<p>{escape(note)}</p>" for note in tables.notes(report)),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _charts(report: UsageReport) -> list[str]:
    return [
        "<h2>GPU-hours over time</h2>",
        f"<figure>{charts.svg(charts.over_time(report), 'GPU-hours over time', 'over-time')}</figure>",
        f"<h2>GPU-hours by {escape(', '.join(report.scope.by))}</h2>",
        f"<figure>{charts.svg(charts.by_row(report), 'GPU-hours by row', 'by-row')}</figure>",
    ]


def _table(section: tables.Section) -> str:
    if not section.rows:
        return f"<h2>{escape(section.title)}</h2><p>{escape(section.nothing)}</p>"
    head = "".join(f"<th{_aligned(section, at)}>{escape(name)}</th>" for at, name in enumerate(section.columns))
    rows = "\n".join(_row(section, row) for row in section.rows)
    foot = f"<tfoot>{_row(section, section.total)}</tfoot>" if section.total else ""
    note = f"<p>{escape(section.note)}</p>" if section.note else ""
    return (
        f"<h2>{escape(section.title)}</h2><div class=wide><table><thead><tr>{head}</tr></thead>\n"
        f"<tbody>{rows}</tbody>{foot}</table></div>{note}"
    )


def _row(section: tables.Section, cells: list[str]) -> str:
    return (
        "<tr>" + "".join(f"<td{_aligned(section, at)}>{escape(cell)}</td>" for at, cell in enumerate(cells)) + "</tr>"
    )


def _aligned(section: tables.Section, at: int) -> str:
    return " class=n" if at in section.numbers else ""
