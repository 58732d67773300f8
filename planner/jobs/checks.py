"""Checks of a submitted job, and the work request of one of its tasks."""

from __future__ import annotations

import signal
from typing import Final

from msgspec.structs import replace

from ...schemas import codec
from ...schemas.limits import MAX_WAIT_SECONDS
from ...schemas.requests import Placement, WorkRequest
from ...schemas.work.jobs import MAX_JOB_BYTES, Array, Attempt, JobSpec, parse_array
from ...schemas.work.runs import RUNNER_LABEL
from .records import request_id

TTL_SECONDS: Final = 600.0
"""Time to live of the lease of a task, which the planner renews by the reports of the runner."""
_PLANNERS: Final = ("wait_seconds", "ttl_seconds", "request_id", "holder", "requeue_of", "distribution")
_UNSET: Final = WorkRequest(owner="nobody")


class InvalidJob(ValueError):
    """A job that can't be queued.

    Attributes:
        field: path of the field at fault.
        code: of the answer.
    """

    def __init__(self, message: str, field: str, code: str = "invalid") -> None:
        super().__init__(message)
        self.field = field
        self.code = code


def check(spec: JobSpec) -> Array:
    """Check a submitted job, and return its indexes.

    Raises:
        InvalidJob: its fields contradict each other, or say nothing.
    """
    _check_command(spec)
    _check_request(spec)
    if spec.image.startswith("-") or any(character.isspace() for character in spec.image):
        raise InvalidJob(f"{spec.image!r} is no image", "$.image")
    if spec.directory and not spec.directory.startswith("/"):
        raise InvalidJob(f"directory is {spec.directory!r}: give an absolute path on the host", "$.directory")
    for name in spec.environment:
        if "=" in name or "\0" in name:
            raise InvalidJob(f"{name!r} is no name of a variable", "$.environment")
    for field, path in (("$.directory", spec.directory), ("$.output", spec.output)):
        if "\0" in path:
            raise InvalidJob("A path contains a NUL character", field)
    if any("\0" in value for value in (*spec.environment.values(), *spec.command, *spec.arguments)):
        raise InvalidJob("A word or a variable contains a NUL character", "$.command")
    if "\0" in spec.request.name:  # it is a variable of the command
        raise InvalidJob("The name contains a NUL character", "$.request.name")
    if spec.preempt_signal:
        number_of_signal(spec.preempt_signal, "$.preempt_signal")
    if (size := len(codec.encode(spec))) > MAX_JOB_BYTES:
        text = f"The job takes {size} bytes, {MAX_JOB_BYTES} are the most: put large files where the hosts find them"
        raise InvalidJob(text, "$.script" if spec.script else "$.command", "too_large")
    return array_of(spec)


def _check_command(spec: JobSpec) -> None:
    if spec.command and spec.script:
        raise InvalidJob("Give a command or a script, not both", "$.script")
    if not spec.command and not spec.script:
        raise InvalidJob("Give a command, or a script", "$.command")
    if spec.command and not spec.command[0].strip():
        raise InvalidJob("The first word of the command is empty: name a program", "$.command[0]")
    if spec.arguments and not spec.script:
        raise InvalidJob("arguments are for a script: put those of a command into command", "$.arguments")
    if spec.script and not spec.script.startswith("#!"):
        raise InvalidJob("The first line of a script names its interpreter, such as #!/bin/bash", "$.script")


def _check_request(spec: JobSpec) -> None:
    request = spec.request
    for name in _PLANNERS:
        if getattr(request, name) != getattr(_UNSET, name):
            raise InvalidJob(f"{name} is the planner's to set for jobs: leave it out", f"$.request.{name}")
    if request.gpus_max is not None:
        raise InvalidJob("Jobs keep the devices that they start with: leave gpus_max out", "$.request.gpus_max")
    if RUNNER_LABEL in request.host_labels:
        raise InvalidJob(f"The planner sets {RUNNER_LABEL}: leave it out", "$.request.host_labels")
    if request.devices:
        return  # they say on which hosts, and how many on each
    if spec.hosts == 1:
        if request.placement is not Placement.SAME_HOST:
            text = f"placement is {request.placement.value}: say on how many hosts, with hosts"
            raise InvalidJob(text, "$.request.placement")
        return
    if not request.gpus or request.gpus % spec.hosts:
        text = f"{request.gpus} devices can't be shared evenly by {spec.hosts} hosts: give a multiple of hosts"
        raise InvalidJob(text, "$.request.gpus")
    if request.gpus_per_host is not None:
        raise InvalidJob("hosts says on how many hosts the devices are: leave gpus_per_host out", "$.request")


def check_group(wanted: str, owner: str, group: str) -> None:
    """Check that a job may be charged to a group; where there are none, any name will do.

    Args:
        wanted: that the job names; empty for none.
        owner: of the job.
        group: of the owner; empty where there are no groups.

    Raises:
        InvalidJob: the owner is not a member of the group.
    """
    if wanted and group and wanted != group and not group.startswith(f"{wanted}/"):
        raise InvalidJob(f"{owner!r} is not a member of group {wanted!r}, but of {group!r}", "$.group")


def array_of(spec: JobSpec) -> Array:
    """Indexes of a job.

    Raises:
        InvalidJob: they can't be read.
    """
    if not spec.array:
        return Array((0,))
    try:
        return parse_array(spec.array)
    except ValueError as error:
        raise InvalidJob(str(error), "$.array") from None


def number_of_signal(name: str, field: str) -> int:
    """Number of a signal, by its name with or without SIG, or as digits.

    Raises:
        InvalidJob: there is no such signal.
    """
    text = name.upper()
    try:
        return signal.Signals(int(text)) if text.isdecimal() else signal.Signals[f"SIG{text.removeprefix('SIG')}"]
    except (KeyError, ValueError):
        raise InvalidJob(f"{name!r} is no signal: write one such as SIGUSR1", field) from None


def notice_signal(spec: JobSpec) -> int:
    """Number of the signal that a job gets at the notice of a preemption; 0 for none."""
    return number_of_signal(spec.preempt_signal, "$.preempt_signal") if spec.preempt_signal else 0


def placed_request(spec: JobSpec) -> WorkRequest:
    """Request of each task of a job, with its hosts: all but that they have runners."""
    request = spec.request
    if spec.hosts == 1 or request.devices:
        return request
    return replace(request, placement=Placement.SPREAD, gpus_per_host=request.gpus // spec.hosts)


def request_of(spec: JobSpec, attempt: Attempt, requeue_of: str) -> WorkRequest:
    """Work request of an attempt.

    Args:
        spec: of the job.
        attempt: of a task.
        requeue_of: id of the preempted lease whose work it goes on with; empty for none.
    """
    request = placed_request(spec)
    return replace(
        request,
        request_id=request_id(attempt),
        # Devices that are named are not waited for in the queue, but tried again.
        wait_seconds=0.0 if request.devices else float(MAX_WAIT_SECONDS),
        ttl_seconds=TTL_SECONDS,
        host_labels={**request.host_labels, RUNNER_LABEL: "yes"},
        requeue_of=requeue_of or None,
    )
