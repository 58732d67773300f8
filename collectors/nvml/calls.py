"""C signatures of the functions in the catalog, so that a tick can call them without pynvml's wrappers.

A function that is not listed here works as well: it is called through pynvml's wrapper, a few microseconds slower.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from operator import attrgetter
from typing import Any, Final

from msgspec import Struct

from ...schemas.rows import Call
from .library import FUNCTION_NOT_FOUND, SUCCESS, Library, NvmlFailure, address

UINT: Final = ctypes.c_uint
ULONGLONG: Final = ctypes.c_ulonglong
value_of: Final = attrgetter("value")


class Signature(Struct, frozen=True):
    """A C function `code = symbol(device, *inputs as unsigned int, *outputs by reference)`.

    Attributes:
        symbol: the C name.
        outputs: ctypes types, or names of pynvml's structures.
        version: name of pynvml's constant to write into the first output's `version`.
    """

    symbol: str
    outputs: tuple[Any, ...] = (UINT,)
    version: str = ""


_SAME: Final = (
    "nvmlDeviceGetPowerUsage",
    "nvmlDeviceGetEnforcedPowerLimit",
    "nvmlDeviceGetPowerManagementDefaultLimit",
    "nvmlDeviceGetClockInfo",
    "nvmlDeviceGetMaxClockInfo",
    "nvmlDeviceGetTemperatureThreshold",
    "nvmlDeviceGetCurrPcieLinkGeneration",
    "nvmlDeviceGetCurrPcieLinkWidth",
    "nvmlDeviceGetMaxPcieLinkGeneration",
    "nvmlDeviceGetMaxPcieLinkWidth",
    "nvmlDeviceGetPcieReplayCounter",
    "nvmlDeviceGetPcieThroughput",
    "nvmlDeviceGetFanSpeed",
    "nvmlDeviceGetPerformanceState",
)
SIGNATURES: Final[dict[str, Signature]] = {
    **{name: Signature(name) for name in _SAME},
    "nvmlDeviceGetUtilizationRates": Signature("nvmlDeviceGetUtilizationRates", ("c_nvmlUtilization_t",)),
    "nvmlDeviceGetMemoryInfo": Signature("nvmlDeviceGetMemoryInfo", ("c_nvmlMemory_t",)),
    "nvmlDeviceGetMemoryInfo/nvmlMemory_v2": Signature(
        "nvmlDeviceGetMemoryInfo_v2", ("c_nvmlMemory_v2_t",), "nvmlMemory_v2"
    ),
    "nvmlDeviceGetBAR1MemoryInfo": Signature("nvmlDeviceGetBAR1MemoryInfo", ("c_nvmlBAR1Memory_t",)),
    "nvmlDeviceGetTotalEnergyConsumption": Signature("nvmlDeviceGetTotalEnergyConsumption", (ULONGLONG,)),
    "nvmlDeviceGetCurrentClocksEventReasons": Signature("nvmlDeviceGetCurrentClocksEventReasons", (ULONGLONG,)),
    "nvmlDeviceGetCurrentClocksThrottleReasons": Signature("nvmlDeviceGetCurrentClocksThrottleReasons", (ULONGLONG,)),
    "nvmlDeviceGetTotalEccErrors": Signature("nvmlDeviceGetTotalEccErrors", (ULONGLONG,)),
    "nvmlDeviceGetViolationStatus": Signature("nvmlDeviceGetViolationStatus", ("c_nvmlViolationTime_t",)),
    "nvmlDeviceGetPowerManagementLimitConstraints": Signature(
        "nvmlDeviceGetPowerManagementLimitConstraints", (UINT, UINT)
    ),
    "nvmlDeviceGetRemappedRows": Signature("nvmlDeviceGetRemappedRows", (UINT, UINT, UINT, UINT)),
    "nvmlDeviceGetEncoderUtilization": Signature("nvmlDeviceGetEncoderUtilization", (UINT, UINT)),
    "nvmlDeviceGetDecoderUtilization": Signature("nvmlDeviceGetDecoderUtilization", (UINT, UINT)),
    "nvmlDeviceGetJpgUtilization": Signature("nvmlDeviceGetJpgUtilization", (UINT, UINT)),
    "nvmlDeviceGetOfaUtilization": Signature("nvmlDeviceGetOfaUtilization", (UINT, UINT)),
    "nvmlDeviceGetTemperature": Signature("nvmlDeviceGetTemperature"),
}


class Probe:
    """One call on one device, prepared so that it can be repeated.

    Attributes:
        name: name for log messages; calls of the same name on the same device are made once.
        function: takes `args`, fills the outputs and returns NVML's code.
        args: arguments, prepared once.
    """

    __slots__ = ("_keep", "_outputs", "args", "function", "name")

    def __init__(self, name: str, function: Callable[..., int], args: tuple[Any, ...], outputs: Any, keep: Any) -> None:
        self.name = name
        self.function = function
        self.args = args
        self._outputs = outputs
        self._keep = keep

    def output(self, attribute: str | None) -> tuple[Any, Callable[[Any], Any]]:
        """Find an output: an object, and a getter that takes the value out of it after each call."""
        if isinstance(self._outputs, _Generic):
            return self._outputs, path(attribute)
        first = self._outputs[0]
        if attribute is None:
            return first, value_of
        if attribute.isdigit():
            return self._outputs[int(attribute)], value_of
        return first, attrgetter(attribute)


class _Generic:
    """The result of a pynvml wrapper, kept until its values are taken."""

    __slots__ = ("result",)

    def __init__(self) -> None:
        self.result: Any = None


def path(attribute: str | None) -> Callable[[Any], Any]:
    """Make a getter along an attribute path as in `Call.attribute`, which starts at the `result` of its argument."""
    steps = attribute.split(".") if attribute else []

    def take(holder: Any) -> Any:
        value: Any = holder.result
        for step in steps:
            if step == "len":
                value = len(value)
            elif step.isdigit():
                value = value[int(step)]
            else:
                value = getattr(value, step)
        return value

    return take


def probe(library: Library, handle: Any, call: Call) -> Probe | None:
    """Prepare a call of the catalog on a device; None where pynvml does not know a constant that it needs."""
    name = "/".join([call.function, *map(str, call.args)])
    signature = SIGNATURES.get(name) or SIGNATURES.get(call.function)
    inputs: list[int] = []
    for arg in call.args:
        number = library.constant(arg) if isinstance(arg, str) else arg
        if number is None:
            return None
        inputs.append(number)
    if signature is None:
        return _wrapped(library, handle, name, call.function, inputs)
    function = library.function(signature.symbol)
    if function is None:  # the wrapper may know a newer call for the same
        return _wrapped(library, handle, name, call.function, inputs)
    if signature.version:
        inputs.clear()
    outputs = [library.structure(o)() if isinstance(o, str) else o() for o in signature.outputs]
    if signature.version:
        version = library.constant(signature.version)
        if version is None:
            return None
        outputs[0].version = version
    args = (
        ctypes.c_void_p.from_param(address(handle)),
        *(UINT.from_param(number) for number in inputs),
        *(ctypes.byref(output) for output in outputs),
    )
    return Probe(name, function, args, outputs, handle)


def _wrapped(library: Library, handle: Any, name: str, function: str, inputs: list[int]) -> Probe:
    holder = _Generic()

    def call(*args: Any) -> int:
        try:
            holder.result = library.call(function, *args)
        except NvmlFailure as failure:
            return failure.code
        return SUCCESS if holder.result is not None else FUNCTION_NOT_FOUND

    return Probe(name, call, (handle, *inputs), holder, handle)
