"""SQL of the columns of rollups that an insert may leave out: see `rollup_omission.py`."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ...schemas.metrics import Metric
from .rollup_derived import MASK, REASONS

_ALL, *_BY_REASON = REASONS


def restored(metrics: Sequence[Metric], have: Collection[str] | None = None) -> dict[str, str]:
    """SQL of each column that may be left out, by its name, over a table's rows.

    Args:
        metrics: whose columns are read.
        have: columns that the table has; None for all.
    """
    found: dict[str, str] = {}

    def stored(name: str) -> str:
        return name if have is None or name in have else "NULL"

    for metric in metrics:
        name, sql = metric.name, metric.row.unit.sql
        last = stored(f"{name}_last")
        # The type is plain where the columns are there. Views are short, since each word of them takes time to bind.
        kind = "" if have is None else f"::{sql}"
        for aggregate in metric.row.rollup:
            column = f"{name}_{aggregate}"
            match aggregate:
                case "min" | "max" | "any":
                    found[column] = f"coalesce({stored(column)}, {last}){kind}"
                case "p95":
                    found[column] = f"coalesce({stored(column)}, {stored(f'{name}_max')}, {last}){kind}"
                case "mean":
                    count = stored(f"{name}_count")
                    found[f"{name}_sum"] = f"coalesce({stored(f'{name}_sum')}, {last}::DOUBLE * {count})"
                case "increase":
                    first = stored(f"{name}_first")
                    still = f"CASE WHEN {first} IS NULL AND {last} IS NOT NULL THEN 0 END"
                    # Readings of a broken counter may be so far apart that no column has room for the difference.
                    between = f"TRY_CAST({last}::HUGEINT - {first} AS {sql})"
                    found[f"{name}_first"] = f"coalesce({first}, {last})::{sql}"
                    found[f"{name}_inner"] = f"coalesce({stored(f'{name}_inner')}, {between}, {still})::{sql}"
                    found[column] = f"coalesce({stored(column)}, {still}){kind}"
                case _:
                    pass
        if name == MASK:
            none = f"CASE WHEN {stored(_ALL)} IS NOT NULL THEN 0::UINTEGER END"
            found |= {each: f"coalesce({stored(each)}, {none})" for each in _BY_REASON}
    return found
