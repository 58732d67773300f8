"""Prometheus exporter of the fleet: one `/metrics` for all devices, with dcgm-exporter's names and labels.

`families` defines the series, `live` keeps the last state of each host, `page` writes the devices' series, `pipeline`
those about leases, queue and Corral itself, `service` answers HTTP.
"""

from __future__ import annotations

from .families import FAMILIES, Family, choose
from .live import LiveFleet
from .page import write
from .service import Exporter

__all__ = ["FAMILIES", "Exporter", "Family", "LiveFleet", "choose", "write"]
