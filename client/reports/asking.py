"""Asks the history for what a report needs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from msgspec.structs import replace

from ...schemas.query import ResultFormat
from ..client import Client
from . import usage_sql
from .periods import Period, slices
from .prices import Prices
from .usage import WASTE, Answers, Scope, UsageReport, usage_report
from .usage_sql import By, Filters


def scope_of(period: Period, by: Sequence[By], filters: Filters, now: datetime) -> Scope:
    """Scope of a report: of a period that is not over yet the part until now.

    Raises:
        ValueError: the period has not begun.
    """
    if period.start >= now:
        raise ValueError(f"the period {period.name} has not begun")
    until = now.replace(microsecond=0) if period.end > now else None
    whole = replace(period, end=until or period.end)
    return Scope(period=whole, until=until, by=list(by), filters=filters, slices=slices(whole))


def queries(scope: Scope) -> dict[str, str]:
    """SQL of the queries that a report needs, by the fields of `Answers`."""
    start, end, by, filters = scope.period.start, scope.period.end, scope.by, scope.filters
    return {
        "usage": usage_sql.usage(scope.slices, filters),
        "leases": usage_sql.leases(start, end, by, filters),
        "requests": usage_sql.requests(start, end, by, filters),
        "preemptions": usage_sql.preemptions(start, end, by, filters),
        "waste": usage_sql.waste(scope.slices, filters, WASTE),
    }


async def ask_usage(client: Client, scope: Scope, prices: Prices | None, timeout: float) -> UsageReport:
    """Ask the history over the bus for a usage report.

    Args:
        client: a connected client.
        scope: what the report is about.
        prices: price list; None for a report without costs.
        timeout: seconds for each of its queries.

    Raises:
        CorralError: the history does not answer, or a query failed.
    """
    # JSON has all digits of whole numbers, with and without pyarrow.
    found = {
        name: (await client.query(sql, timeout=timeout, format=ResultFormat.JSON)).dicts()
        for name, sql in queries(scope).items()
    }
    return usage_report(scope, prices, Answers(**found))
