"""Reads the contexts that `corral context add` and `corral up` write: URL, credentials and owner for each bus."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any, Final, cast

from ..bus.connect import URL_VARIABLE
from ..bus.credentials import CREDENTIALS_VARIABLE
from .errors import Unavailable

_CONFIG_VARIABLE: Final = "CORRAL_CONFIG"
_CONTEXT_VARIABLE: Final = "CORRAL_CONTEXT"
_MACHINE_FILE: Final = Path("/etc/corral/corral.toml")
_OPTIONS: Final = {"nats": "url", "creds": "credentials", "ca": "ca", "cert": "certificate", "key": "key"}
"""Options of `bus.connect` by their names in the configuration file."""


def resolve_connection(url: str | None, credentials: str | None, context: str | None) -> tuple[dict[str, str], str]:
    """Options for `bus.connect`, and the context's owner (empty if it names none).

    A named context takes precedence over the environment. Without a name, the context in use applies if no URL is
    given. If a URL is given, the context with the same URL applies, so that the credentials of one bus are never sent
    to another.

    Args:
        url: URL of the bus; None takes that of the environment, then that of the context.
        credentials: path of a credentials file. If it or `CORRAL_NATS_CREDS` is set and a URL is known, no context is
            read.
        context: name of a context; None takes `CORRAL_CONTEXT`, then the context in use.

    Raises:
        Unavailable: no context has that name, or a configuration file can't be read.
    """
    given = {name: value for name, value in (("url", url), ("credentials", credentials)) if value}
    wanted = url or ("" if context else os.environ.get(URL_VARIABLE, ""))
    if wanted and not context and (credentials or os.environ.get(CREDENTIALS_VARIABLE)):
        return given, ""
    contexts, current, top = _read()
    named = context or ("" if wanted else os.environ.get(_CONTEXT_VARIABLE, ""))
    if named and named not in contexts:
        known = ", ".join(contexts) or "none"
        raise Unavailable(f"there is no context {named!r}, there are: {known} (corral context add NAME URL)")
    if wanted and not context:
        chosen = next((one for one in (*contexts.values(), top) if one.get("nats") == wanted), {})
    else:
        chosen = contexts.get(named or current, top)
    options = {_OPTIONS[name]: value for name, value in chosen.items() if name in _OPTIONS and value}
    if not context and os.environ.get(CREDENTIALS_VARIABLE):
        options.pop("credentials", None)
    return options | given, chosen.get("owner", "")


def _read() -> tuple[dict[str, dict[str, str]], str, dict[str, str]]:
    """Contexts by name, the name of the context in use, and the top-level settings of the files."""
    contexts: dict[str, dict[str, str]] = {}
    current, top = "", dict[str, str]()
    for path in _paths():
        try:
            tree = tomllib.loads(path.read_text())
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise Unavailable(f"the configuration {path} can't be used: {error}") from None
        found = tree.get("contexts", {})
        if isinstance(found, dict):
            for name, fields in cast("dict[str, Any]", found).items():
                contexts[name] = {key: str(value) for key, value in fields.items()}
        current = str(tree.get("current", "")) or current
        top |= {key: value for key, value in tree.items() if isinstance(value, str) and key != "current"}
    return contexts, current, top


def _paths() -> list[Path]:
    """Paths of the configuration files, lowest precedence first; the same files as for the `corral` command."""
    if named := os.environ.get(_CONFIG_VARIABLE):
        return [Path(named)]
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return [_MACHINE_FILE, Path(base) / "corral" / "corral.toml"]
