"""Columns of rollups that follow from others: an insert leaves them out, and those who read the tables compute them.

Most metrics stand still in most buckets. DuckDB spends as much on a value that says
nothing as on any other, so a column is left out of an insert if it follows in all of the rows:

- `…_min`, `…_max` and `…_any` are the last value, `…_p95` is the greatest, and `…_sum` is the last value as often as
  there are values;
- a counter without `…_first` stands still, and `…_inner` is otherwise the difference of its last and first reading;
- of throttled samples those by reason are 0.

In rows of older versions, and of a lake, every column has its value. A column that no row needed yet is not even in the
table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...schemas.metrics import Metric
from .bucketing import ArrowArray, data_of
from .protocol import ArrowTable
from .rollup_derived import MASK, REASONS

_ALL, *_BY_REASON = REASONS


def following(rows: ArrowTable, metrics: Sequence[Metric]) -> set[str]:
    """Columns whose values follow from others in all rows.

    Args:
        rows: of a rollup, with all columns of these metrics.
        metrics: whose columns they are.
    """
    found: set[str] = set()
    for metric in metrics:
        found.update(_following(rows, metric))
    return found


def _following(rows: ArrowTable, metric: Metric) -> list[str]:
    name, rollup = metric.name, metric.row.rollup
    last = rows[f"{name}_last"]
    found = [
        column
        for column in (f"{name}_{aggregate}" for aggregate in ("min", "max", "any") if aggregate in rollup)
        if rows[column].equals(last)
    ]
    if "p95" in rollup and rows[f"{name}_p95"].equals(rows[f"{name}_max"]):
        found.append(f"{name}_p95")
    # Other values than the last one do not add up to as much, or hardly ever.
    if "mean" in rollup and {f"{name}_min", f"{name}_max"}.issubset(found):
        expected = _filled(last).astype(np.float64) * _filled(rows[f"{name}_count"])
        if np.array_equal(_filled(rows[f"{name}_sum"]), expected):
            found.append(f"{name}_sum")
    if "increase" in rollup:
        found += _following_growth(rows, name)
    if name == MASK:
        found += [each for each in _BY_REASON if not _filled(rows[each]).any()]
    return found


def _following_growth(rows: ArrowTable, name: str) -> list[str]:
    first, inner, increase = (f"{name}_{part}" for part in ("first", "inner", "increase"))
    last = rows[f"{name}_last"]
    there = ~_nulls(last)
    grown = _filled(rows[inner])[there]
    if rows[first].equals(last) and not grown.any() and rows[increase].null_count == last.null_count:
        return [first, inner] + ([] if _filled(rows[increase]).any() else [increase])
    between = _filled(last)[there] - _filled(rows[first])[there]
    # A difference below 0 marks a counter that fell, or one for which the column has no room.
    return [inner] if np.array_equal(grown, between) and not (grown < 0).any() else []


def _nulls(column: ArrowArray) -> NDArray[np.bool_]:
    if not column.null_count:
        return np.zeros(len(column), dtype=np.bool_)
    return column.is_null().to_numpy()


def _filled(column: ArrowArray) -> NDArray[Any]:
    """Values of a column, 0 where it is null."""
    data = data_of(column)
    return np.where(_nulls(column), 0, data) if column.null_count else data
