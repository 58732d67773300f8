"""Row of controls that choose a period: the usual ones, since a day, and a calendar month."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..html import Segments, initial_text, on_choice, tag

_LONGEST = 32


class PeriodBar:
    """Controls for the period of a page.

    Args:
        choices: names and labels of the usual periods.
        chosen: name of the period that is chosen at first, as `periods.period_of` reads it.
        then: called with the name of another period.
    """

    def __init__(self, choices: Sequence[tuple[str, str]], chosen: str, then: Callable[[str], Any]) -> None:
        self._then = then
        with tag("div", "bar"):
            self._segments = Segments(choices, chosen, self._choose, "Period")
            with tag("label", "named"):
                tag("span", text="since")
                since = tag("input", "field", type="date", aria_label="Since", title="Since this day",
                            **initial_text(chosen.removeprefix("since-")))  # fmt: skip
            with tag("label", "named"):
                tag("span", text="month")
                month = tag("input", "field", type="month", aria_label="Month", title="A calendar month",
                            **initial_text(chosen))  # fmt: skip
        on_choice(since, lambda day: self._choose(f"since-{day}" if day else ""))
        on_choice(month, self._choose)

    def _choose(self, name: str) -> Any:
        name = name[:_LONGEST]
        self._segments.show(name)
        return self._then(name)
