"""The `corral` command: which commands there are, and where each lives. A command's module is imported when it runs."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import Annotated, Any, Final, NamedTuple

import typer
import typer.core
import typer.main


class Entry(NamedTuple):
    """A command in the list.

    Attributes:
        place: module within `corral.cli`, and the function in it.
        panel: heading that it stands under.
        summary: one line for the list.
        passes_arguments: what follows is a command of the user's with options of its own.
    """

    place: str
    panel: str
    summary: str
    passes_arguments: bool = False


_TRY: Final = "Try it"
_WORK: Final = "Work on GPUs"
_LOOK: Final = "See the fleet"
_OPERATE: Final = "Operate"
_PARTS: Final = "Run the parts"

COMMANDS: Final[dict[str, Entry]] = {
    "up": Entry("up:up", _TRY, "Start a whole cluster on this machine: bus, collector, processor, planner."),
    "demo": Entry("demo:demo", _TRY, "See it all happen once, in under a minute."),
    "run": Entry("run:run", _WORK, "Run a command on GPUs: request, wait, run, renew, release.", True),
    "shell": Entry("run:shell", _WORK, "Open a shell that holds GPUs."),
    "request": Entry("work:request", _WORK, "Request GPUs; print the assignment or the reasons why not."),
    "renew": Entry("work:renew", _WORK, "Keep a lease for longer."),
    "release": Entry("work:release", _WORK, "Give leases back."),
    "leases": Entry("work:leases", _WORK, "List leases."),
    "explain": Entry("work:explain", _WORK, "What would become of a request, device by device."),
    "queue": Entry("work:queue", _WORK, "List the requests that wait."),
    "withdraw": Entry("work:withdraw", _WORK, "Take requests back that wait."),
    "top": Entry("top:top", _LOOK, "The fleet, live."),
    "dashboard": Entry("dashboard:dashboard", _LOOK, "The fleet in a browser: heat map, timelines, leases, SQL."),
    "devices": Entry("fleet:devices", _LOOK, "List devices with their load, free memory and leases."),
    "ps": Entry("ps:ps", _LOOK, "List the processes on GPUs, with their leases."),
    "fleet": Entry("fleet:fleet", _LOOK, "The fleet in numbers."),
    "query": Entry("query:query", _LOOK, "Ask the history a question in SQL."),
    "watch": Entry("fleet:watch", _LOOK, "Print samples as they come, one JSON object a line."),
    "snapshot": Entry("snapshot:snapshot", _LOOK, "Take a consistent copy of the history away."),
    "drain": Entry("fleet:drain", _OPERATE, "Keep new work off devices or hosts."),
    "undrain": Entry("fleet:undrain", _OPERATE, "Let work on drained devices or hosts again."),
    "evict": Entry("fleet:evict", _OPERATE, "Take a lease back from its owner."),
    "health": Entry("health:health", _OPERATE, "Whether a part is well, by the exit code."),
    "simulate": Entry("simulate:simulate", _OPERATE, "Replay a trace of requests through the planner's own core."),
    "context": Entry("context:context", _OPERATE, "Name the buses that you use, and choose one."),
    "config": Entry("settings:config", _OPERATE, "Show the configuration, and where each value is from."),
    "auth": Entry("auth:auth", _OPERATE, "Users of the bus, what each may do, keys and certificates."),
    "doctor": Entry("doctor:doctor", _OPERATE, "Look for what is wrong, each finding with its fix."),
    "collect": Entry("collect:collect", _PARTS, "Collect this host's GPU telemetry and publish it."),
    "process": Entry("process:process", _PARTS, "Turn telemetry into history, and answer SQL."),
    "plan": Entry("plan:plan", _PARTS, "Answer work requests."),
    "export": Entry("export:export", _PARTS, "Serve the whole fleet's metrics to Prometheus."),
}

DEBUG_VARIABLE: Final = "CORRAL_DEBUG"


class LazyCommands(typer.core.TyperGroup):
    """Commands by name: a list of them costs no import, and running one imports that one alone."""

    listing = False

    def list_commands(self, ctx: Any) -> list[str]:
        """All names, in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command; while the list is being written only its name and summary."""
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        return _stub(cmd_name, entry) if self.listing else load(cmd_name)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The help, without an import of each command."""
        self.listing = True
        super().format_help(ctx, formatter)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """Complete names of commands, without an import of each."""
        self.listing = True
        return super().shell_complete(ctx, incomplete)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As above, with a suggestion where the name is misspelt."""
        self.commands = {name: _stub(name, entry) for name, entry in COMMANDS.items()}
        return super().resolve_command(ctx, args)


def _stub(name: str, entry: Entry) -> Any:
    return typer.core.TyperCommand(name, help=entry.summary, rich_help_panel=entry.panel)


def spelled_out(arguments: list[str]) -> list[str]:
    """The arguments with `--mig` alone as `--mig=any`: Typer has no options whose value may be left out.

    What stands behind `--` is a command of the user's; so may be the rest where a command takes one without it.
    """
    end = arguments.index("--") if "--" in arguments else len(arguments)
    if end == len(arguments) and any(COMMANDS[name].passes_arguments for name in arguments if name in COMMANDS):
        return arguments
    return [
        "--mig=any" if text == "--mig" and at < end and (arguments[at + 1 :] or ["-"])[0].startswith("-") else text
        for at, text in enumerate(arguments)
    ]


def load(name: str) -> Any:
    """Import a command and make it one of Typer's."""
    from ..bus import websockets

    websockets.leave_out()
    from .everywhere import attach as attach_everywhere

    entry = COMMANDS[name]
    module, attribute = entry.place.split(":")
    found = getattr(importlib.import_module(f"corral.cli.{module}"), attribute)
    if not isinstance(found, typer.Typer):
        app = typer.Typer(add_completion=False, rich_markup_mode="rich")
        settings = {"allow_interspersed_args": False} if entry.passes_arguments else {}
        app.command(name, context_settings=settings)(found)
        found = app
    command = typer.main.get_command(found)
    command.name = name
    attach_everywhere(name, command)
    # Every option has a variable, CORRAL_<COMMAND>_<OPTION>; the help names those that have one of their own.
    command.context_settings["auto_envvar_prefix"] = f"CORRAL_{name}"
    inner: dict[str, Any] = getattr(command, "commands", None) or {}
    options: list[Any] = [option for one in (command, *inner.values()) for option in one.params]
    for option in options:
        if hasattr(option, "show_envvar"):
            option.show_envvar = option.envvar is not None
    if "_CORRAL_COMPLETE" in os.environ:
        from .complete import attach

        attach(name, command)
    return command


