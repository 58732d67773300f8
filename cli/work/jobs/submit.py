"""`corral submit`: submits a script or a command as a job."""

from __future__ import annotations

import functools
import os
import shlex
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

import typer
from rich.markup import escape

from ....client import Client, InvalidRequest, Rejected
from ....client.jobs.results import exit_code
from ....client.jobs.spec import JobFields, Work, dependencies
from ....client.request import RequestFields, parse_gpus
from ....schemas.work.jobs import Job
from ... import exits, render
from ...options import AsJson, NatsUrl, Timeout, connected, console, print_json, run, say
from ..request_options import with_request_options
from .directives import Directives, read_directives
from .output import print_logs
from .variables import variables

_JOB = "Job"
_EXECUTION = "Execution"
_CLIENT = "After submitting"
_NOT_FOR_JOBS: Final = frozenset(
    (
        "placement",
        "ttl",
        "request_id",
        "requeue_of",
        "items",
        "method",
        "weight_by",
        "memory_per_item",
        "max_items_per_device",
    )
)
_OPTIONS: Final = {
    "`host_count`": "--hosts",
    "gpus_per_host": "--gpus-per-host",
    "`gpus`": "--gpus",
    "gpus=": "--gpus ",
    "after=": "--after ",
    "array:": "--array",
    "['python', 'train.py']": "-- python train.py",
}
"""Arguments of the client in its errors, with the options that mean them."""
_EITHER: Final = ({"gpus", "gpus_per_host"},)
"""Parameters of which one is given: one on the command line overrides the other in a script."""
_PAIRS: Final = {"env", "label", "host_label"}
"""Parameters whose pairs on the command line are added to those in a script; the same key is overridden."""


def _gpus(text: str) -> str:
    try:
        if not isinstance(parse_gpus(text), int):
            raise typer.BadParameter(f"{text!r}: a job keeps the GPUs that it starts with: give one number")
    except InvalidRequest as error:
        raise typer.BadParameter(str(error)) from None
    return text


class _Target(NamedTuple):
    """Command or script that is executed.

    Attributes:
        work: words of a command, or the text of a script.
        arguments: of the script.
        name: of the job, unless it is named.
        file: of the script, for messages; empty for a command.
    """

    work: Work
    arguments: Sequence[str]
    name: str
    file: str = ""


