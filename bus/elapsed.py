"""Time that has gone by, whatever is done to the clock on the wall."""

from __future__ import annotations

import time
from typing import Final

_BOOT: Final = getattr(time, "CLOCK_BOOTTIME", None)
_OFFSET: Final = time.time() - (time.monotonic() if _BOOT is None else time.clock_gettime(_BOOT))


def elapsed_seconds() -> float:
    """Seconds since some moment: setting the clock does not change it, and a machine that sleeps is counted.

    Linux counts sleep in `CLOCK_BOOTTIME` alone; elsewhere it is the monotonic clock.
    """
    return time.monotonic() if _BOOT is None else time.clock_gettime(_BOOT)


def steady_time() -> float:
    """Seconds since the epoch as this process knew them at its start, and the time that has gone by since."""
    return _OFFSET + elapsed_seconds()
