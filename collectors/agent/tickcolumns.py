"""Columns of a host's ticks, kept from tick to tick: only metrics that were read since are packed again."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Final

from ...schemas import columns
from ...schemas.metrics import METRICS

NAMES: Final = tuple(METRICS)
INDEX: Final = {name: at for at, name in enumerate(NAMES)}
_METRICS: Final = tuple(METRICS.values())
_CODES: Final = {"<f4": "f", "<i4": "i", "<i8": "q"}

Values = list[float | int | None]
"""The last value of each metric of one device, in the order of `NAMES`; None where null."""


class TickColumns:
    """Columns and nulls as a `Tick` holds them.

    Attributes:
        columns: metric name → packed values.
        nulls: metric name → a byte per device, 1 where null.
    """

    def __init__(self) -> None:
        self.columns: dict[str, bytes] = {}
        self.nulls: dict[str, bytes] = {}
        self._packers: list[struct.Struct] = []
        self._everything = True

    def relaid(self, devices: int) -> None:
        """Start over with another set of devices: every column is packed anew at the next update."""
        self.columns = {}
        self.nulls = {}
        self._packers = [struct.Struct(f"<{devices}{_CODES[metric.row.unit.dtype]}") for metric in _METRICS]
        self._everything = True

    def update(self, rows: Sequence[Values], fresh: Iterable[int]) -> None:
        """Pack the values that were read.

        Args:
            rows: the last values of each device.
            fresh: indices of the metrics that were read since the last update.
        """
        if self._everything:
            fresh = range(len(NAMES))
            self._everything = False
        for index in fresh:
            name = NAMES[index]
            values = [row[index] for row in rows]
            try:
                self.columns[name] = self._packers[index].pack(*values)
                self.nulls.pop(name, None)
            except struct.error:  # a null among them, or a whole number that came as a float
                self._with_nulls(index, name, values)

    def _with_nulls(self, index: int, name: str, values: Values) -> None:
        packed = columns.pack(_METRICS[index], values)
        if packed is None:
            self.columns.pop(name, None)
            self.nulls.pop(name, None)
            return
        self.columns[name] = packed[0]
        if packed[1] is None:
            self.nulls.pop(name, None)
        else:
            self.nulls[name] = packed[1]
