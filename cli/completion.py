"""Shell completion of values: leases, hosts, contexts, settings and fixed choices.

Leases, hosts and similar values come from the planner, with a timeout of a second. If none answers, nothing is
completed. Command and option names are completed by Typer.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Final, cast

import typer

from ..schemas import requests
from ..schemas.work.jobs import JobState

SECONDS: Final = 1.0
"""Timeout of the planner's answer."""

Found = Iterable[str]


def attach(name: str, command: Any) -> None:
    """Attach completion functions to the parameters of a command, or of a group's commands."""
    for inner in cast("dict[str, Any]", getattr(command, "commands", None) or {}).values():
        attach(name, inner)
    for parameter in command.params:
        word = str(parameter.metavar or "").strip("[].")
        complete = BY_COMMAND.get((name, parameter.name)) or BY_NAME.get(parameter.name) or BY_METAVAR.get(word)
        if complete is not None and parameter._custom_shell_complete is None:
            # Typer takes a completion function only when it creates a parameter; these exist already.
            parameter._custom_shell_complete = _completer(complete)


def _completer(complete: Callable[[typer.Context], Found]) -> Callable[..., list[str]]:
    def completer(ctx: typer.Context, parameter: Any, incomplete: str) -> list[str]:
        found: list[str] = []
        with contextlib.suppress(Exception):  # Tab never prints an error
            found = [_in_bash(word) for word in complete(ctx) if word.startswith(incomplete)]
        return found

    return completer


_SPECIAL: Final = re.compile(r"[^\w@%+=:,./-]")


def _in_bash(word: str) -> str:
    """A word with what bash would split or expand escaped; other shells do that by themselves."""
    return _SPECIAL.sub(r"\\\g<0>", word) if os.environ.get("_CORRAL_COMPLETE", "").endswith("bash") else word


def contexts(ctx: typer.Context) -> Found:
    """Names of contexts."""
    from .config import read

    return read().contexts


def keys(ctx: typer.Context) -> Found:
    """Keys of the configuration file."""
    from ..client.config import VARIABLES
    from .config import settings
    from .loading import load
    from .registry import COMMANDS

    yield from (*VARIABLES, "current")
    for name in COMMANDS:
        with contextlib.suppress(ImportError):
            yield from (f"{name}.{key}" for key in settings(load(name)))


def commands(ctx: typer.Context) -> Found:
    """Names of commands."""
    from .registry import COMMANDS

    return COMMANDS


def policies(ctx: typer.Context) -> Found:
    """Names of ranking policies."""
    from ..planner.placement.policies import POLICIES

    return POLICIES


def sorts(ctx: typer.Context) -> Found:
    """Sort keys of `corral top`."""
    from .top.rows import SORTS

    return SORTS


def leases(ctx: typer.Context) -> Found:
    """Ids of active leases."""
    return [lease.lease_id for lease in _ask(ctx, lambda client: client.leases())]


def waiting(ctx: typer.Context) -> Found:
    """Ids of requests in the queue."""
    return [entry.request_id for entry in _ask(ctx, lambda client: client.queue())]


def jobs(ctx: typer.Context) -> Found:
    """Ids of jobs, the newest first."""
    return [job.job_id for job in _ask(ctx, lambda client: client.jobs.find())]


def hosts(ctx: typer.Context) -> Found:
    """Names of hosts."""
    return sorted({device.host for device in _ask(ctx, lambda client: client.devices())})


def models(ctx: typer.Context) -> Found:
    """Models of devices."""
    return sorted({device.model for device in _ask(ctx, lambda client: client.devices())})


def devices(ctx: typer.Context) -> Found:
    """Uuids of devices."""
    return [device.uuid for device in _ask(ctx, lambda client: client.devices())]


def groups(ctx: typer.Context) -> Found:
    """Names of groups."""
    return [status.group.name for status in _ask(ctx, lambda client: client.groups()).groups]


def owners(ctx: typer.Context) -> Found:
    """Owners of active leases."""
    return sorted({lease.owner for lease in _ask(ctx, lambda client: client.leases())})


def _ask(ctx: typer.Context, question: Callable[[Any], Coroutine[Any, Any, Any]]) -> Any:
    """Ask the planner on the bus that the rest of the command line selects, with logging disabled."""
    from .config import apply
    from .options import connected, run

    root = ctx.find_root().params
    if config := root.get("config"):
        os.environ["CORRAL_CONFIG"] = config
    apply(root.get("context"), lenient=True)

    async def work() -> Any:
        async with connected(ctx.params.get("nats") or root.get("nats"), timeout=SECONDS) as client:
            return await question(client)

    logging.disable(logging.CRITICAL)  # output on standard error would appear within the user's command line
    try:
        return run(work())
    finally:
        logging.disable(logging.NOTSET)


def _words(values: Iterable[Any]) -> Callable[[typer.Context], Found]:
    words = [str(value) for value in values]
    return lambda ctx: words


BY_COMMAND: Final[dict[tuple[str, str], Callable[[typer.Context], Found]]] = {
    ("context", "name"): contexts,
    ("config", "key"): keys,
    ("config", "command"): commands,
    ("up", "source"): _words(("auto", "nvml", "amd", "simulated", "none")),
    ("top", "sort"): sorts,
    ("collect", "host"): _words(()),
    ("dashboard", "host"): _words(()),
    ("auth", "host"): _words(()),
    ("submit", "after"): jobs,
    ("jobs", "state"): _words(JobState),
}
BY_NAME: Final[dict[str, Callable[[typer.Context], Found]]] = {
    "policy": policies,
    "placement": _words(requests.Placement),
    "method": _words(requests.Method),
    "weight_by": _words(by for by in requests.WeightBy if by is not requests.WeightBy.GIVEN),
    "vendor": _words(("nvidia", "amd")),
    "host": hosts,
    "model": models,
    "device": devices,
    "owner": owners,
}
BY_METAVAR: Final[dict[str, Callable[[typer.Context], Found]]] = {
    "LEASE": leases,
    "REQUEST": waiting,
    "GROUP": groups,
    "JOB": jobs,
}
