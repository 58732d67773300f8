"""Convert numbers of other libraries to Python's: a loop over a table yields scalars of NumPy and pandas."""

from __future__ import annotations

import numbers
from datetime import timedelta
from decimal import Decimal
from typing import Any


def number(value: Any) -> Any:
    """Convert a scalar of NumPy or pandas, or an array without axes, to `int`, `float` or `bool`.

    A duration becomes its seconds. Anything else is returned as it is. None of these libraries is imported here.
    """
    if type(value) in (bool, int, float, str, bytes):
        return value
    if isinstance(value, timedelta):  # also pandas' Timedelta
        return value.total_seconds()
    kind = getattr(getattr(value, "dtype", None), "kind", "")
    if kind == "m" and getattr(value, "shape", None) == ():  # NumPy's timedelta64, whose unit varies
        return value.astype("timedelta64[us]").item().total_seconds()
    if kind in ("b", "i", "u", "f") and getattr(value, "shape", None) == ():
        return value.item()
    if isinstance(value, numbers.Integral) and not isinstance(value, int):
        return int(value)
    if isinstance(value, numbers.Real | Decimal) and not isinstance(value, int | float):
        return float(value)
    return value


def encodable(value: Any) -> Any:
    """Convert a value that an encoder does not know to one that it does: a number, or an array to a list.

    Raises:
        TypeError: it can't be converted.
    """
    found = number(value)
    if found is value and hasattr(value, "tolist"):  # an array, or a column of a frame
        found = value.tolist()
    if found is value:
        raise TypeError(f"a {type(value).__qualname__} can't be sent")
    return found
