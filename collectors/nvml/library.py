"""The NVML library, loaded by pynvml: its functions as C pointers, its errors by kind.

pynvml finds and loads the library, and gives its constants and structures. Calls at each tick bypass its Python
wrappers for speed: they go straight to the C function, with arguments prepared once.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import logging
from collections import Counter
from types import ModuleType
from typing import Any, Final, TypeAlias, cast

from ..source import SourceUnavailable
from ..text import clean

log = logging.getLogger("corral.collector.nvml")

SUCCESS: Final = 0
UNINITIALIZED: Final = 1
NOT_SUPPORTED: Final = 3
NO_PERMISSION: Final = 4
NOT_FOUND: Final = 6
INSUFFICIENT_SIZE: Final = 7
DRIVER_NOT_LOADED: Final = 9
TIMEOUT: Final = 10
FUNCTION_NOT_FOUND: Final = 13
GPU_IS_LOST: Final = 15
RESET_REQUIRED: Final = 16
VERSION_MISMATCH: Final = 18

UNSUPPORTED: Final = frozenset({2, NOT_SUPPORTED, NO_PERMISSION, FUNCTION_NOT_FOUND, 22, 25, 26})
"""Codes of refused calls, mostly refused for good and so retried less and less often: not supported, no permission,
unknown to this driver (by argument, function or structure version), off in a vGPU, deprecated."""
LATER: Final = frozenset({TIMEOUT, 19, 21, 27})
"""Codes for no value now, where nothing is wrong: timeout, in use, no data, not ready."""
LOST: Final = frozenset({GPU_IS_LOST, RESET_REQUIRED, 28})
"""Codes for a device that is gone: lost, reset required, not found."""
DRIVER_GONE: Final = frozenset({UNINITIALIZED, DRIVER_NOT_LOADED, 12, VERSION_MISMATCH})
"""Codes for a driver that is gone as a whole: uninitialized, not loaded, library not found, library and driver differ
in version."""

Handle: TypeAlias = Any
"""pynvml's handle of a device: a ctypes pointer."""
Function: TypeAlias = Any
"""A C function of NVML without declared arguments; it returns the error code."""


UNKNOWN: Final = 999
_TEXTS: Final = frozenset(
    {
        *("nvmlSystemGetDriverVersion", "nvmlDeviceGetUUID", "nvmlDeviceGetName", "nvmlDeviceGetSerial"),
        *("nvmlDeviceGetVbiosVersion", "nvmlDeviceGetGspFirmwareVersion", "nvmlDeviceGetInforomImageVersion"),
        "nvmlErrorString",
    }
)
"""Functions whose answer is a text."""

_UNTYPED: Final = ctypes.CFUNCTYPE(ctypes.c_int)
"""A C function called with whatever arguments it is given, as `ctypes.CDLL` would."""


class NvmlFailure(Exception):
    """A call of NVML that failed.

    Attributes:
        code: NVML's error code.
        function: name of the function.
    """

    def __init__(self, code: int, function: str, text: str) -> None:
        super().__init__(f"{function}: {text}")
        self.code = code
        self.function = function


