"""The programs that commands in the documentation call, served to a real shell by forks of one warm interpreter.

usage: python docs_programs.py SOCKET FOLDER

FOLDER gets one small program for each of `PROGRAMS`, to be put first in `PATH`. It hands its arguments, its environment
and its terminal over SOCKET to a fork of this process, which has everything imported, and ends with the fork's code.

`corral` and `python` are the real ones. Services run only as far as their options are read: the cluster that the pages
are about is there already. `nats` and `duckdb` do what the pages ask of them with the Python libraries. What would need
the network or root (`docker`, `pip`, `kubectl`, …) is checked against the repository instead: that files, profiles,
extras and targets are there.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import re
import runpy
import select
import signal
import socket
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
SERVICES = ("up", "demo", "collect", "process", "plan", "export", "dashboard", "serve-http")

# `socket` and `signal` themselves take as long to import as the interpreter to start.
SHIM = """#!{python} -IS
import _signal, _socket, os, sys
s = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
s.connect({path!r})
pairs = [f"{{name}}={{value}}" for name, value in os.environ.items()]
body = "\\0".join([{name!r}, os.getcwd(), str(len(sys.argv) - 1), *sys.argv[1:], *pairs])
body = body.encode("utf-8", "surrogateescape")
streams = b"".join(number.to_bytes(4, sys.byteorder) for number in (0, 1, 2))
s.sendmsg([len(body).to_bytes(4, "big")], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, streams)])
s.sendall(body)
for number in (_signal.SIGTERM, _signal.SIGINT, _signal.SIGHUP, _signal.SIGUSR1):
    _signal.signal(number, lambda n, _: s.sendall(bytes([n])))
code = s.recv(1)
sys.exit(code[0] if code else 70)
"""


class Wrong(Exception):
    """What a page says can't be."""


def corral(arguments: list[str]) -> int:
    """The real command line; of services, the reading of their options."""
    from corral.cli import main
    from corral.cli.loading import load
    from corral.cli.registry import COMMANDS

    # The bus that pages speak of is the cluster's, and root's folders are in a home of its own.
    url, home = os.environ["DOCS_URL"], os.environ["HOME"]
    arguments = [re.sub("nats://(gpu-bus|127.0.0.1):4222", url, word) for word in arguments]
    arguments = [re.sub("^(?=/(etc|var)/)", home, word) for word in arguments]
    name = next((word for word in arguments if word in COMMANDS), "")
    if name in SERVICES and "--help" not in arguments:
        load(name).make_context(name, arguments[arguments.index(name) + 1 :])
        print(f"(corral {name} is not started here: its options are right)")
        return 0
    sys.argv = ["corral", *arguments]
    main.main(arguments)
    return 0


def python(arguments: list[str]) -> int:
    """A file, `-c`, `-m` or stdin, by this interpreter."""
    sys.argv = arguments[:]
    match arguments:
        case ["-c", code, *rest]:
            sys.argv = ["-c", *rest]
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        case ["-m", module, *rest]:
            sys.argv = [module, *rest]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case [file, *_] if file != "-":
            sys.path.insert(0, os.path.dirname(os.path.abspath(file)))
            runpy.run_path(file, run_name="__main__")
        case _:
            exec(compile(sys.stdin.read(), "<stdin>", "exec"), {"__name__": "__main__"})
    return 0


def nats(arguments: list[str]) -> int:
    """`nats context save`, `nats request` and `nats sub --count N`, as the NATS command does them."""
    import asyncio
    import json

    import nats as library

    words = [word for word in arguments if not word.startswith("-")]
    flags = dict(itertools.pairwise(arguments))
    store = Path(os.environ["HOME"], ".config", "nats", "context")
    if words[:2] == ["context", "save"]:
        store.mkdir(parents=True, exist_ok=True)
        (store / "selected.json").write_text(json.dumps(flags))
        return 0
    context = json.loads((store / "selected.json").read_text())
    seed = re.search(r"^SU[A-Z2-7]{56}$", Path(context["--nkey"]).read_text(), re.MULTILINE)
    known = {"nkeys_seed_str": seed[0] if seed else "", "inbox_prefix": context["--inbox-prefix"].encode()}

    async def work() -> None:
        client = await library.connect(context["--server"], allow_reconnect=False, **known)
        if words[0] in ("request", "req"):
            reply = await client.request(words[1], (words[2] if len(words) > 2 else "").encode(), timeout=10)
            print(reply.data.decode())
            if b'"type":"error"' in reply.data[:64]:
                raise Wrong(reply.data.decode())
        elif words[0] in ("sub", "subscribe"):
            count = int(words[-1]) if "--count" in arguments else 1
            subscription = await client.subscribe(words[1])
            for _ in range(count):
                message = await subscription.next_msg(timeout=20)
                print(f"[#1] Received on {message.subject!r}")
        else:
            raise Wrong(f"nats {words[0]}")
        await client.close()

    asyncio.run(work())
    return 0


