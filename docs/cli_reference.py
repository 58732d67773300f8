"""The command line and the configuration as documents: every command, option, variable, key and exit code."""

from __future__ import annotations

import inspect
import re
import textwrap
import tomllib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import typer
from corral.bus.connect import DEFAULT_URL
from corral.cli import config, exits
from corral.cli.loading import load
from corral.cli.main import app
from corral.cli.operate.config import SERVICES, variables
from corral.cli.registry import COMMANDS
from corral.cli.work import request_options
from corral.client.config import VARIABLES, Context

OTHER_VARIABLES: dict[str, tuple[str, str]] = {
    "CORRAL_CONFIG": ("two files, see [above](#the-file)", "The only configuration file to read."),
    "CORRAL_CONTEXT": ("the current one", "Name of the context to use."),
    "CORRAL_LEASE": (
        "–",
        "Id of the lease. Set by Corral for work under a lease; collectors read it from the environment of processes.",
    ),
    "CORRAL_DEVICES_FILE": (
        "–",
        "File with the UUIDs of the GPUs that the command of `corral run --on-resize` may use, with commas. "
        "Set by Corral for the command.",
    ),
    "CORRAL_RESTART_COUNT": (
        "–",
        "Number of times that the command of `corral run --requeue` was run before. Set by Corral for the command.",
    ),
    "CORRAL_JOB_ID": (
        "–",
        "Id of the job. Set by the runner for the processes of [jobs](../jobs.md#what-a-job-sees), like the next ones.",
    ),
    "CORRAL_JOB_NAME": ("–", "Name of the job; empty without one."),
    "CORRAL_ATTEMPT": ("–", "Number of the attempt, from 1."),
    "CORRAL_ARRAY_INDEX": ("–", "Index of the task, in an array."),
    "CORRAL_ARRAY_FIRST": ("–", "Smallest index of the array."),
    "CORRAL_ARRAY_LAST": ("–", "Greatest index of the array."),
    "CORRAL_ARRAY_COUNT": ("–", "Number of tasks of the array."),
    "CORRAL_ADDRESSES": ("–", "Network addresses of the task's hosts, in the order of their ranks, with commas."),
    "CORRAL_HOSTS": ("–", "Names of the task's hosts, in the order of their ranks, with commas."),
    "CORRAL_INBOX_PREFIX": ("that of the credentials, else `_INBOX`", "Prefix of reply subjects."),
    "CORRAL_GRAFANA_TOKEN": ("–", "`compose.yaml`: token of Grafana for the history."),
    "CORRAL_HTTP_PORT": ("`8700`", "`compose.yaml`: the port of the gateway on this machine."),
    "CORRAL_PORT": ("`4222`", "`compose.yaml`: the port of the bus on this machine."),
    "CORRAL_PORT_2": ("`4223`", "`compose.yaml`: the port of the second server of a cluster."),
    "CORRAL_PORT_3": ("`4224`", "`compose.yaml`: the port of the third server."),
    "CORRAL_NOTIFY_DIR": ("`./notify`", "`compose.yaml`: folder with the notifier's `targets.toml` and `rules.toml`."),
    "CORRAL_BUS_URLS": ("`nats://nats:4222`", "`compose.yaml`: the servers of the bus, separated by commas."),
    "CORRAL_BUS_CONFIG": ("`nats.conf`", "`compose.yaml`: the servers' configuration, in `/etc/corral`."),
    "CORRAL_REPLICAS": ("3 on a cluster of servers, else 1", "Replicas of new streams and buckets."),
    "CORRAL_STREAMS_SCALE": (
        "`1`",
        "Factor on the disk space of new streams and buckets: 4.4 GiB in all at 1.",
    ),
    "CORRAL_CHUNKED_TRANSPORT": (
        "on for tested versions of nats-py",
        "`off`: processors use nats-py's own transport, at about twice the CPU time.",
    ),
    "CORRAL_DATA": ("–", "Folder or file of a recording; `corral demo` then replays it."),
    "CORRAL_DEBUG": ("–", "With any value, an error that ends a command shows a traceback."),
    "TZ": ("that of the host", "Time zone of `corral reserve` and `corral drain`, without `--zone`."),
    "NO_COLOR": ("–", "With any value, no colors on a terminal. In a pipe there are never any."),
    "XDG_CONFIG_HOME": ("`~/.config`", "Folder of `corral/corral.toml`."),
    "XDG_DATA_HOME": ("`~/.local/share`", "Where `corral up` creates its folder `corral`."),
    "XDG_STATE_HOME": (
        "`~/.local/state`",
        "Where collectors and runners create their folder `corral`, without `--state`.",
    ),
    "STATE_DIRECTORY": ("–", "Set by systemd: folder of a collector's or runner's state, without `--state`."),
}
"""Variables that are not options of a command: default and meaning."""


