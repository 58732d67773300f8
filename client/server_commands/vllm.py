"""vLLM: tensor and pipeline parallelism, with a number of layers for each stage.

From vLLM's documentation ("Parallelism and Scaling", "Engine Arguments", "Environment Variables"):
`--tensor-parallel-size` is the same for all stages, `VLLM_PP_LAYER_PARTITION` has one number of layers for each stage,
and several hosts without Ray start with `--nnodes`, `--node-rank` and `--master-addr`, equally many devices on each.
"""

from __future__ import annotations

import math
from typing import Final

from ...schemas.models.quantization import DTYPE_BITS
from ...schemas.models.serving import ServeStage
from .command import HostCommand, Offer, Task, by_host, copies, devices_of, vendors_of, visible

VERSION: Final = "0.33"
_MASTER_PORT: Final = 29501


def offer(task: Task) -> Offer:
    """Commands for a plan."""
    made = Offer(server="vllm", version=VERSION)
    refusal = _refusal(task)
    if refusal:
        return Offer(server=made.server, version=VERSION, refusal=refusal)
    commands: list[HostCommand] = []
    for number, stages in enumerate(copies(task.plan) or []):
        commands += _start(task, stages, number)
    notes = [f"{task.plan.replicas} servers: a load balancer shares the requests"] if task.plan.replicas > 1 else []
    return Offer(server=made.server, version=VERSION, commands=commands, notes=notes)


def _refusal(task: Task) -> str:
    chains, model = copies(task.plan), task.work.model
    if model.converted_from and not _converts(task):
        return task.unconverted
    if model.context_tokens and task.work.context_tokens > model.context_tokens:
        return f"vLLM takes no --max-model-len beyond the {model.context_tokens} tokens of the configuration"
    if task.gguf:
        return "vLLM serves Hugging Face folders; its support of GGUF is experimental"
    if chains is None:
        return "a vLLM server is one whole copy of the model, and copies of this plan share stages"
    for stages in chains:
        sizes = {len(stage.devices) for stage in stages}
        if len(sizes) > 1:
            return f"--tensor-parallel-size is one number, and the stages have {_listed(sizes)} devices"
        if len(vendors_of(stages)) > 1:
            return "the processes of a vLLM server are built for the devices of one vendor, and this plan has several"
        hosts = by_host(stages)
        if hosts is None:
            return "the stages of a host follow each other in vLLM, and those of this plan do not"
        counts = {len(run) for _, run in hosts}
        if len(counts) > 1:
            return f"vLLM without Ray has equally many stages on each host, and this plan {_listed(counts)}"
    return ""


def _converts(task: Task) -> bool:
    """True if vLLM converts the weights while it loads them: to another plain type, or from one to fp8."""
    packed = task.work.model.quantization
    return task.work.model.converted_from in DTYPE_BITS and (packed is None or packed.method == "fp8")


def _listed(numbers: set[int]) -> str:
    return " and ".join(str(number) for number in sorted(numbers))


def _utilization(task: Task, stages: list[ServeStage]) -> float:
    """Share of each device's whole memory that the plan uses, rounded down.

    vLLM's `--gpu-memory-utilization` is of all memory, not of the free.
    """
    shares = [one.memory_bytes / one.total_bytes for one in devices_of(stages) if one.total_bytes]
    return math.floor(100 * min([task.work.memory_share, *shares])) / 100


def _start(task: Task, stages: list[ServeStage], number: int) -> list[HostCommand]:
    work, hosts = task.work, by_host(stages)
    assert hosts is not None
    sequences = max(1, -(-work.sequences // max(1, task.plan.replicas)))
    arguments = [
        "vllm", "serve", task.path,
        "--tensor-parallel-size", str(len(stages[0].devices)),
        "--pipeline-parallel-size", str(len(stages)),
        "--max-model-len", str(work.context_tokens),
        "--max-num-seqs", str(sequences),
        "--gpu-memory-utilization", f"{_utilization(task, stages):g}",
    ]  # fmt: skip
    if work.model.converted_from:
        packed = work.model.quantization
        arguments += ["--dtype", work.model.dtype] if packed is None else ["--quantization", packed.method]
    if work.kv_dtype.startswith("float8"):
        arguments += ["--kv-cache-dtype", "fp8"]
    partition = {"VLLM_PP_LAYER_PARTITION": ",".join(str(stage.layers) for stage in stages)} if len(stages) > 1 else {}
    commands: list[HostCommand] = []
    for rank, (host, run) in enumerate(hosts):
        several = [
            "--nnodes", str(len(hosts)), "--node-rank", str(rank),
            "--master-addr", task.address(hosts[0][0]), "--master-port", task.inner_port(0, _MASTER_PORT + number),
            *(["--headless"] if rank else []),
        ] if len(hosts) > 1 else []  # fmt: skip
        port = None if rank else task.port + number
        words = [*arguments, *several, *([] if port is None else [*task.listening, "--port", str(port)])]
        environment = visible(devices_of(run)) | partition
        commands.append(HostCommand(host=host, environment=environment, arguments=words, copy=number, port=port))
    return commands
