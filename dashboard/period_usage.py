"""Usage within a period, as SQL: leases are cut at its ends; also as long a time before it. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from msgspec import Struct

from ..client.reports import usage_sql
from ..client.reports.periods import Slice
from ..client.reports.usage_sql import Filters
from .periods import Period
from .view_queries import Drawing

COUNTED: Final = (
    "Only what is within the period: leases are cut at its ends. GPU-hours are in whole boards, by share; idle is a "
    "minute below 5%, unknown one without samples. Before: as long a time before it."
)


class PeriodQuestion(Struct, frozen=True, kw_only=True):
    """Question that answers a view of usage for a period.

    Attributes:
        keys: columns that its rows are by.
        order: column by which its rows are sorted, the most first.
        drawing: its chart.
    """

    keys: tuple[str, ...]
    order: str
    drawing: Drawing

    def sql(self, period: Period, filters: Mapping[str, str]) -> str:
        """SQL of the usage in a period.

        Args:
            period: the period.
            filters: texts by the names in `periods.FILTERS`; empty ones don't count.
        """
        before = Slice(name="before", start=period.before.start, end=period.before.end)
        cuts = [before, Slice(name="period", start=period.start, end=period.end)]
        only = Filters(**{name: text for name, text in filters.items() if text})
        keys = ", ".join(self.keys)
        granted, earlier = (f"sum(gpus * (b - a)) FILTER (slice = {at})" for at in (1, 0))
        known, idle = (f"sum(gpus * {name}) FILTER (slice = 1)" for name in ("known_us", "idle_us"))
        leases = "count(DISTINCT lease_id) FILTER (slice = 1) AS leases, " if "lease_id" not in self.keys else ""
        return f"""{usage_sql.pieces(cuts, only)}
SELECT {keys}, {leases}{_hours(granted)} AS gpu_hours, {_hours(f"{known} - {idle}")} AS active_gpu_hours,
    {_hours(idle)} AS idle_gpu_hours, {_hours(f"{granted} - coalesce({known}, 0)")} AS unknown_gpu_hours,
    round(100 * {idle} / nullif({known}, 0), 1) AS idle_percent,
    round(sum(share * energy_mj) FILTER (slice = 1) / 3.6e9, 3) AS energy_kwh,
    {_hours(earlier)} AS gpu_hours_before,
    round(100 * (coalesce({granted}, 0) / nullif({earlier}, 0) - 1), 1) AS change_percent
FROM pieces GROUP BY {keys} ORDER BY {self.order} DESC, {keys}"""


def _hours(microseconds: str) -> str:
    return f"round(coalesce({microseconds}, 0) / 3.6e9, 3)"


def _bars(label: Sequence[str], *values: str) -> Drawing:
    return Drawing(kind="bar", label=tuple(label), values=values)


QUESTIONS: Final = {
    "usage_by_owner": PeriodQuestion(
        keys=("owner",), order="gpu_hours", drawing=_bars(("owner",), "gpu_hours", "gpu_hours_before")
    ),
    "group_usage": PeriodQuestion(
        keys=("group_name", "model"),
        order="gpu_hours",
        drawing=_bars(("group_name", "model"), "gpu_hours", "gpu_hours_before"),
    ),
    "lease_usage": PeriodQuestion(
        keys=("lease_id", "owner", "name"),
        order="gpu_hours",
        drawing=_bars(("owner", "name", "lease_id"), "active_gpu_hours", "idle_gpu_hours"),
    ),
    "idle_while_leased": PeriodQuestion(
        keys=("owner", "name", "lease_id", "host", "device"),
        order="idle_gpu_hours",
        drawing=_bars(("owner", "name", "device"), "idle_gpu_hours"),
    ),
}
"""Views that are answered within a period, by name; others show whole rows whose time is in it."""
