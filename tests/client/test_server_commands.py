"""Commands of inference servers: each says what the plan says, as the server itself divides layers, or is refused."""

from __future__ import annotations

import json
import socket
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from corral.client import InvalidRequest
from corral.client.server_commands import SERVERS, offer
from corral.client.server_commands.accelerate import device_map
from corral.client.server_commands.command import Offer, Task
from corral.client.server_commands.exo import proportional
from corral.client.server_commands.jobs import ServedCopy, ServeJob, serve_jobs, served_copy
from corral.client.server_commands.llama_cpp import split
from corral.schemas.models.description import Attention, ModelDescription, Quantization
from corral.schemas.models.serving import PlanKind, ServePlan, ServeRoute, ServeStage, ServeWork, StageDevice
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

WORK = ServeWork(
    model=ModelDescription(
        architecture="LlamaForCausalLM",
        layers=32,
        hidden_size=64,
        vocabulary=100,
        attention=Attention(heads=8, kv_heads=8, head_dim=8),
    ),
    sequences=8,
)


def stage(first: int, layers: int, *devices: str, memory: int = 16) -> ServeStage:
    """A stage on devices such as `a0`: a host and an index."""
    held = [StageDevice(host=one[0], device=f"GPU-{one}", index=int(one[1]), memory_bytes=memory) for one in devices]
    return ServeStage(first_layer=first, layers=layers, devices=held)


def chain(*stages: ServeStage) -> ServePlan:
    last = len(stages)
    routes = [ServeRoute(origin=at - 1, target=at if at < last else -1) for at in range(last + 1)]
    most = max(len(one.devices) for one in stages)
    return ServePlan(kind=PlanKind.PIPELINE, stages=list(stages), routes=routes, tensor_parallel=most)


def copies(*stages: ServeStage) -> ServePlan:
    ways = [ServeRoute(origin=-1, target=at, weight=1 / len(stages)) for at in range(len(stages))]
    ways += [ServeRoute(origin=at, target=-1) for at in range(len(stages))]
    return ServePlan(kind=PlanKind.FLOW, stages=list(stages), routes=ways, replicas=len(stages))


def made(server: str, plan: ServePlan, path: str = "/models/llama", work: ServeWork = WORK) -> Offer:
    return offer(server, plan, work, path, {"a": "a.example", "b": "b.example"})


def other(**fields: Any) -> ServeWork:
    """The same work for another model."""
    return replace(WORK, model=replace(WORK.model, **fields))


def test_vllm_has_one_layer_count_for_each_stage() -> None:
    one = made("vllm", chain(stage(0, 20, "a0", "a1"), stage(20, 12, "a2", "a3")))
    [command] = one.commands
    assert command.environment == {
        "CUDA_VISIBLE_DEVICES": "GPU-a0,GPU-a1,GPU-a2,GPU-a3",
        "VLLM_PP_LAYER_PARTITION": "20,12",
    }
    assert "--tensor-parallel-size 2 --pipeline-parallel-size 2" in command.line
    two = made("vllm", chain(stage(0, 20, "a0"), stage(20, 12, "b0")))
    assert [command.host for command in two.commands] == ["a", "b"]
    assert "--nnodes 2 --node-rank 1 --master-addr a.example" in two.commands[1].line
    assert "--headless" in two.commands[1].arguments
    replicas = made("vllm", copies(stage(0, 32, "a0"), stage(0, 32, "b0")))
    assert [command.arguments[-1] for command in replicas.commands] == ["8000", "8001"]
    assert "--max-num-seqs 4" in replicas.commands[0].line


def test_what_a_server_cannot_express_is_refused_with_the_reason() -> None:
    unequal = chain(stage(0, 20, "a0", "a1"), stage(20, 12, "a2"))
    assert "--tensor-parallel-size is one number" in made("vllm", unequal).refusal
    assert (
        "equally many stages" in made("vllm", chain(stage(0, 8, "a0"), stage(8, 8, "a1"), stage(16, 16, "b0"))).refusal
    )
    shared = ServePlan(
        kind=PlanKind.FLOW,
        stages=[stage(0, 16, "a0"), stage(16, 16, "a1"), stage(16, 16, "b0")],
        routes=[
            ServeRoute(origin=-1, target=0), ServeRoute(origin=0, target=1, weight=0.5),
            ServeRoute(origin=0, target=2, weight=0.5), ServeRoute(origin=1, target=-1),
            ServeRoute(origin=2, target=-1),
        ],
        replicas=0,
    )  # fmt: skip
    for server in SERVERS:
        path = "/models/llama.gguf" if server == "llama.cpp" else "/models/llama"
        refused = made(server, shared, path)
        assert refused.refusal
        assert refused.commands == []
    assert "GGUF" in made("vllm", unequal, "/m.gguf").refusal
    assert "loads GGUF" in made("llama.cpp", unequal).refusal
    assert "groups" in made("llama.cpp", unequal, "/m.gguf").refusal
    assert "one process" in made("accelerate", chain(stage(0, 20, "a0"), stage(20, 12, "b0"))).refusal
    assert "exo splits by memory, 16+16 layers" in made("exo", chain(stage(0, 20, "a0"), stage(20, 12, "b0"))).refusal
    assert made("exo", chain(stage(0, 16, "a0"), stage(16, 16, "b0"))).commands