app = typer.Typer(
    cls=LazyCommands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _contexts(incomplete: str) -> list[str]:
    from .complete import contexts

    return [name for name in contexts(typer.Context(typer.main.get_command(app))) if name.startswith(incomplete)]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"corral {version('corral')}")
        raise typer.Exit


@app.callback(
    epilog="Exit codes: 0 done · 1 failed · 2 wrong usage · 3 no server · 4 rejected · 5 not found or not yours · "
    "6 no planner or processor · 7 timed out · 8 query failed · 9 lease lost · "
    "126, 127 the command can't be run · 130 interrupted"
)
def corral(
    ctx: typer.Context,
    nats: Annotated[
        str | None, typer.Option("--nats", metavar="URL", help="The bus. Default: $CORRAL_NATS_URL, then localhost.")
    ] = None,
    creds: Annotated[
        str | None, typer.Option("--creds", metavar="FILE", help="Credentials file. Default: $CORRAL_NATS_CREDS.")
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(
            "--context", metavar="NAME", help="A named bus. Default: $CORRAL_CONTEXT.", autocompletion=_contexts
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option("--config", metavar="FILE", help="Configuration. Default: $CORRAL_CONFIG, then corral.toml."),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A GPU fleet that senses, remembers and places, on one message bus.

    Start with:
      corral up                                        a cluster on this machine
      corral run --gpus 1 -- python train.py           work on a GPU
      corral query "FROM samples LIMIT 5"              ask the history
    """
    from ..bus.connect import URL_VARIABLE
    from .everywhere import GIVEN, take, use_credentials

    GIVEN.clear()
    if ctx.invoked_subcommand and any(name.startswith("CORRAL_") for name in os.environ):
        from .variables import check

        check(ctx.invoked_subcommand)
    take(ctx.invoked_subcommand or "", nats=nats, creds=creds, context=context, config=config)
    if nats:
        os.environ[URL_VARIABLE] = nats
    if config:
        # Parts that a command starts read the same file.
        os.environ["CORRAL_CONFIG"] = os.path.abspath(config)
    if context or os.environ.get("CORRAL_CONTEXT") or _config_may_be_there():
        from .settings import configure

        configure(ctx, context, must_be_there=config is not None)
    if nats:
        os.environ[URL_VARIABLE] = nats
    if creds:
        use_credentials(creds)


def _config_may_be_there() -> bool:
    """Whether there is a configuration to read: most have none, and need not wait for it."""
    if os.environ.get("CORRAL_CONFIG"):
        return True
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return any(map(os.path.exists, (os.path.join(base, "corral", "corral.toml"), "/etc/corral/corral.toml")))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Errors end as one line on stderr and a documented exit code, never as a traceback."""
    try:
        _main(arguments)
    except SystemExit as end:
        if isinstance(end.code, int) and end.code:
            from . import exports

            if exports.wanted(arguments):
                # A script evaluates what stands here, and shall not go on as if it had a lease.
                typer.echo(exports.failed(end.code), nl=False)
        raise


def _main(arguments: list[str] | None) -> None:
    for name, value in list(os.environ.items()):
        # Kubernetes tells every pod of a service `corral-dashboard` by CORRAL_DASHBOARD_PORT: that is no option.
        if name.startswith("CORRAL_") and value.startswith("tcp://"):
            del os.environ[name]
    try:
        ended = typer.main.get_command(app).main(
            spelled_out(sys.argv[1:] if arguments is None else arguments), prog_name="corral", standalone_mode=False
        )
    except KeyboardInterrupt:
        sys.exit(130)
    except typer.Abort:
        print("corral: nothing was done", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if hasattr(error, "format_message"):
            sys.exit(_wrong_usage(error))
        if os.environ.get(DEBUG_VARIABLE):
            traceback.print_exc()
        from .exits import code_and_message

        code, message = code_and_message(error)
        if settings := sys.modules.get("corral.cli.settings"):
            message += settings.blame(message)
        print(f"corral: {message}", file=sys.stderr)
        sys.exit(code)
    sys.exit(ended if isinstance(ended, int) else 0)


def _wrong_usage(error: Any) -> int:
    """Say what was wrong with the command line, in a line; where nothing was given at all, show the help."""
    ctx = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
    else:
        words = " ".join(error.format_message().split())
        path = ctx.command_path if ctx is not None else "corral"
        print(f"corral: {words.rstrip('.')} ({path} --help)", file=sys.stderr)
    return error.exit_code


if __name__ == "__main__":
    main()
