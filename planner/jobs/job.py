"""A job with its tasks: how many are in which state, and which wait for devices next.

Tasks that were never started have no object of their own: all of them are in one state, `rest`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from typing import Final

from ...schemas.work.jobs import FINAL, Attempt, JobState
from .checks import array_of
from .records import VERSIONS, StoredJob, StoredState
from .task import Task, time_of

MOST_IN_LINE: Final = 64
"""Tasks of a job that wait in the queue at a time."""
_FIRST: Final = tuple(JobState)


class Job:
    """A job.

    Attributes:
        stored: as submitted.
        indexes: of its tasks, ascending.
        most_running: limit on the tasks that have a lease; 0 for none.
        tasks: those that were started, have ended, or are held alone, by index.
        rest: state of the others.
        rest_message: why they are in that state.
        rest_ended_at: when they reached it; None if they wait.
        counts: number of tasks by state.
        held: nothing is started.
        held_tasks: indexes of tasks that are held alone.
        waits_for: ids of jobs that must end first.
        eligible: true if there are none (any more).
        in_line: indexes of tasks in the queue.
        live: indexes of tasks with an attempt that has not ended.
        unfinished: indexes of tasks that have ended without being done, and had said how far they were.
        settling: tasks whose last attempt has ended, while that is made durable and their leases are released; each
            with the id of the lease.
        version: of the last event.
        versions: versions below are reserved.
        ended_at: when the last task ended; None before.
        size: bytes of the job as stored.
        says_progress: true if one of its tasks has said how far it is.
        announced: true if an event of this term has said all of it.
        message: why the last task that ended without success did so; empty if none has.
    """

    def __init__(self, stored: StoredJob, size: int, state: StoredState | None = None) -> None:
        state = state or StoredState(held=stored.spec.held)
        array = array_of(stored.spec)
        self.stored = stored
        self.size = size
        self.indexes = array.indexes
        self.most_running = array.most_running
        self.tasks: dict[int, Task] = {}
        self.rest = state.rest
        self.rest_message = state.rest_message
        self.rest_ended_at: datetime | None = time_of(state.rest_ended_at) if state.rest_ended_at else None
        self.held = state.held
        self.held_tasks = set(state.held_tasks)
        self.eligible = state.eligible or not stored.spec.after
        self.waits_for = set[str]()
        self.counts = Counter({self.rest: len(self.indexes)})
        self.in_line = set[int]()
        self.live = set[int]()
        self.unfinished = set[int]()
        self.settling: dict[int, str] = {}
        self.version = 0
        self.versions = state.versions
        self.ended_at: datetime | None = time_of(state.ended_at) if state.ended_at else None
        self.says_progress = False
        self.message = ""
        self.announced = False
        self._again: dict[int, None] = {}
        """Indexes of tasks with an object that wait, in the order in which they are to enter the queue."""
        self._fresh = 0
        """Position in `indexes` before which no task is left that was never in the queue."""
        for index in self.held_tasks:
            self.task(index)

    @property
    def job_id(self) -> str:
        """Id of the job."""
        return self.stored.job_id

    @property
    def owner(self) -> str:
        """Owner of the job."""
        return self.stored.spec.request.owner

    @property
    def state(self) -> JobState:
        """State of all tasks together: the first in the order of `JobState` that one of them has."""
        return next(state for state in _FIRST if self.counts[state])

    @property
    def is_final(self) -> bool:
        """True if all its tasks have ended."""
        return self.state in FINAL

    def to_store(self) -> StoredState:
        """Record of the job as a whole, for the bucket."""
        return StoredState(
            versions=self.versions,
            held=self.held,
            held_tasks=sorted(self.held_tasks),
            rest=self.rest,
            rest_message=self.rest_message,
            rest_ended_at=self.rest_ended_at.timestamp() if self.rest_ended_at else 0.0,
            eligible=self.eligible,
            ended_at=self.ended_at.timestamp() if self.ended_at else 0.0,
        )

    def correct_end(self) -> None:
        """Correct the time of the end by the tasks: either may have been stored without the other."""
        if not self.is_final:
            self.ended_at = None
        elif self.ended_at is None:
            ends = [task.ended_at for task in self.tasks.values() if task.ended_at is not None]
            self.ended_at = max([*ends, *([self.rest_ended_at] if self.rest_ended_at else [])])

    def next_version(self) -> int:
        """Version of the next event; one that is not below `versions` must be reserved first."""
        self.version += 1
        if self.version >= self.versions:
            self.versions += VERSIONS
        return self.version

    # Tasks

    def has(self, index: int) -> bool:
        """True if it has a task of this index."""
        return index in self.tasks or index in self._positions

    @property
    def _positions(self) -> range | frozenset[int]:
        """Indexes, for a fast search."""
        first, last = self.indexes[0], self.indexes[-1]
        if last - first + 1 == len(self.indexes):
            return range(first, last + 1)
        kept = self.__dict__.get("_kept_positions")
        if kept is None:
            kept = self.__dict__["_kept_positions"] = frozenset(self.indexes)
        return kept

    def task(self, index: int) -> Task:
        """The task of an index, which gets an object of its own if it has none."""
        found = self.tasks.get(index)
        if found is None:
            found = self.tasks[index] = self._fresh_task(index)
            if self.rest is JobState.PENDING and index not in self.in_line:
                self._again[index] = None
        return found

    def _fresh_task(self, index: int) -> Task:
        made = Task(index, self.stored.submitted_at, self.stored.spec.retries, self.rest)
        made.message, made.ended_at = self.rest_message, self.rest_ended_at
        return made

    def put(self, task: Task) -> None:
        """Add a task as it was stored."""
        self.tasks[task.index] = task
        self.counts[self.rest] -= 1
        self.counts[task.state] += 1
        self.says_progress = self.says_progress or task.progress is not None
        if task.is_final:
            self.note_end(task)
        self._sort(task)

    def note_end(self, task: Task) -> None:
        """Note how a task has ended."""
        if task.message:
            self.message = task.message if len(self.indexes) == 1 else f"task {task.index}: {task.message}"

    def forget_ends(self) -> None:
        """Forget how tasks have ended that wait again; what the last of the others has said stays."""
        self.message = ""
        ended = [task for task in self.tasks.values() if task.is_final and task.message]
        for task in sorted(ended, key=lambda task: task.ended_at.timestamp() if task.ended_at else 0.0):
            self.note_end(task)

    def view(self, index: int) -> Task:
        """The task of an index, for reading alone."""
        return self.tasks.get(index) or self._fresh_task(index)

    def state_of(self, index: int) -> JobState:
        """State of a task."""
        found = self.tasks.get(index)
        return self.rest if found is None else found.state

    def note(self, task: Task, before: JobState) -> None:
        """Count a task whose state has changed."""
        if task.state is not before:
            self.counts[before] -= 1
            self.counts[task.state] += 1
        self._sort(task)

    def _sort(self, task: Task) -> None:
        index = task.index
        if task.is_final and task.progress and task.state is not JobState.DONE:
            self.unfinished.add(index)
        else:
            self.unfinished.discard(index)
        if task.is_live:
            self.live.add(index)
        else:
            self.live.discard(index)
        if task.state is not JobState.PENDING:
            self.in_line.discard(index)
            self._again.pop(index, None)
        elif index not in self.in_line:
            self._again[index] = None

    def set_rest(self, state: JobState, message: str, ended_at: datetime | None) -> int:
        """Change the state of all tasks without an object; returns their number."""
        count = len(self.indexes) - len(self.tasks)
        self.counts[self.rest] -= count
        self.counts[state] += count
        self.rest, self.rest_message, self.rest_ended_at = state, message, ended_at
        self._fresh = 0
        return count

    def rest_indexes(self) -> Iterator[int]:
        """Indexes of the tasks without an object."""
        return (index for index in self.indexes if index not in self.tasks)

    # The queue

    @property
    def may_start(self) -> bool:
        """True if its tasks may wait for devices: it is neither held nor waits for other jobs."""
        return self.eligible and not self.held

    def room(self) -> int:
        """Number of tasks that may enter the queue."""
        if not self.may_start:
            return 0
        room = MOST_IN_LINE - len(self.in_line)
        if self.most_running:
            room = min(room, self.most_running - len(self.in_line) - len(self.live) - len(self.settling))
        return room

    def take_waiting(self, most: int) -> list[int]:
        """Take up to so many tasks that wait and are not in the queue, and count them as in it from now on."""
        found = [index for index in self._again if index not in self.held_tasks and index not in self.settling][:most]
        for index in found:
            del self._again[index]
        while len(found) < most and self.rest is JobState.PENDING and self._fresh < len(self.indexes):
            index = self.indexes[self._fresh]
            self._fresh += 1
            if index not in self.tasks and index not in self.in_line:
                found.append(index)
        self.in_line.update(found)
        return found

    def left_line(self, index: int) -> None:
        """Note that a task has left the queue without a lease: it waits, and enters again in its time."""
        self.in_line.discard(index)
        if index in self.tasks:
            self._sort(self.tasks[index])
        else:
            self.task(index)

    def attempt(self, index: int) -> Attempt:
        """The attempt that a task waits for."""
        task = self.tasks.get(index)
        return Attempt(self.job_id, index, 1 if task is None else task.attempt + 1)
