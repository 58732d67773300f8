"""Commands for jobs: `jobs`, `job`, `cancel`, `hold`, `unhold`, `resubmit`."""

from __future__ import annotations

import shlex
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import typer
from msgspec import Struct
from rich.markup import escape
from rich.table import Table

from ....client import Client, NotOwner, errors
from ....client.jobs.names import Selection, parse_selection
from ....client.jobs.results import exit_code
from ....schemas.values.misspelt import closest
from ....schemas.work import jobs as messages
from ....schemas.work.jobs import JobDetails, JobListing, JobState
from ... import exits, render
from ...options import AsJson, NatsUrl, Owner, Timeout, connected, console, print_json, run, say
from ...options_struct import takes
from . import summary as job_summary
from . import tables as job_tables

_TASKS = "Jobs or tasks: 1234, 1234_7, 1234_[0-9]."


def jobs(
    owner: Owner = None,
    mine: Annotated[bool, typer.Option("--mine", help="Only your own jobs.")] = False,
    active: Annotated[bool, typer.Option("--active", help="Only jobs that have not ended.")] = False,
    state: Annotated[
        list[str] | None, typer.Option("--state", "-s", help="Only in this state: running, failed. Repeatable.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", metavar="GLOB", help="Only with a name like this.")] = None,
    most: Annotated[int, typer.Option("--most", help="Maximum number of jobs to show.")] = 50,
    json: AsJson = False,
    nats: NatsUrl = None,
    timeout: Timeout = 10.0,
) -> None:
    """List jobs that have not ended, and those that ended lately, the newest first.

    The history has all jobs: corral query 'FROM jobs'.

    Examples:
      corral jobs
      corral jobs --mine --active
      corral jobs --state failed --name 'sweep*' --json
    """
    states = [_state(text) for text in state or []]

    async def work() -> list[messages.Job]:
        async with connected(nats, owner=owner, timeout=timeout) as client:
            return await client.jobs.find(
                owner=client.owner if mine else owner, states=states, name=name or "", active=active
            )

    found = run(work())
    if json:
        print_json(messages.Jobs(jobs=[JobListing(job=job) for job in found], total=len(found)))
    elif found:
        out = console()
        out.print(job_tables.jobs_table(found[:most], out.width))
        if len(found) > most:
            out.print(f"[dim]… and {len(found) - most} more jobs (--most)[/]")
    else:
        console().print("[dim]no jobs[/]")


def _state(text: str) -> JobState:
    try:
        return JobState(text.lower())
    except ValueError:
        near = closest(text.lower(), JobState)
        hint = f"did you mean {near}?" if near else f"there are {', '.join(JobState)}"
        raise exits.CommandError(f"--state {text!r} is no state: {hint}", exits.USAGE) from None


def job(
    which: Annotated[str, typer.Argument(metavar="JOB", help="Job or tasks: 1234, 1234_7, 1234_[0-9].")],
    wait: Annotated[
        bool, typer.Option("--wait", "-W", help="Wait until it has ended, and end with its exit code.")
    ] = False,
    script: Annotated[bool, typer.Option("--script", help="Print its script or command; only your own jobs.")] = False,
    override: Annotated[bool, typer.Option("--override", help="As an operator, with --script.")] = False,
    most: Annotated[int, typer.Option("--most", help="Maximum number of tasks to show.")] = 20,
    json: AsJson = False,
    nats: NatsUrl = None,
    timeout: Timeout = 10.0,
) -> None:
    """Show a job: its state, its tasks, why it waits or how it ended, and what it used of what it asked for.

    The summary counts all attempts of each task. What GPUs did comes from the history, so a processor must run.

    With --wait the exit code is that of the job, or of the tasks that are named, as of 'corral submit --wait'.

    Examples:
      corral job 1234
      corral job 1234 --wait
      corral job 1234_7
      corral job 1234 --script
      corral job 1234 --json
    """
    chosen = parse_selection(which)

    async def details() -> JobDetails:
        async with connected(nats, timeout=timeout) as client:
            return await client.jobs.show(chosen, operator=override)

    async def work() -> tuple[JobListing, list[tuple[str, str]]]:
        async with connected(nats, timeout=timeout) as client:
            listing = await (client.jobs.wait(chosen) if wait else client.jobs.get(chosen))
            return listing, [] if json else await job_summary.used(client, chosen)

    if script:
        _print_script(run(details()), json)
        return
    listing, summary = run(work())
    if chosen.indexes and not listing.tasks:
        raise exits.CommandError(f"job {chosen.job_id} has no such task: it has {listing.job.array or 'one'}",
                                 exits.NOT_YOURS)  # fmt: skip
    if json:
        print_json(listing)
    else:
        _print_job(listing, summary, most)
    if wait and (code := exit_code(listing.tasks)):
        raise typer.Exit(code)


def _print_job(listing: JobListing, summary: list[tuple[str, str]], most: int) -> None:
    out = console()
    out.print(_pairs(f"job {listing.job.job_id}", job_tables.details(listing)))
    shown = job_tables.shown_tasks(listing.tasks, most)
    if shown:
        out.print()
        out.print(job_tables.tasks_table(listing, shown))
    if len(listing.tasks) > len(shown):
        out.print(f"[dim]… and {len(listing.tasks) - len(shown)} more tasks (--most)[/]")
    if summary:
        out.print()
        out.print(_pairs("used", [(name, escape(value)) for name, value in summary]))
    if wrong := job_tables.failed_tasks(listing):
        out.print(f"[dim]again: corral resubmit '{wrong}'[/]")


