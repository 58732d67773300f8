"""Processes that run on a device, read in the layout that the loaded driver writes.

Drivers have written entries of 16 bytes (id and memory, the unversioned call), of 24 (with the MIG instance, `_v2` and
`_v3`), and, R535 before 535.98, of 32 bytes under the name `_v3` (with protected memory). pynvml of today reads 24, and
so takes the second half of one entry for another process. nvitop has met the same (its issue 75).
"""

from __future__ import annotations

import ctypes
import re
from typing import Any, Final

from msgspec import Struct

from .library import FUNCTION_NOT_FOUND, INSUFFICIENT_SIZE, SUCCESS, Handle, Library, NvmlFailure, address

_LONG_FROM: Final = (535, 43)
_LONG_BEFORE: Final = (535, 98)
_LONGEST: Final = 32
_FORMS: Final = (("_v3", 24), ("_v2", 24), ("", 16))
"""Suffixes of the call, newest first, with the bytes of an entry."""
_UNTOUCHED: Final = 0x5A
_NOT_AVAILABLE: Final = 2**64 - 1
_TRIES: Final = 3


class Running(Struct, frozen=True):
    """A process on a device, and the bytes that it holds there; None where the driver hides them."""

    pid: int
    memory_bytes: int | None


def entry_bytes(driver: str, suffix: str, *, protected: bool, detailed: bool) -> int:
    """Length of an entry in bytes, by the driver's version.

    Args:
        driver: version of the driver, such as `535.54.03`.
        suffix: suffix of the call.
        protected: True if the library can report protected memory (`nvmlDeviceGetConfComputeMemSizeInfo`).
        detailed: True if it has the list of details (`nvmlDeviceGetRunningProcessDetailList`) that replaced the long
            entry.
    """
    usual = dict(_FORMS)[suffix]
    if suffix != "_v3":
        return usual
    version = re.match(r"(\d+)\.(\d+)", driver)
    if version is None:
        return _LONGEST if protected and not detailed else usual
    return _LONGEST if _LONG_FROM <= (int(version[1]), int(version[2])) < _LONG_BEFORE else usual


def written_bytes(raw: bytes, count: int, expected: int) -> int:
    """Length in bytes of the entries that the driver has written, as far as a prefilled buffer can tell.

    Args:
        raw: the buffer, with room for more than `count` entries of the longest form.
        count: number of entries.
        expected: length to assume where the bytes can't tell.
    """
    if expected < 24 or _touched(raw[count * _LONGEST :]):
        return expected  # the driver has written over all of it
    if _touched(raw[count * 24 : count * _LONGEST]):
        return _LONGEST
    return 24 if all(_touched(raw[at : at + 4]) for at in range(0, count * 24, 24)) else expected


def _touched(raw: bytes) -> bool:
    return bool(raw.strip(bytes([_UNTOUCHED])))


class RunningReader:
    """Lists the processes of devices.

    Args:
        library: NVML.
    """

    def __init__(self, library: Library) -> None:
        self._library = library
        self._driver = str(library.ask("", "nvmlSystemGetDriverVersion"))
        self._protected = library.function("nvmlDeviceGetConfComputeMemSizeInfo") is not None
        self._detailed = library.function("nvmlDeviceGetRunningProcessDetailList") is not None

    def read(self, function: str, handle: Handle) -> list[Running]:
        """List the processes of one kind on a device.

        Args:
            function: such as `nvmlDeviceGetComputeRunningProcesses`.
            handle: handle of the device.

        Raises:
            NvmlFailure: with NVML's code.
        """
        for suffix, _ in _FORMS:
            call = self._library.function(function + suffix)
            if call is not None:
                expected = entry_bytes(self._driver, suffix, protected=self._protected, detailed=self._detailed)
                return self._read(call, function + suffix, handle, expected)
        raise NvmlFailure(FUNCTION_NOT_FOUND, function, "unknown to this driver")

    def _read(self, call: Any, name: str, handle: Handle, expected: int) -> list[Running]:
        device = ctypes.c_void_p.from_param(address(handle))
        count = ctypes.c_uint(0)
        code = call(device, ctypes.byref(count), None)
        if code == SUCCESS:
            return []
        for _ in range(_TRIES):
            if code != INSUFFICIENT_SIZE:
                break
            # More may start meanwhile; and spare room shows how long the entries are.
            room = count.value * 2 + 5
            buffer = (ctypes.c_ubyte * ((room + 1) * _LONGEST))(*[_UNTOUCHED] * ((room + 1) * _LONGEST))
            count.value = room
            code = call(device, ctypes.byref(count), ctypes.byref(buffer))
            if code == SUCCESS:
                return _entries(bytes(buffer), min(count.value, room), expected)
        raise NvmlFailure(code, name, self._library.text(code))


def _entries(raw: bytes, count: int, expected: int) -> list[Running]:
    size = written_bytes(raw, count, expected)
    found: list[Running] = []
    for start in range(0, count * size, size):
        pid = int.from_bytes(raw[start : start + 4], "little")
        memory = int.from_bytes(raw[start + 8 : start + 16], "little")
        found.append(Running(pid, None if memory == _NOT_AVAILABLE else memory))
    return found
