"""Names of jobs and tasks as people write them: `1234`, `1234_7`, `1234_[0-9,12]`. Pure."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from ...schemas.work.jobs import parse_array, parse_task_name
from ..errors import InvalidRequest


@runtime_checkable
class HasJob(Protocol):
    """Object with a job, such as `corral.client.submit` returns."""

    @property
    def job_id(self) -> str:
        """Id of the job."""
        ...


class Selection(NamedTuple):
    """A job, or some of its tasks.

    Attributes:
        job_id: id of the job.
        indexes: of the tasks; empty for the whole job.
    """

    job_id: str
    indexes: tuple[int, ...] = ()


def parse_selection(text: str) -> Selection:
    """Parse the name of a job or of tasks: `1234`, `1234_7`, `1234_[0-9]`, `1234_[1,3,5-9]`.

    Raises:
        InvalidRequest: it is none of them.
    """
    job_id, line, rest = text.strip().partition("_")
    if line and rest.startswith("[") and rest.endswith("]") and job_id.isdecimal() and "%" not in rest:
        try:
            return Selection(job_id, parse_array(rest[1:-1]).indexes)
        except ValueError as error:
            raise InvalidRequest(f"{text!r}: {error}", "invalid", "$.job_id") from None
    try:
        job_id, index = parse_task_name(text.strip())
    except ValueError:
        raise InvalidRequest(
            f"{text!r} is no job: write its id, such as 1234, or tasks of an array, such as 1234_7 or 1234_[0-9]",
            "invalid",
            "$.job_id",
        ) from None
    return Selection(job_id, () if index is None else (index,))


def compact(indexes: list[int]) -> str:
    """Indexes as an array is written: `0-3,7`."""
    found: list[str] = []
    first = last = None
    for index in [*sorted(indexes), None]:
        if first is not None and last is not None and index != last + 1:
            found.append(f"{first}" if first == last else f"{first}-{last}")
            first = None
        first = index if first is None else first
        last = index
    return ",".join(found)
