"""Processes that use a device and need no lease."""

from __future__ import annotations

from typing import Final

SYSTEM_PROCESSES: Final = frozenset(
    {
        "nvidia-cuda-mps-server",
        "nvidia-cuda-mps-control",
        "nvidia-persistenced",
        "nv-hostengine",
        "dcgm-exporter",
        "Xorg",
        "Xwayland",
        "gnome-shell",
        "gnome-remote-desktop-daemon",
        "kwin_wayland",
    }
)
"""Executables that serve all users of a device: the driver's daemons, and desktops."""


def is_system_process(name: str, kind: str) -> bool:
    """True if a process serves all users of the device: a desktop, or a daemon of the driver.

    Args:
        name: of its executable.
        kind: as in `ProcessSample`.
    """
    return kind == "graphics" or name in SYSTEM_PROCESSES
