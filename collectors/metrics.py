"""Health of a collector: the values of its instruments, and whether it is ready."""

from __future__ import annotations

from typing import Final

from ..schemas.health import HealthStatus
from .agent.agent import Agent
from .agent.outbox import Outbox
from .agent.publisher import Publisher

MIN_SILENCE_SECONDS: Final = 15.0
"""Time that a collector may always go without an acknowledgement: a server that restarts takes less."""


def health_status(agent: Agent, publisher: Publisher, outbox: Outbox) -> HealthStatus:
    """Health of a collector: it is ready if it can read its source, and the bus has acknowledged messages lately.

    Args:
        agent: the agent that reads.
        publisher: the publisher that sends.
        outbox: the queue between them.
    """
    settings = agent.settings
    most = max(MIN_SILENCE_SECONDS, 3 * (settings.interval_seconds + settings.batch_seconds))
    silent = publisher.acknowledged.seconds
    reasons: list[str] = []
    if agent.trouble:
        reasons.append(agent.trouble)
    if not publisher.published_messages:
        reasons.append("the bus has acknowledged nothing yet")
    elif silent > most:
        reasons.append(f"the bus has acknowledged nothing for {silent:.0f} s")
    return HealthStatus(
        reasons,
        {
            "ticks": float(agent.ticks),
            "late_ticks": float(agent.late_ticks),
            "read_errors": float(agent.read_errors),
            "impossible_values": {name: float(number) for name, number in agent.impossible.items()},
            "published_messages": float(publisher.published_messages),
            "acknowledged_seconds": silent,
            "buffered_messages": float(len(outbox)),
            "buffered_bytes": float(outbox.bytes),
            "dropped_messages": float(outbox.dropped_messages),
            "dropped_samples": float(outbox.dropped_samples),
            "processes_identified": float(agent.identifies_processes),
        },
    )
