"""States of a job's tasks in a byte each, kept up to date by the events of the job. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Final

from ..schemas.work.jobs import Job, JobEvent, JobState, JobTask, parse_array

STATES: Final = tuple(JobState)
"""States in the order of their codes."""
_CODES: Final = {state: code for code, state in enumerate(STATES)}
_PENDING: Final = _CODES[JobState.PENDING]


class TaskStates:
    """State of each task of a job.

    Args:
        array: indexes of the tasks, as submitted; empty for a job of one task.

    Attributes:
        indexes: of the tasks, ascending.
        codes: code of the state of each task in `STATES`, in the same order.
        version: of the last event that was applied; 0 before the first.
    """

    def __init__(self, array: str) -> None:
        found = parse_array(array).indexes if array else (0,)
        run = range(found[0], found[-1] + 1, max(1, found[1] - found[0]) if len(found) > 1 else 1)
        # An array is mostly a range, which takes no memory for each index.
        self.indexes: Sequence[int] = run if len(run) == len(found) and tuple(run) == found else found
        self.codes = bytearray([_PENDING]) * len(found)
        self.version = 0

    def position(self, index: int) -> int | None:
        """Place of a task among all; None if the job has no such task."""
        at = bisect_left(self.indexes, index)
        return at if at < len(self.indexes) and self.indexes[at] == index else None

    def set_all(self, tasks: Iterable[JobTask]) -> None:
        """Take a listing of all tasks but those that are pending."""
        self.codes = bytearray([_PENDING]) * len(self.indexes)
        self._set(tasks)

    def apply(self, event: JobEvent) -> bool:
        """Take an event of the job. Returns false if there may have been others between it and the last one."""
        follows = self.version in (0, event.version - 1) or event.version <= self.version
        self.version = max(self.version, event.version)
        self._set(event.tasks)
        return follows

    def _set(self, tasks: Iterable[JobTask]) -> None:
        for task in tasks:
            at = self.position(task.index)
            if at is not None:
                self.codes[at] = _CODES[task.state]

    def agrees(self, job: Job) -> bool:
        """True if the job counts as many tasks in each state as there are here."""
        counted = {state.value: self.codes.count(code) for code, state in enumerate(STATES)}
        return all(counted[state] == job.counts.get(state, 0) for state in counted)
