"""Scheduled reports: the event that one was written, with its files as far as a message holds them."""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta, Struct

from ..requests import Time

MAX_FILES_BYTES: Final = 384 * 1024
"""Limit on the contents of all files of an event: with the growth by base64 it fits a message of 1 MiB, also where a
part of the bus keeps it beside other things."""


class ReportFile(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """File of a report.

    Attributes:
        name: name of the file, such as `fleet-2026-10.pdf`.
        size_bytes: its size.
        data: its content; null if it is too large for a message.
    """

    name: str
    size_bytes: int
    data: bytes | None = None


class ReportWritten(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="report_written", tag_field="type"):
    """A scheduled report was written.

    Attributes:
        report_id: id of the report; the same if the event comes again.
        name: name of the report in its schedule.
        period: name of its period, such as `2026-10`.
        start: begin of the period.
        end: end of the period.
        written_at: when it was written.
        zone: time zone whose midnight ends the period.
        title: of the report, in words.
        facts: names and values of its summary.
        owner: owner whom it is about; null for all.
        group: group that it is about; null for all.
        url: where its files are on the web; empty if that is not known.
        files: its files.
    """

    report_id: str
    name: str
    period: str
    start: Time
    end: Time
    written_at: Time
    zone: str = "UTC"
    title: str = ""
    facts: Annotated[list[tuple[str, str]], Meta(max_length=64)] = []
    owner: str | None = None
    group: str | None = None
    url: str = ""
    files: Annotated[list[ReportFile], Meta(max_length=16)] = []