def test_weights_in_another_format_than_the_files_are_converted_or_refused() -> None:
    plan = chain(stage(0, 32, "a0"))
    int4 = other(converted_from="bfloat16", quantization=Quantization(method="int4", bits_per_weight=4.2))
    for server in SERVERS:
        path = "/models/llama.gguf" if server == "llama.cpp" else "/models/llama"
        assert "the files have bfloat16, and the plan int4" in made(server, plan, path, int4).refusal
    small = replace(WORK, kv_dtype="float8_e4m3fn")
    assert "--kv-cache-dtype fp8" in made("vllm", plan, work=small).commands[0].line
    for server in ("llama.cpp", "exo", "accelerate"):
        assert "only vLLM's command sets" in made(server, plan, "/m.gguf", small).refusal
    fp8 = other(converted_from="bfloat16", quantization=Quantization(method="fp8", bits_per_weight=8))
    assert "--quantization fp8" in made("vllm", plan, work=fp8).commands[0].line
    assert (
        "--dtype float16" in made("vllm", plan, work=other(converted_from="bfloat16", dtype="float16")).commands[0].line
    )


def test_devices_of_amd_are_shown_as_its_runtime_wants_and_vendors_are_not_mixed() -> None:
    def amd(one: ServeStage) -> ServeStage:
        return replace(
            one, devices=[replace(each, vendor="amd", visible_id=f"GPU-{each.index}x") for each in one.devices]
        )

    [command] = made("vllm", chain(amd(stage(0, 32, "a2", "a3")))).commands
    assert command.environment == {
        "ROCR_VISIBLE_DEVICES": "GPU-2x,GPU-3x",
        "HIP_VISIBLE_DEVICES": "0,1",
        "CUDA_VISIBLE_DEVICES": "0,1",
    }
    mixed = chain(amd(stage(0, 16, "a0")), stage(16, 16, "b0"))
    assert "devices of one vendor" in made("vllm", mixed).refusal
    # llama.cpp's RPC servers may be built for others than the server.
    assert made("llama.cpp", mixed, "/m.gguf").commands
    on_one = chain(amd(stage(0, 16, "a0")), stage(16, 16, "a1"))
    for server in ("llama.cpp", "accelerate"):
        assert "of one vendor" in made(server, on_one, "/m.gguf" if server == "llama.cpp" else "/m").refusal


def test_vllm_gets_its_share_of_all_memory_and_no_context_beyond_the_model() -> None:
    # Of 20 bytes 16 may be used by the plan: others hold the rest.
    used = [StageDevice(host="a", device="GPU-a0", memory_bytes=16, total_bytes=20)]
    assert (
        "--gpu-memory-utilization 0.8"
        in made("vllm", chain(ServeStage(first_layer=0, layers=32, devices=used))).commands[0].line
    )
    assert "beyond the 2048 tokens" in made("vllm", chain(stage(0, 32, "a0")), work=other(context_tokens=2048)).refusal


@settings(max_examples=40)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=8))
def test_llama_cpp_gives_each_device_the_layers_of_its_stage(layers: list[int]) -> None:
    def single(value: float) -> float:
        return struct.unpack("f", struct.pack("f", value))[0]

    at, stages = 0, []
    for count in layers:
        stages.append(stage(at, count, "a0"))
        at += count
    # `load_tensors` in llama.cpp's src/llama-model.cpp: cumulative parts in single precision, then `upper_bound`.
    parts = split(stages)
    total = single(sum(parts))
    ends = [single(sum(parts[: end + 1]) / total) for end in range(len(parts))]
    units = at + 1
    held = [0] * len(parts)
    for layer in range(at):
        where = single(layer / units)
        held[next(place for place, end in enumerate(ends) if end > where)] += 1
    assert held == layers


def test_llama_cpp_has_remote_devices_before_its_own() -> None:
    plan = chain(stage(0, 10, "a0"), stage(10, 10, "a1"), stage(20, 12, "b0"))
    remote = made("llama.cpp", plan, "/models/llama.gguf")
    assert [command.arguments[0] for command in remote.commands] == [
        "ggml-rpc-server",
        "ggml-rpc-server",
        "llama-server",
    ]
    assert [command.host for command in remote.commands] == ["a", "a", "b"]
    line = remote.commands[-1].line
    assert "--rpc a.example:50052,a.example:50053" in line
    assert "--tensor-split 10,10,13" in line
    assert "--ctx-size 32768 --parallel 8" in line


