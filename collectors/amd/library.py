"""The amdsmi library: loads it when it is needed, and sorts its errors by kind."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
from collections import Counter
from types import ModuleType
from typing import Any, Final

from ..source import SourceUnavailable
from ..text import clean

UNSUPPORTED: Final = frozenset({1, 2, 3, 5, 10, 20, 31, 43, 45, 46, 51, 52, 55})
"""Status codes of refused calls, mostly refused for good and so retried less and less often: invalid or not supported,
not implemented, unknown to the library, no permission, no such file or data in this driver."""
NEVER: Final = frozenset({2, 3, 5})
"""Those of them that a healthy device gives permanently."""
LATER: Final = frozenset({8, 9, 11, 30, 40})
"""Status codes for no value now, where nothing is wrong: timeout, retry, interrupted, busy, no data."""
DRIVER_GONE: Final = frozenset({18, 32, 34})
"""Status codes for a driver that is gone as a whole: not initialized or not loaded."""


_MOST_PROCESSES: Final = 1024
"""Most processes listed per device, as in amdsmi's own wrapper."""
_UNKNOWN: Final = 2**32 - 1
_TEXTS: Final = frozenset({"amdsmi_get_gpu_device_uuid"})
"""Functions whose answer is a text."""


class AmdFailure(Exception):
    """A call of amdsmi that failed.

    Attributes:
        code: amdsmi's status; None for an answer that amdsmi's wrapper can't decode.
        function: name of the function.
    """

    def __init__(self, code: int | None, function: str, text: str) -> None:
        super().__init__(f"{function}: {text}")
        self.code = code
        self.function = function


class AmdLibrary:
    """amdsmi, initialized for GPUs.

    Args:
        impossible: counts the values that their metric can't have, by metric.

    Raises:
        SourceUnavailable: no amdsmi, no library, no driver; the message says what is missing.
    """

    def __init__(self, impossible: Counter[str] | None = None) -> None:
        self.impossible: Counter[str] = Counter() if impossible is None else impossible
        self.amdsmi: ModuleType = _load()
        try:
            self.amdsmi.amdsmi_init(self.amdsmi.AmdSmiInitFlags.INIT_AMD_GPUS)
        except self.amdsmi.AmdSmiException as error:
            raise SourceUnavailable(
                f"amdsmi does not start: {_text(error)}. Is the amdgpu driver loaded, and may this user open /dev/kfd?"
            ) from error

    def close(self) -> None:
        """Shut amdsmi down."""
        with contextlib.suppress(self.amdsmi.AmdSmiException):
            self.amdsmi.amdsmi_shut_down()

    def constant(self, name: str) -> Any:
        """Look up a constant or a member of an enumeration by its dotted name; None where this amdsmi has none."""
        value: Any = self.amdsmi
        for part in name.split("."):
            value = getattr(value, part, None)
        return value

    def call(self, name: str, *args: Any) -> Any:
        """Call a function of amdsmi.

        Raises:
            AmdFailure: with amdsmi's status.
        """
        function = getattr(self.amdsmi, name, None)
        if function is None:
            raise AmdFailure(5, name, "unknown to this amdsmi")
        try:
            return function(*args)
        except self.amdsmi.AmdSmiLibraryException as error:
            raise AmdFailure(int(error.get_error_code()), name, _text(error)) from error
        except UnicodeDecodeError as error:  # amdsmi takes every text for UTF-8
            if name in _TEXTS:
                return clean(error.object)
            raise AmdFailure(None, name, "a text in the answer is no UTF-8") from error
        except (self.amdsmi.AmdSmiException, ValueError, KeyError) as error:
            # The wrapper is at odds with what the library said, such as an enumeration that it does not know.
            raise AmdFailure(None, name, f"{type(error).__name__}: {error}") from error

    def fields(self, name: str, structure: str, handle: Any) -> dict[str, Any]:
        """Call the C function and return the fields of its structure, for answers with texts that amdsmi can't decode.

        Raises:
            AmdFailure: with amdsmi's status.
        """
        wrapper = self.amdsmi.amdsmi_wrapper
        value = getattr(wrapper, structure)()
        code = int(getattr(wrapper, name)(handle, ctypes.byref(value)))
        if code:
            raise AmdFailure(code, name, f"status {code}")
        found = {field[0]: getattr(value, field[0]) for field in value._fields_}
        return {key: clean(item) if isinstance(item, bytes) else item for key, item in found.items()}

    def processes(self, handle: Any) -> list[dict[str, Any]] | None:
        """List the processes on a device by the C function, where amdsmi can't decode a name; None if they can't be."""
        wrapper = self.amdsmi.amdsmi_wrapper
        count = ctypes.c_uint32(_MOST_PROCESSES)
        entries = (wrapper.amdsmi_proc_info_t * _MOST_PROCESSES)()
        if wrapper.amdsmi_get_gpu_process_list(handle, ctypes.byref(count), entries):
            return None
        return [
            {
                "pid": entry.pid,
                "name": clean(entry.name),
                "mem": entry.mem,
                "memory_usage": {"vram_mem": entry.memory_usage.vram_mem},
                "cu_occupancy": entry.cu_occupancy if entry.cu_occupancy != _UNKNOWN else None,
            }
            for entry in entries[: min(count.value, _MOST_PROCESSES)]
        ]

    def ask(self, default: Any, name: str, *args: Any) -> Any:
        """Call a function for a fact that may be missing; returns the default where this device has none.

        Raises:
            AmdFailure: the driver is gone.
        """
        try:
            found = self.call(name, *args)
        except AmdFailure as failure:
            if failure.code in DRIVER_GONE:
                raise
            return default
        return default if found is None or found == "N/A" else found


def _load() -> ModuleType:
    # Without its C library amdsmi prints to standard output and then raises any kind of error.
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            return importlib.import_module("amdsmi")
    except ModuleNotFoundError as error:
        raise SourceUnavailable(
            "AMD devices are read through the package amdsmi: pip install 'corral[amd]', in the version of your ROCm"
        ) from error
    except Exception as error:
        raise SourceUnavailable(
            "amdsmi does not find its library libamd_smi.so: install amd-smi-lib, or set ROCM_PATH to where ROCm is"
        ) from error


def _text(error: Exception) -> str:
    info = getattr(error, "get_error_info", None)
    return str(info(detailed=False)) if callable(info) else " ".join(str(error).split())
