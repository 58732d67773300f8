"""Exit code of a job, and progress as a job prints it. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from ...schemas.work.jobs import FINAL, JobState, JobTask

UNKNOWN: Final = 1
"""Exit code of a task that has not ended well, of which no exit code and no signal is known."""
TAKEN_AWAY: Final = 9
"""Exit code of a task whose lease was preempted, or whose host was lost; as `corral run` ends then."""


def exit_code(tasks: Iterable[JobTask]) -> int | None:
    """Exit code of tasks together: the highest; None while one of them has not ended. See `task_exit_code`."""
    codes = [task_exit_code(task) for task in tasks]
    return None if None in codes else max((code for code in codes if code is not None), default=0)


def task_exit_code(task: JobTask) -> int | None:
    """Exit code of a task as a shell has it: that of its command, or 128 plus the number of the signal that ended it.

    Without either: 9 where its lease was preempted or its host was lost, else 1. None if it has not ended.
    """
    if task.state not in FINAL:
        return None
    if task.state is JobState.DONE:
        return 0
    if task.exit_code:
        return task.exit_code
    if task.signal:
        return 128 + task.signal
    return TAKEN_AWAY if task.state in (JobState.PREEMPTED, JobState.LOST) else UNKNOWN


def progress_line(fraction: float) -> str:
    """Line by which a job says how far it is.

    Raises:
        ValueError: it is not between 0 and 1.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"progress is a fraction from 0 to 1, not {fraction!r}")
    return f"::progress {fraction:.4g}"


def progress(fraction: float) -> None:
    """Say how far a job is, from 0 to 1: `corral jobs` and the dashboard show it.

    It prints a line, `::progress 0.42`, which any program may print as well.

    Raises:
        ValueError: it is not between 0 and 1.
    """
    print(progress_line(fraction), flush=True)
