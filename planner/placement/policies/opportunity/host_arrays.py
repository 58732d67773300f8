"""Free capacity of host classes as arrays, so that a decision takes a few passes over them for any kind of request.

A heap of classes for each kind of request needs a score for each kind and each new class; with hundreds of kinds that
is most of the work. Here a class is entered once, and a request scores all classes at a time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ....fleet.fleet import Fleet
from ....fleet.state import HostState

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

ROWS_FIRST: Final = 256


class Table:
    """Table of numbers, with the host state that each row belongs to. Rows are added and discarded.

    Args:
        width: numbers in a row.

    Attributes:
        values: width × capacity; only `[:, :count]` are in use. A free row has -1 in column 0.
        owners: the state of each row; None for a free row.
        count: number of rows in use or free.
    """

    __slots__ = ("_free", "count", "owners", "values")

    def __init__(self, width: int) -> None:
        self.values: Floats = np.full((width, ROWS_FIRST), -1.0)
        self.owners: list[HostState | None] = []
        self.count = 0
        self._free: list[int] = []

    def add(self, owner: HostState, row: tuple[float, ...]) -> int:
        """Add a row, and return its index."""
        if self._free:
            at = self._free.pop()
            self.owners[at] = owner
        else:
            at = self.count
            self.count += 1
            if at == self.values.shape[1]:
                grown = np.full((self.values.shape[0], 2 * at), -1.0)
                grown[:, :at] = self.values
                self.values = grown
            self.owners.append(owner)
        self.values[:, at] = row
        return at

    def discard(self, at: int) -> None:
        """Free a row."""
        self.values[0, at] = -1.0
        self.owners[at] = None
        self._free.append(at)


Rows = tuple[list[tuple[float, ...]], list[tuple[float, ...]]]
"""Rows of one state: of its devices, and of the host."""


class HostTable:
    """Tables that follow a fleet's classes. Some rows may be of classes that have no hosts any more.

    Args:
        widths: of a row of devices, and of a row of hosts.

    Attributes:
        devices: a row for each different device of each class.
        hosts: a row for each model on each class.
    """

    __slots__ = ("_cursor", "_entered", "devices", "hosts")

    def __init__(self, widths: tuple[int, int]) -> None:
        self._cursor = -1
        self._entered: OrderedDict[HostState, tuple[list[int], list[int]]] = OrderedDict()
        self.devices = Table(widths[0])
        self.hosts = Table(widths[1])

    def follow(self, fleet: Fleet, rows: Callable[[HostState], Rows]) -> None:
        """Add the classes that are new since the last call. Empty ones stay until `leave`, or until swept here.

        Args:
            fleet: the fleet.
            rows: computes the rows of a state. It is not stored: its object has these tables, so that would be a cycle.
        """
        index = fleet.index
        classes: dict[HostState, Any] = index.classes
        entered = self._entered
        if self._cursor < index.base:
            new = [state for state in classes if state not in entered]
        else:
            new = [group.state for group in index.log[self._cursor - index.base :] if group.members]
        self._cursor = index.end
        for state in new:
            if state not in entered:
                self._enter(state, *rows(state))
                # For each new class one old one is checked, so that entries stay below about twice the classes.
                oldest = next(iter(entered))
                if oldest in classes:
                    entered.move_to_end(oldest)
                else:
                    self.leave(oldest)

    def _enter(self, state: HostState, devices: list[tuple[float, ...]], hosts: list[tuple[float, ...]]) -> None:
        self._entered[state] = (
            [self.devices.add(state, row) for row in devices],
            [self.hosts.add(state, row) for row in hosts],
        )

    def leave(self, state: HostState) -> None:
        """Remove a class that has no hosts any more."""
        devices, hosts = self._entered.pop(state)
        for at in devices:
            self.devices.discard(at)
        for at in hosts:
            self.hosts.discard(at)
