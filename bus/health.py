"""Health endpoint of a service, and the metrics that every service reports about itself."""

from __future__ import annotations

import contextlib
import resource
import socket
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Final

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError

from ..schemas import codec, replies, subjects
from ..schemas.health import HealthStatus, Measure, ServiceHealth, Values, health_subject, log
from ..schemas.instruments import INSTRUMENTS, Histogram, ServiceKind
from .permissions import identity_of
from .process import corral_version, peak_resident_bytes, resident_bytes

_ANSWERING: Final = ("", "planner", "processor", "collector", "runner", "notifier", "admin")
"""Roles that may answer health checks; without a role nothing is restricted. A user with `serves` may, too."""


class HealthEndpoint:
    """Health endpoint of a service: answers health checks on the bus.

    Args:
        service: kind of the service.
        instance: becomes a token of the subject.
        judge: called for each health check.

    Attributes:
        stopping: set once the service has begun to end.
    """

    def __init__(self, service: ServiceKind, instance: str, judge: Callable[[], HealthStatus]) -> None:
        self.service = service
        self.instance = subjects.host_token(instance)
        self.stopping = False
        self._judge = judge
        self._started_at = datetime.now(UTC)
        self._subscriptions: list[Subscription] = []

    async def open(self, nc: Client) -> None:
        """Subscribe on a connection; call it again with a new one after the connection was lost for good."""

        async def answer(message: Msg) -> None:
            if message.reply:
                content = replies.asked_in(message.headers)
                data, headers = codec.encode(self.health(), content), replies.headers(None, content)
                with contextlib.suppress(NatsError):  # the bus is away: the answer has no use any more
                    await nc.publish(message.reply, data, headers=headers)

        own = health_subject(self.service, self.instance)
        listened = (subjects.HEALTH, health_subject(self.service), own)
        identity = identity_of(nc)
        if identity.role not in _ANSWERING and not identity.serves:  # the bus does not let this user answer
            listened = ()
        self._subscriptions = [await nc.subscribe(subject, cb=answer) for subject in listened]

    async def close(self) -> None:
        """Unsubscribe, and report the service as stopping."""
        self.stopping = True
        for subscription in self._subscriptions:
            with contextlib.suppress(NatsError, OSError, ValueError):
                await subscription.unsubscribe()
        self._subscriptions = []

    def health(self) -> ServiceHealth:
        """Current health: ready unless `judge` gives a reason or fails, or the service is stopping."""
        try:
            judgement = self._judge()
            measures = measured(self.service, {**_common(self._started_at), **judgement.values})
        except Exception as error:  # a health check that fails means not ready
            log.exception("the health check of the %s failed", self.service)
            judgement, measures = HealthStatus([f"its health check failed: {error}"]), []
        reasons = ["it is stopping"] if self.stopping else judgement.reasons
        return ServiceHealth(
            service=self.service,
            instance=self.instance,
            host=socket.gethostname(),
            ready=not reasons,
            reasons=reasons,
            role=judgement.role,
            corral_version=corral_version(),
            started_at=self._started_at,
            measures=measures,
        )


def measured(service: ServiceKind, values: Values) -> list[Measure]:
    """Convert values to the measures of a health reply.

    Raises:
        KeyError: there is no such instrument in `INSTRUMENTS`.
    """
    found: list[Measure] = []
    for name, given in values.items():
        instrument = INSTRUMENTS[service][name]
        if isinstance(given, Mapping):
            label = instrument.labels[0]
            found += [_measure(name, value, {label: key}) for key, value in given.items()]
        else:
            found.append(_measure(name, given, {}))
    return found


def _measure(name: str, value: float | Histogram, labels: dict[str, str]) -> Measure:
    if isinstance(value, Histogram):
        return Measure(name=name, value=value.total, labels=labels, bounds=value.bounds, counts=tuple(value.counts))
    return Measure(name=name, value=float(value), labels=labels)


def _common(started_at: datetime) -> dict[str, float]:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "start_timestamp_seconds": started_at.timestamp(),
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "resident_bytes": float(resident_bytes() or peak_resident_bytes()),
    }


class LastSeen:
    """Time since something last happened, for readiness checks.

    Attributes:
        at: when it last happened, on the monotonic clock; at first when this object was made.
    """

    __slots__ = ("at",)

    def __init__(self) -> None:
        self.at = time.monotonic()

    def now(self) -> None:
        """Record that it happens now."""
        self.at = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since it last happened."""
        return time.monotonic() - self.at
