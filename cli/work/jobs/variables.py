"""Variables for jobs, as options give them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from ... import exits


def variables(given: Sequence[str]) -> Mapping[str, str]:
    """Variables of `--env`: `K=V`, or a name whose value is taken from this environment."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not name:
            raise exits.CommandError(f"--env {text!r}: expected NAME=VALUE, or NAME alone", exits.USAGE)
        if not equals and name not in os.environ:
            raise exits.CommandError(f"--env {name}: it is not set here: write {name}=VALUE", exits.USAGE)
        found[name] = value if equals else os.environ[name]
    return found