def _pairs(title: str, pairs: list[tuple[str, Any]]) -> Table:
    made = render.table(title, "")
    made.columns[1].no_wrap, made.columns[1].overflow = False, "fold"
    for name, value in pairs:
        made.add_row(f"[dim]{name}[/]", value)
    return made


def _print_script(shown: JobDetails, json: bool) -> None:
    if json or shown.spec is None:
        print_json(shown)
    elif shown.spec.script:
        typer.echo(shown.spec.script, nl=not shown.spec.script.endswith("\n"))
    else:
        typer.echo(shlex.join(shown.spec.command))


class CommandOptions(Struct, kw_only=True):
    """Options of a command about jobs."""

    which: Annotated[list[str] | None, typer.Argument(metavar="[JOB]...", help=_TASKS)] = None
    every: Annotated[bool, typer.Option("--all", help="All of the owner's jobs that have not ended.")] = False
    name: Annotated[str | None, typer.Option("--name", metavar="GLOB", help="Of these, those with such a name.")] = None
    reason: Annotated[str, typer.Option("--reason", "-r", help="Reason, for the history.")] = ""
    override: Annotated[bool, typer.Option("--override", help="As an operator, for jobs of other owners.")] = False
    owner: Owner = None
    json: AsJson = False
    nats: NatsUrl = None
    timeout: Timeout = 10.0


class CancelOptions(CommandOptions, kw_only=True):
    """Options of `corral cancel`."""

    signal: Annotated[
        str, typer.Option("--signal", metavar="SIGNAL", help="Signal to send first, in place of SIGTERM: SIGINT.")
    ] = ""


@takes(CancelOptions)
def cancel(options: CancelOptions) -> None:
    """Cancel jobs or tasks: end them, or take them from the queue (exit code 5 if one isn't there or isn't yours).

    What runs gets SIGTERM, and SIGKILL after the job's grace.

    Examples:
      corral cancel 1234
      corral cancel '1234_[5-9]' 1235_0
      corral cancel --all --name 'sweep*'
    """
    signal = _signal(options.signal)
    _each(
        options,
        "Cancelled",
        lambda client, one: client.jobs.cancel(one, reason=options.reason, signal=signal, operator=options.override),
    )


def _signal(text: str) -> str:
    from ..preemption import parse_signal

    return parse_signal(text, "--signal").name if text else ""


@takes(CommandOptions)
def hold(options: CommandOptions) -> None:
    """Hold jobs or tasks: what waits is not started before 'corral unhold'; what runs goes on.

    Examples:
      corral hold 1234
      corral hold '1234_[50-99]'
    """
    _each(options, "Held", lambda client, one: client.jobs.hold(one, reason=options.reason, operator=options.override))


@takes(CommandOptions)
def unhold(options: CommandOptions) -> None:
    """Let held jobs or tasks be started again.

    Examples:
      corral unhold 1234
    """
    _each(
        options,
        "Released",
        lambda client, one: client.jobs.release(one, reason=options.reason, operator=options.override),
    )


@takes(CommandOptions)
def resubmit(options: CommandOptions) -> None:
    """Queue tasks that have ended again, under the same job: those named, or all that have not ended well.

    Examples:
      corral resubmit 1234
      corral resubmit '1234_[3,17]'
    """
    if options.every:
        raise exits.CommandError("--all is for jobs that have not ended: name those to resubmit", exits.USAGE)
    _each(
        options,
        "Resubmitted",
        lambda client, one: client.jobs.resubmit(one, reason=options.reason, operator=options.override),
    )


def _each(options: CommandOptions, done: str, command: Callable[[Client, Selection], Awaitable[JobDetails]]) -> None:
    """Give a command to each job that is named; of several errors the others are printed, and the first is raised."""
    if bool(options.which) == (options.every or options.name is not None):
        raise exits.CommandError("give the ids of jobs (see corral jobs), or --all, or --name", exits.USAGE)
    chosen = [parse_selection(text) for text in options.which or []]

    async def work() -> tuple[list[JobDetails], list[errors.CorralError]]:
        answers: list[JobDetails] = []
        failed: list[errors.CorralError] = []
        async with connected(options.nats, owner=options.owner, timeout=options.timeout) as client:
            if not chosen:
                owned = await client.jobs.find(owner=client.owner, name=options.name or "", active=True)
                chosen.extend(Selection(one.job_id) for one in owned)
            for one in chosen:
                try:
                    answers.append(await command(client, one))
                except NotOwner as error:
                    failed.append(NotOwner(f"{error} (operators: --override)", error.code, error.field))
                except errors.ServiceError as error:
                    failed.append(error)
        return answers, failed

    answers, failed = run(work())
    if options.json:
        print_json(answers)
    else:
        for answer in answers:
            one = answer.job
            tasks = f" ({answer.changed} tasks)" if one.array else ""
            same = "" if answer.changed else ": nothing to do, it is " + one.state.value
            console().print(f"[green]{done}[/] {escape(one.job_id)} {escape(one.name)}{same or tasks}")
        if not answers and not failed:
            console().print("[dim]no jobs[/]")
    for error in failed[1:]:
        say(f"corral: {error}")
    if failed:
        raise failed[0]
