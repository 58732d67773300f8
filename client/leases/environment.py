"""Environment variables for work under a lease: they show its devices on one host, and no other GPU of any vendor.

Each runtime reads a different variable, with a different value for "none". CUDA takes an empty `CUDA_VISIBLE_DEVICES`
as none, and so does ROCm's runtime with `ROCR_VISIBLE_DEVICES` (its `RvdFilter::SelectZeroDevices`). HIP and AMD's
OpenCL run on top of that runtime, and renumber the devices that it shows them: in `HIP_VISIBLE_DEVICES` and
`GPU_DEVICE_ORDINAL`, empty means all and `-1` means none (ROCclr's `roc::Device::init`).
"""

from __future__ import annotations

import contextlib
import os
import socket
import warnings
from collections.abc import Generator
from typing import Final

from ...schemas import requests, subjects
from ...schemas.limits import LEASE_VARIABLE
from ..request import RequestFields

NONE_VISIBLE: Final[dict[str, str]] = {
    "CUDA_VISIBLE_DEVICES": "",
    "ROCR_VISIBLE_DEVICES": "",
    "HIP_VISIBLE_DEVICES": "-1",
    "GPU_DEVICE_ORDINAL": "-1",
}
"""Values that hide all GPUs, whatever the environment held before."""


def environment_for(lease: requests.Lease, host: str | None = None) -> dict[str, str]:
    """Environment variables of a lease on a host; on this host by default.

    Every variable that selects GPUs is included, so that no earlier value of one stays in effect. If the lease holds
    no device on the host, no GPU is visible there.
    """
    granted = lease.environment.get(host or local_host(), {})
    values = {**NONE_VISIBLE, **granted, LEASE_VARIABLE: lease.lease_id}
    amd = granted.get("ROCR_VISIBLE_DEVICES", "")
    if amd:
        # HIP and OpenCL renumber what ROCm's runtime shows them: an earlier value would select other devices.
        numbers = ",".join(map(str, range(len(amd.split(",")))))
        for name in ("HIP_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL"):
            values[name] = granted.get(name, numbers)
    return values


def devices_elsewhere(lease: requests.Lease, host: str | None = None) -> str:
    """Message that all devices of a lease are on other hosts; empty if some are on `host` (this host by default)."""
    here = host or local_host()
    hosts = list(dict.fromkeys(grant.host for grant in lease.grants if grant.device))
    if not hosts or here in hosts:
        return ""
    names = ", ".join(hosts[:3]) + (f" and {len(hosts) - 3} more hosts" if len(hosts) > 3 else "")
    return f"the GPUs of lease {lease.lease_id} are on {names}: none is visible here, on {here}"


def local_host() -> str:
    """Name of this host, in the form that collectors use."""
    return subjects.host_token(os.environ.get("CORRAL_HOST") or socket.gethostname())


def restricted_to_host(fields: RequestFields) -> RequestFields:
    """The fields of a request whose lease sets an environment here: restricted to this host, unless they name hosts."""
    return fields if fields.get("hosts") else {**fields, "hosts": [local_host()]}


@contextlib.contextmanager
def environment_set(lease: requests.Lease) -> Generator[None]:
    """Set the environment of a lease in this process for a block, and restore the earlier values at the end.

    If all of its devices are on other hosts, no GPU is visible, and a `RuntimeWarning` is issued.
    """
    if message := devices_elsewhere(lease):
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
