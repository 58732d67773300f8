"""The contexts that `corral context add` and `corral up` write, for programs: how to reach a bus, and as whom."""

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
"""Options of `bus.connect` by the names that they have in the file."""


def way(url: str | None, credentials: str | None, context: str | None) -> tuple[dict[str, str], str]:
    """What `bus.connect` is to be told, and who asks there (empty if the context does not say).

    A context that is named goes before the environment. Without a name the one in use counts where no URL is said, and
    where one is said, the context that has the same: credentials of one bus are not shown to another.

    Args:
        url: as given; None takes the environment's, then the context's.
        credentials: as given; with them, or with those of the environment, no context is looked at but for the URL.
        context: name of one; None takes `CORRAL_CONTEXT`, then the one in use.

    Raises:
        Unavailable: there is no context of that name, or a file is broken.
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
    """Contexts by name, the name of the one in use, and what the top of the file says."""
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
    """Of the files, the weakest first; as for the `corral` command."""
    if named := os.environ.get(_CONFIG_VARIABLE):
        return [Path(named)]
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return [_MACHINE_FILE, Path(base) / "corral" / "corral.toml"]
