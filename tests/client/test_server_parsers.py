"""Commands of inference servers, parsed by the servers' own parsers where they are installed."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from corral.client.server_commands import offer
from corral.client.server_commands.command import HostCommand
from corral.schemas.models.description import Attention, ModelDescription, Quantization
from corral.schemas.models.serving import PlanKind, ServePlan, ServeRoute, ServeStage, ServeWork, StageDevice
from msgspec.structs import replace

pytestmark = pytest.mark.long

WORK = ServeWork(
    model=ModelDescription(
        layers=32,
        hidden_size=64,
        vocabulary=100,
        attention=Attention(heads=8, kv_heads=8, head_dim=8),
        converted_from="bfloat16",
        quantization=Quantization(method="fp8", bits_per_weight=8),
    ),
    sequences=8,
    kv_dtype="float8_e4m3fn",
)
# The parser asks for the platform, which is a GPU in the wheel from PyPI.
PARSE = """
import json, sys
import vllm.platforms
from vllm.platforms.cpu import CpuPlatform
vllm.platforms._current_platform = CpuPlatform()
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.entrypoints.common.cli_args import make_arg_parser, validate_parsed_serve_args
parser = make_arg_parser(FlexibleArgumentParser())
found = []
for words in json.load(sys.stdin):
    parsed = parser.parse_args(words)
    validate_parsed_serve_args(parsed)
    found.append({name: getattr(parsed, name) for name in sys.argv[1:]})
print(json.dumps(found))
"""
NAMES = (
    *("model_tag", "tensor_parallel_size", "pipeline_parallel_size", "nnodes", "node_rank", "master_addr"),
    *("headless", "max_model_len", "max_num_seqs", "gpu_memory_utilization", "quantization", "kv_cache_dtype"),
    *("host", "port"),
)


def pipeline(*hosts: str) -> ServePlan:
    """Two GPUs on each host that work as one."""
    each = 32 // len(hosts)
    stages = [
        ServeStage(
            first_layer=at * each,
            layers=each,
            devices=[StageDevice(host=host, device=f"GPU-{host}{index}", index=index) for index in range(2)],
        )
        for at, host in enumerate(hosts)
    ]
    routes = [ServeRoute(origin=at - 1, target=at if at < len(hosts) else -1) for at in range(len(hosts) + 1)]
    return ServePlan(kind=PlanKind.PIPELINE, stages=stages, routes=routes, tensor_parallel=2)


def commands(server: str, plan: ServePlan, path: str, work: ServeWork) -> list[HostCommand]:
    made = offer(server, plan, work, path, {"a": "a.example"}, port=8100, listen="0.0.0.0")
    assert made.commands, made.refusal
    return made.commands


def test_vllm_parses_its_commands_as_they_are_meant() -> None:
    python = os.environ.get("CORRAL_VLLM_PYTHON")
    if python is None and importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed here (336 MB, and torch): CORRAL_VLLM_PYTHON names a Python that has it")
    made = [
        *commands("vllm", pipeline("a", "b"), "/models/m", WORK),
        *commands("vllm", pipeline("a"), "/models/m", WORK),
    ]
    done = subprocess.run(
        [python or sys.executable, "-c", PARSE, *NAMES],
        input=json.dumps([command.arguments[2:] for command in made]),
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second, alone = json.loads(done.stdout.splitlines()[-1])
    same: dict[str, Any] = {
        "model_tag": "/models/m", "tensor_parallel_size": 2, "max_model_len": 4096, "max_num_seqs": 8,
        "gpu_memory_utilization": 0.9, "quantization": "fp8", "kv_cache_dtype": "fp8",
    }  # fmt: skip
    for parsed in (first, second, alone):
        assert {name: parsed[name] for name in same} == same
    assert [parsed["pipeline_parallel_size"] for parsed in (first, second, alone)] == [2, 2, 1]
    assert [(parsed["nnodes"], parsed["node_rank"], parsed["headless"]) for parsed in (first, second)] == [
        (2, 0, False),
        (2, 1, True),
    ]
    assert (first["master_addr"], second["master_addr"]) == ("a.example", "a.example")
    assert (first["host"], first["port"], alone["port"]) == ("0.0.0.0", 8100, 8100)


def test_llama_server_parses_its_command(tmp_path: Path) -> None:
    folder = os.environ.get("CORRAL_LLAMA_CPP")
    program = shutil.which("llama-server", path=folder)
    if program is None:
        pytest.skip("llama-server is neither in PATH nor in the folder CORRAL_LLAMA_CPP")
    plan = pipeline("a")
    halves = [
        replace(plan.stages[0], first_layer=at * 16, layers=16, devices=[plan.stages[0].devices[at]]) for at in range(2)
    ]
    routes = [ServeRoute(origin=-1, target=0), ServeRoute(origin=0, target=1), ServeRoute(origin=1, target=-1)]
    two = replace(plan, stages=halves, routes=routes, tensor_parallel=1)
    plain = replace(WORK, model=replace(WORK.model, converted_from="", quantization=None), kv_dtype="")
    [command] = commands("llama.cpp", two, str(tmp_path / "absent.gguf"), plain)

    def executed(words: list[str]) -> str:
        done = subprocess.run([program, *words], capture_output=True, text=True, timeout=60, check=False)
        return done.stdout + done.stderr

    # It gets as far as the file, which is not there.
    assert "failed to load model" in executed(command.arguments[1:])
    assert "invalid argument" in executed([*command.arguments[1:], "--no-such-option"])
