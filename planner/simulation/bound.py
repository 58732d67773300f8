"""Upper bound on what any policy could place of a known sequence of requests, as a linear program.

The bound uses the whole sequence in advance, so a policy that decides online may not reach it. It is a relaxation:
requests may be split, cores, RAM and devices are pooled over equal nodes, and device fillings over the fleet. These
constraints are kept:

- each device is filled by a pattern, a set of shares that fit it together (Gilmore and Gomory's configuration LP);
- models, and requests that cannot fit a kind of node at all;
- requests that fit must be placed. For one witness, a frequent share of more than half a device that may use any model,
  let τ be the time from which it no longer fits. Before τ all of these are placed, and all requests that are easier in
  every respect; after τ none that is as hard in every respect. At τ each device has less than that share free, or is on
  a node that lacks cores or RAM for it. The bound is the greatest over τ, interval by interval of the demand.

Needs `highspy` (the extra `simulate`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import highspy
import numpy as np
from msgspec import Struct

from ..fleet.state import WHOLE_MILLI
from .trace import Arrival, Node

PATTERNS_MOST: Final = 20_000
"""Limit on patterns, beyond which small sizes are left out: totals alone then limit these, which is a looser bound."""
SIZES_MOST: Final = 100
"""Limit on different sizes; the greatest are kept."""
INTERVALS_FROM: Final = 0.6
INTERVAL: Final = 0.04
"""Length of the intervals of the demand in which τ may be, in units of the fleet; the first is from 0 to
`INTERVALS_FROM`."""


class Bound(Struct, frozen=True):
    """Upper bound on the allocation of any policy.

    Attributes:
        percent: of all devices.
        fluid_percent: the same without the constraint that requests which fit must be placed.
        programs: number of linear programs that were solved.
    """

    percent: float
    fluid_percent: float
    programs: int


class _Kind(NamedTuple):
    cpus: int
    memory: int
    gpus: int
    share: int
    models: frozenset[str] | None

    @property
    def milli(self) -> int:
        return self.gpus * self.share

    def as_hard(self, other: _Kind) -> bool:
        """True if `other`, which may use any model, fits wherever this fits."""
        return self.gpus > 0 and self.share >= other.share and self.cpus >= other.cpus and self.memory >= other.memory

    def as_easy(self, other: _Kind) -> bool:
        """True if this fits wherever `other` fits."""
        return (
            self.gpus == 1
            and self.models is None
            and self.share <= other.share
            and self.cpus <= other.cpus
            and self.memory <= other.memory
        )


Terms = Iterable[tuple[int, float]]


class _Program:
    """A linear program: rows of terms ≤ limit, over variables ≥ 0."""

    def __init__(self, variables: int) -> None:
        self.variables = variables
        self._starts = [0]
        self._columns: list[int] = []
        self._values: list[float] = []
        self._limits: list[float] = []

    def add(self, terms: Terms, limit: float) -> None:
        for column, value in terms:
            self._columns.append(column)
            self._values.append(value)
        self._starts.append(len(self._columns))
        self._limits.append(limit)

    def maximum(self, gains: Sequence[float]) -> float | None:
        """Maximum of the sum of gains times variables; None if the program is infeasible."""
        lp = highspy.HighsLp()
        rows = len(self._limits)
        lp.num_col_, lp.num_row_ = self.variables, rows
        lp.sense_ = highspy.ObjSense.kMaximize
        lp.col_cost_ = np.array(gains, dtype=np.float64)
        lp.col_lower_ = np.zeros(self.variables)
        lp.col_upper_ = np.full(self.variables, highspy.kHighsInf)
        lp.row_lower_ = np.full(rows, -highspy.kHighsInf)
        lp.row_upper_ = np.array(self._limits, dtype=np.float64)
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.start_ = np.array(self._starts, dtype=np.int32)
        lp.a_matrix_.index_ = np.array(self._columns, dtype=np.int32)
        lp.a_matrix_.value_ = np.array(self._values, dtype=np.float64)
        # Its subclass `highspy.Highs` prints a banner to stdout when it is created, whatever its options.
        solver = highspy._core._Highs()  # pyright: ignore[reportPrivateUsage]
        solver.setOptionValue("output_flag", False)
        solver.setOptionValue("threads", 1)
        solver.passModel(lp)
        solver.run()
        status = solver.getModelStatus()
        if status == highspy.HighsModelStatus.kInfeasible:
            return None
        if status != highspy.HighsModelStatus.kOptimal:
            raise ArithmeticError(f"the linear program ended as {solver.modelStatusToString(status)}")
        return float(solver.getInfo().objective_function_value)


def patterns(sizes: Sequence[int], most: int) -> list[tuple[int, ...]] | None:
    """All maximal fillings of a device, as counts of each size (greatest first); None if there are more than `most`."""
    found: list[tuple[int, ...]] = []

    def fill(at: int, left: int, counts: tuple[int, ...]) -> bool:
        if at == len(sizes):
            if left < sizes[-1]:
                found.append(counts)
            return len(found) <= most
        return all(
            fill(at + 1, left - count * sizes[at], (*counts, count)) for count in range(left // sizes[at], -1, -1)
        )

    if not sizes:
        return []
    return found if fill(0, WHOLE_MILLI, ()) else None


class _Case:
    """A trace, prepared for the linear programs."""

    def __init__(self, nodes: Sequence[Node], arrivals: Sequence[Arrival]) -> None:
        self.devices = sum(node.gpus for node in nodes)
        models = frozenset(node.model for node in nodes if node.gpus)
        kinds: dict[_Kind, int] = {}
        self.sequence = [kinds.setdefault(_kind(arrival, models), len(kinds)) for arrival in arrivals]
        self.kinds = list(kinds)
        self.total = self.count(self.sequence)
        shapes = Counter((node.cpus_milli, node.memory_mib, node.gpus, node.model) for node in nodes)
        self.shapes = list(shapes.items())
        self.places = [
            (shape, kind)
            for shape, ((cpus, memory, gpus, model), _) in enumerate(self.shapes)
            for kind, want in enumerate(self.kinds)
            if want.cpus <= cpus
            and want.memory <= memory
            and want.gpus <= gpus
            and (not want.gpus or want.models is None or model in want.models)
        ]
        shares = {kind.share for kind in self.kinds if kind.gpus == 1 and kind.share < WHOLE_MILLI}
        self.sizes = sorted(shares, reverse=True)[:SIZES_MOST]
        found = patterns(self.sizes, PATTERNS_MOST)
        while found is None:
            self.sizes.pop()
            found = patterns(self.sizes, PATTERNS_MOST)
        self.patterns = found
        self.witness = self._witness()

    def count(self, sequence: Iterable[int]) -> list[int]:
        counts = Counter(sequence)
        return [counts[kind] for kind in range(len(self.kinds))]

    def _witness(self) -> int | None:
        """Choose the witness: the share whose gaps exceed most what smaller shares could fill; None if none do."""
        best: tuple[int, int] | None = None
        for at, kind in enumerate(self.kinds):
            if kind.gpus != 1 or kind.models is not None or not WHOLE_MILLI // 2 < kind.share < WHOLE_MILLI:
                continue
            gap = WHOLE_MILLI - kind.share
            filled = sum(
                count * other.share
                for other, count in zip(self.kinds, self.total, strict=True)
                if other.gpus == 1 and other.share <= gap
            )
            value = self.total[at] * gap - filled
            if value > 0 and (best is None or value > best[0]):
                best = value, at
        return None if best is None else best[1]

    def most(self, before: Sequence[int], after: Sequence[int], must: Mapping[int, int], falls: bool) -> float | None:
        """Maximum of milli that can be placed; None if the program is infeasible.

        Args:
            before: number of requests by kind that arrive before τ, at most.
            after: number of requests by kind that arrive after τ, at most.
            must: least number by kind that is placed before τ.
            falls: true if τ comes.
        """
        half = len(self.places)
        first, whole, starved = 2 * half, 2 * half + len(self.patterns), 2 * half + len(self.patterns) + 1
        program = _Program(starved + 1)
        of_kind: dict[int, list[int]] = {}
        of_shape: dict[int, list[int]] = {}
        for column, (shape, kind) in enumerate(self.places):
            of_kind.setdefault(kind, []).append(column)
            of_shape.setdefault(shape, []).append(column)
        wants = [self.kinds[kind] for _, kind in self.places]

        def both(columns: Iterable[int]) -> Iterator[tuple[int, int]]:
            for column in columns:
                yield column, column
                yield column, column + half

        for kind, columns in of_kind.items():
            program.add([(column, 1.0) for column in columns], before[kind])
            program.add([(column + half, 1.0) for column in columns], after[kind])
            program.add([(at, 1.0) for _, at in both(columns)], self.total[kind])
        for shape, columns in of_shape.items():
            (cpus, memory, gpus, _), count = self.shapes[shape]
            program.add([(at, float(wants[column].cpus)) for column, at in both(columns)], cpus * count)
            program.add([(at, float(wants[column].memory)) for column, at in both(columns)], memory * count)
            program.add([(at, wants[column].milli / WHOLE_MILLI) for column, at in both(columns)], gpus * count)
        for at_size, size in enumerate(self.sizes):
            users = [column for column, want in enumerate(wants) if want.gpus == 1 and want.share == size]
            supply = [
                (first + at, -float(counts[at_size])) for at, counts in enumerate(self.patterns) if counts[at_size]
            ]
            program.add([(at, 1.0) for _, at in both(users)] + supply, 0.0)
        users = [column for column, want in enumerate(wants) if want.share == WHOLE_MILLI]
        program.add([(at, float(wants[column].gpus)) for column, at in both(users)] + [(whole, -1.0)], 0.0)
        program.add([(at, 1.0) for at in range(first, whole + 1)], self.devices)
        for kind, least in must.items():
            program.add([(column, -1.0) for column in of_kind.get(kind, ())], -least)
        if falls and self.witness is not None:
            self._fall(program, wants, half, starved)
        gains = [float(want.milli) for want in wants] * 2 + [0.0] * (program.variables - 2 * half)
        return program.maximum(gains)

    def _fall(self, program: _Program, wants: Sequence[_Kind], half: int, starved: int) -> None:
        """Add the constraints from τ on.

        The variable `starved` counts devices with room for the witness on nodes that lack cores or RAM.
        """
        assert self.witness is not None
        witness = self.kinds[self.witness]
        gap = WHOLE_MILLI - witness.share
        # Each other device has more than the gap in use, to which each request on it contributes its part.
        used = [
            (column, -float(want.gpus) if want.share == WHOLE_MILLI else -min(1.0, want.share / (gap + 1)))
            for column, want in enumerate(wants)
            if want.gpus
        ]
        program.add([*used, (starved, -1.0)], -self.devices)
        hard = [column for column, want in enumerate(wants) if want.as_hard(witness)]
        program.add([(column + half, 1.0) for column in hard], 0.0)
        # A starved device ends with the witness's share unused, except by requests that need less cores or less RAM.
        slight = sum(
            count * kind.milli
            for kind, count in zip(self.kinds, self.total, strict=True)
            if kind.gpus and (kind.cpus < witness.cpus or kind.memory < witness.memory)
        )
        placed = [
            (at, float(want.milli)) for column, want in enumerate(wants) if want.gpus for at in (column, column + half)
        ]
        program.add([*placed, (starved, float(witness.share))], WHOLE_MILLI * self.devices + slight)


def _kind(arrival: Arrival, models: frozenset[str]) -> _Kind:
    allowed = frozenset(arrival.models) & models
    any_model = not arrival.gpus or not arrival.models or allowed == models
    return _Kind(
        arrival.cpus_milli, arrival.memory_mib, arrival.gpus, arrival.share_milli, None if any_model else allowed
    )


def upper_bound(nodes: Sequence[Node], arrivals: Sequence[Arrival], interval: float = INTERVAL) -> Bound:
    """Compute the bound for policies that never decline a request which fits.

    Args:
        nodes: all hosts.
        arrivals: all requests, in their order.
        interval: length of the intervals of the demand in which τ may be, in units of the fleet; shorter ones take
            longer and give a tighter bound.

    Raises:
        ArithmeticError: a program could not be solved.
    """
    case = _Case(nodes, arrivals)
    if not case.devices:
        return Bound(0.0, 0.0, 0)
    capacity = WHOLE_MILLI * case.devices
    none = [0] * len(case.kinds)
    programs = 1
    fluid = 100 * (case.most(case.total, none, {}, False) or 0.0) / capacity
    if case.witness is None:
        return Bound(fluid, fluid, programs)
    witness = case.kinds[case.witness]
    found: list[float] = []
    never = case.most(case.total, none, {case.witness: case.total[case.witness]}, False)
    programs += 1
    if never is not None:
        found.append(100 * never / capacity)
    demand: list[float] = []
    asked = 0
    for kind in case.sequence:
        asked += case.kinds[kind].milli
        demand.append(asked / capacity)
    start, end = 0.0, INTERVALS_FROM
    easy = [at for at, kind in enumerate(case.kinds) if kind.as_easy(witness)]
    while start < demand[-1] and (not found or max(found) < fluid):
        early = case.count(case.sequence[: bisect_left(demand, start)] if start else ())
        late = case.count(case.sequence[: bisect_left(demand, end) + 1])
        after = [total - count for total, count in zip(case.total, early, strict=True)]
        value = case.most(late, after, {kind: early[kind] for kind in easy}, True)
        programs += 1
        if value is not None:
            found.append(100 * value / capacity)
        start, end = end, end + interval
    return Bound(min(fluid, max(found, default=fluid)), fluid, programs)