class Help(NamedTuple):
    """A command's docstring in parts."""

    summary: str
    text: list[str]
    examples: list[str]


def parts(command: Any) -> Help:
    """The summary, the paragraphs and the examples of a command's help."""
    callback = command.callback
    lines = (inspect.getdoc(callback) or command.help or "").splitlines()
    text: list[str] = []
    examples: list[str] = []
    inside = False
    for line in lines[1:]:
        if re.fullmatch(r"(\[bold\])?(Examples|Start with):?(\[/bold\])?:?", line.strip()):
            inside = True
        elif inside and line.startswith("  "):
            examples.append(line.strip())
        else:
            inside = False
            text.append(line)
    return Help(lines[0] if lines else "", paragraphs(text), examples)


def paragraphs(lines: Iterable[str]) -> list[str]:
    """Lines joined to paragraphs; what is indented stays as it is."""
    found: list[str] = []
    for part in re.split(r"\n\n+", "\n".join(lines).strip("\n")):
        code = part.startswith("  ") or _is_toml(part)
        found += [f"```text\n{textwrap.dedent(part)}\n```" if code else " ".join(part.split())] if part.strip() else []
    return found


def _is_toml(text: str) -> bool:
    try:
        return bool(tomllib.loads(text))
    except tomllib.TOMLDecodeError:
        return False


def leaves(name: str) -> Iterator[tuple[str, Any]]:
    """A command with its full name, or the commands of a group."""
    command = load(name)
    inner = getattr(command, "commands", None)
    if not inner:
        yield name, command
        return
    if command.invoke_without_command and command.params:
        yield name, command
    for part, one in inner.items():
        yield f"{name} {part}", one


def option_words(parameter: Any) -> str:
    """`--gpus`, `-g` N."""
    names = [*parameter.opts, *parameter.secondary_opts]
    shown = ", ".join(f"`{name}`" for name in sorted(names, key=lambda name: (name[:2] != "--", name)))
    return shown if getattr(parameter, "is_flag", False) else f"{shown} {metavar(parameter)}"


def metavar(parameter: Any) -> str:
    """What stands behind the option."""
    kind = parameter.type
    choices = getattr(kind, "choices", None)
    if choices is not None and parameter.metavar is None:
        return "<br>".join(f"`{getattr(choice, 'value', choice)}`" for choice in choices)
    name = parameter.metavar or {"int": "N", "float": "N"}.get(kind.name.removesuffix(" range"), "TEXT")
    return name.replace("|", "\\|")


def default_words(parameter: Any) -> str:
    """The default, as one would write it."""
    value = parameter.default
    value = getattr(value, "value", value)
    if parameter.required:
        return "required"
    if value is None or value == "" or value == []:
        return "–"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def prose(*sentences: str) -> list[str]:
    """A paragraph in lines as long as those that people write here."""
    return [*textwrap.wrap(" ".join(sentences), 118, break_long_words=False, break_on_hyphens=False), ""]


def cell(text: str | None) -> str:
    """Text within a table: help is no Markdown, but for code between backticks."""
    pieces = " ".join((text or "").split()).replace("|", "\\|").split("`")
    pieces[::2] = [re.sub(r"([\[\]*<>_])", r"\\\1", piece) for piece in pieces[::2]]
    return "`".join(pieces)


