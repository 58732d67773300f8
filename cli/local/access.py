"""Who may do what in a cluster of `corral up`: its authority, its parts' credentials, and a context for its owner."""

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

from ...bus.access.folder import Authority
from ...bus.access.roles import Account, Role
from ...bus.credentials import ANY_OWNER, CREDENTIALS_VARIABLE
from .. import config
from ..config import Context
from .supervisor import Part

_ROLES: Final[dict[str, Role]] = {
    "planner": Role.PLANNER,
    "processor": Role.PROCESSOR,
    "collector": Role.COLLECTOR,
    "exporter": Role.VIEWER,
    "dashboard": Role.OPERATOR,
}
"""What the parts of a cluster are."""


class Local(Struct, frozen=True, kw_only=True):
    """The authority of a local cluster.

    Attributes:
        authority: in its data folder.
        user: whoever started it: an operator, who may ask in any name.
    """

    authority: Authority
    user: str

    @property
    def credentials(self) -> Path:
        """Of whoever started the cluster."""
        return self.authority.credentials(self.user)

    def part(self, part: Part) -> Part:
        """A part with its own credentials."""
        role = _ROLES[part.name]
        if part.name not in self.authority.registry.users:
            self.authority.add(
                role,
                part.name,
                # A simulated fleet has many hosts, and which ones is said at each start.
                hosts=["*"] if role is Role.COLLECTOR else [],
                owner=ANY_OWNER if role is Role.OPERATOR else "",
                follows_leases=True,
                serves=True,
            )
        path = str(self.authority.credentials(part.name))
        return replace(part, environment={CREDENTIALS_VARIABLE: path} | part.environment)


def settle(data: Path, pid_file: Path, listen: str = "127.0.0.1") -> Local:
    """The authority of a cluster in a folder, made where it is missing.

    Args:
        data: the cluster's folder.
        pid_file: of its server.
        listen: where its server listens: beyond this machine, it speaks TLS.
    """
    folder = data / "auth"
    hosts = server_names(listen)
    if (folder / "authority.json").exists():
        authority = Authority(folder)
        if hosts and not authority.tls:
            authority.secure(hosts)
    else:
        authority = Authority.create(folder, hosts=hosts, pid_file=str(pid_file))
    user = account()
    if user not in authority.registry.users:
        authority.add(Role.OPERATOR, user, owner=ANY_OWNER)
    return Local(authority=authority, user=user)


def take_over(store: Path, secured: bool) -> None:
    """Let a server find the streams that another kind of it has left, since each account has a folder of its own.

    Args:
        store: the server's folder.
        secured: it will have accounts.
    """
    streams = store / "jetstream"
    left, wanted = (streams / "$G", streams / Account.CORE.value)
    if not secured:
        left, wanted = wanted, left
    if left.is_dir() and not wanted.exists():
        left.rename(wanted)


def account() -> str:
    """The name of whoever runs this, as a user of the bus."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        name = "me"
    token = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-_")[:64] or "me"
    return f"{token}-" if token in (*_ROLES, "system") else token


def server_names(listen: str) -> list[str]:
    """Names and addresses that clients may know a server by; none where it listens to this machine alone."""
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
    """Of the context that leads to a cluster."""
    return "local" if data == default else data.name


def data_in_use() -> Path | None:
    """The data folder of the cluster of `corral up` whose credentials are in use here; None for any other."""
    credentials = os.environ.get(CREDENTIALS_VARIABLE, "")
    if not credentials:
        return None
    folder = Path(credentials).expanduser().absolute().parent.parent
    return folder.parent if folder.name == "auth" and (folder / "authority.json").exists() else None


def url_of(data: Path) -> str:
    """Where the cluster of a data folder is, or was last; empty if there was none."""
    try:
        return str(json.loads((data / "cluster.json").read_text())["url"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def introduce(name: str, url: str, credentials: Path) -> bool:
    """Write a context that leads to a cluster, and use it where none is in use.

    Returns:
        Whether commands go there without being told; False also where the configuration is no file.
    """
    path = config.path()
    if path.exists() and not path.is_file():
        return False
    own = config.read([path])
    own.contexts[name] = Context(nats=url, creds=str(credentials))
    own.current = own.current or name
    config.write(own)
    return own.current == name


def forget(names: Sequence[str], url: str) -> None:
    """Take contexts away that led to a cluster which is gone."""
    path = config.path()
    if not path.is_file():
        return
    own = config.read([path])
    gone = [name for name in names if name in own.contexts and own.contexts[name].nats == url]
    for name in gone:
        del own.contexts[name]
    if gone:
        own.current = "" if own.current in gone else own.current
        config.write(own)