class Library:
    """NVML, initialized.

    Args:
        impossible: counts the values that their metric can't have, by metric.

    Attributes:
        gpm_surveyed: GPM metrics that each kind of device gives, as far as that is known.
        impossible: see above.

    Raises:
        SourceUnavailable: no pynvml, no library, no driver; the message says what is missing.
    """

    def __init__(self, impossible: Counter[str] | None = None) -> None:
        self.impossible: Counter[str] = Counter() if impossible is None else impossible
        try:
            self.pynvml: ModuleType = importlib.import_module("pynvml")
        except ImportError as error:
            raise SourceUnavailable(
                "NVML is read through the package nvidia-ml-py: pip install 'corral[collector]'"
            ) from error
        try:
            self.pynvml.nvmlInit()
        except self.pynvml.NVMLError as error:
            code = int(error.value)
            if code == VERSION_MISMATCH:
                self._unload()
            raise SourceUnavailable(_WHY.get(code, f"NVML does not start: {error}")) from error
        self.gpm_surveyed: dict[str, list[int]] = {}
        self._functions: dict[str, Function | None] = {}

    def close(self) -> None:
        """Shut NVML down."""
        with contextlib.suppress(self.pynvml.NVMLError):
            self.pynvml.nvmlShutdown()

    def _unload(self) -> None:
        """Unload a library that a driver update has replaced, so that the next start loads the new one."""
        with contextlib.suppress(Exception):
            handle = self.pynvml.nvmlLib._handle
            setattr(self.pynvml, "nvmlLib", None)  # noqa: B010
            self.pynvml._nvmlGetFunctionPointer_cache.clear()
            importlib.import_module("_ctypes").dlclose(handle)

    def function(self, symbol: str) -> Function | None:
        """Look up a C function by its name; None where this library has none of that name."""
        if symbol not in self._functions:
            try:
                pointer = self.pynvml._nvmlGetFunctionPointer(symbol)
                self._functions[symbol] = _UNTYPED(ctypes.cast(pointer, ctypes.c_void_p).value or 0)
            except self.pynvml.NVMLError:
                self._functions[symbol] = None
        return self._functions[symbol]

    def constant(self, name: str) -> int | None:
        """Look up a constant of pynvml; None where this pynvml has none of that name."""
        return cast("int | None", getattr(self.pynvml, name, None))

    def structure(self, name: str) -> type[ctypes.Structure]:
        """Make a plain copy of a pynvml structure, with the same layout but without its slow attribute access."""
        return _plain(getattr(self.pynvml, name))

    def text(self, code: int) -> str:
        """Error code in words."""
        return _words(self.pynvml.NVMLError(code))

    def call(self, name: str, *args: Any) -> Any:
        """Call a function of pynvml. Texts are cleaned of characters that a message can't carry.

        Raises:
            NvmlFailure: with NVML's code.
        """
        function = getattr(self.pynvml, name, None)
        if function is None:
            raise NvmlFailure(FUNCTION_NOT_FOUND, name, "unknown to this pynvml")
        try:
            found = function(*args)
        except self.pynvml.NVMLError as error:
            raise NvmlFailure(int(error.value), name, _words(error)) from error
        except UnicodeDecodeError as error:  # pynvml takes every text for UTF-8
            if name in _TEXTS:
                return clean(error.object)
            raise NvmlFailure(UNKNOWN, name, "the answer is no text") from error
        except self.pynvml.NVMLLibraryMismatchError as error:  # an older driver without the newest form of a call
            raise NvmlFailure(FUNCTION_NOT_FOUND, name, "unknown to this driver") from error
        return clean(found) if name in _TEXTS and isinstance(found, str) else found

    def ask(self, default: Any, name: str, *args: Any) -> Any:
        """Call a function of pynvml for a fact that may be missing; returns the default where this device has none.

        Raises:
            NvmlFailure: the device or the driver is gone.
        """
        try:
            found = self.call(name, *args)
        except NvmlFailure as failure:
            if failure.code in LOST or failure.code in DRIVER_GONE:
                raise
            return default
        return default if found is None else found


def address(handle: Handle) -> int:
    """Address in a device handle, which is equal for equal devices."""
    return ctypes.cast(handle, ctypes.c_void_p).value or 0


def field_text(structure: Any, name: str) -> str:
    """Read a text in a structure of pynvml, cleaned; pynvml decodes it as UTF-8, which fails for other bytes."""
    try:
        found = getattr(structure, name)
    except UnicodeDecodeError as error:
        found = error.object
    return clean(found) if isinstance(found, bytes | str) else ""


def _words(error: Any) -> str:
    try:
        return str(error)
    except UnicodeDecodeError:
        return f"NVML error {int(error.value)}"


@functools.cache
def _plain(structure: Any) -> type[ctypes.Structure]:
    return type(structure.__name__, (ctypes.Structure,), {"_fields_": structure._fields_})


_WHY: Final = {
    12: "no NVML library (libnvidia-ml.so.1) here: install the NVIDIA driver, or give the container its GPUs",
    DRIVER_NOT_LOADED: "the NVIDIA driver is not loaded (see `nvidia-smi`)",
    VERSION_MISMATCH: "the NVIDIA library and the loaded driver differ in version: after an update, reload the driver",
    NO_PERMISSION: "no permission to talk to the NVIDIA driver",
}
