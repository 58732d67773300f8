"""The collector service: connects a source, an agent, an outbox and the bus, and shuts them down in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from nats.aio.client import Client
from nats.errors import Error as NatsError

from ..bus.health import HealthEndpoint
from ..bus.layout import ensure_layout
from ..bus.permissions import may_make_streams
from ..bus.tasks import cancel_all
from ..schemas import subjects
from ..schemas.instruments import ServiceKind
from ..schemas.limits import STALE_AFTER_SECONDS
from ..schemas.requests import Lease
from .agent.agent import Agent, AgentSettings
from .agent.claim import HostClaim, HostTaken
from .agent.outbox import Outbox
from .agent.publisher import Publisher
from .metrics import health_status
from .processes.attribution import GRACE_SECONDS
from .processes.lease_feed import HostLeaseFeed, LeaseFeed
from .source import HostSource, LeaseAware, Source

log = logging.getLogger("corral.collector")

MIN_INTERVAL_SECONDS: Final = 0.02
BUFFER_BYTES: Final = 256 * 2**20
DRAIN_SECONDS: Final = 5.0


def check_settings(*, interval_seconds: float, batch_seconds: float, buffer_bytes: int) -> None:
    """Refuse settings that no agent can work with.

    Raises:
        ValueError: with what to write instead.
    """
    if not math.isfinite(interval_seconds) or interval_seconds < MIN_INTERVAL_SECONDS:
        raise ValueError(
            f"an interval of {interval_seconds:g} s is not possible: "
            f"write 20ms or more, such as --interval 1s (drivers refresh their numbers no faster)"
        )
    if not math.isfinite(batch_seconds) or batch_seconds < 0:
        raise ValueError(f"a batch of {batch_seconds:g} s is not possible: write 0 or more, such as --batch 250ms")
    if buffer_bytes < 2**20:
        raise ValueError(f"a buffer of {buffer_bytes} bytes is too small: write 1MiB or more, such as --buffer 256MiB")


def state_folder(name: str, base: Path | None = None) -> Path:
    """Folder of an agent's spill file: `<base>/collector/<name>`.

    The base is, in this order: the argument, `CORRAL_STATE_DIR`, systemd's `STATE_DIRECTORY`, `XDG_STATE_HOME/corral`,
    `~/.local/state/corral`.
    """
    if base is None:
        given = os.environ.get("CORRAL_STATE_DIR") or os.environ.get("STATE_DIRECTORY", "").split(":")[0]
        if given:
            base = Path(given)
        else:
            home = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
            base = Path(home) / "corral"
    return base / "collector" / name


async def collect(
    source: Source,
    *,
    name: str,
    nats_url: str | None = None,
    interval_seconds: float = 1.0,
    batch_seconds: float = 0.25,
    processes_seconds: float = 10.0,
    report_seconds: float = 10.0,
    grace_seconds: float = GRACE_SECONDS,
    buffer_bytes: int = BUFFER_BYTES,
    state: Path | None = None,
    spill: bool = True,
    drain_seconds: float = DRAIN_SECONDS,
) -> None:
    """Read a source and publish it until the data ends or the task is cancelled.

    It does not need the bus at its start: until a server answers, messages wait in the buffer.

    Args:
        source: the source to read.
        name: name of the agent: the host's name, or the fleet's for a source of many hosts; one agent per name.
        nats_url: URLs of the servers, as in `bus.connect`.
        interval_seconds: time between ticks, 0.02 or more.
        batch_seconds: ticks of this period share one message.
        processes_seconds: time between lists of processes; 0 publishes none.
        report_seconds: time between the agent's reports on itself.
        grace_seconds: as in `AgentSettings`.
        buffer_bytes: limit of the messages that wait for the bus; beyond it the oldest are dropped and counted.
        state: base folder for the spill file; see `state_folder`.
        spill: True to keep messages on disk while the bus is away, so that they outlive the agent.
        drain_seconds: when it is stopped, wait this long for the bus to take what is left; the rest stays on disk.
            Where the data has ended by itself, wait for as long as the bus takes messages.

    Raises:
        ValueError: impossible settings, or a name without letters and digits.
        HostTaken: another agent that is alive has the name.
        SpillBusy: another agent on this machine uses the state folder.
        Exception: the error that ended the source.
    """
    check_settings(interval_seconds=interval_seconds, batch_seconds=batch_seconds, buffer_bytes=buffer_bytes)
    if max(interval_seconds, batch_seconds) > STALE_AFTER_SECONDS / 2:
        log.warning(
            "a planner gives a device no work after %.0f s without a sample: report more often", STALE_AFTER_SECONDS
        )
    token = subjects.host_token(name)
    if token != name:
        log.warning("the name %r goes into subjects as %r", name, token)
    outbox = Outbox(buffer_bytes, state_folder(token, state) if spill else None)
    if len(outbox):
        log.info("%d messages of an earlier run wait to be sent", len(outbox))
    settings = AgentSettings(
        name=token,
        interval_seconds=interval_seconds,
        batch_seconds=batch_seconds,
        processes_seconds=processes_seconds,
        report_seconds=report_seconds,
        grace_seconds=grace_seconds,
    )
    publisher: Publisher
    agent = Agent(
        source, outbox, settings, wake=lambda: publisher.wake(), published=lambda: publisher.published_messages
    )
    claim = HostClaim(token, agent.id)
    follow = _lease_feed(source, agent)

    async def on_connected(nc: Client) -> None:
        if may_make_streams(nc):
            try:
                await ensure_layout(nc.jetstream())
            except (NatsError, TimeoutError) as error:
                log.debug("could not check the streams: %s", error)
        agent.limit_message_bytes(nc.max_payload)
        await claim.take(nc)
        await health.open(nc)
        log.info(
            "publishing %s as agent %s on %s", token, agent.id, nc.connected_url.netloc if nc.connected_url else ""
        )

    publisher = Publisher(
        outbox,
        nats_url,
        name=f"corral-collector {token}",
        on_connected=on_connected,
        while_connected=[claim.renew, *follow],
        before_close=claim.release,
    )
    health = HealthEndpoint(ServiceKind.COLLECTOR, token, lambda: health_status(agent, publisher, outbox))
    reading = asyncio.create_task(agent.run(), name="agent")
    publishing = asyncio.create_task(publisher.run(), name="publisher")
    ended = False
    try:
        await asyncio.wait({reading, publishing}, return_when=asyncio.FIRST_COMPLETED)
        if publishing.done():
            publishing.result()
        reading.result()
        ended = True
    finally:
        health.stopping = True
        await cancel_all([reading])
        publisher.wake()
        # If it is stopped while the bus is away there is nothing to wait for: messages stay on disk.
        waits = drain_seconds > 0 and (ended or publisher.connected or not spill)
        reported = False
        while waits and not publishing.done() and len(outbox):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(drain_seconds):
                    await publisher.drained(patient=ended or not spill)
            # The bus may refuse messages for good after the last report: report such drops once more.
            again = not reported and agent.report_drops()
            reported = reported or again
            waits = again or (ended and publisher.connected)
        await cancel_all([publishing])
        left = len(outbox)
        # Readings made while another agent holds the claim on the host must not be published.
        refused = publishing.done() and not publishing.cancelled() and isinstance(publishing.exception(), HostTaken)
        keep = claim.held or not refused
        lost = outbox.close(keep=keep)
        if left and keep:
            log.warning("%d messages could not be sent: %d are kept on disk, %d are lost", left, left - lost, lost)


def _lease_feed(source: Source, agent: Agent) -> list[Callable[[Client], Awaitable[None]]]:
    """Tasks that keep the agent's leases up to date while it is connected; none for a replay."""
    if isinstance(source, LeaseAware):

        def changed(leases: list[Lease], complete: bool) -> None:
            source.set_leases(leases)
            agent.set_leases(leases if complete else None)

        return [LeaseFeed(changed).follow]
    if isinstance(source, HostSource):
        return [HostLeaseFeed(subjects.host_token(source.host), agent.set_leases).follow]
    return []
