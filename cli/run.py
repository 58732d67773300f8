"""`corral run` and `corral shell`: a command that holds GPUs for as long as it runs."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import sys
from collections.abc import Generator, Sequence
from typing import Annotated

import typer

from ..client import Client, Rejected
from ..client.lease import HeldLease, environment_for, local_host
from ..client.request import RequestFields
from ..schemas import units
from . import exits, render
from .asking import asking
from .options import NatsUrl, connected, console, say
from .remote import Remote
from .server import die_with_parent
from .waiting import waiting_line

DEFAULT_TTL = "60s"
"""Of a lease that is renewed in the background: so long its GPUs stay taken after a crash."""
TELL_SECONDS = 10.0
"""To hand a signal to a command on another host."""
_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGKILL)

Grace = Annotated[
    str, typer.Option("--grace", metavar="TIME", help="Between SIGTERM and SIGKILL where the lease is lost.")
]
Via = Annotated[
    str | None,
    typer.Option(
        "--via",
        metavar="ssh|COMMAND",
        help="Start it on the granted host: 'ssh', or a command with {host} or {address} in it.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but what goes wrong.")]


@asking
def run(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND [ARG]...", help="What to run.")],
    fields: RequestFields,
    grace: Grace = "10s",
    via: Via = None,
    quiet: Quiet = False,
    nats: NatsUrl = None,
) -> None:
    """Run a command on GPUs: request them, wait if told to, run, renew meanwhile, release at the end.

    The command sees its GPUs alone (CUDA_VISIBLE_DEVICES by uuid) and its lease in CORRAL_LEASE. It keeps the
    terminal, gets the signals, and its exit code becomes this one's. Where the lease is lost it gets SIGTERM, then
    SIGKILL after --grace, and the exit code is 9. GPUs of this host are taken unless --host says otherwise
    ('--host any' for all).

    Examples:
      corral run --gpus 2 --memory 20GiB -- python train.py
      corral run --gpus 8 --model '*H100*' --wait 2h --name llama -- torchrun --nproc-per-node 8 train.py
      corral run --share 0.25 --memory 6GiB -- jupyter lab
      corral run --gpus 1 --host any --via ssh -- nvidia-smi
    """
    raise typer.Exit(_hold(command, fields, grace, via, quiet, nats))


@asking
def shell(
    fields: RequestFields,
    grace: Grace = "10s",
    via: Via = None,
    nats: NatsUrl = None,
) -> None:
    """Open a shell that holds GPUs until you leave it.

    Examples:
      corral shell --gpus 1
      corral shell --gpus 2 --memory 40GiB --wait 10m --name debugging
    """
    command = [] if via else [os.environ.get("SHELL") or "/bin/sh"]
    raise typer.Exit(_hold(command, fields, grace, via, False, nats))


def _hold(
    command: Sequence[str], fields: RequestFields, grace: str, via: str | None, quiet: bool, nats: str | None
) -> int:
    try:
        seconds = units.parse_seconds(grace)
    except ValueError as error:
        raise exits.CommandError(str(error), exits.USAGE) from None
    hosts = fields.get("hosts")
    if not hosts:
        fields["hosts"] = [local_host()]
    elif list(hosts) == ["any"]:
        fields.pop("hosts")
    fields.setdefault("ttl", DEFAULT_TTL)
    fields.setdefault("name", os.path.basename(command[0]) if command else "shell")
    return asyncio.run(_held(command, fields, seconds, via, quiet, nats))


async def _held(
    command: Sequence[str], fields: RequestFields, grace: float, via: str | None, quiet: bool, nats: str | None
) -> int:
    loop = asyncio.get_running_loop()
    lost = asyncio.Event()
    async with connected(nats, owner=fields.get("owner")) as client:
        with waiting_line(quiet) as on_wait, _as_interrupt(loop):
            try:
                context = client.lease(on_lost=lambda _: lost.set(), on_wait=on_wait, **fields)
                held = await context.__aenter__()
            except Rejected as rejected:
                await _explain_host(client, fields)
                for line in render.rejection_lines(rejected.rejection):
                    console(stderr=True).print(line)
                return exits.REJECTED
        try:
            if not quiet:
                where = ", ".join(f"{grant.host}:{grant.index} {grant.model}" for grant in held.grants)
                say(f"corral: lease {held.lease_id} on {where}")
            code = await _child(command, held, via, lost, grace)
        finally:
            await context.__aexit__(None, None, None)
    if held.lost is not None:
        say(f"corral: {held.lost}; the command was stopped")
        return exits.LEASE_LOST
    return code


def _remote(held: HeldLease, via: str) -> Remote:
    if len(held.hosts) != 1:
        raise exits.CommandError(f"--via starts one command on one host, but {len(held.hosts)} hosts were granted")
    host = held.hosts[0]
    return Remote(via, host, held.lease.addresses.get(host) or host, terminal=sys.stdin.isatty())


class _Running:
    """The command, here or there: who gets a signal, and what must not stay behind.

    Args:
        process: the command, or what connects to it.
        held: its lease.
        remote: where it runs; None for this host.
    """

    def __init__(self, process: asyncio.subprocess.Process, held: HeldLease, remote: Remote | None) -> None:
        self.process = process
        # On a terminal it shares our group, so that it may read from it and gets Ctrl-C from it.
        self.terminal = sys.stdin.isatty()
        self._held = held
        self._remote = remote
        self._family: set[int] = set()
        self._errands: set[asyncio.Task[None]] = set()

    def signal(self, number: signal.Signals) -> None:
        """Hand a signal on."""
        if self._remote is None:
            self._family |= descendants(self.process.pid)
            _signal(self.process.pid, number, group=not self.terminal)
            return
        errand = asyncio.ensure_future(self._tell(self._remote, number))
        self._errands.add(errand)
        errand.add_done_callback(self._errands.discard)

    async def kill(self) -> None:
        """End it with all that it has left behind: none of it may stay on the devices."""
        if self._remote is not None:
            await self._tell(self._remote, signal.SIGKILL)
        for pid in {*self._family, *descendants(self.process.pid), self.process.pid}:
            _signal(pid, signal.SIGKILL)

    async def settled(self) -> None:
        """Wait for signals that are on their way to the other host."""
        for errand in self._errands:
            errand.cancel()
        await asyncio.gather(*self._errands, return_exceptions=True)

    async def _tell(self, remote: Remote, number: signal.Signals) -> None:
        words = remote.tell(self._held.lease_id, number.name.removeprefix("SIG"))
        nowhere = asyncio.subprocess.DEVNULL
        try:
            async with asyncio.timeout(TELL_SECONDS):
                teller = await asyncio.create_subprocess_exec(*words, stdin=nowhere, stdout=nowhere, stderr=nowhere)
                told = await teller.wait() == 0
        except (OSError, TimeoutError):
            told = False
        if not told and number in _ENDING:
            # It can't be told: without its connection the watcher there ends it.
            _signal(self.process.pid, signal.SIGTERM)


async def _child(command: Sequence[str], held: HeldLease, via: str | None, lost: asyncio.Event, grace: float) -> int:
    """Run the command to its end, or to the end of its lease."""
    terminal = sys.stdin.isatty()
    parent = os.getpid()
    remote = None if via is None else _remote(held, via)
    words, environment = list(command), os.environ | held.environment
    if remote is not None:
        # The connection itself does not work under the lease: it must outlive what the lease's work is told.
        environment = {name: value for name, value in os.environ.items() if name != "CORRAL_LEASE"}
        words = remote.start(command, environment_for(held.lease, remote.host), held.lease_id, grace)

    def prepare() -> None:
        die_with_parent(parent)
        if not terminal:
            os.setpgid(0, 0)

    try:
        process = await asyncio.create_subprocess_exec(*words, env=environment, preexec_fn=prepare)
    except FileNotFoundError:
        say(f"corral: {words[0]}: command not found")
        return 127
    except PermissionError:
        say(f"corral: {words[0]}: permission denied")
        return 126
    running = _Running(process, held, remote)
    with _forwarding(running):
        ended = asyncio.create_task(process.wait())
        losing = asyncio.create_task(lost.wait())
        await asyncio.wait({ended, losing}, return_when=asyncio.FIRST_COMPLETED)
        losing.cancel()
        if not ended.done():
            say(f"corral: {held.lost}; stopping the command (SIGTERM, SIGKILL in {grace:g} s)")
            running.signal(signal.SIGTERM)
            await asyncio.wait({ended}, timeout=grace)
            await running.kill()
        code = await ended
        await running.settled()
    return code if code >= 0 else 128 - code


@contextlib.contextmanager
def _forwarding(running: _Running) -> Generator[None]:
    """Signals to this process go to the command; those that a terminal sends to both are its alone."""
    loop = asyncio.get_running_loop()
    numbers = [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGQUIT]
    for number in numbers:
        own = running.terminal and number in (signal.SIGINT, signal.SIGQUIT)
        loop.add_signal_handler(number, (lambda: None) if own else functools.partial(running.signal, number))
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


@contextlib.contextmanager
def _as_interrupt(loop: asyncio.AbstractEventLoop) -> Generator[None]:
    """While nothing runs yet, SIGTERM and SIGHUP end the waiting as Ctrl-C does."""
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, task.cancel)
    try:
        yield
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        for number in (signal.SIGTERM, signal.SIGHUP):
            loop.remove_signal_handler(number)


async def _explain_host(client: Client, fields: RequestFields) -> None:
    """A rejection on a machine that the fleet does not know has one likely reason: say it."""
    mine = local_host()
    if list(fields.get("hosts", ())) == [mine] and not (await client.fleet(hosts=[mine])).devices:
        say(
            f"corral: this host ({mine}) has no devices in the fleet; is `corral collect` running here? "
            "--host any takes devices of any host (--via ssh starts the command there)"
        )


def descendants(pid: int) -> set[int]:
    """The process ids of all children of a process, their children, and so on (Linux; elsewhere none)."""
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc") if os.path.isdir("/proc/self") else ():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                with open(f"/proc/{entry.name}/stat", "rb") as file:
                    # The name in parentheses may hold anything, so the fields are counted behind it.
                    parent = int(file.read().rpartition(b")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found: set[int] = set()
    open_ends = [pid]
    while open_ends:
        for child in children.get(open_ends.pop(), ()):
            if child not in found:
                found.add(child)
                open_ends.append(child)
    return found


def _signal(pid: int, number: int, group: bool = False) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if group:
            os.killpg(pid, number)
        else:
            os.kill(pid, number)
