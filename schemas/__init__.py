"""The contract between the parts: messages, the metric catalog, and the layout of the bus."""

from __future__ import annotations

from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    """Give `subjects` under its former name too: programs have `from corral.schemas import bus`."""
    if name == "bus":
        from . import subjects

        return subjects
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
