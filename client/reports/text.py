"""A usage report as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import re
from typing import Any, Final

import msgspec

from . import tables
from .usage import Row, UsageReport

_ACTIVE_IN_MARKDOWN: Final = re.compile(r"([\\`*_{}\[\]<>|~])")


def markdown(report: UsageReport) -> str:
    """The report as Markdown with tables that GitHub and GitLab show."""
    lines = [f"# {escaped(tables.title(report))}", "", escaped(tables.subtitle(report)), ""]
    lines += [f"- {name}: {escaped(value)}" for name, value in tables.summary(report)]
    for section in tables.sections(report):
        lines += ["", f"## {section.title}", ""]
        if not section.rows:
            lines.append(section.nothing)
            continue
        lines.append(_line(section.columns))
        lines.append(_line(["---:" if at in section.numbers else "---" for at in range(len(section.columns))], True))
        lines += [_line(row) for row in section.rows]
        if section.total:
            lines.append(_line([f"**{escaped(cell)}**" if cell else "" for cell in section.total], True))
        if section.note:
            lines += ["", section.note]
    lines += ["", *tables.notes(report)]
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    return _ACTIVE_IN_MARKDOWN.sub(r"\\\1", " ".join(text.split()))


def _line(cells: list[str], ready: bool = False) -> str:
    return "| " + " | ".join(cells if ready else map(escaped, cells)) + " |"


def as_csv(report: UsageReport) -> str:
    """The rows with all their fields, without the total, as CSV (RFC 4180); unknown values are empty."""
    by = [one.value for one in report.scope.by]
    skipped = {"group", "owner", "model"} - set(by)
    names = [*by, *(name for name in Row.__struct_fields__ if name not in skipped and name not in by)]
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(names)
    for row in report.rows:
        writer.writerow([_plain(getattr(row, name)) for name in names])
    return out.getvalue()


def _plain(value: Any) -> Any:
    return "" if value is None else value


def as_json(report: UsageReport) -> bytes:
    """The whole report as JSON; decimals are numbers with all their digits."""
    scope = report.scope
    document = {
        "period": scope.period,
        "until": scope.until,
        "by": scope.by,
        "filters": scope.filters,
        "prices": report.prices,
        "total": report.total,
        "rows": report.rows,
        "bars": report.bars,
        "waste": report.waste,
        "unpriced": report.unpriced,
    }
    return msgspec.json.format(msgspec.json.Encoder(decimal_format="number").encode(document), indent=2) + b"\n"
