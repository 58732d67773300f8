"""Page `docs/reference/services.md`: measurements of services, from `schemas/instruments.py`."""

from __future__ import annotations

from corral.exporter.pipeline import series_name
from corral.schemas.instruments import COMMON, INSTRUMENTS, Instrument, InstrumentKind, ServiceKind

_HEAD = """# Measurements of services

Generated from `schemas/instruments.py`. Each service answers on `corral.v1.health` with these values as JSON
([health checks](../how-to/services.md)). `corral export` serves those of planners, processors, dashboards, gateways and
its own to Prometheus. Measurements of collectors come with their reports, as `corral_agent_…` by host. Counters start
at 0 with the service. All series have the label `id`, the instance.
"""


def render() -> str:
    """The document."""
    parts = [_HEAD, _section("Every service", ServiceKind.PLANNER, COMMON, "")]
    shared = {instrument.name for instrument in COMMON}
    for kind, instruments in INSTRUMENTS.items():
        own = [instrument for instrument in instruments.values() if instrument.name not in shared]
        if own:
            parts.append(_section(kind.value.capitalize(), kind, own, kind.value))
    return "\n".join(parts)


def _section(title: str, kind: ServiceKind, instruments: list[Instrument] | tuple[Instrument, ...], of: str) -> str:
    shown = of != ServiceKind.COLLECTOR.value
    lines = [f"## {title}", "", "| name | kind | meaning |" + (" series |" if shown else "")]
    lines.append("| --- | --- | --- |" + (" --- |" if shown else ""))
    for instrument in instruments:
        labels = "".join(f" by `{label}`" for label in instrument.labels)
        suffix = "_total" if instrument.kind is InstrumentKind.COUNTER else ""
        row = f"| `{instrument.name}` | {instrument.kind.value}{labels} | {instrument.help} |"
        lines.append(row + (f" `{series_name(kind, instrument.name)}{suffix}` |" if shown else ""))
    return "\n".join([*lines, ""])
