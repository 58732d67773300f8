"""Health of the login service, on the bus: whether its provider answers, and the bus's server takes its logins."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections import Counter
from collections.abc import Callable
from typing import Final

from ..bus import credentials
from ..bus.connect import BusUnavailable, connect, until_closed
from ..bus.health import HealthEndpoint
from ..bus.tasks import cancel_all
from ..schemas.health import HealthStatus
from ..schemas.instruments import ServiceKind
from .issuing import Issuer
from .provider import Provider, ProviderError

log = logging.getLogger("corral.login")

CHECK_SECONDS: Final = 30.0
"""Interval in which the provider is asked, and pause before the bus is tried again that has refused the service."""
_ROLES: Final = ("viewer", "operator")


class LoginHealth:
    """Answers health checks on the bus, with credentials of the service's own; without them it does nothing.

    Args:
        provider: asked for its discovery document every `CHECK_SECONDS`.
        issuer: knows whether the bus's server hears of logins.
        logins_running: number of logins in progress.

    Attributes:
        outcomes: logins since the start, by outcome: `issued`, `refused` or `failed`.
    """

    def __init__(self, provider: Provider, issuer: Issuer, logins_running: Callable[[], int]) -> None:
        self.outcomes: Counter[str] = Counter(issued=0, refused=0, failed=0)
        self._provider = provider
        self._issuer = issuer
        self._logins_running = logins_running
        self._provider_problem = ""
        self._endpoint = HealthEndpoint(ServiceKind.LOGIN, f"{socket.gethostname()}-{os.getpid()}", self._judge)

    @property
    def instance(self) -> str:
        """Name of the service in health checks."""
        return self._endpoint.instance

    async def run(self, nats_url: str | None) -> None:
        """Answer until cancelled. Nobody's login depends on it, so a bus that refuses the service is tried again.

        Args:
            nats_url: of the bus.
        """
        identity = credentials.identify()
        if not identity.serves or identity.role not in _ROLES:
            log.warning(
                "no health checks are answered on the bus: `corral auth add viewer NAME --service` makes credentials "
                "for that, and with [groups] `corral auth add operator NAME --service`"
            )
            return
        checking = asyncio.create_task(self._check())
        try:
            while True:
                try:
                    await self._answer(nats_url)
                except (BusUnavailable, credentials.CredentialsError) as error:
                    log.warning("no health checks are answered on the bus, retrying: %s", error)
                await asyncio.sleep(CHECK_SECONDS)
        finally:
            await cancel_all([checking])

    async def _answer(self, nats_url: str | None) -> None:
        closed = asyncio.Event()
        nc = await connect(nats_url, name="corral-login", wait_seconds=None, closed=closed)
        try:
            await self._endpoint.open(nc)
            await until_closed(nc, closed)
        finally:
            await self._endpoint.close()
            self._endpoint.stopping = False
            await nc.close()

    async def _check(self) -> None:
        while True:
            try:
                await self._provider.check()
                self._provider_problem = ""
            except ProviderError as error:
                self._provider_problem = str(error)
            await asyncio.sleep(CHECK_SECONDS)

    def _judge(self) -> HealthStatus:
        reasons = [reason for reason in (self._provider_problem, self._issuer.problem) if reason]
        outcomes = {outcome: float(count) for outcome, count in self.outcomes.items()}
        return HealthStatus(reasons, {"logins": outcomes, "logins_running": float(self._logins_running())})
