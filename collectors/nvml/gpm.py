"""The GPU Performance Monitor: activity of the units of a Hopper or later GPU, between two samples of its counters."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from typing import Any, Final

from .library import NOT_SUPPORTED, SUCCESS, UNSUPPORTED, Library, NvmlFailure, address

MIN_SECONDS: Final = 0.1
"""Shortest time between two samples: closer ones cost more than they tell."""
_FIRST_SECONDS: Final = 0.02


class GpmReader:
    """Reads the GPM metrics of one device or MIG instance, by their ids.

    Args:
        library: NVML.
        handle: handle of the device; of the parent for a MIG instance.
        instance: id of the GPU instance; None for a whole device.
        metrics: ids that are wanted.
        surveyed: ids that each kind of device gives; each kind is surveyed once, since that takes a pause.
        kind: kind of this device.

    Attributes:
        metrics: ids that the device gives, in the order of `values`.
        values: values of the last reading; None where there is none yet.
    """

    def __init__(
        self,
        library: Library,
        handle: Any,
        instance: int | None,
        metrics: Sequence[int],
        surveyed: dict[str, list[int]],
        kind: str,
    ) -> None:
        self.metrics: list[int] = []
        self.values: list[float | None] = []
        self._library = library
        self._handle = handle
        self._wanted = list(metrics)
        self._trying = False
        self._samples: list[Any] = []
        self._due = 0.0
        device = ctypes.c_void_p.from_param(address(handle))
        if instance is None:
            self._get = library.function("nvmlGpmSampleGet")
            self._target: tuple[Any, ...] = (device,)
        else:
            self._get = library.function("nvmlGpmMigSampleGet")
            self._target = (device, ctypes.c_uint.from_param(instance))
        self._compute = library.function("nvmlGpmMetricsGet")
        if not self._begin():
            return
        known = surveyed.get(kind)
        if known is None:
            known = self._survey(metrics)
            if known is not None:
                surveyed[kind] = known
        if known:
            self._prepare(known)
        else:
            self.close()

    def _begin(self) -> bool:
        """Take the first sample; False where the device can't."""
        library = self._library
        if not self._wanted or self._get is None or self._compute is None or not _supported(library, self._handle):
            return False
        try:
            self._samples = [library.call("nvmlGpmSampleAlloc") for _ in range(2)]
        except NvmlFailure:
            self.close()
            return False
        if self._sample() != SUCCESS:
            self.close()
            return False
        return True

    def ask_again(self) -> None:
        """Ask for all wanted metrics with the next reading; those that are refused then are left out again."""
        if len(self.metrics) == len(self._wanted) or (not self._samples and not self._begin()):
            return
        self._prepare(self._wanted)
        self._trying = True

    def _survey(self, metrics: Sequence[int]) -> list[int] | None:
        """Find the metrics that this device gives, by two samples and a computation; None where that fails."""
        self._prepare(metrics)
        time.sleep(_FIRST_SECONDS)
        self._swap()
        if self._sample() != SUCCESS or self._request() != SUCCESS:
            return None
        return [metric for at, metric in enumerate(metrics) if self._codes[at].value not in UNSUPPORTED]

    def _prepare(self, metrics: Sequence[int]) -> None:
        structure = self._library.structure("c_nvmlGpmMetricsGet_t")
        item: Any = self._library.structure("c_nvmlGpmMetric_t")
        request: Any = structure()
        request.version = self._library.constant("NVML_GPM_METRICS_GET_VERSION")
        request.numMetrics = len(metrics)
        start = structure.metrics.offset  # pyright: ignore[reportAttributeAccessIssue]  # a field of the structure
        size = ctypes.sizeof(item)
        places = [start + at * size for at in range(len(metrics))]
        for metric, place in zip(metrics, places, strict=True):
            ctypes.c_uint.from_buffer(request, place + item.metricId.offset).value = metric
        self._codes = [ctypes.c_uint.from_buffer(request, place + item.nvmlReturn.offset) for place in places]
        self._numbers = [ctypes.c_double.from_buffer(request, place + item.value.offset) for place in places]
        self._asked = request
        self._asked_arg = ctypes.byref(request)
        self.metrics = list(metrics)
        self.values = [None] * len(metrics)

    def _swap(self) -> None:
        self._samples.reverse()

    def _sample(self) -> int:
        return self._get(*self._target, self._samples[1]) if self._get else NOT_SUPPORTED

    def _request(self) -> int:
        self._asked.sample1, self._asked.sample2 = self._samples
        return self._compute(self._asked_arg) if self._compute else NOT_SUPPORTED

    def read(self, now: float) -> int | None:
        """Take a sample and compute the metrics since the last one; returns NVML's code, or None if none is due."""
        if not self.metrics or now < self._due:
            return None
        self._due = now + MIN_SECONDS * 0.9  # ticks jitter: a tick each 100 ms is to hit each time
        self._swap()
        code = self._sample()
        if code != SUCCESS:
            self._swap()
            self.values = [None] * len(self.metrics)
            return code
        code = self._request()
        if code != SUCCESS:
            self.values = [None] * len(self.metrics)
            return code
        self.values = [
            number.value if code.value == SUCCESS else None
            for code, number in zip(self._codes, self._numbers, strict=True)
        ]
        if self._trying:
            self._settle()
        return SUCCESS

    def _settle(self) -> None:
        """Keep those metrics that the device gives, after `ask_again`."""
        self._trying = False
        codes = [code.value for code in self._codes]
        given = [
            (metric, value)
            for metric, value, code in zip(self.metrics, self.values, codes, strict=True)
            if code not in UNSUPPORTED
        ]
        if not given:
            self.close()
        elif len(given) < len(codes):
            self._prepare([metric for metric, _ in given])
            self.values = [value for _, value in given]

    def close(self) -> None:
        """Free the samples."""
        self._trying = False
        self.metrics = []
        self.values = []
        for sample in self._samples:
            self._library.ask(None, "nvmlGpmSampleFree", sample)
        self._samples = []


def _supported(library: Library, handle: Any) -> bool:
    support = library.ask(None, "nvmlGpmQueryDeviceSupport", handle)
    return support is not None and bool(support.isSupportedDevice)
