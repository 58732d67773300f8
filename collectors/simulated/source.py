"""The simulated source: a fleet that changes with time and with the leases that the planner has granted."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Final

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from ...schemas.requests import Grant, Lease
from ...schemas.telemetry import Inventory, ProcessSample
from ..source import Emit, Tick
from .columns import Columns, Counters
from .faults import Faults
from .fleet import build, without
from .jobs import NOTEBOOK, SERVING, TRAINING, Job, Jobs, digest, uniform
from .models import parse_mix
from .physics import Physics

_BACKGROUND_SECONDS: Final = 900.0
"""Time that a process without a lease stays."""
_FOREIGN: Final = (("jupyter-lab", NOTEBOOK), ("python3", SERVING), ("ollama", SERVING), ("blender", TRAINING))
_ACCOUNTS: Final = ("ada", "grace", "linus", "barbara", "edsger")


MISDEED_LABEL: Final = "simulate"
EXCEED_MEMORY: Final = "exceed-memory"
STRANGER: Final = "stranger"
MISDEEDS: Final = (EXCEED_MEMORY, STRANGER)
_GREED: Final = 1.3


class SimulatedSource:
    """A seeded fleet of any size.

    Args:
        hosts: number of hosts.
        devices_per_host: number of devices on each host.
        seed: seed of all random choices.
        models: mix of models, such as `H100:3,T4`; empty for the default one.
        background: share of devices, 0 to 1, on which some process without a lease runs at any time.
        misbehaving: share of leased devices, 0 to 1, on which the lease's work takes more memory than it was granted,
            or a process without a lease runs concurrently. A lease asks for either by its label `simulate`
            (`MISDEEDS`).
        faults_per_device_day: faults of a device per day, on average, such as Xid and ECC events.
        time_scale: seconds of simulation in a second; times that are published stay real.
        prefix: prefix of host names.
        labels: labels of all hosts.
        clock_ns: returns the time, nanoseconds since the epoch.

    Raises:
        ValueError: a size, share, scale or mix that is not possible.
    """

    name = "simulated"

    def __init__(
        self,
        hosts: int = 4,
        devices_per_host: int = 8,
        *,
        seed: int = 1,
        models: str = "",
        background: float = 0.05,
        misbehaving: float = 0.0,
        faults_per_device_day: float = 0.2,
        time_scale: float = 1.0,
        prefix: str = "sim",
        labels: dict[str, str] | None = None,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        if not 0.0 <= background <= 1.0:
            raise ValueError(f"a background share of {background:g} is not possible: write 0 to 1")
        if not 0.0 <= misbehaving <= 1.0:
            raise ValueError(f"a misbehaving share of {misbehaving:g} is not possible: write 0 to 1")
        if not 0.0 < time_scale <= 100_000:
            raise ValueError(f"a time scale of {time_scale:g} is not possible: write a number above 0, such as 60")
        if not 0.0 <= faults_per_device_day <= 10_000:
            raise ValueError(f"{faults_per_device_day:g} faults a day are not possible: write 0 or more")
        self._fleet = build(
            hosts=hosts,
            per_host=devices_per_host,
            seed=seed,
            mix=parse_mix(models),
            prefix=prefix,
            labels=labels or {},
        )
        self._seed = seed
        self._background = background
        self._misbehaving = misbehaving
        self._time_scale = time_scale
        self._clock_ns = clock_ns
        self._by_uuid = {uuid: at for at, uuid in enumerate(self._fleet.uuids)}
        size = len(self._fleet.uuids)
        per_device = [model for model in self._fleet.models for _ in range(devices_per_host)]
        self._physics = Physics(per_device, self._fleet.cooling, seed)
        self._columns = Columns(self._fleet, self._physics)
        self._counters = Counters(size)
        self._faults = Faults(self._fleet, seed, faults_per_device_day, self._counters)
        self._leases: tuple[Lease, ...] = ()
        self._jobs = Jobs([])
        self._jobs_of: tuple[tuple[Lease, ...], int] | None = None
        self._lease_started: dict[str, float] = {}
        self._started_ns: dict[tuple[int, int], int] = {}
        self._time = 0.0
        self._last_ns: int | None = None
        self._emit: Emit = lambda event: None

    def open(self, emit: Emit) -> None:
        """Start at the present."""
        self._emit = emit
        self._last_ns = None

    def set_leases(self, leases: list[Lease]) -> None:
        """Set all active leases; the next tick shows them. May be called from any thread."""
        self._leases = tuple(leases)

    def inventory(self) -> Sequence[Inventory]:
        """Inventories of the fleet, which change only by boards that are gone until they are repaired."""
        now = self._clock_ns()
        gone = {self._fleet.uuids[at] for at in self._faults.gone}
        return [replace(without(inventory, gone), time_ns=now) for inventory in self._fleet.inventories]

    def read(self) -> Sequence[Tick]:
        """Advance the fleet to the present and read it."""
        now = self._clock_ns()
        seconds = 0.0 if self._last_ns is None else max(now - self._last_ns, 0) / 1e9 * self._time_scale
        self._last_ns = now
        self._time += seconds
        self._refresh_jobs(now)
        size = self._physics.size
        lost = self._faults.step(self._time, now, self._emit)
        self._physics.obstructed = self._faults.air
        load = self._jobs.load(self._time, size)
        if lost.any():
            load = np.where(lost, 0.0, load)
        self._physics.step(load, self._time, seconds)
        return self._columns.ticks(now, self._used(), self._counters, lost)

    def processes(self) -> dict[str, list[ProcessSample]]:
        """List the processes of all jobs, by host."""
        found: dict[str, list[ProcessSample]] = {host: [] for host in self._fleet.hosts}
        # A process keeps the start that it was first seen with: computed anew it would differ by nanoseconds each time.
        before, self._started_ns = self._started_ns, {}
        per_host = self._fleet.per_host
        memory = self._jobs.memory(self._time)
        utilization = self._physics.utilization
        for job, held in zip(self._jobs.jobs, memory.tolist(), strict=True):
            worked_out = (self._last_ns or 0) - int((self._time - job.started) / self._time_scale * 1e9)
            started_ns = self._started_ns[job.device, job.pid] = before.get((job.device, job.pid), worked_out)
            found[self._fleet.hosts[job.device // per_host]].append(
                ProcessSample(
                    device=self._fleet.uuids[job.device],
                    pid=job.pid,
                    memory_used_bytes=int(held),
                    sm_utilization_percent=round(100 * float(utilization[job.device]) * job.share, 1),
                    name=job.name,
                    user=job.owner,
                    lease=job.lease,
                    started_ns=started_ns,
                )
            )
        return found

    def close(self) -> None:
        """Do nothing: the source holds no resources."""

    def _used(self) -> npt.NDArray[np.float64]:
        used = self._jobs.memory_by_device(self._time, self._physics.size)
        return np.minimum(np.floor(used), self._columns.total - self._columns.reserved)

    def _refresh_jobs(self, now_ns: int) -> None:
        leases, slot = self._leases, int(self._time / _BACKGROUND_SECONDS)
        if self._jobs_of is not None and self._jobs_of[0] is leases and self._jobs_of[1] == slot:
            return
        self._jobs_of = (leases, slot)
        leased = self._lease_jobs(leases, now_ns)
        taken = {job.device for job in leased}
        self._jobs = Jobs(leased + [job for job in self._background_jobs(slot) if job.device not in taken])

    def _lease_jobs(self, leases: Sequence[Lease], now_ns: int) -> list[Job]:
        jobs: list[Job] = []
        started: dict[str, float] = {}
        for lease in leases:
            age = (datetime.fromtimestamp(now_ns / 1e9, UTC) - lease.granted_at).total_seconds()
            start = self._lease_started.get(lease.lease_id, self._time - max(age, 0.0) * self._time_scale)
            started[lease.lease_id] = start
            # The same workload behaves the same: what a name uses of its grant is a property of the name.
            habit = digest(lease.name or lease.lease_id)
            kind = TRAINING if habit % 3 else SERVING
            appetite = 0.55 + 0.42 * ((habit >> 8) % 1000) / 1000
            for grant in lease.grants:
                device = self._by_uuid.get(grant.device)
                if device is None:
                    continue
                room = float(self._columns.total[device] - self._columns.reserved[device])
                granted = float(grant.memory_bytes) or room * grant.share
                misdeed = self._misdeed(lease, grant)
                used = granted * (_GREED if misdeed == EXCEED_MEMORY else appetite)
                if misdeed == STRANGER:
                    jobs.append(self._stranger(device, start, room))
                jobs.append(
                    Job(
                        device=device,
                        memory_bytes=int(min(used, room)),
                        share=grant.share,
                        kind=kind,
                        started=start,
                        lease=lease.lease_id,
                        owner=lease.owner,
                    )
                )
        self._lease_started = started
        return jobs

    def _misdeed(self, lease: Lease, grant: Grant) -> str:
        """Choose the violation to simulate under a lease on a device; empty for most."""
        wanted = lease.labels.get(MISDEED_LABEL, "")
        if wanted:
            return wanted
        chance = digest(f"{self._seed}/{lease.lease_id}/{grant.device}") % 10_000
        if chance >= self._misbehaving * 10_000:
            return ""
        return EXCEED_MEMORY if grant.memory_bytes and grant.share < 1.0 and chance % 2 else STRANGER

    def _stranger(self, device: int, started: float, room: float) -> Job:
        pick = digest(f"{self._seed}/{device}/{started:.0f}")
        return Job(
            device=device,
            memory_bytes=int(room * 0.04),
            share=0.2,
            kind=NOTEBOOK,
            started=started,
            owner=_ACCOUNTS[pick % len(_ACCOUNTS)],
            name=_FOREIGN[pick % len(_FOREIGN)][0],
        )

    def _background_jobs(self, slot: int) -> list[Job]:
        if self._background <= 0:
            return []
        size = self._physics.size
        chance = uniform(self._seed + 11, slot, size)
        what = uniform(self._seed + 12, slot, size)
        much = uniform(self._seed + 13, slot, size)
        jobs: list[Job] = []
        for device in np.flatnonzero(chance < self._background).tolist():
            name, kind = _FOREIGN[int(what[device] * len(_FOREIGN))]
            jobs.append(
                Job(
                    device=device,
                    memory_bytes=int(self._columns.total[device] * (0.05 + 0.4 * much[device])),
                    share=0.3 + 0.6 * float(much[device]),
                    kind=kind,
                    started=max(slot * _BACKGROUND_SECONDS, 0.0) - 30.0 * float(what[device]),
                    owner=_ACCOUNTS[device % len(_ACCOUNTS)],
                    name=name,
                )
            )
        return jobs
