"""llama.cpp: layers over the devices of a host, and over those of others by its RPC servers.

From `tools/server/README.md`, `tools/rpc/README.md` and `src/llama-model.cpp`: devices of RPC servers come before those
of the host (`llama_prepare_model_devices`). `--tensor-split` divides the layers and the output layer behind them, so
the last device gets one more; the embedding stays in host memory.
"""

from __future__ import annotations

from typing import Final

from ...schemas.models.serving import ServeStage
from .command import HostCommand, Offer, Task, by_host, copies, devices_of, vendors_of, visible

VERSION: Final = "0.5"
RPC_SERVER: Final = "ggml-rpc-server"
OLD_RPC_SERVER: Final = "rpc-server"
"""Its name in older builds."""
_RPC_PORT: Final = 50052
_ALL_LAYERS: Final = 999


def offer(task: Task) -> Offer:
    """Commands for a plan."""
    refusal = _refusal(task)
    if refusal:
        return Offer(server="llama.cpp", version=VERSION, refusal=refusal)
    commands: list[HostCommand] = []
    notes: list[str] = []
    started = 0  # RPC servers of other copies, which may be on the same hosts
    for number, stages in enumerate(copies(task.plan) or []):
        hosts = by_host(stages)
        assert hosts is not None
        remote = [device for _, run in hosts[:-1] for device in devices_of(run)]
        ports = {device.device: task.inner_port(at, _RPC_PORT + started + at) for at, device in enumerate(remote)}
        started += len(remote)
        for device in remote:
            arguments = [RPC_SERVER, "--host", "0.0.0.0", "--port", ports[device.device]]
            commands.append(
                HostCommand(host=device.host, environment=visible([device]), arguments=arguments, copy=number)
            )
        endpoints = [f"{task.address(device.host)}:{ports[device.device]}" for device in remote]
        commands.append(_server(task, stages, endpoints, hosts[-1], number))
        if remote:
            notes = [
                f"an RPC server has no authentication: keep it in a network of its own; older builds call it "
                f"{OLD_RPC_SERVER}"
            ]
    if task.plan.replicas > 1:
        notes.append(f"{task.plan.replicas} servers: a load balancer shares the requests")
    return Offer(server="llama.cpp", version=VERSION, commands=commands, notes=notes)


def _refusal(task: Task) -> str:
    chains = copies(task.plan)
    if task.unconverted or task.small_cache:
        return task.unconverted or task.small_cache
    if not task.gguf:
        return "llama.cpp loads GGUF files: convert_hf_to_gguf.py makes one"
    if chains is None:
        return "a llama.cpp server is one whole copy of the model, and copies of this plan share stages"
    if task.plan.tensor_parallel > 1:
        return "llama.cpp splits by layers here, and this plan has groups of devices that share each layer"
    if any(by_host(stages) is None for stages in chains):
        return "the stages of a host follow each other in llama.cpp, and those of this plan do not"
    if any(len(vendors_of(run)) > 1 for stages in chains for _, run in (by_host(stages) or [])[-1:]):
        return "llama-server is built for the devices of one vendor, and its host in this plan has several"
    return ""


def split(stages: list[ServeStage]) -> list[int]:
    """Proportions for `--tensor-split`: the layers of each device, and the output layer on the last."""
    layers = [stage.layers for stage in stages]
    return [*layers[:-1], layers[-1] + 1]


def _server(
    task: Task, stages: list[ServeStage], endpoints: list[str], last: tuple[str, list[ServeStage]], number: int
) -> HostCommand:
    work = task.work
    sequences = max(1, -(-work.sequences // max(1, task.plan.replicas)))
    arguments = [
        "llama-server", "--model", task.path,
        "--gpu-layers", str(_ALL_LAYERS),
        "--ctx-size", str(work.context_tokens * sequences),
        "--parallel", str(sequences),
        *task.listening,
        "--port", str(task.port + number),
    ]  # fmt: skip
    if endpoints:
        arguments += ["--rpc", ",".join(endpoints)]
    if len(stages) > 1:
        arguments += ["--split-mode", "layer", "--tensor-split", ",".join(str(part) for part in split(stages))]
    host, run = last
    return HostCommand(
        host=host,
        environment=visible(devices_of(run)),
        arguments=arguments,
        copy=number,
        needs=endpoints,
        port=task.port + number,
    )
