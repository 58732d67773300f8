"""Deferred import of the NATS client's WebSocket support.

Only WebSocket connections need aiohttp, and importing it takes two fifths of the time in which a command starts.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any, Final

_TRANSPORT: Final = "nats.aio.transport"
_NEEDED: Final = ("aiohttp", "multidict")


def leave_out() -> None:
    """Import the NATS client without aiohttp, unless it is imported already. Call it before threads are started."""
    if _TRANSPORT in sys.modules:
        return
    hidden = {name: sys.modules.get(name) for name in _NEEDED}
    modules: dict[str, Any] = sys.modules
    modules.update(dict.fromkeys(_NEEDED))
    try:
        importlib.import_module(_TRANSPORT)
    finally:
        for name, module in hidden.items():
            if module is None:
                del modules[name]
            else:
                modules[name] = module


def bring_in() -> None:
    """Import what `leave_out` left out.

    Raises:
        ImportError: aiohttp is not installed.
    """
    transport: Any = importlib.import_module(_TRANSPORT)
    for name in _NEEDED:
        setattr(transport, name, importlib.import_module(name))


def wanted(servers: list[str]) -> bool:
    """True if one of these URLs is of a WebSocket."""
    return any(server.lower().startswith(("ws://", "wss://")) for server in servers)
