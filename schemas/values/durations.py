"""Digest of how long leases lasted, from which the planner estimates durations. A processor answers with it.

Durations are counted in bins, so that a digest stays small: bin `b` counts those from `2**(b / 4)` seconds up to
`2**((b + 1) / 4)`, bin 0 also shorter ones. A count is weighted: a lease that ended `d` days before the digest's time
counts `0.5 ** (d / 30)`.
"""

from __future__ import annotations

import functools
import math
from typing import Annotated, Final

from msgspec import Meta, Struct

from ..requests import Time, WorkRequest

DIGEST_VERSION: Final = 1
BINS: Final = 101
"""Number of bins: the last begins at 2**25 s, more than a year."""
HALF_LIFE_SECONDS: Final = 30 * 86400.0
"""A lease that ended so long ago counts half."""
MAX_GROUPS: Final = 4096

Bin = Annotated[int, Meta(ge=0, lt=BINS)]
Weight = Annotated[float, Meta(ge=0, le=1e12)]


class DurationGroup(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Durations of the leases of one owner, workload name and shape.

    Attributes:
        owner: owner of the leases.
        name: name of their workload.
        shape: shape of the requests; see `shape_of`.
        ended: pairs of bin and weight of the leases whose work ended.
        censored: likewise of the leases that lasted at least so long: they are active still, or were taken away.
    """

    owner: str = ""
    name: str = ""
    shape: str = ""
    ended: list[tuple[Bin, Weight]] = []
    censored: list[tuple[Bin, Weight]] = []


class DurationsRequest(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Request for the digest of durations.

    Attributes:
        max_groups: number of groups in the answer: those with the most weight.
    """

    max_groups: Annotated[int, Meta(ge=1, le=MAX_GROUPS)] = MAX_GROUPS


class DurationDigest(Struct, frozen=True, kw_only=True, tag="duration_digest", tag_field="type"):
    """Durations of past leases, by owner, name and shape.

    Attributes:
        time: time up to which leases are counted, and to which weights refer.
        groups: groups with the most weight first.
        version: version of the form of this message.
    """

    time: Time
    groups: Annotated[list[DurationGroup], Meta(max_length=MAX_GROUPS)]
    version: int = DIGEST_VERSION


class DurationEstimate(Struct, frozen=True, kw_only=True):
    """Estimate of how long the work of a request takes.

    Attributes:
        seconds: median.
        low_seconds: 10 % quantile.
        high_seconds: 90 % quantile.
        basis: `request` (its `expected_seconds`), `owner_name`, `name`, `burst` (those submitted at about the same
            time), `owner_shape`, `shape`, `all`, or `none`.
        leases: number of leases that it rests on, weighted by their age.
    """

    seconds: float
    low_seconds: float
    high_seconds: float
    basis: str
    leases: float = 0.0


def bin_of(seconds: float) -> int:
    """Bin that counts a duration."""
    return 0 if seconds < 1 else min(BINS - 1, int(4 * math.log2(seconds)))


def bin_seconds(number: int) -> float:
    """Middle of a bin, in seconds."""
    return 2.0 ** ((number + 0.5) / 4)


@functools.lru_cache(4096)
def shape_of(gpus: int, gpu_share: float | None = None, models: tuple[str, ...] = (), mig: bool | str = False) -> str:
    """Shape of a request: number of devices or share of one, with the models or the MIG profile that it asks for."""
    size = f"{gpus}" if gpu_share is None else f"{gpu_share:g}"
    kind = "|".join(sorted(glob.lower() for glob in models)) or ("" if not mig else f"mig:{mig}".lower())
    return f"{size} {kind}".rstrip()[:256]


def shape_of_request(request: WorkRequest) -> str:
    """Shape of a work request."""
    return shape_of(request.gpus, request.gpu_share, tuple(request.models), request.mig)


__all__ = [
    "BINS",
    "DIGEST_VERSION",
    "HALF_LIFE_SECONDS",
    "MAX_GROUPS",
    "DurationDigest",
    "DurationEstimate",
    "DurationGroup",
    "DurationsRequest",
    "bin_of",
    "bin_seconds",
    "shape_of",
    "shape_of_request",
]