@functools.partial(with_request_options, without=_NOT_FOR_JOBS)
def submit(
    context: typer.Context,
    command: Annotated[
        list[str], typer.Argument(metavar="SCRIPT [ARG]... | -- COMMAND [ARG]...", help="Script, or command to run.")
    ],
    fields: RequestFields,
    gpus: Annotated[
        str | None,
        typer.Option(
            "--gpus",
            "-g",
            metavar="N",
            parser=_gpus,
            help="Number of GPUs of each task, on all its hosts together. Default: 1 on each host.",
            rich_help_panel="Devices",
        ),
    ] = None,
    gpus_per_host: Annotated[
        int | None,
        typer.Option("--gpus-per-host", metavar="N", help="GPUs on each host instead.", rich_help_panel="Devices"),
    ] = None,
    hosts: Annotated[
        int,
        typer.Option("--hosts", "-N", metavar="N", min=1, help="Hosts of each task.", rich_help_panel="Hosts"),
    ] = 1,
    tasks_per_host: Annotated[
        int,
        typer.Option("--tasks-per-host", metavar="N", min=1, help="Processes on each host.", rich_help_panel="Hosts"),
    ] = 1,
    array: Annotated[
        str | None,
        typer.Option(
            "--array", "-a", metavar="INDEXES", help="A task for each index: 0-99, 1,3,5-9%2.", rich_help_panel=_JOB
        ),
    ] = None,
    after: Annotated[
        list[str] | None,
        typer.Option(
            "--after",
            metavar="JOB",
            help="Start once this job is done; JOB:any once it has ended, JOB:failed if it was not done. Repeatable.",
            rich_help_panel=_JOB,
        ),
    ] = None,
    retries: Annotated[
        int, typer.Option("--retries", metavar="N", min=0, help="Restarts of a task that fails.", rich_help_panel=_JOB)
    ] = 0,
    requeue: Annotated[
        bool,
        typer.Option(
            "--requeue/--no-requeue",
            help="Queue a task again, in its place, when it is preempted or its host is lost.",
            rich_help_panel=_JOB,
        ),
    ] = False,
    group: Annotated[
        str | None,
        typer.Option(
            "--group", metavar="GROUP", help="Group to charge: one that the owner is in.", rich_help_panel=_JOB
        ),
    ] = None,
    hold: Annotated[
        bool, typer.Option("--hold/--no-hold", help="Don't start it before corral unhold.", rich_help_panel=_JOB)
    ] = False,
    submit_id: Annotated[
        str | None,
        typer.Option(
            "--submit-id", metavar="ID", help="Idempotency key: the same id is one job.", rich_help_panel=_JOB
        ),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            "--env",
            "-e",
            metavar="K=V|NAME",
            help="Variable for the job; NAME takes its value here. Repeatable.",
            rich_help_panel=_EXECUTION,
        ),
    ] = None,
    cd: Annotated[
        str | None,
        typer.Option(
            "--cd",
            "-C",
            metavar="FOLDER",
            help="Working directory. Default: the account's home.",
            rich_help_panel=_EXECUTION,
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="File on the host for the output, with %j (job), %a (index) and %x (name).",
            rich_help_panel=_EXECUTION,
        ),
    ] = None,
    image: Annotated[
        str | None,
        typer.Option("--image", metavar="IMAGE", help="Container image to run in.", rich_help_panel=_EXECUTION),
    ] = None,
    on_preempt: Annotated[
        str | None,
        typer.Option(
            "--on-preempt",
            metavar="SIGNAL",
            help="Signal at the notice of a preemption: SIGUSR1.",
            rich_help_panel="Preemption",
        ),
    ] = None,
    grace: Annotated[
        str | None,
        typer.Option(
            "--grace",
            metavar="TIME",
            help="Time between SIGTERM and SIGKILL, and between the notice of a preemption and the end. Default: 30s.",
            rich_help_panel="Preemption",
        ),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", "-W", help="Wait, and end with the job's exit code.", rich_help_panel=_CLIENT)
    ] = False,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Show what it prints, and wait.", rich_help_panel=_CLIENT)
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print the job's id alone.", rich_help_panel=_CLIENT)
    ] = False,
    ignore_unknown: Annotated[
        bool,
        typer.Option("--ignore-unknown", help="Submit a script with #SBATCH lines that mean nothing here."),
    ] = False,
    json: AsJson = False,
    nats: NatsUrl = None,
    timeout: Timeout = 10.0,
) -> None:
    """Submit a script, or a command after --, as a job. It waits for GPUs, runs on their host, and needs no terminal.

    A script is sent to the host; '-' reads it from standard input. Options may stand in its first lines, as
    '#CORRAL --gpus 2'; '#SBATCH' lines that mean the same are understood, and unknown ones are an error. Options on
    the command line win, then CORRAL_SUBMIT_... variables, then the script's.

    With --wait the exit code is that of the job: the highest of its tasks, 128 plus the number of a signal, 9 if its
    lease was preempted or its host lost, and 1 if it was cancelled or could not be started.

    Examples:
      corral submit --gpus 2 --memory 20GiB train.sh
      corral submit --gpus 8 --max 2d --name llama -- python train.py --epochs 3
      corral submit --array 0-99%10 --retries 2 sweep.sh
      corral submit --hosts 2 --gpus-per-host 8 --cd /data/llama ddp.sh
      corral submit --after 1234 --env WANDB_API_KEY -- python evaluate.py
      corral submit --gpus 1 --wait test.sh
    """
    target = _target(context, command)
    if target.file and _DONE not in context.meta:
        context.meta[_DONE] = True
        if (merged := _with_directives(context, target, ignore_unknown)) is not None:
            assert context.command.callback is not None
            context.command.callback(**merged)
            return
    job_fields: JobFields = {
        **fields,
        "host_count": hosts,
        "tasks_per_host": tasks_per_host,
        "retries": retries,
        "requeue": requeue,
        "held": hold,
        "env": variables(env or []),
    }
    given: dict[str, Any] = {
        "gpus": None if gpus is None else parse_gpus(gpus),
        "gpus_per_host": gpus_per_host,
        "array": array,
        "after": after,
        "group": group,
        "submit_id": submit_id,
        "directory": cd,
        "output": output,
        "image": image,
        "preempt_signal": on_preempt,
        "grace": grace,
    }
    job_fields.update({name: value for name, value in given.items() if value is not None})  # pyright: ignore[reportCallIssue, reportArgumentType]
    job_fields.setdefault("name", target.name)
    if "output" in job_fields:
        job_fields["output"] = job_fields["output"].replace("%x", job_fields.get("name") or "")
    if after:
        job_fields["after"] = [one for text in after for one in _in_words(dependencies, text.split(","))]

    async def work() -> int:
        async with connected(nats, owner=fields.get("owner"), timeout=timeout) as client:
            job = await client.jobs.submit(target.work, *target.arguments, **job_fields)
            _print_submitted(job, json=json, quiet=quiet, waits=wait or follow)
            return await _ended(client, job, follow) if wait or follow else exits.OK

    try:
        code = run(work())
    except InvalidRequest as error:
        raise InvalidRequest(_in_options(str(error)), error.code, error.field) from None
    except Rejected as rejected:
        if json:
            print_json(rejected.rejection)
        else:
            for line in render.rejection_lines(rejected.rejection):
                console(stderr=quiet).print(line)
        raise typer.Exit(exits.REJECTED) from None
    raise typer.Exit(code)


