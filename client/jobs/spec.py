"""Builds jobs from keyword arguments: what is executed, what each task needs, and how it is queued. Pure."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

from ...schemas import codec
from ...schemas.requests import WorkRequest
from ...schemas.values import plain, units
from ...schemas.values.misspelt import meant
from ...schemas.work.jobs import MAX_JOB_BYTES, Condition, Dependency, JobSpec, parse_array
from ..errors import InvalidRequest
from ..request import RequestFields, work_request
from .functions import script_of
from .names import HasJob

Work = str | Path | Sequence[str] | Callable[..., Any]
"""What a job executes: the words of a command, a script as a `Path` or as text that begins with `#!`, or a function."""

_OF_THE_PLANNER: Final[dict[str, str]] = {
    "wait": "a job waits for as long as it takes",
    "wait_seconds": "a job waits for as long as it takes",
    "ttl": "the planner renews the leases of jobs",
    "ttl_seconds": "the planner renews the leases of jobs",
    "request_id": "the idempotency key of a job is `submit_id`",
    "requeue_of": "a job goes on in its place by `requeue`",
    "holder": "the runner holds the leases of jobs",
    "distribution": "give each task its part by its index: `array`, or `map`",
}
_ITEMS: Final[tuple[str, ...]] = ("items", "method", "weight_by", "memory_per_item", "max_items_per_device")
_OF_THE_PLANNER_TOO: Final[dict[str, str]] = dict.fromkeys(_ITEMS, _OF_THE_PLANNER["distribution"])


class JobFields(RequestFields, total=False):
    """Keyword arguments of a job: those of a request, which each task makes, and those of `JobSpec`.

    Of a request are left out: `wait`, `ttl`, `request_id`, `requeue_of`, `holder`, and those of work items.
    """

    env: Mapping[str, str]
    """variables to set (`environment`)"""
    directory: str | Path
    """working directory on the host; that of this process for a Python function, else the home of the account"""
    group: str
    """group to charge, of which the owner must be a member"""
    output: str
    image: str
    array: str | Sequence[int]
    """indexes of the tasks: `0-99`, `1,3,5-9%2`, or a list of them"""
    after: Any
    """jobs that must end first: an id, a `Job`, `"1234:any"`, a `Dependency`, or a list of these"""
    retries: int
    requeue: bool
    host_count: int
    """number of hosts of each task (`JobSpec.hosts`; `hosts` are patterns of their names)"""
    tasks_per_host: int
    held: bool
    preempt_signal: str
    submit_id: str
    python: str
    """interpreter on the hosts for a Python function; by default the path of this one"""


_JOB_ONLY: Final = frozenset(JobFields.__annotations__) - frozenset(RequestFields.__annotations__)
_AS_THEY_ARE: Final = (
    *("group", "output", "image", "retries", "requeue", "tasks_per_host", "held", "preempt_signal", "submit_id"),
)


def job_spec(owner: str, work: Work, arguments: Sequence[Any], fields: JobFields) -> JobSpec:
    """Build and validate a job.

    Args:
        owner: owner of the job, unless `fields` names one.
        work: what is executed.
        arguments: of a script or a function, or further words of a command.
        fields: the keyword arguments.

    Raises:
        InvalidRequest: an argument is unknown, has the wrong type or is out of range; `field` is its path where known.
    """
    given: dict[str, Any] = {name: plain.number(value) for name, value in fields.items()}
    _check_names(given)
    if isinstance(given.get("hosts"), int):
        text = f"hosts={given['hosts']}: `hosts` are names or patterns; the number of hosts is `host_count`"
        raise InvalidRequest(text, "invalid", "$.hosts")
    own = {name: given.pop(name) for name in _JOB_ONLY & set(given)}
    body: dict[str, Any] = {name: own[name] for name in _AS_THEY_ARE if name in own}
    body |= _executed(work, arguments, own.get("python"))
    if callable(work):
        own.setdefault("directory", os.getcwd())
    if "env" in own:
        body["environment"] = dict(own["env"])
    if "directory" in own:
        body["directory"] = _absolute(str(own["directory"]))
    if "array" in own:
        body["array"] = _array(own["array"])
    if "after" in own:
        body["after"] = dependencies(own["after"])
    if own.get("preempt_signal"):
        body["preempt_signal"] = signal_name(own["preempt_signal"])
    if "grace" in given:
        body["grace_seconds"] = _seconds(given["grace"])
    hosts = own.get("host_count", 1)
    body["hosts"] = hosts
    given.setdefault("name", name_of(work))
    if not given.get("devices"):
        given["gpus"] = _gpus(given.get("gpus"), given.pop("gpus_per_host", None), hosts)
    given.setdefault("placement", "spread" if isinstance(hosts, int) and hosts > 1 else "same_host")
    body["request"] = work_request(owner, cast("RequestFields", given))
    return validated(body)


def name_of(work: Work) -> str:
    """Name of a job that was given none: of its program, script or function."""
    if isinstance(work, str):
        return "script"
    if isinstance(work, Path):
        return work.name
    if callable(work):
        function = getattr(work, "func", work)
        return str(getattr(function, "__name__", type(function).__name__))[:256]
    return os.path.basename(work[0]) if work else ""


def dependencies(after: Any) -> list[Dependency]:
    """Dependencies as they are written: `1234`, `"1234:any"`, a `Job`, a `Dependency`, or a list of these."""
    several = cast("list[Any]", after) if isinstance(after, list | tuple) else [after]
    return [_dependency(one) for one in several]


_DEPENDENCY: Final = re.compile(r"(\d+)(?::(\w+))?")


def _dependency(one: Any) -> Dependency:
    if isinstance(one, Dependency):
        return one
    text = one.job_id if isinstance(one, HasJob) else str(one)
    found = _DEPENDENCY.fullmatch(text.strip())
    if found is None or (found[2] or "ok") not in tuple(Condition):
        raise InvalidRequest(
            f"after={text!r} is no dependency: write the id of a job, and how it must end if not well: "
            "1234, 1234:any, 1234:failed",
            "invalid",
            "$.after",
        )
    return Dependency(job_id=found[1], condition=Condition(found[2] or "ok"))


def signal_name(text: str) -> str:
    """Name of a signal: `SIGUSR1`, from that, `usr1` or `10`.

    Raises:
        InvalidRequest: there is no such signal.
    """
    name = str(text).upper().removeprefix("SIG")
    try:
        return signal.Signals(int(name)).name if name.isdecimal() else signal.Signals[f"SIG{name}"].name
    except (KeyError, ValueError):
        raise InvalidRequest(f"{text!r} is no signal: use a name such as SIGUSR1", "invalid") from None


def validated(body: dict[str, Any]) -> JobSpec:
    """Validate a job by decoding it as the planner would, so that errors are reported before it is sent.

    Raises:
        InvalidRequest: a field is invalid; `field` is its path.
    """
    try:
        encoded = codec.encode(body, codec.JSON)
        if len(encoded) > MAX_JOB_BYTES:
            raise InvalidRequest(
                f"the job has {len(encoded) / 1024:.0f} KiB, and at most {MAX_JOB_BYTES // 1024} KiB are allowed: "
                "keep large inputs in files, and pass their names",
                "too_large",
            )
        return codec.decode(encoded, JobSpec, codec.JSON)
    except codec.DecodeError as error:
        raise InvalidRequest(str(error), error.code, error.field) from None
    except TypeError as error:
        raise InvalidRequest(str(error), "invalid") from None


def _check_names(given: Mapping[str, Any]) -> None:
    for name in given:
        why = _OF_THE_PLANNER.get(name) or _OF_THE_PLANNER_TOO.get(name)
        if why:
            raise InvalidRequest(f"`{name}` is not for jobs: {why}", "invalid", f"$.{name}")
        if name not in JobFields.__annotations__ and name not in WorkRequest.__struct_fields__:
            near = meant(name, JobFields.__annotations__)
            hint = f": did you mean `{near}`?" if near else f": there are {', '.join(JobFields.__annotations__)}"
            raise InvalidRequest(f"There is no argument `{name}`{hint}", "invalid", f"$.{name}")


def _executed(work: Work, arguments: Sequence[Any], python: str | None) -> dict[str, Any]:
    """Command, or script with its arguments."""
    if callable(work):
        return {"script": script_of(work, arguments, python)}
    words = [str(word) for word in arguments]
    if isinstance(work, Path):
        return {"script": read_script(work), "arguments": words}
    if isinstance(work, str):
        if not work.startswith("#!"):
            raise InvalidRequest(
                f"{work[:60]!r} is neither a command nor a script: give a command as a list of words, such as "
                "['python', 'train.py'], a file as Path('train.sh'), or the text of a script, which begins with #!",
                "invalid",
                "$.command",
            )
        return {"script": work, "arguments": words}
    command = [str(word) for word in work]
    if not command or not command[0]:
        raise InvalidRequest("the command is empty: give its words, such as ['python', 'train.py']", "invalid")
    return {"command": [*command, *words]}


def read_script(path: Path) -> str:
    """Text of a script.

    Raises:
        InvalidRequest: it can't be read, is too large, or its first line does not name its interpreter.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = "it is no text" if isinstance(error, UnicodeDecodeError) else error.strerror or str(error)
        raise InvalidRequest(f"the script {path} can't be read: {why}", "invalid", "$.script") from None
    if not text.startswith("#!"):
        raise InvalidRequest(
            f"the script {path} does not name its interpreter: its first line must be one such as #!/bin/bash",
            "invalid",
            "$.script",
        )
    return text


