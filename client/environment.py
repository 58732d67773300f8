"""What a lease sets in the environment of its work: the devices of one host, and no other GPU of any vendor.

Each runtime reads a variable of its own, and has another way to say "none". CUDA takes an empty `CUDA_VISIBLE_DEVICES`
for none, and so does ROCm's runtime with `ROCR_VISIBLE_DEVICES` (its `RvdFilter::SelectZeroDevices`). HIP and AMD's
OpenCL stand on that runtime and number anew what it shows them: to `HIP_VISIBLE_DEVICES` and `GPU_DEVICE_ORDINAL` empty
means all, and `-1` none (ROCclr's `roc::Device::init`).
"""

from __future__ import annotations

import contextlib
import os
import socket
import warnings
from collections.abc import Generator
from typing import Final

from ..schemas import requests, subjects
from .request import RequestFields

LEASE_VARIABLE: Final = "CORRAL_LEASE"
NONE_VISIBLE: Final[dict[str, str]] = {
    "CUDA_VISIBLE_DEVICES": "",
    "ROCR_VISIBLE_DEVICES": "",
    "HIP_VISIBLE_DEVICES": "-1",
    "GPU_DEVICE_ORDINAL": "-1",
}
"""No GPU is visible, whatever was set outside."""


def environment_for(lease: requests.Lease, host: str | None = None) -> dict[str, str]:
    """The environment that a lease wants on a host: this one by default.

    Every variable that shows GPUs is in it, so that none is left from outside. Where the lease holds no device on the
    host, none is visible there.
    """
    granted = lease.environment.get(host or local_host(), {})
    values = {**NONE_VISIBLE, **granted, LEASE_VARIABLE: lease.lease_id}
    amd = granted.get("ROCR_VISIBLE_DEVICES", "")
    if amd:
        # HIP and OpenCL number anew what ROCm's runtime shows them: one that is left from outside would choose others.
        numbers = ",".join(map(str, range(len(amd.split(",")))))
        for name in ("HIP_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL"):
            values[name] = granted.get(name, numbers)
    return values


def elsewhere(lease: requests.Lease, host: str | None = None) -> str:
    """A sentence that says that a lease's devices are all on other hosts than this one; empty if it is not so."""
    here = host or local_host()
    hosts = list(dict.fromkeys(grant.host for grant in lease.grants if grant.device))
    if not hosts or here in hosts:
        return ""
    names = ", ".join(hosts[:3]) + (f" and {len(hosts) - 3} more hosts" if len(hosts) > 3 else "")
    return f"the GPUs of lease {lease.lease_id} are on {names}: none is visible here, on {here}"


def local_host() -> str:
    """This host's name as collectors write it."""
    return subjects.host_token(os.environ.get("CORRAL_HOST") or socket.gethostname())


def placed_here(fields: RequestFields) -> RequestFields:
    """The fields of a request whose lease sets an environment here: for this host, unless they name others."""
    return fields if fields.get("hosts") else {**fields, "hosts": [local_host()]}


@contextlib.contextmanager
def environment_set(lease: requests.Lease) -> Generator[None]:
    """Set the environment of a lease in this process, and put back what was there.

    Where its devices are all on other hosts that is warned of: no GPU is visible then.
    """
    if message := elsewhere(lease):
        warnings.warn(message, RuntimeWarning, stacklevel=4)
    values = environment_for(lease)
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
