"""Memory and version of the current process."""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import re
import resource
import sys
from importlib import metadata


def resident_bytes() -> int:
    """Resident memory of this process, in bytes; 0 if there is no `/proc`."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def release_memory() -> None:
    """Give free memory of the C library back to the system, where it can: on Linux with glibc."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


def collect_garbage_seldom() -> None:
    """Have Python search for cyclic garbage seldom, and never among the objects that exist now.

    For services that hold many small messages at once, of which none is in a cycle: by default each is visited several
    times, which takes half of the time of decoding them.
    """
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def peak_resident_bytes() -> int:
    """Peak resident memory of this process, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Bytes on macOS, kilobytes elsewhere.
    return peak if sys.platform == "darwin" else peak * 1024


@functools.cache
def corral_version() -> str:
    """Version of the installed package; `unknown` if it is not installed."""
    try:
        return metadata.version("corral")
    except metadata.PackageNotFoundError:
        return "unknown"


def service_version() -> str:
    """Version of a NATS micro service, which must be a semantic one: that of the package, or 0.0.0 if it is none."""
    version = corral_version()
    return version if re.fullmatch(r"\d+\.\d+\.\d+", version) else "0.0.0"
