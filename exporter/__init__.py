"""The fleet for Prometheus: one `/metrics` for every device, under the names and labels that dcgm-exporter gives them.

`families` says which series there are, `live` keeps the newest of each host, `page` writes the devices' series,
`pipeline` those about leases, queue and Corral itself, `service` answers HTTP.
"""

from __future__ import annotations

from .families import FAMILIES, Family, choose
from .live import Live
from .page import write
from .service import Exporter

__all__ = ["FAMILIES", "Exporter", "Family", "Live", "choose", "write"]