def _absolute(path: str) -> str:
    return os.path.abspath(path) if path else path


def _array(given: Any) -> str:
    text = given if isinstance(given, str) else ",".join(str(index) for index in given)
    if isinstance(given, str) or text:
        try:
            parse_array(text)
        except ValueError as error:
            raise InvalidRequest(f"array: {error}", "invalid", "$.array") from None
    return text


def _gpus(gpus: Any, per_host: Any, hosts: Any) -> Any:
    """Devices of a task in all."""
    if per_host is not None:
        if gpus is not None:
            raise InvalidRequest("give `gpus` (in all) or `gpus_per_host`, not both", "invalid", "$.gpus")
        return per_host * hosts
    if gpus is None:
        return hosts
    if not isinstance(gpus, int | str) or (isinstance(gpus, str) and not gpus.strip().lstrip("-").isdecimal()):
        text = f"gpus={gpus}: a job keeps the devices that it starts with: give one number"
        raise InvalidRequest(text, "invalid", "$.gpus")
    count = int(gpus) if isinstance(gpus, str) and gpus.isdecimal() else gpus
    if isinstance(count, int) and isinstance(hosts, int) and hosts > 1 and count % hosts:
        raise InvalidRequest(
            f"gpus={count} can't be shared by {hosts} hosts: each has the same number, so ask for "
            f"{(count // hosts + 1) * hosts}, or say how many each has with gpus_per_host",
            "invalid",
            "$.gpus",
        )
    return gpus


def _seconds(value: Any) -> float:
    try:
        return units.parse_seconds(value)
    except ValueError as error:
        raise InvalidRequest(str(error), "invalid", "$.grace_seconds") from None
