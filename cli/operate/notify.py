"""`corral notify`: rules that tell an owner when something happens, and tests of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.markup import escape
from rich.table import Table

from ...schemas.work.notifications import NewsKind, Notifications
from ..exits import FAILED, USAGE, CommandError
from ..options import AsJson, NatsUrl, Timeout, connected, console, print_json, run, say

if TYPE_CHECKING:
    from ...schemas.work.notifications import NotifyRule, OwnedRule

notify = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", add_completion=False)

_TEST_SECONDS: Final = 60.0
_WHAT: Final = "What"
_WHEN: Final = "Limits"
Whose = Annotated[
    str | None,
    typer.Option("--owner", metavar="NAME", help="Owner of the rules. Default: $CORRAL_OWNER, then your user name."),
]
AsOperator = Annotated[
    bool, typer.Option("--operator", help="As an operator: about the rules of anybody, and those in the file.")
]


@notify.callback()
def notifications() -> None:
    """Have e-mail, a chat or a webhook told when something happens (docs/notifications.md).

    Kinds: granted, expiring, preempted, cut-short, ended, idle, job-started, job-ended, job-failed, unhealthy,
    queue-long, over-share.

    Examples:
      corral notify targets
      corral notify add away --on preempted,job-ended --to ann-mail --quiet '22:00-07:00 Europe/Berlin'
      corral notify test --rule away
      corral notify list
    """


def _words(given: list[str] | None) -> list[str]:
    return [word.strip() for text in given or [] for word in text.split(",") if word.strip()]


@notify.command()
def add(
    name: Annotated[str, typer.Argument(help="Name of the rule; one that is there is replaced.")],
    on: Annotated[
        list[str] | None,
        typer.Option("--on", metavar="KIND", help=f"{', '.join(NewsKind)}. Repeatable, or with commas."),
    ] = None,
    to: Annotated[
        list[str] | None,
        typer.Option("--to", metavar="TARGET", help="Name of a target: `corral notify targets`. Repeatable."),
    ] = None,
    workload: Annotated[
        list[str] | None,
        typer.Option("--workload", metavar="GLOB", help="Only leases and jobs of this name.", rich_help_panel=_WHAT),
    ] = None,
    host: Annotated[
        list[str] | None, typer.Option("--host", metavar="GLOB", help="Only on these hosts.", rich_help_panel=_WHAT)
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", metavar="NAME", help="Only GPUs of this model.", rich_help_panel=_WHAT),
    ] = None,
    group: Annotated[
        list[str] | None,
        typer.Option("--group", metavar="GLOB", help="Only this group, and those within.", rich_help_panel=_WHAT),
    ] = None,
    quiet: Annotated[
        list[str] | None,
        typer.Option(
            "--quiet",
            metavar="TIMES",
            help="Wait until it is over: '22:00-07:00 Europe/Berlin', 'Sat-Sun 00:00-24:00'. Repeatable.",
        ),
    ] = None,
    urgent: Annotated[
        list[str] | None, typer.Option("--urgent", metavar="KIND", help="Kinds that do not wait.")
    ] = None,
    zone: Annotated[
        str | None,
        typer.Option("--zone", metavar="ZONE", help="Time zone of --quiet and the messages. Default: this host's."),
    ] = None,
    waited: Annotated[
        str | None,
        typer.Option(
            "--waited", metavar="TIME", help="granted: after so long in the queue (10s).", rich_help_panel=_WHEN
        ),
    ] = None,
    before: Annotated[
        str | None,
        typer.Option("--before", metavar="TIME", help="expiring: so long before (15m).", rich_help_panel=_WHEN),
    ] = None,
    idle_below: Annotated[
        str | None,
        typer.Option(
            "--idle-below", metavar="PERCENT", help="idle: no sample reaches this (5%).", rich_help_panel=_WHEN
        ),
    ] = None,
    idle_for: Annotated[
        str | None, typer.Option("--idle-for", metavar="TIME", help="idle: for so long (30m).", rich_help_panel=_WHEN)
    ] = None,
    queue_requests: Annotated[
        int | None,
        typer.Option("--queue-requests", metavar="N", help="queue-long: at least so many wait.", rich_help_panel=_WHEN),
    ] = None,
    queue_wait: Annotated[
        str | None,
        typer.Option(
            "--queue-wait", metavar="TIME", help="queue-long: one has waited for so long.", rich_help_panel=_WHEN
        ),
    ] = None,
    share_excess: Annotated[
        str | None,
        typer.Option(
            "--share-excess",
            metavar="PERCENT",
            help="over-share: by so much more than is fair (10%).",
            rich_help_panel=_WHEN,
        ),
    ] = None,
    resolved: Annotated[
        bool,
        typer.Option(
            "--resolved", help="unhealthy, queue-long, over-share: also when it is over.", rich_help_panel=_WHEN
        ),
    ] = False,
    owner: Whose = None,
    operator: AsOperator = False,
    json: AsJson = False,
    nats: NatsUrl = None,
    timeout: Timeout = 10.0,
) -> None:
    """Add a rule for your leases and jobs, or replace that of the same name.

    Examples:
      corral notify add my-turn --on granted,expiring --to ann-mail
      corral notify add nights --on job-ended --to ann-mail --quiet 22:00-07:00 --urgent job-ended
      corral notify add wasted --on idle --idle-below 5% --idle-for 1h --to lab-chat
    """
    given: dict[str, Any] = {
        "name": name,
        "on": _words(on),
        "to": _words(to),
        "workloads": _words(workload),
        "hosts": _words(host),
        "models": _words(model),
        "groups": _words(group),
        "quiet": [text.strip() for text in quiet or []],
        "urgent": _words(urgent),
        "waited": waited,
        "before": before,
        "idle_below": idle_below,
        "idle_for": idle_for,
        "queue_requests": queue_requests,
        "queue_wait": queue_wait,
        "share_excess": share_excess,
        "resolved": resolved,
    }
    rule = _rule({key: value for key, value in given.items() if value not in (None, [], False)}, zone)
    answer = run(_set(nats, timeout, rule, owner, operator))
    if json:
        print_json(answer)
    else:
        say(f"{name}: {', '.join(rule.on)} to {', '.join(rule.to)} (corral notify test --rule {name})")


def _rule(given: dict[str, Any], zone: str | None) -> NotifyRule:
    from ...notifier.quiet import named_zone
    from ...notifier.rule_text import rule_of
    from ...notifier.rules import WrongRule
    from ..clock_times import zone_of

    if zone is not None or not any(map(named_zone, given.get("quiet", []))):
        given["zone"] = zone_of(zone).name
    for key, hint in (("on", "--on preempted,job-ended"), ("to", "--to ann-mail (corral notify targets lists them)")):
        if key not in given:
            raise CommandError(f"--{key} is missing: {hint}", USAGE)
    try:
        return rule_of(given)
    except WrongRule as error:
        option = "NAME" if error.field == "name" else f"--{_OPTIONS.get(error.field, error.field).replace('_', '-')}"
        text = str(error).removeprefix(f"{error.field}: ")
        raise CommandError(f"{option}: {text}", USAGE) from None


_OPTIONS: Final = {"workloads": "workload", "hosts": "host", "models": "model", "groups": "group"}


async def _set(nats: str | None, timeout: float, rule: NotifyRule, owner: str | None, operator: bool) -> Notifications:
    async with connected(nats, owner=None if operator else owner, timeout=timeout) as client:
        if operator and owner is None:
            owner = client.owner
        return await client.notifications.set(rule, owner=owner, override=operator)


@notify.command("list")
def list_rules(
    owner: Whose = None,
    operator: AsOperator = False,
    json: AsJson = False,
    nats: NatsUrl = None,
    timeout: Timeout = 10.0,
) -> None:
    """List your rules; with --operator those of everybody, and of the notifier's file.

    Examples:
      corral notify list
      corral notify list --operator
      corral notify list --operator --owner ann --json
    """
    answer = run(_listing(nats, timeout, owner, operator))
    if json:
        print_json(answer)
        return
    if not answer.rules:
        say("no rules yet: corral notify add NAME --on preempted,job-ended --to TARGET")
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in (*(("OWNER",) if operator else ()), "RULE", "ON", "TO", "ELSE"):
        table.add_column(column)
    for owned in answer.rules:
        table.add_row(*_row(owned, operator))
    console().print(table)


def _row(owned: OwnedRule, operator: bool) -> list[str]:
    from ...notifier.rule_text import in_text

    rule = owned.rule
    problem = f"[red]{escape(owned.problem)}[/red]" if owned.problem else ""
    return [
        *((escape(owned.owner) or "[dim]file[/dim]",) if operator else ()),
        escape(rule.name),
        ", ".join(rule.on),
        escape(", ".join(rule.to)),
        "; ".join(filter(None, (escape(in_text(rule)), problem))),
    ]


async def _listing(nats: str | None, timeout: float, owner: str | None, operator: bool) -> Notifications:
    async with connected(nats, owner=None if operator else owner, timeout=timeout) as client:
        return await client.notifications.rules(owner=owner, override=operator)


@notify.command()
def targets(
    owner: Whose = None,
    operator: AsOperator = False,
    json: AsJson = False,
    nats: NatsUrl = None,
    timeout: Timeout = 10.0,
) -> None:
    """List the targets that your rules may name, and whether they work; with --operator all.

    Examples:
      corral notify targets
      corral notify targets --operator --json
    """
    answer = run(_listing(nats, timeout, owner, operator))
    if json:
        print_json(answer.targets)
        return
    if not answer.targets:
        say("no targets for you yet: an operator adds them to the file of the notifier (docs/notifications.md)")
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("TARGET", "SERVICE", "WAITING", "STATE"):
        table.add_column(column, justify="right" if column == "WAITING" else "left")
    for target in answer.targets:
        state = f"[red]{escape(target.problem)}[/red]" if target.failing_since else "ok"
        if not target.service:
            state = "[red]its address is wrong: `corral notifier --check` says why[/red]"
        table.add_row(escape(target.name), escape(target.service), str(target.waiting), state)
    console().print(table)


@notify.command()
def remove(
    name: Annotated[str, typer.Argument(help="Name of the rule.")],
    owner: Whose = None,
    operator: AsOperator = False,
    nats: NatsUrl = None,
    timeout: Timeout = 10.0,
) -> None:
    """Remove a rule. What it has said already is not taken back.

    Examples:
      corral notify remove nights
      corral notify remove nights --operator --owner ann
    """

    async def work() -> None:
        async with connected(nats, owner=None if operator else owner, timeout=timeout) as client:
            whose = client.owner if operator and owner is None else owner
            await client.notifications.remove(name, owner=whose, override=operator)

    run(work())
    say(f"{name} is removed")


@notify.command("test")
def send_test(
    target: Annotated[str | None, typer.Option("--target", metavar="NAME", help="Send to this target.")] = None,
    rule: Annotated[str | None, typer.Option("--rule", metavar="NAME", help="Send to the targets of a rule.")] = None,
    owner: Whose = None,
    operator: AsOperator = False,
    json: AsJson = False,
    nats: NatsUrl = None,
    timeout: Timeout = _TEST_SECONDS,
) -> None:
    """Send a test message for real, and say whether it was taken. Exit code 1 if one was not.

    Examples:
      corral notify test --target ann-mail
      corral notify test --rule nights
      corral notify test --operator --target ops-chat
    """
    if (target is None) == (rule is None):
        raise CommandError("say what to test: --target NAME (corral notify targets) or --rule NAME", USAGE)

    async def work() -> Notifications:
        async with connected(nats, owner=None if operator else owner, timeout=timeout) as client:
            return await client.notifications.test(rule=rule, target=target, owner=owner, override=operator)

    results = run(work()).results
    if json:
        print_json(results)
    else:
        for result in results:
            how = f"sent in {result.seconds:.1f} s" if result.sent else result.problem
            print(f"{result.target}: {how}")
    if failed := [result.target for result in results if not result.sent]:
        raise CommandError(f"not sent to {', '.join(failed)}", FAILED)
