"""Access to a cluster of `corral up`: its authority, the credentials of its parts, and a context for its user."""

from __future__ import annotations

import getpass
import ipaddress
import json
import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from ...bus import config_files
from ...bus.access.folder import Authority
from ...bus.access.roles import ON_HOSTS, Account, Role
from ...bus.credentials import ANY_OWNER, CREDENTIALS_VARIABLE
from ...client.config import Context
from .. import config
from .supervisor import Part

_ROLES: Final[dict[str, Role]] = {
    "planner": Role.PLANNER,
    "processor": Role.PROCESSOR,
    "collector": Role.COLLECTOR,
    "runner": Role.RUNNER,
    "exporter": Role.VIEWER,
    "dashboard": Role.OPERATOR,
    "notifier": Role.NOTIFIER,
    "gateway": Role.GATEWAY,
}
"""Role of each part of a cluster."""


class LocalAccess(Struct, frozen=True, kw_only=True):
    """The authority of a local cluster.

    Attributes:
        authority: the authority in the cluster's data folder.
        user: name of the user who started the cluster: an operator, who may make requests for any owner.
    """

    authority: Authority
    user: str

    @property
    def credentials(self) -> Path:
        """Path of the credentials of the user who started the cluster."""
        return self.authority.credentials(self.user)

    def part(self, part: Part) -> Part:
        """The part with its credentials in its environment; its user is added to the authority if it is missing."""
        role = _ROLES[part.name]
        if part.name not in self.authority.registry.users:
            self.authority.add(
                role,
                part.name,
                # A simulated fleet has many hosts, and they may differ at each start.
                hosts=["*"] if role in ON_HOSTS else [],
                owner=ANY_OWNER if role is Role.OPERATOR else "",
                follows_leases=True,
                serves=True,
            )
        path = str(self.authority.credentials(part.name))
        return replace(part, environment={CREDENTIALS_VARIABLE: path} | part.environment)


def ensure_access(data: Path, pid_file: Path, listen: str = "127.0.0.1") -> LocalAccess:
    """Open the authority of a cluster, and create it if it is missing.

    Args:
        data: the cluster's data folder.
        pid_file: path of the server's PID file.
        listen: address that the server listens on; one that other machines can reach enables TLS.
    """
    folder = data / "auth"
    hosts = server_names(listen)
    if (folder / "authority.json").exists():
        authority = Authority(folder)
        if hosts and not authority.tls:
            authority.secure(hosts)
    else:
        authority = Authority.create(folder, hosts=hosts, pid_file=str(pid_file))
    user = account_name()
    if user not in authority.registry.users:
        authority.add(Role.OPERATOR, user, owner=ANY_OWNER)
    return LocalAccess(authority=authority, user=user)


def move_streams(store: Path, secured: bool) -> None:
    """Move the streams of a server between its folders for a bus with accounts and one without.

    JetStream keeps the streams of each account in a separate folder, so a server wouldn't find those that were written
    before accounts were enabled or disabled.

    Args:
        store: the server's data folder.
        secured: true if the server will have accounts.
    """
    streams = store / "jetstream"
    left, wanted = (streams / "$G", streams / Account.CORE.value)
    if not secured:
        left, wanted = wanted, left
    if left.is_dir() and not wanted.exists():
        left.rename(wanted)


def account_name() -> str:
    """Name of the user account that runs this process, as a user name of the bus."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        name = "me"
    token = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-_")[:64] or "me"
    return f"{token}-" if token in (*_ROLES, "system") else token


def server_names(listen: str) -> list[str]:
    """Names and addresses under which clients may reach a server; none if it listens on loopback only."""
    try:
        if ipaddress.ip_address(listen).is_loopback:
            return []
        addresses = [] if ipaddress.ip_address(listen).is_unspecified else [listen]
    except ValueError:
        if listen == "localhost":
            return []
        addresses = [listen]
    return list(dict.fromkeys([*addresses, socket.gethostname(), socket.getfqdn(), "localhost", "127.0.0.1"]))


def context_name(data: Path, default: Path) -> str:
    """Name of the context for a cluster: `local` for the default data folder, else the folder's name."""
    return "local" if data == default else data.name


def data_in_use() -> Path | None:
    """Data folder of the `corral up` cluster whose credentials the environment names; None if they are of another."""
    credentials = os.environ.get(CREDENTIALS_VARIABLE, "")
    if not credentials:
        return None
    folder = Path(credentials).expanduser().absolute().parent.parent
    return folder.parent if folder.name == "auth" and (folder / "authority.json").exists() else None


def url_of(data: Path) -> str:
    """URL of the cluster in a data folder, or its last URL if it isn't running; empty if unknown."""
    try:
        return str(json.loads((data / "cluster.json").read_text())["url"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def add_context(name: str, url: str, credentials: Path) -> bool:
    """Write a context for a cluster, and make it the context in use if there is none.

    Returns:
        True if it is the context in use. False if it isn't, or if the configuration path isn't a regular file; nothing
        is written then.
    """
    path = config_files.path()
    if path.exists() and not path.is_file():
        return False
    own = config.read([path])
    own.contexts[name] = Context(nats=url, creds=str(credentials))
    own.current = own.current or name
    config.write(own)
    return own.current == name


def remove_contexts(names: Sequence[str], url: str) -> None:
    """Remove contexts of a cluster that no longer exists.

    Args:
        names: names of the contexts to remove.
        url: URL of the cluster; contexts with another URL are kept.
    """
    path = config_files.path()
    if not path.is_file():
        return
    own = config.read([path])
    gone = [name for name in names if name in own.contexts and own.contexts[name].nats == url]
    for name in gone:
        del own.contexts[name]
    if gone:
        own.current = "" if own.current in gone else own.current
        config.write(own)
