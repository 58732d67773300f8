"""Messages for tests of the history."""

from __future__ import annotations

import time

import numpy as np
from corral.schemas.metrics import METRICS
from corral.schemas.telemetry import SampleBatch


def sample_batch(
    host: str = "h1",
    sequence: int = 1,
    *,
    agent: str = "",
    devices: int = 4,
    ticks: int = 3,
    start_ns: int | None = None,
    step_ns: int = 1_000_000_000,
    metrics: tuple[str, ...] = ("gpu_utilization_percent", "power_watts", "memory_used_bytes", "energy_millijoules"),
) -> SampleBatch:
    """A batch whose values say where they come from: each column counts its values from the sequence on."""
    start = time.time_ns() - ticks * step_ns if start_ns is None else start_ns
    count = devices * ticks
    times = np.repeat(start + np.arange(ticks, dtype="<i8") * step_ns, devices)
    values = (np.arange(count) + sequence) % 100
    return SampleBatch(
        host=host,
        agent=agent or f"run-{host}",
        sequence=sequence,
        source="simulated",
        devices=[f"GPU-{host}-{at}" for at in range(devices)],
        times_ns=times.astype("<i8").tobytes(),
        columns={name: values.astype(METRICS[name].row.unit.dtype).tobytes() for name in metrics},
    )
