"""`corral auth`: users of the bus, what each may do, their keys and certificates, and the server's configuration."""

from __future__ import annotations

import os
import shlex
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import msgspec
import typer
from msgspec import Struct

from ...bus.access.folder import CONFIG_NAME, SERVER_NAME, Authority, AuthorityError
from ...bus.access.reload import reload
from ...bus.access.roles import ASKING, Role, User, Verb, allowed
from ..exits import NOT_YOURS, USAGE, CommandError
from ..options import AsJson, print_json, say

T = TypeVar("T")

FOLDER_VARIABLE: Final = "CORRAL_AUTH_DIR"

auth = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", add_completion=False)

Folder = Annotated[
    Path | None,
    typer.Option(
        "--dir", envvar=FOLDER_VARIABLE, metavar="FOLDER", help="Of the authority. Default: that of `corral up`."
    ),
]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="FOLDER", help="Put a copy of the credentials there, as corral.creds.")
]
Keep = Annotated[bool, typer.Option("--exist-ok", help="Leave what is there already as it is.")]


@auth.callback()
def authority() -> None:
    """Manage the users of the bus, the role of each, and the server's configuration that is made from them.

    Roles: collector, processor, planner, requester, viewer, operator (docs/security.md has the whole table).

    Examples:
      corral auth init --dir /etc/corral/auth --tls-host bus.example
      corral auth add collector node-7
      corral auth add requester alice
      corral auth revoke alice
    """


def usual_folder() -> Path:
    """Default folder of the authority of this user account."""
    from ..local.folders import default_data

    return default_data() / "auth"


def default_folder() -> Path:
    """Folder of the authority of `corral up`: of the cluster in use, else the default one."""
    from ..local.access import data_in_use

    in_use = data_in_use()
    return usual_folder() if in_use is None else in_use / "auth"


def _open(folder: Path | None) -> Authority:
    try:
        return Authority(folder or default_folder())
    except AuthorityError as error:
        raise CommandError(str(error), USAGE) from None


def _do(work: Callable[[], T]) -> T:
    try:
        return work()
    except AuthorityError as error:
        raise CommandError(str(error), NOT_YOURS if "there is no user" in str(error) else USAGE) from None
    except OSError as error:
        raise CommandError(f"{error.filename or 'the folder'} can't be written: {error.strerror}") from None


@auth.command()
def init(
    folder: Folder = None,
    tls_host: Annotated[
        list[str] | None,
        typer.Option(
            "--tls-host", metavar="NAME", help="Name or address of the server: TLS with a CA of its own. Repeatable."
        ),
    ] = None,
    mutual: Annotated[bool, typer.Option("--mutual", help="Clients show a certificate, too.")] = False,
    pid_file: Annotated[
        Path | None,
        typer.Option("--pid-file", metavar="FILE", help="Of a server that is to be told of changes."),
    ] = None,
    server_dir: Annotated[
        Path | None,
        typer.Option("--server-dir", metavar="FOLDER", help="For the server's files alone. Default: with the others."),
    ] = None,
    exist_ok: Keep = False,
) -> None:
    """Make an authority: a folder with the keys, the server's configuration, and a planner and a processor in it.

    Examples:
      corral auth init --dir /etc/corral/auth --tls-host bus.example --tls-host 10.0.0.5
      nats-server -c /etc/corral/auth/nats-server.conf
    """
    # `init` creates a new authority, so the default isn't the folder of the cluster in use.
    where = folder or usual_folder()
    if exist_ok and (where / "authority.json").exists():
        return

    def make() -> Authority:
        pid = (pid_file or (server_dir or where) / "nats-server.pid").expanduser().absolute()
        made = Authority.create(where, hosts=tls_host or [], mutual=mutual, pid_file=str(pid), server_folder=server_dir)
        made.add(Role.PLANNER, "planner")
        made.add(Role.PROCESSOR, "processor")
        return made

    made = _do(make)
    say(f"{made.folder}: an authority with a planner and a processor{', and a CA' if made.tls else ''}")
    say(f"  nats-server -c {made.server / SERVER_NAME}     or, in a configuration of yours: include {CONFIG_NAME!r}")
    option = f" --dir {folder or where}" if folder or where != default_folder() else ""
    say(f"  corral auth add{option} requester {os.environ.get('USER', 'alice')}")


