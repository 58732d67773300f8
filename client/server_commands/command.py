"""Commands for a plan, and what all servers have in common."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from msgspec import Struct

from ...schemas.models.serving import ServePlan, ServeStage, ServeWork, StageDevice
from ...schemas.models.sizes import dtype_bytes

_AMD: Final = "amd"
FIRST_PORT: Final = 8000
"""HTTP port of the first server."""


class HostCommand(Struct, frozen=True, kw_only=True):
    """A command to run on a host.

    Attributes:
        host: the host's name.
        environment: variables to set for it.
        arguments: the program and its arguments.
        copy: number of the copy of the model that it belongs to, from 0.
        needs: addresses with ports that must accept connections before it starts.
        port: HTTP port at which it serves requests; null if it serves none.
    """

    host: str
    arguments: list[str]
    environment: dict[str, str] = {}
    copy: int = 0
    needs: list[str] = []
    port: int | None = None

    @property
    def line(self) -> str:
        """The command as a line for a shell."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, shlex.join(self.arguments)])


class Offer(Struct, frozen=True, kw_only=True):
    """Commands with which a server starts a plan.

    Attributes:
        server: name of the server.
        version: its version whose documentation the commands follow.
        commands: commands in the order to start them; empty if it can't express the plan.
        refusal: why it can't; empty if it can.
        notes: what else has to be known.
    """

    server: str
    version: str
    commands: list[HostCommand] = []
    refusal: str = ""
    notes: list[str] = []


class Task(NamedTuple):
    """A plan with what its commands name.

    Attributes:
        plan: the plan.
        work: what it serves.
        path: path or name of the model, as the server loads it.
        addresses: network addresses of hosts, where known.
        port: HTTP port of the first server; those of further ones follow.
        listen: address at which servers listen for requests; empty for their default.
        inner_ports: ports between the processes of a copy, from its first; empty for the servers' usual ones.
    """

    plan: ServePlan
    work: ServeWork
    path: str
    addresses: Mapping[str, str]
    port: int = FIRST_PORT
    listen: str = ""
    inner_ports: Callable[[int], str] | None = None

    def address(self, host: str) -> str:
        """Network address of a host; its name where none is known."""
        return self.addresses.get(host) or host

    def inner_port(self, at: int, usual: int) -> str:
        """Port between the processes of a copy: the one of a number, or the usual one."""
        return str(usual) if self.inner_ports is None else self.inner_ports(at)

    @property
    def listening(self) -> list[str]:
        """Option for the address at which a server listens, the same for vLLM and llama.cpp."""
        return ["--host", self.listen] if self.listen else []

    @property
    def unconverted(self) -> str:
        """Return why the files can't be loaded as planned, if their weights have another format; empty if they can."""
        model = self.work.model
        if not model.converted_from:
            return ""
        planned = model.dtype if model.quantization is None else model.quantization.method
        return f"the files have {model.converted_from}, and the plan {planned}: convert them, and plan for the result"

    @property
    def small_cache(self) -> str:
        """Return why a server without an option for it can't keep the KV cache as planned; empty if it can."""
        if not self.work.kv_dtype or dtype_bytes(self.work.kv_dtype) >= dtype_bytes(self.work.model.dtype):
            return ""
        return f"the KV cache is planned as {self.work.kv_dtype}, and only vLLM's command sets that"

    @property
    def gguf(self) -> bool:
        """True if the model is a GGUF file."""
        return self.path.endswith(".gguf")


def copies(plan: ServePlan) -> list[list[ServeStage]] | None:
    """The stages of each copy of the model, in order; None if copies share stages."""
    onward: dict[int, list[int]] = {}
    into: dict[int, int] = {}
    for route in plan.routes:
        if route.target >= 0:
            onward.setdefault(route.origin, []).append(route.target)
            into[route.target] = into.get(route.target, 0) + 1
    if any(len(targets) > 1 for origin, targets in onward.items() if origin >= 0) or any(n > 1 for n in into.values()):
        return None
    found: list[list[ServeStage]] = []
    for start in onward.get(-1, []):
        chain, at, done = [plan.stages[start]], start, plan.stages[start].layers
        while at in onward:
            at = onward[at][0]
            if plan.stages[at].first_layer != done:
                return None  # it begins inside the layers of the one before
            chain.append(plan.stages[at])
            done += plan.stages[at].layers
        found.append(chain)
    return found


def visible(devices: list[StageDevice]) -> dict[str, str]:
    """Variables that show a program some devices of one vendor, in this order; for AMD as leases have them."""
    if devices[0].vendor != _AMD:
        if not any(device.visible_id for device in devices):
            return {"CUDA_VISIBLE_DEVICES": ",".join(device.device for device in devices)}
        # A list has uuids or numbers, not both.
        numbers = ",".join(str(device.index) for device in devices)
        return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": numbers}
    named = ",".join(device.visible_id or str(device.index) for device in devices)
    here = ",".join(str(at) for at in range(len(devices)))
    return {"ROCR_VISIBLE_DEVICES": named, "HIP_VISIBLE_DEVICES": here, "CUDA_VISIBLE_DEVICES": here}


def vendors_of(stages: list[ServeStage]) -> set[str]:
    """Vendors of the devices of some stages: a program is built for those of one."""
    return {device.vendor for device in devices_of(stages)}


def by_host(stages: list[ServeStage]) -> list[tuple[str, list[ServeStage]]] | None:
    """Stages of each host, in order; None if a host has stages that do not follow each other."""
    found: list[tuple[str, list[ServeStage]]] = []
    for stage in stages:
        host = stage.devices[0].host
        if found and found[-1][0] == host:
            found[-1][1].append(stage)
        else:
            found.append((host, [stage]))
    return found if len({host for host, _ in found}) == len(found) else None


def devices_of(stages: list[ServeStage]) -> list[StageDevice]:
    """All devices of some stages, in order."""
    return [device for stage in stages for device in stage.devices]
