"""Apportionment in proportion to weights: the largest-remainder method, exact, with a limit per device."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction


def apportion(total: int, weights: Sequence[float], limits: Sequence[int | None] | None = None) -> list[int]:
    """Apportion a number of equal items.

    Each place gets the whole part of its quota `total · weight / sum`; the rest goes one each to the largest
    remainders, of equal ones to the first (Hamilton's method). A place whose count is above its limit gets the limit,
    and the rest is apportioned anew among the others.

    Args:
        total: number of items.
        weights: positive numbers.
        limits: most per place; None for none.

    Returns:
        Counts. Their sum is less than `total` only where every place is at its limit.
    """
    counts = [0] * len(weights)
    exact = [Fraction(weight) for weight in weights]
    open_ = list(range(len(weights)))
    left = total
    while open_ and left > 0:
        whole = sum((exact[at] for at in open_), Fraction(0))
        quotas = {at: left * exact[at] / whole for at in open_}
        parts = {at: int(quota) for at, quota in quotas.items()}
        rest = left - sum(parts.values())
        for at in sorted(open_, key=lambda at: (parts[at] - quotas[at], at))[:rest]:
            parts[at] += 1
        above = [at for at in open_ if limits is not None and (limit := limits[at]) is not None and parts[at] > limit]
        if not above:
            for at in open_:
                counts[at] = parts[at]
            break
        for at in above:
            assert limits is not None
            counts[at] = limits[at] or 0
            left -= counts[at]
        open_ = [at for at in open_ if at not in set(above)]
    return counts
