"""Detection of this machine's source, by the files that a loaded driver creates; no library is loaded or called."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def detect() -> Literal["nvml", "amd"] | None:
    """Detect the source for this machine's devices; None where no GPU driver is loaded."""
    if any(Path(path).exists() for path in ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg")):
        return "nvml"
    return "amd" if Path("/dev/kfd").exists() else None
