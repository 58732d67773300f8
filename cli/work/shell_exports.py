"""Shell commands for `eval` that set a lease's environment, or that make `eval` fail if there is no lease."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence

import typer

from ...client.leases.environment import NONE_VISIBLE, environment_for
from ...schemas.limits import LEASE_VARIABLE
from ...schemas.requests import Lease
from .. import exits
from ..environment_check import PREFIX

_VARIABLE = f"{PREFIX}REQUEST_EXPORT"
"""Environment variable of the option `--export`."""


def exported(lease: Lease) -> str:
    """Shell commands that set the environment of a lease on this host."""
    return _exports(environment_for(lease))


def failed(code: int) -> str:
    """Shell commands for a script that got no lease: no GPU is visible, and `eval` returns the exit code.

    Without them a script would continue with every GPU of the host visible.
    """
    return f"{_exports(NONE_VISIBLE)}unset {LEASE_VARIABLE}\n(exit {code})\n"


def wanted(arguments: Sequence[str] | None) -> bool:
    """True if a command line asks for `--export` output. The command line may be invalid, so this is a guess."""
    words = set(sys.argv[1:] if arguments is None else arguments)
    configured = os.environ.get(_VARIABLE, "").lower() in ("1", "true", "yes", "on", "t", "y")
    if "request" not in words or words & {"--help", "-h"}:
        return False
    return "--export" in words or (configured and "--json" not in words)


def chosen(context: typer.Context, *, export: bool, json: bool) -> tuple[bool, bool]:
    """Choose one output format: `--export` or `--json` on the command line takes precedence over configured ones.

    Returns:
        The values of `export` and `json` to use.

    Raises:
        CommandError: both are on the command line, or both are configured.
    """
    if not (export and json):
        return export, json
    sources = {name: context.get_parameter_source(name) for name in ("export", "json")}
    chosen_formats = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    if len(chosen_formats) != 1:
        raise exits.CommandError("--export and --json exclude each other", exits.USAGE)
    return chosen_formats == ["export"], chosen_formats == ["json"]


def _exports(values: dict[str, str]) -> str:
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in values.items())
