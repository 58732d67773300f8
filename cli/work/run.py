"""`corral run` and `corral shell`: run a command under a lease, which is held as long as the command runs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import typer

from ...bus.tasks import BackgroundTasks, cancel_all
from ...client import OnOutage, Rejected
from ...client.leases.environment import environment_for, restricted_to_host
from ...client.leases.lease import HeldLease
from ...client.request import RequestFields
from ...schemas.limits import LEASE_VARIABLE, MAX_WAIT_SECONDS
from ...schemas.requests import GpuRange
from ...schemas.values import units
from .. import exits, render
from ..options import NatsUrl, connected, console, say
from .children import Child, NotStarted
from .host_messages import explain_missing, print_device_hosts
from .jobs.control import HARMLESS, Interrupted, Signals, Terminal
from .lease_safety import reporting_troubles, start_in_time
from .preemption import RESTARTS_VARIABLE, Notices, parse_signal, was_preempted
from .remote import Remote
from .request_options import with_request_options
from .resize import DEVICES_VARIABLE, Resizes
from .wait_display import wait_display

DEFAULT_TTL = "60s"
"""Time to live of the lease, which is renewed in the background: its GPUs stay leased this long after a crash."""
TELL_SECONDS = 10.0
"""Timeout for sending a signal to a command on another host."""
_DEFAULT_GRACE = "10s"
_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGKILL)

Grace = Annotated[
    str | None,
    typer.Option(
        "--grace",
        metavar="TIME",
        help="Time between SIGTERM and SIGKILL, after the lease is lost and for processes left behind (default: 10s); "
        "with --preemptible also between the notice and the end, with a range of GPUs for an answer (default: 30s).",
    ),
]
OnPreempt = Annotated[
    str | None,
    typer.Option("--on-preempt", metavar="SIGNAL", help="Signal for the command at the notice: SIGUSR1."),
]
OnResize = Annotated[
    str | None,
    typer.Option(
        "--on-resize",
        metavar="SIGNAL",
        help="With a range of GPUs: signal for the command when the list in CORRAL_DEVICES_FILE has changed: SIGUSR2.",
    ),
]
Requeue = Annotated[
    bool,
    typer.Option(
        "--requeue",
        help="After a preemption, wait in the same place in the queue and run the command again, unless it ended "
        "with 0.",
    ),
]
Via = Annotated[
    str | None,
    typer.Option(
        "--via",
        metavar="ssh|COMMAND",
        help="Start the command on the granted host: 'ssh', or a command with {host} or {address}.",
    ),
]
WhereCutOff = Annotated[
    OnOutage,
    typer.Option(
        "--on-outage",
        help="If bus or planner can't be reached for longer than --ttl: 'continue' until a planner says that the "
        "lease has ended, or 'stop' the command.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]


class _How(NamedTuple):
    """Settings with which a command is run.

    Attributes:
        grace: seconds between SIGTERM and SIGKILL.
        via: `ssh`, or a command that starts another on a host; None for this host.
        quiet: print errors only.
        on_outage: what to do while the lease can't be renewed.
        on_preempt: signal for the command at the notice of a preemption; None for none.
        on_resize: signal for the command when its devices change, or are asked back; None if they stay as they are.
        requeue: run the command again after a preemption.
        nats: URL of the bus; None for the default.
    """

    grace: float
    via: str | None
    quiet: bool
    on_outage: OnOutage
    on_preempt: signal.Signals | None
    on_resize: signal.Signals | None
    requeue: bool
    nats: str | None


@with_request_options
def run(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND [ARG]...", help="Command to run.")],
    fields: RequestFields,
    grace: Grace = None,
    via: Via = None,
    quiet: Quiet = False,
    on_outage: WhereCutOff = OnOutage.CONTINUE,
    on_preempt: OnPreempt = None,
    on_resize: OnResize = None,
    requeue: Requeue = False,
    nats: NatsUrl = None,
) -> None:
    """Run a command under a lease on GPUs: request, run, renew meanwhile, and release at the end.

    The command sees only its GPUs (CUDA_VISIBLE_DEVICES by UUID; ROCR_VISIBLE_DEVICES on AMD), and has the lease's id
    in CORRAL_LEASE. It keeps the terminal, signals are forwarded, and its exit code is returned. Processes that it
    leaves behind are ended. If the lease is lost, the command gets SIGTERM, then SIGKILL after --grace, and the exit
    code is 9. GPUs of this host are requested, unless --host is given ('--host any' for all hosts).

    With --preemptible the lease may be preempted. The command gets the signal --on-preempt at the notice, SIGTERM a few
    seconds before the end, and SIGKILL at the end. If it exits by itself before, its exit code is returned.

    With --gpus 2-8 the lease is elastic: it starts with at least 2 GPUs, and with as many as are idle. With --on-resize
    it gets more while they are idle, and is asked to give them back for others: the file that CORRAL_DEVICES_FILE names
    has the UUIDs to use from then on, and the command gets the signal. It agrees to give GPUs back by 'corral resize
    accept', once it has left them.

    Examples:
      corral run --gpus 2 --memory 20GiB -- python train.py
      corral run --gpus 8 --model H100 --wait 2h --name llama -- torchrun --nproc-per-node 8 train.py
      corral run --share 0.25 --memory 6GiB -- jupyter lab
      corral run --preemptible --grace 60s --on-preempt SIGUSR1 --requeue -- python train.py
      corral run --gpus 2-8 --on-resize SIGUSR2 -- python train_elastic.py
      corral run --gpus 1 --host any --via ssh -- nvidia-smi
    """
    number = None if on_preempt is None else parse_signal(on_preempt)
    resized = None if on_resize is None else parse_signal(on_resize, "--on-resize")
    if on_resize and not isinstance(fields.get("gpus"), GpuRange):
        raise exits.CommandError("--on-resize needs a range of GPUs: --gpus 2-8", exits.USAGE)
    if on_resize and via:
        raise exits.CommandError("--on-resize is for a command on this host: leave --via out", exits.USAGE)
    if (on_preempt or requeue) and not fields.get("preemptible"):
        option = "--on-preempt" if on_preempt else "--requeue"
        raise exits.CommandError(f"{option} needs --preemptible: no other lease is preempted", exits.USAGE)
    how = _How(_seconds(grace), via, quiet, on_outage, number, resized, requeue, nats)
    raise typer.Exit(_hold(command, fields, grace, how))


@with_request_options
def shell(
    fields: RequestFields,
    grace: Grace = None,
    via: Via = None,
    on_outage: WhereCutOff = OnOutage.CONTINUE,
    nats: NatsUrl = None,
) -> None:
    """Open a shell under a lease on GPUs, which is released when the shell exits.

    Examples:
      corral shell --gpus 1
      corral shell --gpus 2 --memory 40GiB --wait 10m --name debugging
    """
    command = [] if via else [os.environ.get("SHELL") or "/bin/sh"]
    how = _How(_seconds(grace), via, False, on_outage, None, None, False, nats)
    raise typer.Exit(_hold(command, fields, grace, how))


def _seconds(grace: str | None) -> float:
    try:
        return units.parse_seconds(grace or _DEFAULT_GRACE)
    except ValueError as error:
        raise exits.CommandError(f"--grace: {error}", exits.USAGE) from None


def _hold(command: Sequence[str], fields: RequestFields, grace: str | None, how: _How) -> int:
    fields = restricted_to_host(fields)
    fields.setdefault("ttl", DEFAULT_TTL)
    fields.setdefault("name", os.path.basename(command[0]) if command else "shell")
    if grace is not None and (fields.get("preemptible") or isinstance(fields.get("gpus"), GpuRange)):
        fields["grace"] = grace
    return asyncio.run(_held(command, fields, how))


async def _held(command: Sequence[str], fields: RequestFields, how: _How) -> int:
    """Run the command under a lease; after each preemption again under another, if that is wanted."""
    terminal = Terminal()
    restarts = 0
    with Signals(stoppable=not terminal.is_there) as signals:
        while True:
            try:
                ran = await _run_once(command, fields, how, signals, terminal, restarts)
            except Interrupted as interrupted:
                return interrupted.code
            if ran.requeue_of is None:
                return ran.code
            restarts += 1
            fields = {"wait": MAX_WAIT_SECONDS, **fields, "requeue_of": ran.requeue_of}
            fields.pop("request_id", None)  # it stands for the lease that was preempted
            say("corral: the command runs again once its request, in the same place in the queue, is granted")


class _Ran(NamedTuple):
    """Result of a command under one lease.

    Attributes:
        code: exit code.
        requeue_of: id of its lease, if that was preempted and the command is to run again.
    """

    code: int
    requeue_of: str | None = None


async def _run_once(
    command: Sequence[str], fields: RequestFields, how: _How, signals: Signals, terminal: Terminal, restarts: int
) -> _Ran:
    async with contextlib.AsyncExitStack() as stack:
        lost, notices = asyncio.Event(), Notices(how.on_preempt)
        resizes = None if how.on_resize is None else stack.enter_context(Resizes(how.on_resize))
        held = await signals.unless_interrupted(_granted(stack, fields, lost, notices, resizes, how))
        if held is None:
            return _Ran(exits.REJECTED)
        if not how.quiet:
            where = ", ".join(f"{grant.host}:{grant.index} {grant.model}" for grant in held.grants)
            say(f"corral: lease {held.lease_id} on {where}")
        with reporting_troubles(held, how.quiet):
            code, interrupted = await _child(command, held, lost, notices, resizes, how, signals, terminal, restarts)
        preempted = code != 0 and (held.lost is not None or held.preemption is not None) and await was_preempted(held)
    if code is None:
        say(f"corral: {held.lost or 'the lease is preempted'}; the command was stopped")
    requeue = how.requeue and preempted and not interrupted
    return _Ran(exits.LEASE_LOST if code is None else code, held.lease_id if requeue else None)


async def _granted(
    stack: contextlib.AsyncExitStack,
    fields: RequestFields,
    lost: asyncio.Event,
    notices: Notices,
    resizes: Resizes | None,
    how: _How,
) -> HeldLease | None:
    """Request a lease that is released when the stack is closed; print a rejection, and return None then."""
    client = await stack.enter_async_context(connected(how.nats, owner=fields.get("owner")))
    with wait_display(how.quiet) as on_wait:
        try:
            # No grace time for children: the reaper has already waited for the processes that the command has left.
            context = client.lease(
                on_lost=lambda _: lost.set(),
                on_preempt=notices.notice,
                on_resize=None if resizes is None else resizes.notice,
                on_wait=on_wait,
                on_outage=how.on_outage,
                children_grace=0.0,
                **fields,
            )
            return await stack.enter_async_context(context)
        except Rejected as rejected:
            await explain_missing(client, fields)
            for line in render.rejection_lines(rejected.rejection):
                console(stderr=True).print(line)
            return None


def _remote(held: HeldLease, via: str) -> Remote:
    if len(held.hosts) != 1:
        raise exits.CommandError(f"--via starts one command on one host, but {len(held.hosts)} hosts were granted")
    host = held.hosts[0]
    return Remote(via, host, held.lease.addresses.get(host) or host, terminal=sys.stdin.isatty())


class _Running:
    """A running command, on this host or another one: routes signals to it, and ends what it leaves behind.

    Args:
        child: the command, or the connection to the remote command.
        held: its lease.
        remote: host on which it runs; None for this host.
        notices: notices of preemption.

    Attributes:
        interrupted: true if a signal that ends a command was forwarded to it.
    """

    def __init__(self, child: Child, held: HeldLease, remote: Remote | None, notices: Notices) -> None:
        self.interrupted = False
        self._notices = notices
        self._child = child
        self._held = held
        self._remote = remote
        self._background = BackgroundTasks()

    async def until_the_end(self, lost: asyncio.Event, grace: float) -> int | None:
        """Wait until the command and all its descendants have ended; end them if the lease is lost or preempted.

        Args:
            lost: set when the lease is lost.
            grace: seconds between SIGTERM and SIGKILL.

        Returns:
            The command's exit code, negative for a signal; None if its lease ended before it did, or a signal ended it
            since the lease was about to be preempted.
        """
        stopped = preempted = False
        ended = asyncio.ensure_future(self._child.wait())
        losing = asyncio.ensure_future(lost.wait())
        due = asyncio.ensure_future(self._notices.until_due(self._held))
        try:
            await asyncio.wait({ended, losing, due}, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                running = not self._child.exited.done()
                what = "the command" if running else "what the command has left"
                if losing.done():
                    stopped, why = running, f"{self._held.lost}"
                else:
                    preempted, why, grace = running, "the lease is about to end", due.result()
                say(f"corral: {why}; stopping {what} (SIGTERM, SIGKILL in {grace:.3g} s)")
                await self._end(ended, grace)
            code = await ended
            # If a signal ended the command, the reaper may have sent it because of the lease while this process was
            # stopped.
            return None if stopped or (code < 0 and (preempted or self._held.lost is not None)) else code
        finally:
            await asyncio.gather(cancel_all([losing, due]), self._background.cancel())

    def forward(self, number: int) -> None:
        """Forward a signal that this process got; see `signal`."""
        self.interrupted = self.interrupted or number in _ENDING
        self.signal(number)

    def signal(self, number: int) -> None:
        """Send a signal to the command; after its end, send SIGKILL to its remaining descendants instead."""
        if self._child.exited.done():
            if number not in HARMLESS:
                self._child.leave()
        elif self._remote is None:
            self._child.signal(number)
        elif number not in HARMLESS:
            self._background.start(self._send_signal(self._remote, signal.Signals(number)))

    async def _end(self, ended: asyncio.Future[int], grace: float) -> None:
        if self._remote is None:
            self._child.end(grace)
            if not (await asyncio.wait({ended}, timeout=grace + TELL_SECONDS))[0]:
                # The lease is lost already, so there is no reason to wait for processes that can't be ended.
                self._child.give_up()
            return
        self.signal(signal.SIGTERM)
        await asyncio.wait({ended}, timeout=grace)
        await self._send_signal(self._remote, signal.SIGKILL)
        self._child.end(0.0)

    async def _send_signal(self, remote: Remote, number: signal.Signals) -> None:
        words = remote.tell(self._held.lease_id, number.name.removeprefix("SIG"))
        nowhere = asyncio.subprocess.DEVNULL
        try:
            async with asyncio.timeout(TELL_SECONDS):
                sender = await asyncio.create_subprocess_exec(*words, stdin=nowhere, stdout=nowhere, stderr=nowhere)
                sent = await sender.wait() == 0
        except (OSError, TimeoutError):
            sent = False
        if not sent and number in _ENDING:
            # The signal can't be sent, so the connection is closed: the watcher there then ends the command.
            self._child.signal(signal.SIGTERM)


async def _child(
    command: Sequence[str],
    held: HeldLease,
    lost: asyncio.Event,
    notices: Notices,
    resizes: Resizes | None,
    how: _How,
    signals: Signals,
    terminal: Terminal,
    restarts: int,
) -> tuple[int | None, bool]:
    """Run the command until its end.

    Returns:
        Its exit code as a shell's, or None if its lease ended before it did; and true if a signal to this process was
        to end it.
    """
    remote = None if how.via is None else _remote(held, how.via)
    count = {RESTARTS_VARIABLE: str(restarts)} if how.requeue else {}
    words, environment = list(command), os.environ | held.environment | count
    if resizes is not None:
        resizes.write(held.lease)
        environment[DEVICES_VARIABLE] = str(resizes.path)
    if remote is None:
        print_device_hosts(held.lease)
    else:
        # The process of the connection isn't under the lease: it must survive signals to the lease's processes.
        environment = {name: value for name, value in os.environ.items() if name != LEASE_VARIABLE}
        there = environment_for(held.lease, remote.host) | count
        words = remote.start(command, there, held.lease_id, how.grace)
    child = Child(say=lambda text: say(f"corral: {text}"), stopped=terminal.stop_with)
    signals.check()
    try:
        await start_in_time(
            held,
            lambda start_by: child.start(
                words,
                environment,
                lease_id="" if remote else held.lease_id,
                grace_seconds=how.grace,
                ttl_seconds=held.lease.ttl_seconds,
                own_group=not terminal.is_there,
                ignored=signals.ignored,
                start_by=start_by,
            ),
        )
    except NotStarted as error:
        say(f"corral: {error}")
        return error.code, True
    running = _Running(child, held, remote, notices)
    notices.send = running.signal
    following = BackgroundTasks()
    if resizes is not None:
        resizes.send = running.signal
        following.start(resizes.follow(held), name="following the devices of the lease")
    with signals.to(running.forward):
        code = await running.until_the_end(lost, how.grace)
    await following.cancel()
    terminal.take_back(settings=code is None or code < 0)
    if code is None:
        return None, running.interrupted
    return code if code >= 0 else 128 - code, running.interrupted
