"""Memory and version of the current process."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import re
import resource
import sys
from importlib import metadata
from typing import Final

_MADV_DONTNEED: Final = 4
_MAPPING: Final = re.compile(r"([0-9a-f]+)-([0-9a-f]+) r-[x-]p [0-9a-f]+ \S+ [1-9]\d* +/")
"""A read-only mapping of a file in `/proc/self/smaps`."""
_LEAST_KIB: Final = 64
"""Smaller mappings are not worth a call."""


def resident_bytes() -> int:
    """Resident memory of this process, in bytes; 0 if there is no `/proc`."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def release_memory() -> None:
    """Give memory back to the system that is not in use, where it can: on Linux.

    That is free memory of glibc and Arrow, and the pages of code and constants of all libraries. Those that are needed
    again are mapped again, from the page cache: half of what importing DuckDB and Arrow has touched never is.
    """
    if sys.platform != "linux":
        return
    if (arrow := sys.modules.get("pyarrow")) is not None:
        arrow.default_memory_pool().release_unused()
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
    with contextlib.suppress(OSError):
        for address, length in _unchanged_file_pages():
            library.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), _MADV_DONTNEED)


def _unchanged_file_pages() -> list[tuple[int, int]]:
    """Address and length of each read-only mapping of a file that has no page of this process's own in it.

    Others are left out, since their changed pages would be lost: relocated constants, for one.
    """
    found: list[tuple[int, int]] = []
    address = length = resident = 0
    with open("/proc/self/smaps", encoding="ascii", errors="replace") as file:
        for line in file:
            if (mapping := _MAPPING.match(line)) is not None:
                address = int(mapping[1], 16)
                length = int(mapping[2], 16) - address
                resident = 0
            elif not line[0].isupper():
                length = 0  # of no interest: writable, or of no file
            elif line.startswith("Rss:"):
                resident = int(line.split()[1])
            elif length and resident >= _LEAST_KIB and line.startswith("Anonymous:") and line.split()[1] == "0":
                found.append((address, length))
    return found


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
