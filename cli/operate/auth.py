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

from ...bus.access.folder import CONFIG_NAME, SERVER_NAME, Authority, AuthorityError, UnknownUser
from ...bus.access.reload import reload
from ...bus.access.roles import ASKING, Role, Verb
from ...bus.access.tokens import TokenError, token_of
from ...bus.access.users import User, allowed
from ...bus.credentials import CREDENTIALS_VARIABLE, CredentialsError, identify
from ..exits import NOT_YOURS, USAGE, CommandError
from ..options import AsJson, print_json, say

T = TypeVar("T")

FOLDER_VARIABLE: Final = "CORRAL_AUTH_DIR"

auth = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", add_completion=False)

Folder = Annotated[
    Path | None,
    typer.Option(
        "--dir",
        envvar=FOLDER_VARIABLE,
        metavar="FOLDER",
        help="Folder of the authority (keys and users). Default: that of `corral up`.",
    ),
]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="FOLDER", help="Copy the credentials to FOLDER/corral.creds.")
]
Keep = Annotated[bool, typer.Option("--exist-ok", help="Succeed without a change if it exists already.")]


@auth.callback()
def authority() -> None:
    """Manage the users of the bus and their roles, and generate the server's configuration.

    Roles: collector, runner, processor, planner, notifier, requester, viewer, operator, gateway (docs/security.md has
    all).

    Examples:
      corral auth init --dir /etc/corral/auth --tls-host bus.example
      corral auth add collector node-7
      corral auth add runner runner-7 --host node-7
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


def _translate_errors(work: Callable[[], T]) -> T:
    try:
        return work()
    except AuthorityError as error:
        raise CommandError(str(error), NOT_YOURS if isinstance(error, UnknownUser) else USAGE) from None
    except OSError as error:
        raise CommandError(f"{error.filename or 'the folder'} can't be written: {error.strerror}") from None


@auth.command()
def init(
    folder: Folder = None,
    tls_host: Annotated[
        list[str] | None,
        typer.Option(
            "--tls-host",
            metavar="NAME",
            help="Enable TLS with a new CA, for a server with this name or address. Repeatable.",
        ),
    ] = None,
    mutual: Annotated[bool, typer.Option("--mutual", help="Require client certificates (mutual TLS).")] = False,
    pid_file: Annotated[
        Path | None,
        typer.Option(
            "--pid-file", metavar="FILE", help="PID file of the server, which is sent SIGHUP when users change."
        ),
    ] = None,
    server_dir: Annotated[
        Path | None,
        typer.Option(
            "--server-dir", metavar="FOLDER", help="Separate folder for the server's files. Default: the same folder."
        ),
    ] = None,
    exist_ok: Keep = False,
) -> None:
    """Create an authority: a folder with keys, users and the server's configuration. Adds a planner and a processor.

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

    made = _translate_errors(make)
    say(f"{made.folder}: an authority with a planner and a processor{', and a CA' if made.tls else ''}")
    say(f"  nats-server -c {made.server / SERVER_NAME}     or, in your own configuration: include {CONFIG_NAME!r}")
    option = f" --dir {folder or where}" if folder or where != default_folder() else ""
    say(f"  corral auth add{option} requester {os.environ.get('USER', 'alice')}")


@auth.command()
def add(
    role: Annotated[Role, typer.Argument(help="Role of the user.")],
    name: Annotated[
        str,
        typer.Argument(help="Name of the user; for a collector or a runner the host's name, unless --host is given."),
    ],
    owner: Annotated[
        str,
        typer.Option(
            "--owner", metavar="NAME", help="Owner of the user's requests: by default its own name; '*' for any owner."
        ),
    ] = "",
    host: Annotated[
        list[str] | None,
        typer.Option(
            "--host",
            metavar="NAME",
            help="Host that a collector or a runner may speak for: gpu-1, gpu[01-16], '*'. Repeatable.",
        ),
    ] = None,
    simulated: Annotated[
        bool,
        typer.Option(
            "--simulated", help="A collector whose simulated GPUs follow the leases: it may read lease events."
        ),
    ] = False,
    service: Annotated[
        bool,
        typer.Option("--service", help="An exporter, a dashboard or a login service: it may answer health checks."),
    ] = False,
    group: Annotated[
        str, typer.Option("--group", metavar="GROUP", help="Group of the owner, for `corral group apply`: lab/vision.")
    ] = "",
    out: Out = None,
    folder: Folder = None,
    exist_ok: Keep = False,
) -> None:
    """Add a user, and print the path of its credentials.

    Examples:
      corral auth add collector node-7
      corral auth add collector rack-3 --host 'gpu[01-16]'
      corral auth add runner runner-7 --host node-7
      corral auth add requester alice --group lab/vision
      corral auth add requester portal --owner '*'
      corral auth add operator olga --out ./olga
      corral auth add viewer exporter --service
      corral auth add gateway http
    """
    found = _open(folder)
    if not (exist_ok and name in found.registry.users):
        _translate_errors(
            lambda: found.add(
                role, name, owner=owner, hosts=host or [], follows_leases=simulated, serves=service, group=group
            )
        )
        _reload_server(found)
    _hand_over(found, name, out)


