"""Reads the configuration files, and resolves the connection to a bus from them, the environment and arguments.

`corral context add` and `corral up` write contexts: named buses, each with its URL, credentials and owner. The command
line reads the same files through `read`, with checks of the tables for its commands (`cli/config.py`).
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, cast

import msgspec
from msgspec import Struct

from ..bus import credentials
from ..bus.config_files import paths
from ..bus.connect import URL_VARIABLE
from ..schemas.values.error_words import in_words
from .errors import Unavailable
from .request import OWNER_VARIABLE

CONTEXT_VARIABLE: Final = "CORRAL_CONTEXT"


class ConfigError(Unavailable):
    """A configuration file is invalid or unreadable, or there is no context with a given name."""


class Context(Struct, kw_only=True, omit_defaults=True):
    """A bus, and the settings for a connection to it.

    Attributes:
        nats: URL of the bus.
        creds: path of a credentials file; empty if none.
        owner: owner of requests and leases; empty for the name of the user account.
        ca: path of the CA certificate for checking the server's; empty for the system's, or that of the credentials.
        cert: path of a client certificate, if the server requires one.
        key: path of the client certificate's key.
    """

    nats: str = ""
    creds: str = ""
    owner: str = ""
    ca: str = ""
    cert: str = ""
    key: str = ""


VARIABLES: Final[dict[str, str]] = {
    "nats": URL_VARIABLE,
    "creds": credentials.CREDENTIALS_VARIABLE,
    "owner": OWNER_VARIABLE,
    "ca": credentials.CA_VARIABLE,
    "cert": credentials.CERTIFICATE_VARIABLE,
    "key": credentials.KEY_VARIABLE,
}
"""Environment variable for each field of a context."""
_ARGUMENTS: Final = {"nats": "url", "creds": "credentials", "ca": "ca", "cert": "certificate", "key": "key"}
"""Arguments of `bus.connect` for fields of a context."""


class Config(Struct, kw_only=True):
    """Merged contents of the configuration files.

    Attributes:
        top: the bus to use if no context is in use.
        current: name of the context in use; empty if none.
        contexts: contexts by name.
        tables: tables of commands, by the command's name; each maps options to values.
        origins: file that each key comes from; keys are such as `collect.interval`.
    """

    top: Context = msgspec.field(default_factory=Context)
    current: str = ""
    contexts: dict[str, Context] = {}
    tables: dict[str, dict[str, Any]] = {}
    origins: dict[str, Path] = {}


Check = Callable[[Path, Mapping[str, Any]], None]
"""Check of a parsed file, which raises an error of its own."""


def read(files: Iterable[Path] | None = None, check: Check | None = None) -> Config:
    """Read the configuration; it is empty if there is no file. Unknown keys are ignored.

    Args:
        files: files to read, lowest precedence first; those of `config_files.paths()` by default.
        check: further check of each file's contents.

    Raises:
        ConfigError: a file exists and is invalid.
    """
    found = Config()
    for file in paths() if files is None else files:
        tree = _parsed(file)
        if check is not None:
            check(file, tree)
        _merge(found, file, tree)
    return found


def _parsed(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"{file} can't be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is invalid: {error}") from None


def _merge(found: Config, file: Path, tree: Mapping[str, Any]) -> None:
    """Add the contents of a file, which take precedence over what was found before."""
    try:
        top = msgspec.convert({key: tree[key] for key in VARIABLES if key in tree}, Context)
        contexts = msgspec.convert(tree.get("contexts", {}), dict[str, Context])
        current = msgspec.convert(tree.get("current", ""), str)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{file} is invalid: {in_words(str(error))}") from None
    for key in VARIABLES:
        if key in tree:
            setattr(found.top, key, getattr(top, key))
    found.contexts = found.contexts | contexts
    found.current = current or found.current
    for name, table in tree.items():
        if isinstance(table, dict) and name != "contexts":
            options = cast("dict[str, Any]", table)
            found.tables[name] = found.tables.get(name, {}) | options
            found.origins |= {f"{name}.{option}": file for option in options}
        else:
            found.origins[name] = file
    found.origins |= {f"contexts.{name}": file for name in contexts}


def unknown_context(name: str, config: Config) -> str:
    """Error message for an unknown context, with the names of the existing ones."""
    known = f"there are {', '.join(config.contexts)}" if config.contexts else "there is none yet"
    return f"there is no context {name!r}: {known} (corral context add NAME URL)"


def resolve_connection(
    url: str | None, credentials_file: str | None, context: str | None
) -> tuple[dict[str, str], str]:
    """Arguments for `bus.connect`, and the context's owner (empty if it names none).

    A named context takes precedence over the environment. Without a name, the context in use applies if no URL is
    given. If a URL is given, the context with the same URL applies, so that the credentials of one bus are never sent
    to another.

    Args:
        url: URL of the bus; None takes that of the environment, then that of the context.
        credentials_file: path of a credentials file. If it or `CORRAL_NATS_CREDS` is set and a URL is known, no
            context is read.
        context: name of a context; None takes `CORRAL_CONTEXT`, then the context in use.

    Raises:
        ConfigError: no context has that name, or a configuration file can't be read.
    """
    given = {name: value for name, value in (("url", url), ("credentials", credentials_file)) if value}
    in_environment = os.environ.get(credentials.CREDENTIALS_VARIABLE)
    wanted = url or ("" if context else os.environ.get(URL_VARIABLE, ""))
    if wanted and not context and (credentials_file or in_environment):
        return given, ""
    config = read()
    if wanted and not context:
        chosen = next((one for one in (*config.contexts.values(), config.top) if one.nats == wanted), Context())
    else:
        named = context or os.environ.get(CONTEXT_VARIABLE, "")
        if named and named not in config.contexts:
            raise ConfigError(unknown_context(named, config))
        chosen = config.contexts.get(named or config.current, config.top)
    found = {argument: value for field, argument in _ARGUMENTS.items() if (value := getattr(chosen, field))}
    if not context and in_environment:
        found.pop("credentials", None)
    return found | given, chosen.owner
