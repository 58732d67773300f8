"""Jobs on a simulated fleet: leased work, and processes that hold no lease, as arrays.

A job's load is a function of its age and of a hash of its name, so that the same lease behaves the same in each run.
"""

from __future__ import annotations

import hashlib
from typing import Final

import numpy as np
import numpy.typing as npt
from msgspec import Struct

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

TRAINING: Final = 0
SERVING: Final = 1
NOTEBOOK: Final = 2
_LOAD_SECONDS: Final = 8.0
"""Time in which a job fills its memory."""


class Job(Struct, frozen=True, kw_only=True):
    """A process on one device.

    Attributes:
        device: index of its device in the fleet.
        memory_bytes: device memory that it holds once loaded.
        share: share of the device's time at full load.
        kind: pattern of its load: `TRAINING`, `SERVING` or `NOTEBOOK`.
        started: when it started, in seconds of simulation time.
        lease: id of its lease; empty for a process without a lease.
        owner: account that runs it.
        name: name of the executable.
    """

    device: int
    memory_bytes: int
    share: float
    kind: int
    started: float
    lease: str = ""
    owner: str = ""
    name: str = "python3"

    @property
    def pid(self) -> int:
        """Process id, always the same for the same job."""
        return 2_000 + digest(f"{self.lease}/{self.owner}/{self.device}/{self.started:.0f}") % 4_000_000


class Jobs:
    """All jobs at one time.

    Attributes:
        jobs: one by one, for lists of processes.
    """

    def __init__(self, jobs: list[Job]) -> None:
        self.jobs = jobs
        self._device: Ints = np.array([job.device for job in jobs], dtype=np.int64)
        self._memory: Floats = np.array([job.memory_bytes for job in jobs], dtype=np.float64)
        self._share: Floats = np.array([job.share for job in jobs], dtype=np.float64)
        self._kind: Ints = np.array([job.kind for job in jobs], dtype=np.int64)
        self._started: Floats = np.array([job.started for job in jobs], dtype=np.float64)
        self._phase: Floats = np.array([digest(job.lease or str(job.pid)) % 997 / 997 for job in jobs])

    def load(self, time: float, devices: int) -> Floats:
        """Load of each device: demand for its time, 0 to 1."""
        age = np.maximum(time - self._started, 0.0)
        wave = np.sin(2 * np.pi * (age / 37.0 + self._phase)) * np.sin(2 * np.pi * age / 113.0)
        # Training runs flat out, with a pause for the checkpoint; serving follows its users; a notebook mostly waits.
        pause = ((age + 90.0 * self._phase) % 90.0) < 3.0
        training = np.where(pause, 0.12, 0.96 + 0.03 * wave)
        serving = 0.45 + 0.4 * wave
        notebook = np.where(((age + 60 * self._phase) % 60.0) < 9.0, 0.7, 0.02)
        demand = np.select([self._kind == TRAINING, self._kind == SERVING], [training, serving], notebook)
        demand = demand * np.clip((age - _LOAD_SECONDS / 2) / (_LOAD_SECONDS / 2), 0.0, 1.0)
        total = np.bincount(self._device, weights=demand * self._share, minlength=devices)
        return np.minimum(total, 1.0)

    def memory(self, time: float) -> Floats:
        """Device memory that each job holds now, bytes."""
        loaded = np.clip((time - self._started) / _LOAD_SECONDS, 0.02, 1.0)
        return self._memory * loaded

    def memory_by_device(self, time: float, devices: int) -> Floats:
        """Memory that all jobs together hold on each device now, bytes."""
        held: Floats = np.bincount(self._device, weights=self.memory(time), minlength=devices).astype(np.float64)
        return held


def digest(text: str) -> int:
    """Hash a text to a number that is the same in each run and on each machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def uniform(seed: int, slot: int, size: int) -> Floats:
    """Random numbers in [0, 1) that depend on the seed and the slot alone, one for each device."""
    key = np.array([seed % 2**64, slot % 2**64], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(size)
