"""Jobs from scripts and notebooks: `submit`, `map` and `as_completed`, each over a connection of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Unpack

from ...schemas.work.jobs import FINAL, Job, JobState, JobTask
from ..sync import SyncClient
from .results import exit_code
from .spec import JobFields, Work


class SubmittedJob:
    """A job that was submitted by `submit` or `map`. Nothing of it depends on this object, or on this process.

    Args:
        job: as the planner answered.
        url: URL of the bus; defaults as in `SyncClient`.

    Attributes:
        job: as it was known last.
        tasks: those of the last `wait`; empty before.
    """

    def __init__(self, job: Job, url: str | None = None) -> None:
        self.job = job
        self.tasks: list[JobTask] = []
        self._url = url

    def __repr__(self) -> str:
        return f"<job {self.job_id} {self.job.name!r}: {self.job.state.value}>"

    @property
    def job_id(self) -> str:
        """Id of the job."""
        return self.job.job_id

    @property
    def state(self) -> JobState:
        """State of the job now."""
        with SyncClient(self._url) as client:
            self.job = client.jobs.get(self.job_id, tasks=False).job
        return self.job.state

    @property
    def exit_code(self) -> int | None:
        """Highest exit code of its tasks, see `corral submit --wait`; None if it was not waited for to its end."""
        return exit_code(self.tasks) if self.tasks else None

    def wait(self, timeout: float | None = None) -> int:
        """Wait until the job has ended.

        Args:
            timeout: seconds; None for no limit.

        Returns:
            The highest exit code of its tasks: 0 if all are done.

        Raises:
            TimeoutError: it has not ended by then.
        """
        with SyncClient(self._url) as client:
            ended = client.jobs.wait(self.job_id, timeout=timeout)
        self.job, self.tasks = ended.job, ended.tasks
        return exit_code(self.tasks) or 0

    def as_completed(self, timeout: float | None = None) -> Iterator[JobTask]:
        """Its tasks in the order in which they end: with index, state, exit code and hosts.

        Args:
            timeout: seconds; None for no limit.

        Raises:
            TimeoutError: not all have ended by then.
        """
        with SyncClient(self._url) as client:
            yield from client.jobs.tasks_as_completed(self.job_id, timeout=timeout)

    def output(self, index: int | None = None) -> str:
        """Return what the job, or the task of this index, has printed so far, as far as the bus has kept it."""
        which = self.job_id if index is None else f"{self.job_id}_{index}"
        with SyncClient(self._url) as client:
            return b"".join(piece.data for piece in client.jobs.logs(which)).decode(errors="replace")

    def cancel(self, reason: str = "") -> None:
        """End the job, or take it from the queue."""
        with SyncClient(self._url) as client:
            self.job = client.jobs.cancel(self.job_id, reason=reason).job


def submit(work: Work, *arguments: Any, url: str | None = None, **fields: Unpack[JobFields]) -> SubmittedJob:
    """Submit a command, a script or a Python function as a job.

    `submit(["python", "train.py"], gpus=2, memory="20GiB")`, `submit(train, 0.1, gpus=1, retries=2)`

    Args:
        work: as in `JobCalls.submit`.
        arguments: likewise.
        url: URL of the bus; defaults as in `SyncClient`.
        fields: what each task needs and how it is queued, as in `JobCalls.submit`.
    """
    with SyncClient(url) as client:
        return SubmittedJob(client.jobs.submit(work, *arguments, **fields), url)


def map(work: Work, inputs: Iterable[Any], *, url: str | None = None, **fields: Unpack[JobFields]) -> SubmittedJob:
    """Submit an array with a task for each input; see `JobCalls.map`.

    `map(train, [0.1, 0.01, 0.001], gpus=1, array="%2")`
    """
    with SyncClient(url) as client:
        return SubmittedJob(client.jobs.map(work, inputs, **fields), url)


def as_completed(jobs: Iterable[SubmittedJob], timeout: float | None = None) -> Iterator[SubmittedJob]:
    """Jobs in the order in which they end, each once.

    Args:
        jobs: what `submit` and `map` returned.
        timeout: seconds; None for no limit.

    Raises:
        TimeoutError: not all have ended by then.
    """
    by_id = {job.job_id: job for job in jobs}
    if not by_id:
        return
    url = next(iter(by_id.values()))._url  # pyright: ignore[reportPrivateUsage]
    with SyncClient(url) as client:
        for ended in client.jobs.as_completed(list(by_id), timeout=timeout):
            job = by_id[ended.job_id]
            job.job = ended
            if ended.state in FINAL:
                job.tasks = client.jobs.get(ended).tasks
            yield job
