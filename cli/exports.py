"""A lease's environment as shell commands for `eval`, and what makes `eval` fail where there is no lease."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence

from ..client.environment import LEASE_VARIABLE, NONE_VISIBLE, environment_for
from ..schemas.requests import Lease


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
    configured = os.environ.get("CORRAL_REQUEST_EXPORT", "").lower() in ("1", "true", "yes", "on", "t", "y")
    return "request" in words and ("--export" in words or configured) and not words & {"--json", "--help", "-h"}


def _exports(values: dict[str, str]) -> str:
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in values.items())
