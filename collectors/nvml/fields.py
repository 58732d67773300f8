"""Field values of `nvmlDeviceGetFieldValues`: many numbers in one call, each with a type and an error code."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Final

from .library import FUNCTION_NOT_FOUND, SUCCESS, Library, address

_TYPES: Final = (
    ctypes.c_double,
    ctypes.c_uint,
    ctypes.c_ulong,
    ctypes.c_ulonglong,
    ctypes.c_longlong,
    ctypes.c_int,
    ctypes.c_ushort,
)
"""C types of values, by NVML's value type."""
WIDE: Final = frozenset({2, 3, 4})
"""NVML's value types of 64 bits."""

Key = tuple[int, int]
"""A field's id and its scope."""


class FieldBatch:
    """A batch of fields on one device, prepared so that it can be read repeatedly.

    Attributes:
        keys: the fields that it reads, in order.
        entries: for each field, its structure with `nvmlReturn` and `valueType` of the last reading, and a view of its
            value in each type.
        types: number of known value types.
        function: takes `args` and returns NVML's code for the batch as a whole.
        args: arguments, prepared once.
    """

    __slots__ = ("args", "entries", "function", "keys", "types")

    def __init__(self, library: Library, handle: Any, keys: Sequence[Key]) -> None:
        structure = library.structure("c_nvmlFieldValue_t")
        array: Any = (structure * len(keys))()
        self.keys = list(keys)
        items: list[Any] = [array[at] for at in range(len(keys))]
        for item, (field, scope) in zip(items, keys, strict=True):
            item.fieldId = field
            item.scopeId = scope
        offset = structure.value.offset  # pyright: ignore[reportAttributeAccessIssue]  # a field of the structure
        size = ctypes.sizeof(structure)
        self.entries = [
            (item, [kind.from_buffer(array, at * size + offset) for kind in _TYPES]) for at, item in enumerate(items)
        ]
        self.types = len(_TYPES)
        self.function = library.function("nvmlDeviceGetFieldValues") or _missing
        self.args = (ctypes.c_void_p.from_param(address(handle)), ctypes.c_int(len(keys)), ctypes.byref(array))

    def read(self) -> int:
        """Read the batch; returns NVML's code for the call as a whole."""
        return self.function(*self.args) if self.keys else SUCCESS

    def code(self, at: int) -> int:
        """NVML's code for one field of the last reading."""
        return int(self.entries[at][0].nvmlReturn)

    def value(self, at: int) -> float | int | None:
        """Value of one field in the last reading; None if its type is not known."""
        item, views = self.entries[at]
        return views[item.valueType].value if item.valueType < self.types else None

    def wide(self, at: int) -> bool:
        """True if a field came in 64 bits in the last reading."""
        return self.entries[at][0].valueType in WIDE


def _missing(*_args: Any) -> int:
    return FUNCTION_NOT_FOUND


def survey(library: Library, handle: Any, keys: Sequence[Key]) -> dict[Key, tuple[int, bool]]:
    """Read fields once; returns the error code of each, and True if it comes in 64 bits."""
    batch = FieldBatch(library, handle, keys)
    code = batch.read()
    if code == SUCCESS:
        return {key: (batch.code(at), batch.wide(at)) for at, key in enumerate(batch.keys)}
    if len(keys) <= 1:
        return dict.fromkeys(keys, (code, False))
    # Some drivers refuse a whole batch for one field that they do not know.
    half = len(keys) // 2
    return {**survey(library, handle, keys[:half]), **survey(library, handle, keys[half:])}
