"""Policies that use the state of one host alone: random, best-fit, spread, pack, and score (memory, compute,
temperature)."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from ...fleet.state import HEAT_LEVELS, LOAD_LEVELS, UNLIMITED, WHOLE_MILLI, Ask, DeviceState, HostState
from .policy import Choice, Search, pick
from .strain import STRAIN_WEIGHTS, strain, strain_of

if TYPE_CHECKING:
    from ...fleet.fleet import Fleet


def fullest_first(state: HostState, ask: Ask, candidates: Sequence[int]) -> Sequence[int]:
    """Sort candidates by strain, then free memory, ascending; for a share, return the fullest candidate alone."""
    if len(candidates) == 1 or len(state.kinds) == 1:
        return candidates
    devices = state.devices
    if ask.whole:
        return sorted(candidates, key=lambda at: (strain(devices[at]), devices[at].memory_free))
    # A share takes one device, so that the first is all that counts.
    best = min(candidates, key=lambda at: (devices[at].share_free, strain(devices[at]), devices[at].memory_free))
    return (best,)


class Base:
    """Base class of simple policies, which learn nothing."""

    name = ""
    version = 0

    @property
    def draw(self) -> random.Random | None:
        """None: hosts are ranked by score."""
        return None

    @property
    def search(self) -> Search | None:
        """None: the cached ranking is used."""
        return None

    def observe(self, fleet: Fleet, ask: Ask) -> None:
        """Do nothing: there is nothing to learn."""


class Random(Base):
    """Any feasible host with equal probability, then any of its feasible devices. The baseline of placement papers."""

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)

    @property
    def draw(self) -> random.Random | None:
        """Random generator that draws the host."""
        return self._random

    def choose(self, state: HostState, ask: Ask, candidates: Sequence[int]) -> Choice:
        """Pick devices at random."""
        return Choice(0.0, 0.0, tuple(sorted(self._random.sample(list(candidates), ask.gpus))))

    def parts(self, state: HostState, ask: Ask, choice: Choice, device: int) -> dict[str, float]:
        """A score of 0: the choice is random."""
        return {"random": 0.0}


class BestFit(Base):
    """The host with the least cores and share left over; on it the device with the least free share that fits.

    As "BestFit" in the experiments of the FGD paper (USENIX ATC'23): the score is the negative of what the host has
    left of each resource after the request, over what a large host has of it (128 cores, 8 devices), with equal
    weights. RAM is ignored, as there.
    """

    name = "best-fit"

    def choose(self, state: HostState, ask: Ask, candidates: Sequence[int]) -> Choice:
        """Pick the fullest device that fits; the host with the least left scores highest."""
        chosen = pick(state, fullest_first(state, ask, candidates), ask.gpus)
        cpus, share = _left(state, ask)
        return Choice(-cpus - share, -strain_of(state, chosen), chosen)

    def parts(self, state: HostState, ask: Ask, choice: Choice, device: int) -> dict[str, float]:
        """Rest of each resource, negative."""
        cpus, share = _left(state, ask)
        return {"cpus": -cpus, "share": -share}


CORES_SCALE: Final = 128_000
SHARE_SCALE: Final = 8 * WHOLE_MILLI


def _left(state: HostState, ask: Ask) -> tuple[float, float]:
    """Cores and share that stay free, in units of a large host (128 cores, 8 devices), halved."""
    cpus = 0.0 if state.cpus_free >= UNLIMITED else (state.cpus_free - ask.cpus_milli) / CORES_SCALE
    share = (state.share_free - ask.gpus * ask.share_milli) / SHARE_SCALE
    return cpus / 2, share / 2


class Pack(Base):
    """The host with the least free share: idle hosts stay idle, and may be switched off or given to a large request."""

    name = "pack"

    def choose(self, state: HostState, ask: Ask, candidates: Sequence[int]) -> Choice:
        """Pick the fullest device that fits; the fullest host scores highest."""
        chosen = pick(state, fullest_first(state, ask, candidates), ask.gpus)
        return Choice(-float(state.share_free), -strain_of(state, chosen), chosen)

    def parts(self, state: HostState, ask: Ask, choice: Choice, device: int) -> dict[str, float]:
        """Free share of the host, negative."""
        return {"share_free": choice.score}


class Spread(Base):
    """The host with the greatest part of its devices free, and on it the device with the most free.

    So work gets as much of a host's bandwidth, cooling and power as there is.
    """

    name = "spread"

    def choose(self, state: HostState, ask: Ask, candidates: Sequence[int]) -> Choice:
        """Pick the emptiest devices; the emptiest host scores highest."""
        devices = state.devices
        order = sorted(
            candidates, key=lambda at: (strain(devices[at]) - devices[at].share_free, -devices[at].memory_free)
        )
        chosen = pick(state, order, ask.gpus)
        whole = max(1, len(devices)) * WHOLE_MILLI
        score = state.share_free / whole
        return Choice(score, -strain_of(state, chosen), chosen)

    def parts(self, state: HostState, ask: Ask, choice: Choice, device: int) -> dict[str, float]:
        """Free part of the host's devices."""
        return {"share_free": choice.score}


SCORE_WEIGHTS: Final = {"memory": 0.4, "compute": 0.4, "temperature": 0.2}
"""Weights of the score policy. Memory: the free part of the device's memory. Compute: the device's peak over
`COMPUTE_SCALE`, times its free share and the part that is idle and not throttled. Temperature: 1 below 60 °C, less a
quarter for each step of 10 °C, so 0 from 90 °C on."""
COMPUTE_SCALE: Final = 132 * 1980
"""Streaming multiprocessors × MHz of an H100 SXM, the unit of compute."""


class Score(Base):
    """The devices with the highest weighted sum of free memory, idle compute and low temperature (`SCORE_WEIGHTS`).

    A device with a recent health warning loses the penalty for it in `STRAIN_WEIGHTS`.
    """

    name = "score"

    def __init__(self) -> None:
        self._scores: dict[DeviceState, float] = {}

    def device(self, device: DeviceState) -> dict[str, float]:
        """Components of a device's score."""
        total = device.model.memory_bytes or device.memory_free or 1
        peak = min(1.0, device.model.compute / COMPUTE_SCALE) if device.model.compute else 0.5
        idle = (1.0 - device.load / (LOAD_LEVELS + 1)) * (0.5 if device.throttled else 1.0)
        return {
            "memory": SCORE_WEIGHTS["memory"] * min(1.0, device.memory_free / total),
            "compute": SCORE_WEIGHTS["compute"] * peak * idle * device.share_free / WHOLE_MILLI,
            "temperature": SCORE_WEIGHTS["temperature"] * (1.0 - device.heat / HEAT_LEVELS),
            "health": -STRAIN_WEIGHTS["warned"] if device.warned else 0.0,
        }

    def choose(self, state: HostState, ask: Ask, candidates: Sequence[int]) -> Choice:
        """Pick the devices with the highest scores; a host's score is the mean of theirs."""
        known, devices = self._scores, state.devices
        scores: dict[int, float] = {}
        for at in candidates:
            score = known.get(devices[at])
            if score is None:
                if len(known) > 65_536:
                    known.clear()
                score = known[devices[at]] = math.fsum(self.device(devices[at]).values())
            scores[at] = score
        chosen = pick(state, sorted(candidates, key=lambda at: -scores[at]), ask.gpus)
        mean = sum([scores[at] for at in chosen]) / len(chosen) if chosen else 0.0
        return Choice(mean, 0.0, chosen)

    def parts(self, state: HostState, ask: Ask, choice: Choice, device: int) -> dict[str, float]:
        """Components of a device's score, see `device`; for cores and RAM alone a score of 0."""
        return self.device(state.devices[device]) if device >= 0 else {"host": 0.0}
