"""A usage report as PDF, in A4 landscape. The same report gives the same bytes."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Final
from xml.sax.saxutils import escape

from reportlab.lib.colors import HexColor
from reportlab.lib.pagesizes import A4, landscape
from reportlab.lib.styles import ParagraphStyle, getSampleStyleSheet
from reportlab.lib.units import mm
from reportlab.pdfbase.pdfmetrics import stringWidth
from reportlab.pdfgen.canvas import Canvas
from reportlab.platypus import CondPageBreak, Flowable, LongTable, Paragraph, SimpleDocTemplate, Spacer, TableStyle

from . import charts, tables
from .usage import UsageReport

_LINE: Final = HexColor("#d9dee3")
_SOFT: Final = HexColor("#59636e")
_SIZE: Final = 7.5
_MARGIN: Final = 15 * mm
_STYLES: Final = getSampleStyleSheet()
_CELL: Final = ParagraphStyle("cell", parent=_STYLES["Normal"], fontSize=_SIZE, leading=_SIZE + 2, splitLongWords=True)
_NUMBER: Final = ParagraphStyle("number", parent=_CELL, alignment=2)
_NOTE: Final = ParagraphStyle("note", parent=_STYLES["Normal"], fontSize=8, textColor=_SOFT, spaceBefore=4)
_HEADING: Final = ParagraphStyle("heading", parent=_STYLES["Heading2"], keepWithNext=1)
_ENCODING: Final = "cp1252"
"""Characters of the fonts that every reader has; others are replaced by question marks."""


def pdf(report: UsageReport) -> bytes:
    """The report as PDF."""
    out = io.BytesIO()
    document = SimpleDocTemplate(
        out,
        pagesize=landscape(A4),
        leftMargin=_MARGIN,
        rightMargin=_MARGIN,
        topMargin=_MARGIN,
        bottomMargin=_MARGIN,
        title=_known(tables.title(report)),
        invariant=1,
    )
    document.build(list(_story(report)), onFirstPage=_numbered, onLaterPages=_numbered)
    return out.getvalue()


def _story(report: UsageReport) -> Iterator[Flowable]:
    yield Paragraph(_text(tables.title(report)), _STYLES["Title"])
    yield Paragraph(_text(tables.subtitle(report)), _NOTE)
    yield Spacer(0, 8)
    yield _grid(
        [[Paragraph(_text(cell), _CELL) for cell in pair] for pair in tables.summary(report)], [120, 220], False
    )
    if report.total.leases:
        yield Paragraph("GPU-hours over time", _HEADING)
        yield charts.over_time(report)
        yield Paragraph(_text(f"GPU-hours by {', '.join(report.scope.by)}"), _HEADING)
        yield charts.by_row(report)
    for section in tables.sections(report):
        yield CondPageBreak(30 * mm)
        yield Paragraph(_text(section.title), _STYLES["Heading2"])
        yield _table(section) if section.rows else Paragraph(_text(section.nothing), _NOTE)
        if section.rows and section.note:
            yield Paragraph(_text(section.note), _NOTE)
    for note in tables.notes(report):
        yield Paragraph(_text(note), _NOTE)


def _table(section: tables.Section) -> LongTable:
    rows = [section.columns, *section.rows, *([section.total] if section.total else [])]
    bold = {0, len(rows) - 1 if section.total else 0}
    cells = [
        [
            Paragraph(
                f"<b>{_text(cell)}</b>" if at in bold else _text(cell), _NUMBER if number in section.numbers else _CELL
            )
            for number, cell in enumerate(row)
        ]
        for at, row in enumerate(rows)
    ]
    return _grid(cells, _widths(rows), True)


def _widths(rows: list[list[str]]) -> list[float]:
    """Widths of columns by their longest texts; if these don't fit, lines break, between words where possible."""
    columns = list(zip(*rows, strict=True))
    wanted = [max(map(_width, column)) for column in columns]
    least = [max(_width(word) for cell in column for word in cell.split() or [""]) for column in columns]
    room = landscape(A4)[0] - 2 * _MARGIN
    if sum(wanted) <= room:
        return wanted
    if sum(least) >= room:
        return [width * room / sum(least) for width in least]
    part = (room - sum(least)) / (sum(wanted) - sum(least))
    return [low + part * (width - low) for low, width in zip(least, wanted, strict=True)]


def _width(text: str) -> float:
    """Width of a text in bold, up to forty characters, with the padding of its cell."""
    return stringWidth(_known(text[:40]), "Helvetica-Bold", _SIZE) + 13


def _grid(cells: list[list[Paragraph]], widths: list[float], headed: bool) -> LongTable:
    style = TableStyle(
        [("LINEBELOW", (0, 0), (-1, -1), 0.4, _LINE), ("VALIGN", (0, 0), (-1, -1), "TOP"),
         ("TOPPADDING", (0, 0), (-1, -1), 2), ("BOTTOMPADDING", (0, 0), (-1, -1), 2)]
    )  # fmt: skip
    return LongTable(cells, colWidths=widths, repeatRows=int(headed), hAlign="LEFT", style=style)


def _numbered(canvas: Canvas, document: SimpleDocTemplate) -> None:
    canvas.setFont("Helvetica", 8)
    canvas.setFillColor(_SOFT)
    canvas.drawRightString(landscape(A4)[0] - _MARGIN, 8 * mm, f"{document.page}")


def _known(text: str) -> str:
    return text.encode(_ENCODING, "replace").decode(_ENCODING)


def _text(text: str) -> str:
    return escape(_known(text))
