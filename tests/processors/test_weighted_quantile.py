"""`weighted_quantile` of values with counts is the quantile of each value written as often as it counts."""

from __future__ import annotations

import math
from fractions import Fraction

import duckdb
from corral.processors.storage.rollup_columns import WEIGHTED_QUANTILE
from hypothesis import given
from hypothesis import strategies as st

CONNECTION = duckdb.connect()
CONNECTION.execute(f"CREATE MACRO {WEIGHTED_QUANTILE}")
COUNTED = st.lists(st.tuples(st.sampled_from([-3.0, 0.0, 0.5, 1.0, 7.25]), st.integers(0, 4)), max_size=9)


@given(COUNTED, st.sampled_from(["0.0", "0.07", "0.25", "0.5", "0.95", "0.99", "1.0"]))
def test_it_is_that_of_all_values_written_out(counted: list[tuple[float, int]], share: str) -> None:
    values = sorted(value for value, count in counted for _ in range(count))
    # The smallest value that at least this share of all do not exceed.
    place = max(0, math.ceil(Fraction(share) * len(values)) - 1)
    entries = ", ".join(f"{{value: {value}, n: {count}}}" for value, count in counted)
    question = f"SELECT weighted_quantile([{entries}]::STRUCT(value FLOAT, n BIGINT)[], {share})"
    assert CONNECTION.execute(question).fetchall() == [(values[place] if values else None,)]
