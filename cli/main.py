"""The `corral` command line. A command's module is imported only when the command runs."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated, Any, Final

import typer
import typer.core
import typer.main

from .loading import load
from .registry import COMMANDS, Entry

DEBUG_VARIABLE: Final = "CORRAL_DEBUG"


class LazyCommands(typer.core.TyperGroup):
    """Group of commands that are imported lazily: help imports none of them, and running one imports only that one."""

    listing = False

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of all commands, in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command; while commands are being listed, a stub with its name and summary."""
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        if self.listing:
            return _stub(cmd_name, entry)
        command = load(cmd_name)
        if "_CORRAL_COMPLETE" in os.environ:
            from .completion import attach

            attach(cmd_name, command)
        return command

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Format the help without importing the commands."""
        self.listing = True
        super().format_help(ctx, formatter)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """Complete names of commands without importing them."""
        self.listing = True
        return super().shell_complete(ctx, incomplete)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Resolve the command without importing others, with a suggestion if the name is misspelled."""
        self.commands = {name: _stub(name, entry) for name, entry in COMMANDS.items()}
        return super().resolve_command(ctx, args)


def _stub(name: str, entry: Entry) -> Any:
    return typer.core.TyperCommand(name, help=entry.summary, rich_help_panel=entry.panel)


def expand_optional_values(arguments: list[str]) -> list[str]:
    """Replace `--mig` without a value by `--mig=any`, since Typer has no options with an optional value.

    Arguments after `--` belong to a command of the user's and are kept. Without `--`, all arguments are kept if a
    command is named that takes such a command.
    """
    end = arguments.index("--") if "--" in arguments else len(arguments)
    if end == len(arguments) and any(COMMANDS[name].passes_arguments for name in arguments if name in COMMANDS):
        return arguments
    return [
        "--mig=any" if text == "--mig" and at < end and (arguments[at + 1 :] or ["-"])[0].startswith("-") else text
        for at, text in enumerate(arguments)
    ]


app = typer.Typer(
    cls=LazyCommands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _contexts(incomplete: str) -> list[str]:
    from .completion import contexts

    return [name for name in contexts(typer.Context(typer.main.get_command(app))) if name.startswith(incomplete)]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"corral {version('corral')}")
        raise typer.Exit


@app.callback(
    epilog="Exit codes: 0 done · 1 failed · 2 wrong usage · 3 no server · 4 rejected · 5 not found or not yours · "
    "6 no planner or processor · 7 timed out · 8 query failed · 9 lease lost · "
    "126, 127 the command can't be run · 130 interrupted · 255 session lost"
)
def corral(
    ctx: typer.Context,
    nats: Annotated[
        str | None,
        typer.Option(
            "--nats", metavar="URL", help="URL of the NATS server. Default: $CORRAL_NATS_URL, then localhost."
        ),
    ] = None,
    creds: Annotated[
        str | None, typer.Option("--creds", metavar="FILE", help="Credentials file. Default: $CORRAL_NATS_CREDS.")
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(
            "--context",
            metavar="NAME",
            help="Named connection settings (corral context). Default: $CORRAL_CONTEXT.",
            autocompletion=_contexts,
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option("--config", metavar="FILE", help="Configuration file. Default: $CORRAL_CONFIG, then corral.toml."),
    ] = None,
    utc: Annotated[bool, typer.Option("--utc", help="Print times in UTC instead of this machine's zone.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """GPU fleet telemetry, history and placement on one message bus.

    Start with:
      corral up                                        start a cluster on this machine
      corral run --gpus 1 -- python train.py           run a command on a GPU
      corral query "FROM samples LIMIT 5"              query the history
    """
    from ..bus.connect import URL_VARIABLE
    from .global_options import GIVEN, record_options, use_credentials

    GIVEN.clear()
    if utc:
        os.environ["TZ"] = "UTC"
    if ctx.invoked_subcommand and any(name.startswith("CORRAL_") for name in os.environ):
        from .environment_check import check

        check(ctx.invoked_subcommand)
    record_options(ctx.invoked_subcommand or "", nats=nats, creds=creds, context=context, config=config)
    if nats:
        os.environ[URL_VARIABLE] = nats
    if config:
        # Parts that a command starts read the same file.
        os.environ["CORRAL_CONFIG"] = os.path.abspath(config)
    if context or os.environ.get("CORRAL_CONTEXT") or _config_may_be_there():
        from .config_defaults import configure

        configure(ctx, context, load, must_be_there=config is not None)
    if nats:
        os.environ[URL_VARIABLE] = nats
    if creds:
        use_credentials(creds)


def _config_may_be_there() -> bool:
    """True if a configuration file may exist; otherwise the import of the configuration's modules is skipped."""
    from ..bus.config_files import CONFIG_VARIABLE, paths

    return bool(os.environ.get(CONFIG_VARIABLE)) or any(file.exists() for file in paths())


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Errors end as one line on stderr and a documented exit code, never as a traceback."""
    try:
        _main(arguments)
    except SystemExit as end:
        if isinstance(end.code, int) and end.code:
            from .work import shell_exports

            if shell_exports.wanted(arguments):
                # A script evaluates this output, and must not continue as if it had a lease.
                typer.echo(shell_exports.failed(end.code), nl=False)
        raise


def _main(arguments: list[str] | None) -> None:
    for name, value in list(os.environ.items()):
        # Kubernetes sets CORRAL_DASHBOARD_PORT in every pod for a service `corral-dashboard`; it is no option.
        if name.startswith("CORRAL_") and value.startswith("tcp://"):
            del os.environ[name]
    words = expand_optional_values(sys.argv[1:] if arguments is None else arguments)
    try:
        # `corral submit` distinguishes a command behind `--` from a script, and parsing drops the `--`.
        ended = typer.main.get_command(app).main(words, prog_name="corral", standalone_mode=False, obj=tuple(words))
    except KeyboardInterrupt:
        sys.exit(130)
    except typer.Abort:
        print("corral: aborted", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if hasattr(error, "format_message"):
            sys.exit(_wrong_usage(error))
        if os.environ.get(DEBUG_VARIABLE):
            traceback.print_exc()
        from .exits import code_and_message

        code, message = code_and_message(error)
        from .config_defaults import setting_source

        print(f"corral: {message}{setting_source(message)}", file=sys.stderr)
        sys.exit(code)
    sys.exit(ended if isinstance(ended, int) else 0)


def _wrong_usage(error: Any) -> int:
    """Print a usage error as one line, or the help if no arguments were given. Returns the exit code."""
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
