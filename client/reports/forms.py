"""Forms of a usage report: Markdown, CSV, JSON, HTML and PDF, as bytes."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

from .text import as_csv, as_json, markdown
from .usage import UsageReport


class Form(StrEnum):
    """Form of a report; the value is the ending of its file's name."""

    MARKDOWN = "md"
    CSV = "csv"
    JSON = "json"
    HTML = "html"
    PDF = "pdf"


def renderer(form: Form) -> Callable[[UsageReport], bytes]:
    """Return the function that makes a form of a report.

    Raises:
        ModuleNotFoundError: HTML and PDF need the extra `report`.
    """
    if form is Form.HTML:
        from .page import html

        return lambda report: html(report).encode()
    if form is Form.PDF:
        from .pdf import pdf

        return pdf
    if form is Form.JSON:
        return as_json
    text = markdown if form is Form.MARKDOWN else as_csv
    return lambda report: text(report).encode()