def options_table(parameters: Iterable[Any]) -> list[str]:
    """Options with default and meaning."""
    rows = [
        f"| {option_words(one)} | {default_words(one)} | {cell(one.help)} |"
        for one in parameters
        if one.param_type_name == "option" and one.name != "help" and not one.hidden
    ]
    return ["| option | default | |", "| --- | --- | --- |", *rows, ""] if rows else []


def arguments_list(command: Any) -> list[str]:
    """Arguments with their meaning."""
    found = [one for one in command.params if one.param_type_name == "argument" and one.help]
    return [f"- `{argument(one)}`: {cell(one.help)}" for one in found] + ([""] if found else [])


def argument(parameter: Any) -> str:
    """An argument as the usage shows it."""
    name = parameter.metavar or parameter.name.upper()
    name = name if parameter.required or name.startswith("[") else f"[{name}]"
    return f"{name}..." if parameter.nargs != 1 and "..." not in name else name


def usage(name: str, command: Any) -> str:
    """The line that shows how the command is written."""
    words = [argument(one) for one in command.params if one.param_type_name == "argument"]
    return " ".join(["corral", name, "[OPTIONS]", *words])


def commands() -> str:
    """The reference of the command line."""
    root = typer.main.get_command(app)
    asked = {parameter.name for parameter in request_options._PARAMETERS}
    shared = [one for one in load("request").params if one.name in asked]
    lines = [
        "# Command line",
        "",
        "Generated from the command line itself by `make docs`.",
        "",
        *prose(
            "Every option may also be set by a variable or in a file: [Configuration](configuration.md).",
            "`--json` prints one document with every field; results go to stdout, everything else to stderr.",
            "Times are written like `250ms`, `10s` or `1h30m`, sizes like `20GiB` or `512MiB`.",
        ),
    ]
    panels: dict[str, list[str]] = {}
    for name, entry in COMMANDS.items():
        panels.setdefault(entry.panel, []).append(name)
    for panel, names in panels.items():
        lines += [f"- {panel}: " + ", ".join(f"[`{name}`](#corral-{name})" for name in names)]
    lines += [
        "- All of them: [options before the command](#options-before-the-command), [exit codes](#exit-codes), "
        "[completion](#completion)",
        "",
        "## Options before the command",
        "",
        *prose(
            "They may also follow the command's name. Commands that use no bus (`up`, `demo`, `simulate`) refuse those",
            "that select one.",
        ),
        *options_table(root.params),
        "## Exit codes",
        "",
        "| code | meaning |",
        "| ---: | --- |",
        *(f"| {code} | {cell(meaning)} |" for code, meaning in exits.MEANINGS.items()),
        "",
        *prose(
            "An error is one line on stderr. `corral run` and `corral shell` end with the exit code of the command",
            "that they ran, or 128 + N if signal N killed it.",
        ),
        "## Completion",
        "",
        "`corral --install-completion` completes commands, options and their values in bash, zsh, fish and PowerShell;",
        "`corral --show-completion` prints the script that it would install.",
        "",
        "## What a request may ask for",
        "",
        "Options of `request`, `explain`, `run` and `shell`.",
        "",
        *options_table(shared),
    ]
    for panel, names in panels.items():
        lines += [f"## {panel}", ""]
        for name in names:
            lines += command_section(name, asked)
    return "\n".join(lines).rstrip() + "\n"


def command_section(name: str, asked: set[str]) -> list[str]:
    """One command, or a group with its commands."""
    group = getattr(load(name), "commands", None)
    lines: list[str] = []
    if group:
        help = parts(load(name))
        lines += [f"### corral {name}", "", help.summary, ""]
        for text in help.text:
            lines += [text, ""]
    for full, command in leaves(name):
        help = parts(command)
        lines += [f"{'####' if group else '###'} corral {full}", "", help.summary, ""]
        for text in help.text:
            lines += [text, ""]
        lines += ["```sh", *help.examples, "```", ""] if help.examples else []
        lines += [f"`{usage(full, command)}`", ""]
        lines += arguments_list(command)
        requesting = name in ("request", "explain", "run", "shell")
        if requesting:
            lines += ["In addition to the [options of requests](#what-a-request-may-ask-for):", ""]
        lines += options_table(one for one in command.params if not (requesting and one.name in asked))
    return lines


