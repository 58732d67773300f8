"""Prices of GPU-hours and energy, from a TOML file. Money is decimal."""

from __future__ import annotations

import tomllib
from decimal import ROUND_HALF_UP, Decimal
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from ...schemas.values import globs


class Prices(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Prices of a GPU-hour by model.

    Attributes:
        currency: as it is printed, such as `EUR`.
        decimals: digits after the point to which amounts are rounded.
        gpu_hour: price of an hour of a whole board, by a pattern of its model; of several that match the first counts.
        energy_kwh: price of a kWh, in addition; None if energy is not charged.
    """

    currency: Annotated[str, Meta(min_length=1, max_length=16)]
    gpu_hour: dict[str, Decimal]
    decimals: Annotated[int, Meta(ge=0, le=6)] = 2
    energy_kwh: Decimal | None = None

    def price(self, model: str) -> Decimal | None:
        """Price of a GPU-hour of a model; None if no pattern matches it."""
        return next((price for glob, price in self.gpu_hour.items() if globs.matches(model, glob)), None)

    def rounded(self, amount: Decimal) -> Decimal:
        """Round an amount of money; halves away from zero, as invoices do."""
        return amount.quantize(Decimal(1).scaleb(-self.decimals), ROUND_HALF_UP)


def parse_prices(text: str) -> Prices:
    """Read prices from TOML.

    Raises:
        ValueError: it is no TOML, a field is missing, unknown or of another type, or a price is negative.
    """
    try:
        prices = msgspec.convert(tomllib.loads(text, parse_float=Decimal), Prices)
        globs.check(list(prices.gpu_hour), "gpu_hour")
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, globs.DecodeError) as error:
        raise ValueError(str(error)) from None
    for name, price in (*prices.gpu_hour.items(), ("energy_kwh", prices.energy_kwh or Decimal(0))):
        if not (price.is_finite() and 0 <= price < 10**9):
            raise ValueError(f"the price {price} of {name!r} has to be a number from 0 to 1e9")
    return prices
