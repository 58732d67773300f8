"""Jobs as plain process groups: nothing keeps them from other devices, memory and cores than were granted."""

from __future__ import annotations

from .command import Confined, Work


def confine(work: Work) -> Confined:
    """Execute the commands as they are."""
    return Confined(commands=work.commands, account=work.switched)
