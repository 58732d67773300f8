"""Web dashboard of the fleet: heat map, timelines, leases, analytics and requests, over one connection to the bus.

`security/` has accounts, roles and sessions; `fleet.py` has the state that all browsers share; `pages/` has the pages;
`components/` has the Vue components that draw thousands of devices and rows. `server.py` assembles and serves them.
"""

from __future__ import annotations

from .settings import Settings

__all__ = ["Settings"]
