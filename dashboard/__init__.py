"""The fleet in a browser: heat map, timelines, leases, analytics and requests, over one connection to the bus.

`security/` says who may see and do what, `fleet.py` is the state that all browsers share, `pages/` what they see,
`components/` the two canvases that draw thousands of devices. `server.py` puts them together and serves them.
"""

from __future__ import annotations

from .settings import Settings

__all__ = ["Settings"]
