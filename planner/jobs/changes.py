"""Consequences of changes of jobs: records to store, orders and events to publish, leases to release."""

from __future__ import annotations

from typing import NamedTuple

from ...schemas.work.jobs import JobTask

TaskKey = tuple[str, int]
"""Job id and index."""


class Release(NamedTuple):
    """A lease to release.

    Attributes:
        lease_id: of the lease.
        owner: of the lease.
        reason: for its record; empty for a task that has ended.
        after: task whose record must be stored first; None for none.
    """

    lease_id: str
    owner: str
    reason: str = ""
    after: TaskKey | None = None


class Changes:
    """Changes since they were taken last. Sets are dicts, in the order in which things were added.

    Attributes:
        tasks: tasks whose records are to be written now.
        later: tasks whose records may be written some time later.
        states: jobs whose state is to be written.
        leave: requests to withdraw from the queue, by owner and request id.
        releases: leases to release.
        orders: hosts with the tasks about which their runners have other orders.
        refill: jobs that may have room for more tasks in the queue.
        events: jobs with the tasks that have changed.
        ended: attempts that have ended, of tasks that wait for a further one, by job: their end is an event, too.
    """

    __slots__ = ("ended", "events", "later", "leave", "orders", "refill", "releases", "states", "tasks")

    def __init__(self) -> None:
        self.tasks: dict[TaskKey, None] = {}
        self.later: dict[TaskKey, None] = {}
        self.states: dict[str, None] = {}
        self.leave: list[tuple[str, str]] = []
        self.releases: list[Release] = []
        self.orders: dict[str, dict[TaskKey, None]] = {}
        self.refill: dict[str, None] = {}
        self.events: dict[str, set[int]] = {}
        self.ended: dict[str, list[JobTask]] = {}

    def order(self, host: str, key: TaskKey) -> None:
        """Note that the runner of a host has other orders about a task."""
        self.orders.setdefault(host, {})[key] = None

    def event(self, key: TaskKey) -> None:
        """Note that a task has changed."""
        self.events.setdefault(key[0], set()).add(key[1])