@auth.command()
def add(
    role: Annotated[Role, typer.Argument(help="What it is.")],
    name: Annotated[str, typer.Argument(help="Of the user; a collector's is its host's, unless --host says another.")],
    owner: Annotated[
        str, typer.Option("--owner", metavar="NAME", help="In whose name it asks; its own by default, '*' for any.")
    ] = "",
    host: Annotated[
        list[str] | None,
        typer.Option("--host", metavar="NAME", help="That a collector speaks for: gpu-1, gpu[01-16], '*'. Repeatable."),
    ] = None,
    simulated: Annotated[
        bool, typer.Option("--simulated", help="A collector whose simulated GPUs follow the leases.")
    ] = False,
    service: Annotated[
        bool, typer.Option("--service", help="An exporter or a dashboard: it tells how it is, when asked.")
    ] = False,
    out: Out = None,
    folder: Folder = None,
    exist_ok: Keep = False,
) -> None:
    """Add a user, and print where its credentials are.

    Examples:
      corral auth add collector node-7
      corral auth add collector rack-3 --host 'gpu[01-16]'
      corral auth add requester alice
      corral auth add requester portal --owner '*'
      corral auth add operator olga --out ./olga
      corral auth add viewer exporter --service
    """
    found = _open(folder)
    if not (exist_ok and name in found.registry.users):
        _do(lambda: found.add(role, name, owner=owner, hosts=host or [], follows_leases=simulated, serves=service))
        _tell(found)
    _hand_over(found, name, out)


@auth.command("apply")
def apply_file(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="TOML: a table for each user.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="Each user's credentials go to FOLDER/NAME, if that is there."),
    ] = None,
    folder: Folder = None,
    server_dir: Annotated[
        Path | None, typer.Option("--server-dir", metavar="FOLDER", help="As in `init`, for an authority that is new.")
    ] = None,
    tls_host: Annotated[
        list[str] | None, typer.Option("--tls-host", metavar="NAME", help="As in `init`. Repeatable.")
    ] = None,
    mutual: Annotated[bool, typer.Option("--mutual", help="As in `init`.")] = False,
) -> None:
    """Create the authority and the users that a file names, where they are missing. No user is removed.

    [node-7]                       # the user's name
    role = "collector"
    hosts = ["node-7"]             # as --host; also: owner, simulated, service

    Examples:
      corral auth apply users.toml --out /run/credentials
    """
    where = folder or default_folder()
    wanted = _do(lambda: read_users(file))
    if not (where / "authority.json").exists():
        _do(lambda: Authority.create(where, hosts=tls_host or [], mutual=mutual, server_folder=server_dir))
    found = _open(folder)
    for name, fields in wanted.items():
        known = found.registry.users.get(name)
        if known is None:
            _do(
                lambda name=name, fields=fields: found.add(
                    fields.role,
                    name,
                    owner=fields.owner,
                    hosts=fields.hosts,
                    follows_leases=fields.simulated,
                    serves=fields.service,
                )
            )
            say(f"{name}: {fields.role}, new")
        elif known.role is not fields.role:
            raise CommandError(f"{name} is a {known.role}, not a {fields.role}: revoke it first", USAGE)
        if out is not None and (out / name).is_dir():
            _do(lambda name=name: copy_credentials(found, name, out / name))
    # The permissions of roles may have changed with the version, even if no user has.
    _do(found.write_config)
    _tell(found)


@auth.command()
def revoke(
    name: Annotated[str, typer.Argument(help="Of the user.")],
    folder: Folder = None,
) -> None:
    """Take a user away. Its connections end when the server reads its configuration anew.

    Examples:
      corral auth revoke alice
    """
    found = _open(folder)
    _do(lambda: found.revoke(name))
    say(f"{name} is no user any more")
    _tell(found)


@auth.command()
def rotate(
    name: Annotated[str | None, typer.Argument(help="Of the user.")] = None,
    server: Annotated[bool, typer.Option("--server", help="Give the server a new certificate.")] = False,
    tls_host: Annotated[
        list[str] | None,
        typer.Option("--tls-host", metavar="NAME", help="Name of the server from now on. Repeatable."),
    ] = None,
    out: Out = None,
    folder: Folder = None,
) -> None:
    """Give a user a new key, or the server a new certificate. The old key is refused from then on.

    Examples:
      corral auth rotate alice
      corral auth rotate --server --tls-host bus.example --tls-host bus2.example
    """
    found = _open(folder)
    if (name is None) == (not server):
        raise CommandError("name a user, or --server", USAGE)
    if name is None:
        _do(lambda: found.rotate_server(tls_host or []))
        say("the server has a new certificate")
        _tell(found)
        return
    _do(lambda: found.rotate(name))
    _tell(found)
    _hand_over(found, name, out)


@auth.command()
def show(
    name: Annotated[str | None, typer.Argument(help="Of the user; all by default.")] = None,
    folder: Folder = None,
    as_json: AsJson = False,
) -> None:
    """List the users, or what one of them may do. Keys are shown, secrets never.

    Examples:
      corral auth show
      corral auth show alice
    """
    found = _open(folder)
    if name is None:
        users = sorted(found.registry.users.values(), key=lambda user: (user.role, user.name))
        if as_json:
            listing: Any = {"folder": str(found.folder), "tls": found.tls, "users": users}
            print_json(listing)
            return
        for user in users:
            typer.echo(f"{user.name:<20} {user.role:<10} {_details(user):<30} {user.key[:12]}…  {user.created}")
        return
    _do(lambda: found.credentials(name))
    user = found.registry.users[name]
    rights = {verb.value: allowed(user, verb) for verb in Verb}
    if as_json:
        detailed: Any = {"user": user, "credentials": str(found.credentials(name)), **rights}
        print_json(detailed)
        return
    typer.echo(f"{user.name}: {user.role} {_details(user)}".rstrip())
    typer.echo(f"key {user.key}, credentials in {found.credentials(name)}")
    for verb, subjects in rights.items():
        typer.echo(f"may {verb}:")
        for subject in subjects:
            typer.echo(f"  {subject}")


