"""The authority's folder: the users, their credentials, the certificates and the server's configuration.

    authority.json       the users: names, roles and public keys
    credentials/         NAME.creds for each user, to be handed out; with TLS also ca.crt
    ca.key, ca.crt       of the CA, with TLS
    nats-auth.conf       for the server, to be included by its own configuration
    nats-server.conf     a whole configuration that includes it, for those who have none
    server.crt, …key     the server's certificate, with TLS

The server's files may be in a separate folder, so that the server sees no credentials. Folders are created with mode
0700, so only their owner can reach the files. Changes are made under a lock, and each file is replaced atomically.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
from collections.abc import Generator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from ...schemas.requests import OwnerName
from ...schemas.work.groups import GroupName
from ..credentials import ANY_OWNER, read
from . import certificates, server_config
from .certificates import Certified
from .roles import ASKING, ON_HOSTS, Role
from .users import User

CONFIG_NAME: Final = "nats-auth.conf"
SERVER_NAME: Final = "nats-server.conf"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_HOST: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")
_RANGE: Final = re.compile(r"\[(\d+)-(\d+)\]")
_MOST_HOSTS: Final = 20_000
_SYSTEM: Final = "system"


class AuthorityError(ValueError):
    """Failure of an operation on the authority; the message says why and what to do."""


class UnknownUser(AuthorityError):
    """The authority has no user with that name."""


class Registry(Struct, kw_only=True, forbid_unknown_fields=True):
    """Contents of `authority.json`.

    Attributes:
        system_key: public NKey of the system account's user.
        users: by name.
        hosts: names and addresses in the server's certificate; empty without TLS.
        mutual: true if clients must present a certificate, too.
        pid_file: path of the pid file of the server to notify of changes; empty if it is not known.
        server_folder: where the server's files are; empty for the authority's own folder.
    """

    system_key: str
    users: dict[str, User] = {}
    hosts: list[str] = []
    mutual: bool = False
    pid_file: str = ""
    server_folder: str = ""


class Authority:
    """Users and their keys in a folder.

    Args:
        folder: that holds an authority; see `create`.

    Raises:
        AuthorityError: there is none in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser().absolute()
        self.registry = self._read()

    @classmethod
    def create(
        cls,
        folder: Path,
        *,
        hosts: Sequence[str] = (),
        mutual: bool = False,
        pid_file: str = "",
        server_folder: Path | None = None,
    ) -> Authority:
        """Create an authority: keys, the CA if TLS is wanted, and the server's configuration.

        Args:
            folder: created if it is missing.
            hosts: names and addresses of the servers, for TLS; none means no TLS.
            mutual: true if clients must present a certificate, too.
            pid_file: path of the server's pid file, to notify it of changes.
            server_folder: for the server's files; the authority's folder by default.

        Raises:
            AuthorityError: there is an authority in the folder already, or `mutual` is set without `hosts`.
        """
        folder = folder.expanduser().absolute()
        if (folder / "authority.json").exists():
            raise AuthorityError(f"there is an authority in {folder} already: add users to it, or name another folder")
        if mutual and not hosts:
            raise AuthorityError("mutual TLS needs TLS: name the server's hosts")
        server = server_folder.expanduser().absolute() if server_folder else folder
        for made in (folder, folder / "credentials", server):
            made.mkdir(parents=True, exist_ok=True, mode=0o700)
        seed, key = make_key()
        registry = Registry(
            system_key=key,
            hosts=list(hosts),
            mutual=mutual,
            pid_file=pid_file,
            server_folder="" if server == folder else str(server),
        )
        _write(folder / "authority.json", msgspec.json.encode(registry))
        authority = cls(folder)
        if hosts:
            authority._make_ca()
            authority._issue_server()
        authority._give(None, seed)
        authority.write_config()
        return authority

    @property
    def config(self) -> Path:
        """Path of the file that the server's configuration must include."""
        return self.server / CONFIG_NAME

    @property
    def server(self) -> Path:
        """The folder of the server's files."""
        return Path(self.registry.server_folder) if self.registry.server_folder else self.folder

    @property
    def tls(self) -> bool:
        """True if the server uses TLS."""
        return bool(self.registry.hosts)

    def credentials(self, name: str) -> Path:
        """Path of a user's credentials file.

        Raises:
            UnknownUser: there is no such user.
            AuthorityError: it is a login for a time, which leaves no credentials here.
        """
        if name != _SYSTEM and self._known(name).expires:
            raise AuthorityError(f"{name} has logged in for a time: only who did has its credentials")
        return self.folder / "credentials" / f"{name}.creds"

    def add(
        self,
        role: Role,
        name: str,
        *,
        owner: str = "",
        hosts: Sequence[str] = (),
        follows_leases: bool = False,
        serves: bool = False,
        group: str = "",
    ) -> User:
        """Create a user with its credentials.

        Args:
            role: see `Role`.
            name: of the user.
            owner: name that it makes requests under; the user's name by default, `*` for any.
            hosts: that a collector or a runner speaks for; its name by default, `*` for any, `gpu[01-16]` for many.
            follows_leases: for a collector of simulated GPUs.
            serves: for an exporter or a dashboard; a gateway does in any case.
            group: group of the owner; empty for none.

        Raises:
            AuthorityError: the name is taken or invalid, or the role can't have this owner, group or these hosts.
        """
        with self._locked():
            if not _NAME.fullmatch(name) or name == _SYSTEM:
                raise AuthorityError(f"{name!r} is no name for a user: letters, digits, - and _, 64 at most")
            if name in self.registry.users:
                raise AuthorityError(
                    f"there is a user {name!r} already: `corral auth rotate {name}` gives it a new key"
                )
            seed, key = make_key()
            owner = _owner(role, name, owner)
            user = User(
                name=name,
                role=role,
                key=key,
                owner=owner,
                hosts=_hosts(role, name, hosts),
                group=_group(owner, group),
                follows_leases=follows_leases and role is Role.COLLECTOR,
                serves=role is Role.GATEWAY or (serves and role in (Role.VIEWER, Role.OPERATOR)),
                created=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            self.registry.users[name] = user
            self._give(user, seed)
            self._save()
        return user

    def add_login(
        self, role: Role, name: str, key: str, owner: str, group: str, expires: datetime, *, most: int
    ) -> tuple[User, list[str]]:
        """Add a user for a time. Its seed is with its holder alone, so there is no credentials file.

        Args:
            role: of the user.
            name: of the user.
            key: its public NKey.
            owner: name that it makes requests under; none for a viewer.
            group: group of the owner; empty for none.
            expires: end of the login.
            most: logins that an owner may have; those that end first are removed.

        Returns:
            The user, and the names of those that were removed.

        Raises:
            AuthorityError: the name or the key is taken, or a user who stays has that owner.
        """
        with self._locked():
            users = self.registry.users
            if name in users or any(user.key == key for user in users.values()):
                raise AuthorityError(
                    f"there is a user {name!r} already, or its key is another's: log in with a new key"
                )
            staying = next(
                (user for user in users.values() if not user.expires and owner in (user.name, user.owner)), None
            )
            if staying is not None:
                raise AuthorityError(
                    f"{owner!r} is the name of a user with a key of its own: the operator of Corral can remove it with "
                    f"`corral auth revoke {staying.name}`"
                )
            theirs = sorted(
                (
                    user
                    for user in users.values()
                    if user.expires and _login_owner(user) in (owner, name.rpartition("-")[0])
                ),
                key=lambda user: datetime.fromisoformat(user.expires),
            )
            removed = [user.name for user in theirs[: max(0, len(theirs) - most + 1)]]
            for gone in removed:
                del users[gone]
            user = users[name] = User(
                name=name,
                role=role,
                key=key,
                owner=_owner(role, name, owner if role in ASKING else ""),
                group=_group(owner, group) if role in ASKING else "",
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                expires=expires.isoformat(timespec="seconds"),
            )
            self._save()
        return user, removed

    def end_logins(self, now: datetime) -> tuple[list[str], datetime | None]:
        """Remove users whose time is over. Their connections end with the server's next reload.

        Returns:
            Their names, and when the next one ends; None if there is none.
        """
        with self._locked():
            ends = {
                user.name: datetime.fromisoformat(user.expires) for user in self.registry.users.values() if user.expires
            }
            over = [name for name, end in ends.items() if end <= now]
            for name in over:
                del self.registry.users[name]
            if over:
                self._save()
        return over, min((end for name, end in ends.items() if name not in over), default=None)

    def assign(self, name: str, group: str) -> User:
        """Change the group of a user; empty for none.

        Raises:
            AuthorityError: the user asks for no devices, or the group's name is invalid.
        """
        with self._locked():
            user = self._known(name)
            user = self.registry.users[name] = replace(user, group=_group(user.owner, group))
            self._save()
        return user

    def revoke(self, name: str) -> User:
        """Remove a user and its credentials. Its connections end with the server's next reload.

        Raises:
            UnknownUser: there is no such user.
        """
        with self._locked():
            user = self._known(name)
            del self.registry.users[name]
            self._save()
            for suffix in ("creds", "crt", "key"):
                (self.folder / "credentials" / f"{name}.{suffix}").unlink(missing_ok=True)
        return user

    def rotate(self, name: str) -> User:
        """Give a user a new key and new credentials. The old key is refused from the server's next reload on.

        Raises:
            UnknownUser: there is no such user.
            AuthorityError: it is a login for a time.
        """
        with self._locked():
            seed, key = make_key()
            if name == _SYSTEM:
                self.registry.system_key = key
                user = User(name=_SYSTEM, role=Role.ADMIN, key=key)
                self._give(None, seed)
            elif self._known(name).expires:
                raise AuthorityError(f"{name} has logged in for a time: `corral login` gives it a new key")
            else:
                user = self.registry.users[name] = replace(self._known(name), key=key)
                self._give(user, seed)
            self._save()
        return user

    def rotate_server(self, hosts: Sequence[str] = ()) -> None:
        """Give the server a new certificate, for other names if some are given.

        Raises:
            AuthorityError: the authority is without TLS.
        """
        with self._locked():
            if not self.tls:
                raise AuthorityError("this authority is without TLS: make one with `corral auth init --tls-host NAME`")
            self.registry.hosts = list(hosts) or self.registry.hosts
            self._issue_server()
            self._save()

    def secure(self, hosts: Sequence[str]) -> None:
        """Turn TLS on: create a CA and a server certificate, and rewrite all credentials to name the CA. Keys stay.

        Args:
            hosts: names and addresses of the servers.
        """
        with self._locked():
            self.registry.hosts = list(hosts)
            self._make_ca()
            self._issue_server()
            for user in (*(user for user in self.registry.users.values() if not user.expires), None):
                path = self.folder / "credentials" / f"{user.name if user else _SYSTEM}.creds"
                self._give(user, read(path)[1])
            self._save()

    def write_config(self) -> None:
        """Rewrite the server's configuration; write the whole one only if it is missing."""
        tls = (
            server_config.Tls(
                certificate=self.server / "server.crt",
                key=self.server / "server.key",
                ca=self.server / "ca.crt",
                mutual=self.registry.mutual,
            )
            if self.tls
            else None
        )
        now = datetime.now(UTC)
        users = [
            user
            for user in self.registry.users.values()
            if not user.expires or datetime.fromisoformat(user.expires) > now
        ]
        _write(self.config, server_config.render(users, self.registry.system_key, tls).encode())
        whole = self.server / SERVER_NAME
        if not whole.exists():
            _write(whole, _whole_config(self.server).encode())

    def _make_ca(self) -> None:
        ca = certificates.make_ca()
        _write(self.folder / "ca.key", ca.key)
        for folder in (self.folder, self.folder / "credentials", self.server):
            _write(folder / "ca.crt", ca.certificate, 0o644)

    def _issue_server(self) -> None:
        made = certificates.issue(self._ca(), "nats-server", self.registry.hosts)
        _write(self.server / "server.key", made.key)
        _write(self.server / "server.crt", made.certificate, 0o644)

    def _ca(self) -> Certified:
        return Certified((self.folder / "ca.crt").read_bytes(), (self.folder / "ca.key").read_bytes())

    def _give(self, user: User | None, seed: str) -> None:
        """Write a user's credentials, with a new client certificate under mutual TLS. None means the system user."""
        folder = self.folder / "credentials"
        name = user.name if user else _SYSTEM
        mutual = self.registry.mutual
        if mutual:
            made = certificates.issue(self._ca(), name)
            _write(folder / f"{name}.crt", made.certificate)
            _write(folder / f"{name}.key", made.key)
        facts = {
            "user": name,
            "role": user.role if user else _SYSTEM,
            "owner": user.owner if user else "",
            "service": "yes" if user and user.serves else "",
            "inbox": f"_INBOX.{name}",
            "ca": "ca.crt" if self.tls else "",
            "cert": f"{name}.crt" if mutual else "",
            "key": f"{name}.key" if mutual else "",
        }
        said = [f"# {fact}: {value}" for fact, value in facts.items() if value]
        lines = ["# Credentials for Corral's bus: whoever has this file is its holder.", *said, seed, ""]
        _write(folder / f"{name}.creds", "\n".join(lines).encode())

    def _known(self, name: str) -> User:
        user = self.registry.users.get(name)
        if user is None:
            known = ", ".join(sorted(self.registry.users)) or "none yet"
            raise UnknownUser(f"there is no user {name!r}; there are: {known}")
        return user

    def _read(self) -> Registry:
        path = self.folder / "authority.json"
        try:
            return msgspec.json.decode(path.read_bytes(), type=Registry)
        except FileNotFoundError:
            raise AuthorityError(f"there is no authority in {self.folder}: make one with `corral auth init`") from None
        except OSError as error:
            raise AuthorityError(f"{path} can't be read: {error.strerror}") from None
        except msgspec.MsgspecError as error:
            raise AuthorityError(f"{path} is broken: {error}") from None

    def _save(self) -> None:
        self.write_config()
        _write(self.folder / "authority.json", msgspec.json.format(msgspec.json.encode(self.registry), indent=2))

    @contextlib.contextmanager
    def _locked(self) -> Generator[None]:
        """Hold the lock for one change. The registry is read from disk first, and again if the change fails."""
        with (self.folder / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.registry = self._read()
            try:
                yield
            except BaseException:
                self.registry = self._read()
                raise


def make_key() -> tuple[str, str]:
    """Create a user's NKey: its seed, which is the secret, and its public key."""
    import nkeys

    library: Any = nkeys
    seed: bytes = library.encode_seed(secrets.token_bytes(32), library.PREFIX_BYTE_USER)
    return seed.decode(), library.from_seed(bytearray(seed)).public_key.decode()


def expand_hosts(text: str) -> list[str]:
    """Expand `gpu[01-16]` into the names that it stands for.

    Raises:
        AuthorityError: the range is empty, or too large.
    """
    found = _RANGE.search(text)
    if not found:
        return [text]
    first, last = int(found[1]), int(found[2])
    if not 0 <= last - first < _MOST_HOSTS:
        raise AuthorityError(f"{text!r} is no range of at most {_MOST_HOSTS} hosts: write it like gpu[01-16]")
    width = len(found[1])
    names = [f"{text[: found.start()]}{number:0{width}d}{text[found.end() :]}" for number in range(first, last + 1)]
    return [name for one in names for name in expand_hosts(one)]


def _login_owner(user: User) -> str:
    """Person that a login is of. A viewer has no owner, but a name that begins with that of the person."""
    return user.owner or user.name.rpartition("-")[0]


def _owner(role: Role, name: str, owner: str) -> str:
    if role not in ASKING:
        if owner:
            raise AuthorityError(f"a {role} asks for no devices: it has no owner")
        return ""
    owner = owner or name
    if owner == ANY_OWNER:
        return owner
    try:
        msgspec.convert(owner, OwnerName)
    except msgspec.ValidationError:
        raise AuthorityError(f"{owner!r} can't be an owner: letters, digits and _ @ . : / + -") from None
    if owner.endswith(".") or ".." in owner:
        raise AuthorityError(f"{owner!r} can't be an owner on a bus with authentication: no empty part between dots")
    return owner


def _group(owner: str, group: str) -> str:
    if not group:
        return ""
    if not owner or owner == ANY_OWNER:
        raise AuthorityError("only a user with one owner can be in a group: it is the owner who is its member")
    try:
        return msgspec.convert(group, GroupName)
    except msgspec.ValidationError:
        raise AuthorityError(f"{group!r} is no name of a group: letters, digits, _ . and -, as in lab/vision") from None


def _hosts(role: Role, name: str, hosts: Sequence[str]) -> tuple[str, ...]:
    if role not in ON_HOSTS:
        if hosts:
            raise AuthorityError(f"a {role} speaks for no host")
        return ()
    found = [expanded for host in hosts or [name] for expanded in expand_hosts(host)]
    for host in found:
        if host != "*" and not _HOST.fullmatch(host):
            raise AuthorityError(
                f"{host!r} is no host as it stands in subjects: letters, digits, - and _ (dots become -), "
                "* for any, or a range such as gpu[01-16]"
            )
    return ("*",) if "*" in found else tuple(dict.fromkeys(found))


def _whole_config(folder: Path) -> str:
    return (
        "# A whole configuration for nats-server: nats-server -c nats-server.conf. Yours to change.\n"
        'listen: "0.0.0.0:4222"\n'
        "max_payload: 1MB\n"
        f"pid_file: {json.dumps(str(folder / 'nats-server.pid'))}\n"
        f"jetstream {{ store_dir: {json.dumps(str(folder / 'jetstream'))} }}\n"
        f"include {json.dumps(CONFIG_NAME)}\n"
    )


def _write(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace a file atomically. By default only its owner may read it."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
