"""Detects misspelled environment variables, which would otherwise be ignored silently."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from typing import Any, Final

from ..schemas.values.misspelt import same, slip
from .exits import USAGE, CommandError

PREFIX: Final = "CORRAL_"
OTHERS: Final = frozenset(
    PREFIX + name
    for name in (
        *("NATS_URL", "NATS_CREDS", "NATS_CA", "NATS_CERT", "NATS_KEY", "INBOX_PREFIX", "OWNER", "CONTEXT", "CONFIG"),
        *("LEASE", "DEVICES_FILE", "RESTART_COUNT"),
        *("JOB_ID", "JOB_NAME", "ATTEMPT", "HOSTS", "ADDRESSES"),
        *("ARRAY_INDEX", "ARRAY_FIRST", "ARRAY_LAST", "ARRAY_COUNT"),
        *("DEBUG", "DATA", "REPLICAS", "STREAMS_SCALE", "AUTH_DIR", "STATE_DIR", "CHUNKED_TRANSPORT"),
        *("PORT", "PORT_2", "PORT_3", "BUS_URLS", "BUS_CONFIG", "NOTIFY_DIR", "HTTP_PORT", "GRAFANA_TOKEN"),
    )
)
"""Variables that Corral reads but that belong to no command's option."""
_MEANT: Final = {
    "URL": "NATS_URL",
    "NATS": "NATS_URL",
    "BUS_URL": "NATS_URL",
    "NATS_SERVER": "NATS_URL",
    "CREDS": "NATS_CREDS",
    "CREDENTIALS": "NATS_CREDS",
    "NATS_CREDENTIALS": "NATS_CREDS",
    "CA": "NATS_CA",
}
_OF_KUBERNETES: Final = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_.*)?|PORT(_[0-9]+_(TCP|UDP|SCTP)(_.*)?)?)$")
"""Variables that Kubernetes sets in every pod for a service whose name begins with `corral-`."""


def check(command: str) -> None:
    """Refuse an environment variable whose name is a likely misspelling of one that the command reads.

    Variables that resemble none are accepted, since they may belong to other programs.

    Raises:
        CommandError: a variable is misspelled; the message names it and the likely one.
    """
    unknown_names = [
        name
        for name in os.environ
        if name.startswith(PREFIX) and name not in OTHERS and not _OF_KUBERNETES.search(name)
    ]
    if not unknown_names:
        return
    from .loading import load
    from .registry import COMMANDS

    if command not in COMMANDS:
        return
    own = known(load(command))
    near = {name: found for name in unknown_names if name not in own and (found := _nearest(name, command, own))}
    if not near:
        return
    # It may be a correctly spelled variable of another command.
    for other in COMMANDS:
        try:
            of_other = known(load(other))
        except ModuleNotFoundError:  # its part is not installed here
            continue
        near = {name: found for name, found in near.items() if name not in of_other}
    for name, found in near.items():
        raise CommandError(f"{name} is set, but no command reads it: did you mean {found}?", USAGE)


def known(command: Any) -> set[str]:
    """Environment variables for the options of a command, or of the commands of a group."""
    found: set[str] = set()
    prefix = str(command.context_settings.get("auto_envvar_prefix") or f"{PREFIX}{command.name}").upper()
    for inner, one in [("", command), *(getattr(command, "commands", None) or {}).items()]:
        between = f"_{inner}_" if inner else "_"
        for option in one.params:
            own = getattr(option, "envvar", None) or []
            found |= {own} if isinstance(own, str) else set(own)
            found.add(f"{prefix}{between}{option.name}".upper().replace("-", "_"))
    return found


def _nearest(name: str, command: str, own: Collection[str]) -> str:
    """The variable that a name is very likely a misspelling of; empty if none.

    The match is strict, because users may have other variables with this prefix, such as `CORRAL_DATA_DIR`.
    """
    rest = name.removeprefix(PREFIX)
    if rest in _MEANT:
        return PREFIX + _MEANT[rest]
    prefix = f"{PREFIX}{command}_".upper().replace("-", "_")
    # A variable that ends with `_ID` is likely the user's, for something that a script numbers.
    if name.startswith(prefix) and not name.endswith("_ID"):
        options = {one.removeprefix(prefix).lower(): one for one in own if one.startswith(prefix)}
        if found := same(name.removeprefix(prefix).lower(), options):
            return options[found]
    return slip(name, {*own, *OTHERS}) if len(rest) > 3 else ""
