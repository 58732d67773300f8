"""Health checks of services: their subjects, and the message that a service answers with.

Each service listens on three subjects: `corral.v1.health` (all services answer), `corral.v1.health.<service>` (all
instances of one) and `corral.v1.health.<service>.<instance>`. It is alive if it answers, and ready if it does its
work; the reasons say why not.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from msgspec import Struct

from . import subjects
from .instruments import Histogram, ServiceKind
from .requests import Time

log = logging.getLogger("corral.health")


Values = Mapping[str, "float | Histogram | Mapping[str, float] | Mapping[str, Histogram]"]
"""Values by the name of the instrument; within, by the value of its label where it has one."""


class Measure(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Value of one instrument (gauge, counter or histogram) of a service.

    Attributes:
        name: name of the instrument; see `schemas/instruments.py`.
        value: value of a gauge or counter; for a histogram the sum of all observed values.
        labels: label values by name, such as the stream.
        bounds: bucket bounds of a histogram, ascending.
        counts: buckets of a histogram, not cumulative: values up to each bound and above the one before it, and at last
            those beyond all bounds.
    """

    name: str
    value: float
    labels: dict[str, str] = {}
    bounds: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()


class ServiceHealth(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="health", tag_field="type"):
    """Health of one service: readiness, role and the values of its instruments.

    Attributes:
        service: kind of the service.
        instance: id of the service among those of its kind.
        host: name of the machine that it runs on.
        ready: true if the service does its work.
        reasons: why it is not ready, in words; empty if it is.
        role: such as `leader` or `standby`; empty for a service that has only one.
        corral_version: version of the package.
        started_at: when it started.
        measures: values of its instruments.
    """

    service: ServiceKind
    instance: str
    host: str
    ready: bool
    reasons: list[str] = []
    role: str = ""
    corral_version: str = ""
    started_at: Time | None = None
    measures: list[Measure] = []


class HealthStatus(Struct, frozen=True):
    """Readiness, role and instruments of a service at one moment.

    Attributes:
        reasons: why it is not ready; empty if it is.
        values: values of its instruments, without those that every service has.
        role: as in `ServiceHealth`.
    """

    reasons: list[str]
    values: Values = {}
    role: str = ""


def health_subject(service: str | None = None, instance: str | None = None) -> str:
    """Subject of a health check: of all services, those of one kind, or one instance."""
    return ".".join(filter(None, (subjects.HEALTH, service, instance and subjects.host_token(instance))))
