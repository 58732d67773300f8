"""Option `--prices`: a price list in a file."""

from __future__ import annotations

from pathlib import Path

from ..client.reports.prices import Prices, parse_prices
from .exits import USAGE, CommandError


def read_prices(file: Path) -> Prices:
    """Read a price list.

    Raises:
        CommandError: the file can't be read, or is no price list.
    """
    try:
        return parse_prices(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CommandError(f"--prices {file}: {error}", USAGE) from None
