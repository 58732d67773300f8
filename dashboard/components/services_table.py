"""Table of the services of a fleet, with the reasons why one is not ready."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final

from ...client import Client
from ...client.health import ask_health
from ...schemas.health import ServiceHealth
from ...schemas.instruments import ServiceKind
from ..html import table, tag

_LISTED: Final = tuple(kind for kind in ServiceKind if kind not in (ServiceKind.COLLECTOR, ServiceKind.RUNNER))
"""Collectors and runners are those of hosts, of which there may be thousands; pages of hosts have them."""


async def ask_services(client: Client) -> list[ServiceHealth]:
    """Ask for the health of planners, processors, exporters, dashboards, notifiers, login services and gateways."""
    answers = await asyncio.gather(*(ask_health(client.nc, kind.value, first_seconds=1.0) for kind in _LISTED))
    return [each for found in answers for each in found]


def services_table(services: Sequence[ServiceHealth]) -> None:
    """Show services."""

    def state(one: ServiceHealth) -> Callable[[], Any]:
        words = (one.role or "ready") if one.ready else "not ready"
        return lambda: tag("span", f"chip {'good' if one.ready else 'bad'}", words)

    rows = [(one.service.value, one.host, state(one), "; ".join(one.reasons) or "–") for one in services]
    table(("Service", "Host", "State", "Why"), rows)