_DONE: Final = "corral.cli.work.jobs.submit.directives"


def _target(context: typer.Context, command: Sequence[str]) -> _Target:
    """Return what the words that are no options name: a command behind `--`, else a script with its arguments."""
    words: Sequence[str] = context.find_root().obj or ()
    before = len(words) - len(command) - 1
    if context.meta.get(_SEPARATED, before >= 0 and words[before] == "--"):
        context.meta[_SEPARATED] = True
        return _Target(list(command), (), os.path.basename(command[0]))
    name, *arguments = command
    if name == "-":
        if _TEXT not in context.meta:
            context.meta[_TEXT] = sys.stdin.read()
        return _Target(_checked(context.meta[_TEXT], "standard input"), arguments, "script", "standard input")
    path = Path(name)
    if not path.is_file():
        example = textwrap.shorten(shlex.join(command), _EXAMPLE_CHARACTERS, placeholder=" ...")
        raise exits.CommandError(
            f"there is no script {name!r}: write -- before a command, as in corral submit -- {example}", exits.USAGE
        )
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = "it is no text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise exits.CommandError(
            f"the script {name} can't be read: {why}; write -- before a command that is on the hosts", exits.USAGE
        ) from None
    return _Target(_checked(text, name), arguments, path.name, name)


_SEPARATED: Final = f"{_DONE}.separated"
_TEXT: Final = f"{_DONE}.text"
_EXAMPLE_CHARACTERS: Final = 100


def _checked(text: str, file: str) -> str:
    if not text.startswith("#!"):
        raise exits.CommandError(
            f"{file} does not name its interpreter: its first line must be one such as #!/bin/bash", exits.USAGE
        )
    return text


def _with_directives(context: typer.Context, target: _Target, ignore_unknown: bool) -> dict[str, Any] | None:
    """Parameters of the command with those of the script in place of defaults; None if the script has none.

    Raises:
        CommandError: the script has an option that is unknown or wrong; the message has its line.
    """
    assert isinstance(target.work, str)
    try:
        found = read_directives(target.work)
    except ValueError as error:
        raise exits.CommandError(f"{target.file}: {error}", exits.USAGE) from None
    words = [word for line in found.options for word in line.words]
    _remark(found, target.file, ignore_unknown or "--ignore-unknown" in words)
    if not words:
        return None
    for line in found.options:
        _parsed(context, line.words, f"{target.file}:{line.line}")
    script = _parsed(context, words, target.file)
    merged = dict(context.params)
    in_script = {name for name in script.params if _source(script, name) == "COMMANDLINE"}
    set_here = {name for name in merged if _source(context, name) in ("COMMANDLINE", "ENVIRONMENT")}
    for either in _EITHER:
        if set_here & either:
            in_script -= either
        elif either <= in_script:
            in_script -= either - {_last(words, either)}
            merged.update(dict.fromkeys(either))
    merged.update({name: script.params[name] for name in in_script - set_here})
    for name in _PAIRS & in_script & set_here:
        merged[name] = [*script.params[name], *merged[name]]
    return merged


