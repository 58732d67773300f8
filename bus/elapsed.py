"""Elapsed time that is independent of changes to the wall clock."""

from __future__ import annotations

import time
from typing import Final

_BOOT: Final = getattr(time, "CLOCK_BOOTTIME", None)
_OFFSET: Final = time.time() - (time.monotonic() if _BOOT is None else time.clock_gettime(_BOOT))


def elapsed_seconds() -> float:
    """Seconds since an arbitrary moment. Setting the clock does not change it, and time in sleep counts.

    On Linux it is `CLOCK_BOOTTIME`, the only clock that counts sleep; elsewhere the monotonic clock.
    """
    return time.monotonic() if _BOOT is None else time.clock_gettime(_BOOT)


def steady_time() -> float:
    """Seconds since the epoch: the wall clock at the start of this process plus the time elapsed since."""
    return _OFFSET + elapsed_seconds()