def fields(struct: type[Any]) -> dict[str, str]:
    """The attributes of a docstring."""
    found: dict[str, str] = {}
    for line in (inspect.getdoc(struct) or "").partition("Attributes:")[2].splitlines():
        key, colon, text = line.strip().partition(": ")
        if colon and line.startswith("    ") and not line.startswith("     "):
            found[key] = text
    return found


def configuration() -> str:
    """The reference of variables, the file and contexts."""
    lines = [
        "# Configuration",
        "",
        "Generated from the code by `make docs`.",
        "",
        "A flag overrides the environment, which overrides the file, which overrides the default.",
        "`corral config show` prints every setting with its value and its source.",
        "",
        "## The file",
        "",
        *prose(
            "`--config` selects the file `corral.toml`, else `CORRAL_CONFIG` does. Without either there are two:",
            "`/etc/corral/corral.toml` for the machine, and `corral/corral.toml` in `$XDG_CONFIG_HOME` or `~/.config`",
            "for the account, whose keys override those of the machine.",
        ),
        "```toml",
        'nats = "nats://gpu-bus:4222"',
        'creds = "/etc/corral/collector.creds"',
        "",
        "[collect]",
        'interval = "100ms"',
        'label = { rack = "r7", zone = "a" }',
        "",
        "[process]",
        'db = "/var/lib/corral/history.duckdb"',
        'keep-raw = "7d"',
        "",
        "[run]",
        'wait = "10m"',
        "```",
        "",
        *prose(
            "A table is a command, and its keys are the command's options without the dashes (`keep-raw` or",
            "`keep_raw`). Flags take `true` and `false`; a repeatable option takes a list, or a table for `KEY=VALUE`.",
            "An unknown key is an error that names the nearest known one. `corral config set collect.interval 100ms`",
            "writes the file, `corral config check` checks it.",
        ),
        "## The bus, and contexts",
        "",
        "At the top of the file, or under `[contexts.NAME]`, with `current` as the name of the current one.",
        "`corral context add`, `use` and `remove` write them:",
        "",
        "| key | variable | default | |",
        "| --- | --- | --- | --- |",
    ]
    described = fields(Context)
    for key, variable in VARIABLES.items():
        default = f"`{DEFAULT_URL}`" if key == "nats" else "–"
        lines.append(f"| `{key}` | `{variable}` | {default} | {cell(described.get(key))} |")
    lines += [
        "| `current` | `CORRAL_CONTEXT` | – | Name of the current context; only at the top of the file. |",
        "",
        *prose(
            "A context selected by `--context` overrides the environment; the current one only supplies values that",
            "the environment does not set. If a flag or the environment selects another bus, the context's credentials",
            "are not sent to it.",
        ),
        "## Settings of the services",
        "",
        *prose(
            "Every option of every other command also has a variable, `CORRAL_<COMMAND>_<OPTION>`, and a key in the",
            "command's table: `CORRAL_RUN_WAIT`, `[run] wait`. [The command line](cli.md) lists these options.",
        ),
    ]
    for name in SERVICES:
        if name not in COMMANDS:
            continue
        lines += [f"### `[{name}]`", "", "| key | variable | default | |", "| --- | --- | --- | --- |"]
        for key, setting in config.settings(load(name)).items():
            one = setting.parameter
            shown = f"`{variables(name, one)[0]}`"
            lines.append(f"| `{key}` | {shown} | {default_words(one)} | {cell(one.help)} |")
        lines.append("")
    lines += ["In addition, every `corral auth` command takes its `--dir` from `CORRAL_AUTH_DIR`.", ""]
    lines += ["## Other variables", "", "| variable | default | |", "| --- | --- | --- |"]
    lines += [f"| `{name}` | {default} | {meaning} |" for name, (default, meaning) in OTHER_VARIABLES.items()]
    return "\n".join(lines).rstrip() + "\n"