def test_exo_divides_by_largest_remainders() -> None:
    assert proportional(32, [16, 16]) == [16, 16]
    assert proportional(34, [24, 24, 16, 16]) == [10, 10, 7, 7]
    assert proportional(3, [1000, 1, 1]) == [1, 1, 1]


def test_accelerate_names_each_module() -> None:
    plan = chain(stage(0, 20, "a0"), stage(20, 12, "a1"))
    [command] = made("accelerate", plan).commands
    placed = json.loads(command.arguments[-1])
    assert placed == device_map(Task(plan, WORK, "/models/llama", {}))
    assert placed["model.layers.19"] == 0
    assert placed["model.layers.20"] == placed["lm_head"] == 1
    assert len([name for name in placed if name.startswith("model.layers.")]) == 32


def test_accelerate_itself_accepts_the_device_map() -> None:
    pytest.importorskip("torch", reason="accelerate and torch are not installed here (hundreds of MB)")
    accelerate = pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        num_hidden_layers=32, hidden_size=64, intermediate_size=64, num_attention_heads=8, vocab_size=100
    )
    with accelerate.init_empty_weights():
        model = transformers.LlamaForCausalLM(config)
    plan = chain(stage(0, 20, "a0"), stage(20, 12, "a1"))
    accelerate.utils.check_device_map(model, device_map(Task(plan, WORK, "/models/llama", {})))


def listening(program: str) -> str:
    """A program that prints its arguments and what it sees, and ends with 0, or accepts connections for ever."""
    ends = "exec sleep 30" if program == "ggml-rpc-server" else "exit 0"
    return f'#!/bin/sh\necho "{program} $* | $CUDA_VISIBLE_DEVICES $VLLM_PP_LAYER_PARTITION"\n{ends}\n'


def executed(job: ServeJob, rank: int, folder: Path, port: int = 15000) -> subprocess.CompletedProcess[str]:
    """Execute the script of a job, as the runner of one of its hosts does."""
    for program in ("vllm", "llama-server", "ggml-rpc-server"):
        (folder / program).write_text(listening(program))
        (folder / program).chmod(0o755)
    (folder / "script").write_text(job.script)
    variables = {"PATH": f"{folder}:/usr/bin:/bin", "NODE_RANK": str(rank), "MASTER_PORT": str(port)}
    variables["CORRAL_ADDRESSES"] = "127.0.0.1,b.example"
    return subprocess.run(
        ["bash", str(folder / "script")], env=variables, capture_output=True, text=True, timeout=30, check=False
    )


def test_the_script_of_a_job_starts_the_commands_of_its_host(tmp_path: Path) -> None:
    plan = chain(stage(0, 20, "a0"), stage(20, 12, "b0"))
    [job] = serve_jobs("vllm", plan, WORK, "/models/a model")
    assert (job.devices, job.hosts, job.serving_host, job.port) == (["GPU-a0", "GPU-b0"], ["a", "b"], "a", 8000)
    done = executed(job, 1, tmp_path)
    assert "vllm serve /models/a model --tensor" in done.stdout
    assert "--node-rank 1 --master-addr 127.0.0.1 --master-port 15000 --headless | GPU-b0 20,12" in done.stdout
    # The others would wait for ever for one that has ended, even if it ended well.
    assert (done.returncode, "ended with exit code 0" in done.stderr) == (1, True)
    assert served_copy(job.script) == ServedCopy(server="vllm", work=WORK, stages=plan.stages)
    with socket.create_server(("127.0.0.1", 0)) as rpc:
        remote = chain(stage(0, 10, "a0"), stage(10, 22, "b0"))
        [job] = serve_jobs("llama.cpp", remote, WORK, "/m.gguf", port=9000, listen="0.0.0.0")
        done = executed(job, 1, tmp_path, rpc.getsockname()[1])
        assert f"--rpc 127.0.0.1:{rpc.getsockname()[1]} " in done.stdout
        assert "--host 0.0.0.0 --port 9000" in done.stdout


def test_each_copy_has_a_job_and_what_serves_nothing_has_none() -> None:
    jobs = serve_jobs("vllm", copies(stage(0, 32, "a0"), stage(0, 32, "b0")), WORK, "/models/llama")
    assert [(job.devices, job.hosts) for job in jobs] == [(["GPU-a0"], ["a"]), (["GPU-b0"], ["b"])]
    assert [job.port for job in jobs] == [8000, 8001]
    assert len({job.name for job in jobs}) == 2
    for server, said in (("accelerate", "serves no requests"), ("llama.cpp", "GGUF")):
        with pytest.raises(InvalidRequest, match=said):
            serve_jobs(server, chain(stage(0, 32, "a0")), WORK, "/models/llama")