def curl(arguments: list[str]) -> int:
    """The real one, at the gateway that the tests have started; an error's status is one of the command."""
    real = os.environ["DOCS_CURL"]
    moved = [word.replace("http://127.0.0.1:8700", os.environ["DOCS_HTTP"]) for word in arguments]
    os.execv(real, ["curl", "--fail-with-body", "--max-time", "60", *moved])


def duckdb(arguments: list[str]) -> int:
    """`duckdb FILE SQL`."""
    import duckdb as library

    library.default_connection()
    with library.connect(arguments[0], read_only=True) as connection:
        print(connection.sql(arguments[1]))
    return 0


def pip(arguments: list[str]) -> int:
    """That extras which are installed are there, of the package by its name or of the clone."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = project["optional-dependencies"]
    for word in arguments:
        if match := re.fullmatch(r"(?:corral|\.)\[([a-z,]+)\]", word):
            for extra in match[1].split(","):
                if extra not in known:
                    raise Wrong(f"there is no extra {extra}")
    return 0


def docker(arguments: list[str]) -> int:
    """That the compose file has the profiles and services, and the files are there."""
    import yaml

    if arguments[:1] != ["compose"]:
        for word in arguments:
            if word.startswith("deploy/") and not (ROOT / word).exists():
                raise Wrong(f"there is no {word}")
        return 0
    words = arguments[1:]
    file = ROOT / (words[words.index("-f") + 1] if "-f" in words else "compose.yaml")
    services = yaml.safe_load(file.read_text())["services"]
    profiles = {profile for service in services.values() for profile in service.get("profiles", ())}
    verb = next(
        word
        for word in words
        if word in ("up", "down", "logs", "build", "ps", "run", "exec", "restart", "stop", "kill")
    )
    for flag, value in itertools.pairwise(words):
        if flag == "--profile" and value not in profiles:
            raise Wrong(f"{file.name} has no profile {value}")
        if flag == "--scale" and value.partition("=")[0] not in services:
            raise Wrong(f"{file.name} has no service {value}")
    named = [word for word in words[words.index(verb) + 1 :] if not word.startswith("-") and word != "HUP"]
    if verb not in ("up", "down", "build") and named[0] not in services:
        raise Wrong(f"{file.name} has no service {named[0]}")
    if verb == "run" and named[:2] == ["auth", "print"]:
        sys.stdout.write(Path(os.environ["DOCS_CREDENTIALS"]).read_text())
    return 0


def nats_server(arguments: list[str]) -> int:
    """That the server takes its configuration."""
    from corral.cli.local.server import server_binary

    arguments = [re.sub("^(?=/(etc|var)/)", os.environ["HOME"], word) for word in arguments]
    os.execv(server_binary(), ["nats-server", "-t", *arguments])


def files(arguments: list[str]) -> int:
    """That files of the repository which are named are there."""
    for word in arguments:
        if word.startswith(("deploy/", "docs/", "bench/")) and not (ROOT / word).exists():
            raise Wrong(f"there is no {word}")
    return 0


def systemctl(arguments: list[str]) -> int:
    """That the units are there, and that what one starts was installed where it says."""
    for word in arguments:
        name = word if word.endswith(".service") else f"{word}.service"
        if not word.startswith("corral-"):
            continue
        unit = ROOT / "deploy" / "systemd" / name
        if not unit.is_file():
            raise Wrong(f"there is no deploy/systemd/{name}")
        started = re.findall(r"^ExecStart=(\S+)", unit.read_text(), re.MULTILINE)
        if "enable" in arguments and (missing := [program for program in started if not rooted(program).exists()]):
            raise Wrong(f"{name} starts {missing[0]}, and nothing was installed there")
    return 0


def sudo(arguments: list[str]) -> int:
    """What it would run, checked as without it; what has no check of its own is looked at for files.

    Of a virtual environment that root makes, and of what its `pip` installs, there are empty files below the home.
    """
    match arguments:
        case ["python3" | "python", "-m", "venv", *options, folder]:
            programs = rooted(folder) / "bin"
            programs.mkdir(parents=True, exist_ok=True)
            for program in ("python3", *(() if "--without-pip" in options else ("pip",))):
                (programs / program).touch()
            return 0
        case [program, *rest] if program.endswith("/pip"):
            if not rooted(program).exists():
                raise Wrong(f"there is no {program}")
            if any(word.startswith(("corral", ".[")) for word in rest):
                rooted(program).with_name("corral").touch()
            return pip(rest)
        case _:
            name, *rest = [word for word in arguments if not word.startswith("-")] or [""]
            return PROGRAMS.get(name, files)(rest)


def rooted(path: str) -> Path:
    """Where a path of root's is in these tests: below the home."""
    return Path(os.environ["HOME"] + os.path.abspath(path))