@auth.command("apply")
def apply_file(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="TOML file with a table for each user.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FOLDER", help="Copy each user's credentials to FOLDER/NAME, if that folder exists."
        ),
    ] = None,
    folder: Folder = None,
    server_dir: Annotated[
        Path | None, typer.Option("--server-dir", metavar="FOLDER", help="As in `init`, if the authority is created.")
    ] = None,
    tls_host: Annotated[
        list[str] | None, typer.Option("--tls-host", metavar="NAME", help="As in `init`. Repeatable.")
    ] = None,
    mutual: Annotated[bool, typer.Option("--mutual", help="As in `init`.")] = False,
) -> None:
    """Create the authority and the users that a file lists, unless they exist. No user is removed.

    A group in the file becomes that of a user who exists.

    [node-7]                       # the user's name
    role = "collector"
    hosts = ["node-7"]             # as --host; also: owner, simulated, service, group

    Examples:
      corral auth apply users.toml --out /run/credentials
    """
    where = folder or default_folder()
    wanted = _translate_errors(lambda: read_users(file))
    if not (where / "authority.json").exists():
        _translate_errors(
            lambda: Authority.create(where, hosts=tls_host or [], mutual=mutual, server_folder=server_dir)
        )
    found = _open(folder)
    for name, fields in wanted.items():
        known = found.registry.users.get(name)
        if known is None:
            _translate_errors(
                lambda name=name, fields=fields: found.add(
                    fields.role,
                    name,
                    owner=fields.owner,
                    hosts=fields.hosts,
                    follows_leases=fields.simulated,
                    serves=fields.service,
                    group=fields.group,
                )
            )
            say(f"{name}: {fields.role}, new")
        elif known.role is not fields.role:
            raise CommandError(f"{name} is a {known.role}, not a {fields.role}: revoke it first", USAGE)
        elif fields.group and fields.group != known.group:
            _translate_errors(lambda name=name, fields=fields: found.assign(name, fields.group))
            say(f"{name}: group {fields.group}")
        if out is not None and (out / name).is_dir():
            _translate_errors(lambda name=name: copy_credentials(found, name, out / name))
    # The permissions of roles may have changed with the version, even if no user has.
    _translate_errors(found.write_config)
    _reload_server(found)


@auth.command("group")
def assign(
    name: Annotated[str, typer.Argument(help="Name of the user.")],
    group: Annotated[str, typer.Argument(metavar="GROUP", help="Group of its owner; '' for none.")],
    folder: Folder = None,
) -> None:
    """Change the group of a user. `corral group apply --members-from-auth` makes its owner a member.

    Examples:
      corral auth group alice lab/vision
    """
    found = _open(folder)
    user = _translate_errors(lambda: found.assign(name, group))
    say(f"{name}: {_details(user)}")


@auth.command()
def revoke(
    name: Annotated[str, typer.Argument(help="Name of the user.")],
    folder: Folder = None,
) -> None:
    """Remove a user. Its connections end when the server reloads its configuration.

    Examples:
      corral auth revoke alice
    """
    found = _open(folder)
    _translate_errors(lambda: found.revoke(name))
    say(f"{name} is removed")
    _reload_server(found)


@auth.command()
def rotate(
    name: Annotated[str | None, typer.Argument(help="Name of the user.")] = None,
    server: Annotated[bool, typer.Option("--server", help="Renew the server's certificate.")] = False,
    tls_host: Annotated[
        list[str] | None,
        typer.Option("--tls-host", metavar="NAME", help="Name or address in the new certificate. Repeatable."),
    ] = None,
    out: Out = None,
    folder: Folder = None,
) -> None:
    """Replace the key of a user, or the certificate of the server. The old key stops working.

    Examples:
      corral auth rotate alice
      corral auth rotate --server --tls-host bus.example --tls-host bus2.example
    """
    found = _open(folder)
    if (name is None) == (not server):
        raise CommandError("name a user, or --server", USAGE)
    if name is None:
        _translate_errors(lambda: found.rotate_server(tls_host or []))
        say("the server has a new certificate")
        _reload_server(found)
        return
    _translate_errors(lambda: found.rotate(name))
    _reload_server(found)
    _hand_over(found, name, out)


