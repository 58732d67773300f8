"""A lease's environment as shell commands for `eval`, and what makes `eval` fail where there is no lease."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence

import typer

from ...client.environment import LEASE_VARIABLE, NONE_VISIBLE, environment_for
from ...schemas.requests import Lease
from .. import exits
from ..variables import PREFIX

_VARIABLE = f"{PREFIX}REQUEST_EXPORT"
"""That of `--export`, as every option has one."""


def exported(lease: Lease) -> str:
    """Commands that set the environment of a lease on this host."""
    return _exports(environment_for(lease))


def failed(code: int) -> str:
    """Commands for a script that got no lease: it sees no GPU, and `eval` ends with the exit code.

    Without them a script would go on, with every GPU of the host visible.
    """
    return f"{_exports(NONE_VISIBLE)}unset {LEASE_VARIABLE}\n(exit {code})\n"


def wanted(arguments: Sequence[str] | None) -> bool:
    """Whether a command line wants an environment, as far as that can be told of one that may be wrong."""
    words = set(sys.argv[1:] if arguments is None else arguments)
    configured = os.environ.get(_VARIABLE, "").lower() in ("1", "true", "yes", "on", "t", "y")
    if "request" not in words or words & {"--help", "-h"}:
        return False
    return "--export" in words or (configured and "--json" not in words)


def chosen(context: typer.Context, *, export: bool, json: bool) -> tuple[bool, bool]:
    """The one form in which to print: what is said on the command line goes before what is configured.

    Raises:
        CommandError: two are wanted.
    """
    if not (export and json):
        return export, json
    sources = {name: context.get_parameter_source(name) for name in ("export", "json")}
    said = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    if len(said) != 1:
        raise exits.CommandError("--export and --json are two forms of one answer: give one of them", exits.USAGE)
    return said == ["export"], said == ["json"]


def _exports(values: dict[str, str]) -> str:
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in values.items())
