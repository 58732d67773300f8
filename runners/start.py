"""Start of a run for its supervisor, from its order, its account and its executor."""

from __future__ import annotations

import os
from typing import Any, Final

from ..schemas.work.jobs import JobSpec
from ..schemas.work.runs import Run
from .accounts import Account
from .environment import environment_of
from .executors import Command, Confined, Executors, Work, confine
from .journal import RunFolder

SETTLE_SECONDS: Final = 1.0
"""Time after the end of the commands in which what they have started may end by itself."""


class CannotStart(ValueError):
    """A run can't be started; the message says why."""


def plan(folder: RunFolder, run: Run, account: Account, executors: Executors) -> tuple[str, Confined]:
    """Plan the start of a run.

    Everyone may see why a run can't be started, so messages name neither directory, image nor variables.

    Returns:
        The name of the executor, and what the supervisor executes.

    Raises:
        ValueError: it can't be started here; the message says why.
    """
    spec = run.spec
    if spec is None:
        raise CannotStart("its order has no job")
    directory = spec.directory or account.home
    if not directory.startswith("/"):
        raise CannotStart("its working directory is not absolute")
    if not os.path.isdir(directory):
        what = "its working directory" if spec.directory else "the home directory of its account"
        raise CannotStart(f"{what} is not there")
    executor = executors.choose(spec.image)
    words = [f"{folder.work}/script", *spec.arguments] if spec.script else spec.command
    if not words:
        raise CannotStart("it has no command")
    work = Work(
        key=folder.key,
        run=run,
        account=account,
        commands=[
            Command(words=words, environment=environment_of(run, spec, account, rank))
            for rank in range(spec.tasks_per_host)
        ],
        directory=directory,
        folder=folder.work,
        image=spec.image,
    )
    return executor, confine(executor, work)


def start_of(
    folder: RunFolder, run: Run, account: Account, executor: str, confined: Confined, wanted: dict[str, Any]
) -> dict[str, Any]:
    """Content of `start.json`; see `runners/supervisor.py`."""
    spec = run.spec
    assert spec is not None
    own = confined.account
    return {
        "lease_id": run.lease_id,
        "executor": executor,
        "commands": [
            {"words": each.words, "environment": each.environment, "variables": each.variables}
            for each in confined.commands
        ],
        "account": None if own is None else {"uid": own.uid, "gid": own.gid, "groups": own.groups},
        # Who owns the folder of script and output, also where a container's client runs as the runner itself.
        "owner": {"uid": account.uid, "gid": account.gid, "groups": account.groups} if account.switched else None,
        "directory": spec.directory or account.home,
        "work": folder.work,
        "script": spec.script,
        "output": output_of(folder, run, spec, account),
        "grace_seconds": spec.grace_seconds,
        "settle_seconds": SETTLE_SECONDS,
        "finish": confined.finish,
        "wanted": wanted,
        "news": folder.news,
    }


def output_of(folder: RunFolder, run: Run, spec: JobSpec, account: Account) -> str:
    """File of a run's output: the job's, with `%j` and `%a` replaced, or the runner's."""
    if not spec.output:
        return f"{folder.work}/output"
    index = "0" if run.index is None else str(run.index)
    name = spec.output.replace("%j", run.job_id).replace("%a", index)
    return os.path.join(spec.directory or account.home, name)
