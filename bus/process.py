"""What a process can say of itself."""

from __future__ import annotations

import os
import resource
import sys
from importlib import metadata


def resident_bytes() -> int:
    """Resident memory of this process; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def peak_resident_bytes() -> int:
    """The most memory that this process has had resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Bytes on macOS, kilobytes elsewhere.
    return peak if sys.platform == "darwin" else peak * 1024


def corral_version() -> str:
    """Of the installed package; `unknown` where it is not installed."""
    try:
        return metadata.version("corral")
    except metadata.PackageNotFoundError:
        return "unknown"
