"""HTTP gateway: what the bus offers to users, for those who can't speak NATS.

It has no interface of its own: paths, bodies and answers are the channels and messages of `schemas/channels.py`
(`routes.py`). It holds no powers either: a caller's bearer token is the caller's own credentials of the bus, and each
caller has a connection of its own (`callers.py`), so that the server decides what it may do.
"""

from __future__ import annotations

from .settings import Settings

__all__ = ["Settings"]