def _last(words: Sequence[str], names: set[str]) -> str:
    """The parameter whose option comes last."""
    options = {f"--{name.replace('_', '-')}": name for name in names} | ({"-g": "gpus"} if "gpus" in names else {})
    return next(options[text] for word in reversed(words) if (text := word.partition("=")[0]) in options)


def _source(context: Any, name: str) -> str:
    source = context.get_parameter_source(name)
    return "" if source is None else source.name


def _parsed(context: typer.Context, words: Sequence[str], where: str) -> Any:
    """The context of options of a script, as of a command line.

    Raises:
        CommandError: they are no options of the command.
    """
    try:
        found = context.command.make_context(context.info_name, [*words, "--", "."], parent=context.parent)
    except exits.CommandError as error:
        raise exits.CommandError(f"{where}: {error}", error.code) from None
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        message = " ".join(error.format_message().split()).rstrip(".")  # pyright: ignore[reportAttributeAccessIssue]
        raise exits.CommandError(f"{where}: {message}", exits.USAGE) from None
    rest = list(found.params["command"] or ())
    if rest != ["."]:
        raise exits.CommandError(f"{where}: {rest[0]!r} is no option", exits.USAGE)
    return found


def _remark(found: Directives, file: str, ignore_unknown: bool) -> None:
    for note in found.notes:
        say(f"corral: {file}:{note.line}: {note.text}: {note.why}")
    if not found.unknown:
        return
    lines = [f"{file}:{note.line}: {note.text}: {note.why}" for note in found.unknown]
    if not ignore_unknown:
        many = "this means" if len(lines) == 1 else "these mean"
        raise exits.CommandError(
            f"{many} nothing here (--ignore-unknown submits it without):\n  " + "\n  ".join(lines), exits.USAGE
        )
    for line in lines:
        say(f"corral: ignored: {line}")


def _in_words(parse: Any, value: Any) -> Any:
    try:
        return parse(value)
    except InvalidRequest as error:
        raise InvalidRequest(_in_options(str(error)), error.code, error.field) from None


def _in_options(message: str) -> str:
    """An error of the client, with options in place of its arguments."""
    for argument, option in _OPTIONS.items():
        message = message.replace(argument, option)
    return message


def _print_submitted(job: Job, *, json: bool, quiet: bool, waits: bool) -> None:
    for warning in job.warnings:
        say(f"corral: {warning}")
    if json:
        print_json(job)
        return
    if quiet:
        typer.echo(job.job_id)
        return
    tasks = sum(job.counts.values())
    many = f" ({tasks} tasks)" if job.array else ""
    held = ", held: corral unhold " + job.job_id if job.held else ""
    console().print(f"[green]Submitted[/] job [bold]{escape(job.job_id)}[/]{many}{held}")
    if not waits:
        commands = ("state: corral job", "output: corral logs -f", "end: corral cancel")
        console().print(f"[dim]{' · '.join(f'{command} {job.job_id}' for command in commands)}[/]")


async def _ended(client: Client, job: Job, follow: bool) -> int:
    """Wait until a job has ended, with what it prints; returns its exit code."""
    try:
        if follow:
            await print_logs(client, job.job_id, follow=True)
        ended = await client.jobs.wait(job)
    except BaseException:
        say(f"corral: job {job.job_id} goes on: corral job {job.job_id}, or corral cancel {job.job_id}")
        raise
    code = exit_code(ended.tasks)
    if code and ended.job.message:
        say(f"corral: job {job.job_id}: {ended.job.state.value}: {ended.job.message}")
    return code or 0