@auth.command()
def show(
    name: Annotated[str | None, typer.Argument(help="Name of the user. Default: list all users.")] = None,
    folder: Folder = None,
    as_json: AsJson = False,
) -> None:
    """List the users, or the permissions of one. Public keys are shown, secrets are not.

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
            until = f"  until {user.expires}" if user.expires else ""
            typer.echo(f"{user.name:<20} {user.role:<10} {_details(user):<30} {user.key[:12]}…  {user.created}{until}")
        return
    if name not in found.registry.users:
        _translate_errors(lambda: found.credentials(name))
    user = found.registry.users[name]
    file = "" if user.expires else str(found.credentials(name))
    rights = {verb.value: allowed(user, verb) for verb in Verb}
    if as_json:
        detailed: Any = {"user": user, "credentials": file, **rights}
        print_json(detailed)
        return
    typer.echo(f"{user.name}: {user.role} {_details(user)}".rstrip())
    typer.echo(f"key {user.key}, {f'a login until {user.expires}' if user.expires else f'credentials in {file}'}")
    for verb, subjects in rights.items():
        typer.echo(f"may {verb}:")
        for subject in subjects:
            typer.echo(f"  {subject}")


@auth.command("print")
def print_credentials(
    name: Annotated[str, typer.Argument(help="Name of the user.")],
    ca: Annotated[bool, typer.Option("--ca", help="Print the CA's certificate instead.")] = False,
    folder: Folder = None,
) -> None:
    """Print a user's credentials, which are secret: whoever has them can connect as that user.

    Examples:
      corral auth print alice > alice.creds
    """
    found = _open(folder)
    path = _translate_errors(lambda: found.credentials(name))
    if ca and not found.tls:
        raise CommandError("this authority has no CA, since it doesn't use TLS", USAGE)
    typer.echo(_translate_errors(lambda: (path.with_name("ca.crt") if ca else path).read_text()), nl=False)


@auth.command("token")
def print_token(
    name: Annotated[
        str | None, typer.Argument(help="Name of the user. Default: the one whose credentials are in use.")
    ] = None,
    owner: Annotated[
        str,
        typer.Option("--owner", metavar="NAME", help="Owner of the token's requests, if the user may name any."),
    ] = "",
    header: Annotated[
        bool, typer.Option("--header", help="Print a line for `curl -H @FILE`, which keeps it out of process lists.")
    ] = False,
    folder: Folder = None,
) -> None:
    """Print a user's bearer token for `corral serve-http`, which is as secret as its credentials are.

    It has the user's rights, and ends when the user is revoked or its key is rotated. For a program, add a user of its
    own, with the same owner.

    Examples:
      corral auth token alice > alice.token
      corral auth token --header > corral.header
      corral auth add requester alice-ci --owner alice && corral auth token alice-ci
    """
    if name is not None:
        found = _open(folder)
        file = str(_translate_errors(lambda: found.credentials(name)))
    elif not (file := os.environ.get(CREDENTIALS_VARIABLE, "")):
        raise CommandError(f"name a user, or credentials with --creds or {CREDENTIALS_VARIABLE}", USAGE)
    try:
        token = token_of(identify(file), owner)
    except (TokenError, CredentialsError) as error:
        raise CommandError(str(error), USAGE) from None
    typer.echo(f"Authorization: Bearer {token}" if header else token)


class Wanted(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A user in a file for `corral auth apply`; see `Authority.add`."""

    role: Role
    owner: str = ""
    hosts: list[str] = []
    simulated: bool = False
    service: bool = False
    group: str = ""


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
        raise AuthorityError(f"{file} is invalid: {error}") from None


def _details(user: User) -> str:
    if user.role in ASKING:
        return f"owner {user.owner}{f', group {user.group}' if user.group else ''}"
    if user.hosts:
        more = f" and {len(user.hosts) - 3} more" if len(user.hosts) > 3 else ""
        return f"hosts {', '.join(user.hosts[:3])}{more}"
    return ""


def _hand_over(found: Authority, name: str, out: Path | None) -> None:
    """Print the path of a user's credentials, and the command that adds a context with them."""
    path = _translate_errors(lambda: found.credentials(name))
    if out is not None:
        path = _translate_errors(lambda: copy_credentials(found, name, out))
    typer.echo(str(path))
    if found.registry.users[name].role in (Role.REQUESTER, Role.VIEWER, Role.OPERATOR):
        say(f"  corral context add {_free_context(name)} {bus_url(found)} --creds {shlex.quote(str(path))}")
        if found.tls and out is None:
            say(f"  {path.with_name('ca.crt')} is needed too")


def bus_url(found: Authority) -> str:
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


def _reload_server(found: Authority) -> None:
    """Make the server reload its configuration, or print how to do that."""
    pid_file = Path(found.registry.pid_file) if found.registry.pid_file else None
    if pid_file is not None and (pid := reload(pid_file)):
        say(f"the server (process {pid}) reloads its configuration")
        return
    say(f"it takes effect when the server reloads {found.config}: nats-server --signal reload, or kill -HUP")