@auth.command("print")
def print_credentials(
    name: Annotated[str, typer.Argument(help="Of the user.")],
    ca: Annotated[bool, typer.Option("--ca", help="The CA's certificate, in place of the credentials.")] = False,
    folder: Folder = None,
) -> None:
    """Print a user's credentials, for a pipe: whoever has them is that user.

    Examples:
      corral auth print alice > alice.creds
    """
    found = _open(folder)
    path = _do(lambda: found.credentials(name))
    if ca and not found.tls:
        raise CommandError("this authority is without TLS: there is no CA", USAGE)
    typer.echo(_do(lambda: (path.with_name("ca.crt") if ca else path).read_text()), nl=False)


class Wanted(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A user in a file for `corral auth apply`; see `Authority.add`."""

    role: Role
    owner: str = ""
    hosts: list[str] = []
    simulated: bool = False
    service: bool = False


def read_users(file: Path) -> dict[str, Wanted]:
    """Read the users that a file names.

    Raises:
        AuthorityError: the file is missing or invalid.
    """
    try:
        return msgspec.toml.decode(file.read_bytes(), type=dict[str, Wanted])
    except OSError as error:
        raise AuthorityError(f"{file} can't be read: {error.strerror}") from None
    except (msgspec.MsgspecError, ValueError) as error:
        raise AuthorityError(f"{file} is wrong: {error}") from None


def _details(user: User) -> str:
    if user.role in ASKING:
        return f"owner {user.owner}"
    if user.hosts:
        more = f" and {len(user.hosts) - 3} more" if len(user.hosts) > 3 else ""
        return f"hosts {', '.join(user.hosts[:3])}{more}"
    return ""


def _hand_over(found: Authority, name: str, out: Path | None) -> None:
    """Print the path of a user's credentials, and the command that adds a context with them."""
    path = _do(lambda: found.credentials(name))
    if out is not None:
        path = _do(lambda: copy_credentials(found, name, out))
    typer.echo(str(path))
    if found.registry.users[name].role in (Role.REQUESTER, Role.VIEWER, Role.OPERATOR):
        say(f"  corral context add {_free_context(name)} {_url(found)} --creds {shlex.quote(str(path))}")
        if found.tls and out is None:
            say(f"  {path.with_name('ca.crt')} goes with it")


def _url(found: Authority) -> str:
    """URL of the bus for users.

    With TLS, it has the first name in the server's certificate, and the port of `corral up`, else 4222. Without TLS, it
    is the URL that `corral up` has written, else this host's name with port 4222.
    """
    from ..local.access import url_of

    known = url_of(found.folder.parent) if found.folder.name == "auth" else ""
    if not found.tls:
        return known or f"nats://{socket.gethostname()}:4222"
    port = known.rpartition(":")[2] if known else "4222"
    return f"nats://{found.registry.hosts[0]}:{port}"


def _free_context(name: str) -> str:
    """Name for a new context: the given one, or `NAME-there` if a context with that name exists."""
    from .. import config

    try:
        taken = config.read().contexts
    except CommandError:
        taken = {}
    return name if name not in taken else f"{name}-there"


def copy_credentials(found: Authority, name: str, out: Path) -> Path:
    """Copy a user's credentials, certificate and key, and the CA certificate, to a folder, with mode 0600.

    Returns:
        Path of the credentials file.
    """
    out = out.expanduser().absolute()
    out.mkdir(parents=True, exist_ok=True)
    source = found.credentials(name)
    target = out / "corral.creds"
    for file, name_there in (
        (source, target.name),
        (source.with_name("ca.crt"), "ca.crt"),
        (source.with_suffix(".crt"), f"{name}.crt"),
        (source.with_suffix(".key"), f"{name}.key"),
    ):
        if file.exists():
            partial = out / f".{name_there}.partial"
            partial.unlink(missing_ok=True)
            partial.touch(mode=0o600)
            partial.write_bytes(file.read_bytes())
            partial.replace(out / name_there)
    return target


def _tell(found: Authority) -> None:
    """Make the server reload its configuration, or print how to do that."""
    pid_file = Path(found.registry.pid_file) if found.registry.pid_file else None
    if pid_file is not None and (pid := reload(pid_file)):
        say(f"the server (process {pid}) has been told")
        return
    say(f"it holds once the server reads {found.config} anew: nats-server --signal reload, or kill -HUP")
