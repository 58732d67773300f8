"""Numbers of other libraries as Python's own: a loop over a table hands out NumPy's and pandas' scalars."""

from __future__ import annotations

import numbers
from datetime import timedelta
from decimal import Decimal
from typing import Any


def number(value: Any) -> Any:
    """A scalar of NumPy or pandas, or an array without axes, as an `int`, `float` or `bool`; a duration as its seconds.
    All else as it is.

    None of these libraries is imported here.
    """
    if type(value) in (bool, int, float, str, bytes):
        return value
    if isinstance(value, timedelta):  # pandas' own is one, too
        return value.total_seconds()
    kind = getattr(getattr(value, "dtype", None), "kind", "")
    if kind == "m" and getattr(value, "shape", None) == ():  # counted in a unit of its own
        return value.astype("timedelta64[us]").item().total_seconds()
    if kind in ("b", "i", "u", "f") and getattr(value, "shape", None) == ():
        return value.item()
    if isinstance(value, numbers.Integral) and not isinstance(value, int):
        return int(value)
    if isinstance(value, numbers.Real | Decimal) and not isinstance(value, int | float):
        return float(value)
    return value


def encodable(value: Any) -> Any:
    """What an encoder does not know, as something that it does.

    Raises:
        TypeError: there is no such thing.
    """
    found = number(value)
    if found is value and hasattr(value, "tolist"):  # an array, or a column of a frame
        found = value.tolist()
    if found is value:
        raise TypeError(f"a {type(value).__qualname__} can't be sent")
    return found