def make(arguments: list[str]) -> int:
    """That the targets are there."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for word in arguments:
        if "=" not in word and word not in targets:
            raise Wrong(f"there is no target {word}")
    return 0


PROGRAMS: dict[str, Callable[[list[str]], int]] = {
    "corral": corral, "python": python, "python3": python, "nats": nats, "nats-server": nats_server, "duckdb": duckdb,
    "curl": curl, "pip": pip, "docker": docker, "kubectl": files, "systemctl": systemctl, "sudo": sudo, "make": make,
    "apt-get": files, "apt": files, "createdb": files, "git": files,
}  # fmt: skip


def serve(path: str, folder: Path) -> None:
    """Make the programs, then fork one process for each call, for ever."""
    for name in PROGRAMS:
        shim = folder / name
        shim.write_text(SHIM.format(python=sys.executable, path=path, name=name))
        shim.chmod(0o755)
    _warm()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    print("ready", flush=True)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            os._exit(_handle(connection))
        connection.close()


def _warm() -> None:
    parts = ["render", "top.command", "top.rows", "work.commands", "work.request_options", "work.run"]
    parts += [f"operate.{part}" for part in ("config", "doctor", "fleet", "health", "query")]
    libraries = ("nats.aio.client", "corral.client", "rich.console", "rich.progress", "rich.table", "typer.rich_utils")
    for name in (*libraries, *(f"corral.cli.{part}" for part in parts)):
        importlib.import_module(name)
    from corral.cli.loading import load

    # Reading the first option of a command imports pydantic, which takes longer than most commands.
    load("fleet").make_context("fleet", [])


def _handle(connection: socket.socket) -> int:
    """One call: a child with the caller's terminal, folder and environment; its code goes back."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, descriptors, _, _ = socket.recv_fds(connection, 4, 3)
    size, body = int.from_bytes(head, "big"), b""
    while len(body) < size:
        body += connection.recv(size - len(body))
    name, folder, count, *words = body.decode("utf-8", "surrogateescape").split("\0")
    arguments, environment = words[: int(count)], words[int(count) :]
    child = os.fork()
    if child == 0:
        connection.close()
        for target, descriptor in enumerate(descriptors):
            os.dup2(descriptor, target)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(pair.split("=", 1) for pair in environment)
        os._exit(_run(name, arguments))
    for descriptor in descriptors:
        os.close(descriptor)
    connection.setblocking(False)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            with contextlib.suppress(OSError):
                connection.send(bytes([code if code >= 0 else 128 - code]))
            return 0
        if select.select([connection], [], [], 0.005)[0]:
            told = connection.recv(1)
            os.kill(child, told[0] if told else signal.SIGTERM)
            if not told:
                os.waitpid(child, 0)
                return 0


def _run(name: str, arguments: list[str]) -> int:
    """The program's exit code, as an interpreter of its own would end."""
    # What was made for another call's terminal is not for this one.
    from corral.cli import options

    options.console.cache_clear()
    sys.stdin = os.fdopen(0, "r", closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    code: object
    try:
        code = PROGRAMS[name](arguments)
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except Wrong as wrong:
        print(f"{name} {' '.join(arguments)}: {wrong}", file=sys.stderr)
        code = 64
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    return int(code or 0) if not isinstance(code, str) else 1


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        serve(sys.argv[1], Path(sys.argv[2]))
