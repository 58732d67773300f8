"""How a service is: what it answers on `corral.v1.health`, and who answers for it.

Each service listens on three subjects: `corral.v1.health` (all services answer), `corral.v1.health.<service>` (all
instances of one) and `corral.v1.health.<service>.<instance>`. It is alive if it answers, and ready if it does what it
is there for; the reasons say why not.
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
"""By instrument; by the value of its label where it has one."""


class Measure(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The value of an instrument.

    Attributes:
        name: of the instrument; see `schemas/instruments.py`.
        value: of a gauge or counter; for a histogram the sum of all values.
        labels: such as the stream.
        bounds: of a histogram, ascending.
        counts: of a histogram: values up to each bound and above the one before it, and at last those beyond.
    """

    name: str
    value: float
    labels: dict[str, str] = {}
    bounds: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()


class ServiceHealth(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="health", tag_field="type"):
    """A service on itself.

    Attributes:
        service: which; see `ServiceKind`.
        instance: names it among those of its kind.
        host: name of the machine that it runs on.
        ready: it does what it is there for.
        reasons: why not, in words; empty if it is ready.
        role: such as `leader` or `standby`; empty if there is only one.
        corral_version: of the package.
        started_at: when it started.
        measures: of itself.
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


class Judgement(Struct, frozen=True):
    """What a service says of itself at one moment.

    Attributes:
        reasons: why it is not ready; empty if it is.
        values: of its instruments, those of every service left out.
        role: as in `ServiceHealth`.
    """

    reasons: list[str]
    values: Values = {}
    role: str = ""


def health_subject(service: str | None = None, instance: str | None = None) -> str:
    """Where to ask: all services, those of one kind, or one of them."""
    return ".".join(filter(None, (subjects.HEALTH, service, instance and subjects.host_token(instance))))
