"""Servers started by `corral serve --start`: real planner, runners and processes, with stand-ins for the servers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from corral.cli.local.server import EmbeddedServer
from corral.client import connect
from corral.client.model_files.plain_numbers import described
from nats.aio.client import Client as Bus
from support.local_cluster import invoke
from support.planner_of_runs import RunnerProcess
from support.planner_rig import GIB, FakeHosts, PlannerProcess, ask, until_ready

pytestmark = pytest.mark.long

# A server that finds the others as the real one does: vLLM at the first one's address, llama.cpp by `--rpc`.
STAND_IN = """#!/usr/bin/env python3
import http.server, json, os, socket, sys, time
name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
def option(text): return words[words.index(text) + 1] if text in words else None
def connect(host, port):
    end = time.monotonic() + 30
    while True:
        try: return socket.create_connection((host, int(port)))
        except OSError:
            if time.monotonic() > end: raise
            time.sleep(0.05)
peers = []
if name == "ggml-rpc-server":
    listening = socket.create_server((option("--host"), int(option("--port"))))
elif name == "vllm" and option("--node-rank") == "0":
    listening = socket.create_server(("127.0.0.1", int(option("--master-port"))))
    peers.append(listening.accept()[0])
elif name == "vllm":
    peers.append(connect(option("--master-addr"), option("--master-port")))
else:  # as llama-server, which gives up at once
    peers += [socket.create_connection(tuple(end.split(":"))) for end in option("--rpc").split(",")]
serving = option("--port") if name != "ggml-rpc-server" else None
if serving: server = http.server.HTTPServer(("127.0.0.1", int(serving)), http.server.SimpleHTTPRequestHandler)
seen = {"name": name, "words": words, "pid": os.getpid(), "visible": os.environ["CUDA_VISIBLE_DEVICES"],
        "layers": os.environ.get("VLLM_PP_LAYER_PARTITION")}
folder = os.path.dirname(os.path.dirname(os.path.abspath(sys.argv[0])))
file = f"{folder}/seen/{os.getpid()}"
open(file + ".new", "w").write(json.dumps(seen)); os.rename(file + ".new", file)
print("Avg prompt throughput: 0.0 tokens/s, Avg generation throughput: 50.0 tokens/s, Running: 4 reqs,", flush=True)
if serving: server.serve_forever()
while True: time.sleep(60)
"""


FIT = (
    *("fit", "--params", "14B", "--layers", "40", "--hidden", "5120", "--heads", "40", "--kv-heads", "8"),
    *("--no-tensor-parallel", "--json"),
)
"""A model that needs all four GPUs, a stage on each."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1]


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


class World:
    """Two hosts of two GPUs with runners, and programs that stand in for servers."""

    def __init__(self, nc: Bus, url: str, folder: Path) -> None:
        self.nc = nc
        self.url = url
        self.folder = folder
        self.port = free_port()
        (folder / "bin").mkdir()
        (folder / "seen").mkdir()
        for name in ("vllm", "llama-server", "ggml-rpc-server"):
            (folder / "bin" / name).write_text(STAND_IN)
            (folder / "bin" / name).chmod(0o755)

    async def corral(self, *arguments: str) -> Any:
        return await asyncio.to_thread(lambda: invoke(*arguments, url=self.url, CORRAL_OWNER="ann"))

    async def start(self, *options: str) -> Any:
        path = f"PATH={self.folder / 'bin'}:{os.environ['PATH']}"
        plans = str(self.folder / "plans.json")
        return await self.corral(
            *("serve", "--plan", plans, "--start", "--port", str(self.port), "--env", path, "--json", *options)
        )

    async def processes(self, count: int) -> list[dict[str, Any]]:
        """What the processes see, once so many are up."""
        async with asyncio.timeout(60):
            while True:
                files = [file for file in (self.folder / "seen").iterdir() if not file.suffix]
                if len(files) == count:
                    return [json.loads(file.read_text()) for file in files]
                await asyncio.sleep(0.05)

    async def until(self, verb: str, body: dict[str, Any], met: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        """The planner's answer, once it meets a condition."""
        async with asyncio.timeout(60):
            while True:
                found = await ask(self.nc, verb, body)
                if met(found):
                    return found
                await asyncio.sleep(0.05)

    async def until_state(self, job_id: str, state: str) -> dict[str, Any]:
        wanted = {"job_ids": [job_id]}
        found = await self.until("jobs", wanted, lambda found: found["jobs"][0]["job"]["state"] == state)
        return found["jobs"][0]["job"]


@pytest.fixture
def runners(server: EmbeddedServer, tmp_path: Path) -> Iterator[list[RunnerProcess]]:
    made = [RunnerProcess(server.url, tmp_path / name, host=name) for name in ("node0", "node1")]
    yield made
    for runner in made:
        runner.stop()
        runner.end_runs()


@pytest.fixture
async def world(server: EmbeddedServer, nc: Bus, runners: list[RunnerProcess], tmp_path: Path) -> AsyncIterator[World]:
    hosts = FakeHosts(nc, hosts=2, devices=2, memory=10 * GIB, address="127.0.0.1")
    await hosts.start()
    planner = PlannerProcess(server.url, tmp_path / "planner.log")
    planner.start()
    await until_ready(nc, 4)
    made = World(nc, server.url, tmp_path)
    await made.until("fleet", {}, lambda found: found["runner_hosts"] == 2)
    done = await made.corral(*FIT)
    assert done.returncode == 0, done.stderr
    (tmp_path / "plans.json").write_text(done.stdout)
    yield made
    planner.stop()
    await hosts.stop()


async def test_a_pipeline_of_vllm_over_two_hosts_starts_together_and_ends_together(world: World) -> None:
    done = await world.start("--load", "/models/some", "--server", "vllm")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    [job] = answer["jobs"]
    assert (job["gpus"], job["hosts"]) == (4, 2)
    found = await world.processes(2)
    planned = [device["device"] for stage in answer["plan"]["stages"] for device in stage["devices"]]
    layers = ",".join(str(stage["layers"]) for stage in answer["plan"]["stages"])
    by_rank = {one["words"][one["words"].index("--node-rank") + 1]: one for one in found}
    assert [by_rank[rank]["visible"].split(",") for rank in "01"] == [planned[:2], planned[2:]]
    assert {one["layers"] for one in found} == {layers}
    _, writer = await asyncio.open_connection("127.0.0.1", world.port)
    writer.close()
    # Its GPUs are taken: another one is refused before it is submitted.
    again = await world.start("--load", "/models/some", "--server", "vllm")
    assert again.returncode == 4
    assert "leased" in again.stdout
    # What it prints is the measurement for the next one.
    rates: list[Any] = []
    async with asyncio.timeout(60):
        while not rates:
            rates = json.loads((await world.corral(*FIT)).stdout)["work"]["rates"]
    assert [rate["source"].partition(" of ")[0] for rate in rates] == ["vllm in job 1"]
    # A server that ends without an error leaves the other alone, which would wait for ever.
    os.kill(by_rank["1"]["pid"], signal.SIGTERM)
    ended = await world.until_state(job["job_id"], "failed")
    # Here both hosts are one machine, so that the supervisor of either finds what is left of their lease.
    assert ended["message"] in ("exit code 143 on node1", "signal 15 on node0")
    assert all(is_gone(one["pid"]) for one in found)
    assert not (await ask(world.nc, "leases", {"states": ["active"]}))["leases"]
    # Programs have the rates too, and only its owner has.
    model = described(14 * 10**9, 40, hidden=5120, heads=40, kv_heads=8)
    async with connect(world.url) as client:
        for owner, measured, known in (("ann", True, True), ("ann", False, False), ("ben", True, False)):
            fit = await client.fit(model, measured=measured, owner=owner)
            rests_on = fit.plans[0].rests_on
            assert any("measured (vllm in job 1 of" in source for source in rests_on) is known, rests_on


async def test_llama_cpp_starts_once_the_rpc_servers_of_the_other_host_listen(world: World) -> None:
    done = await world.start("--load", "/models/some.gguf")
    assert done.returncode == 0, done.stderr
    [job] = json.loads(done.stdout)["jobs"]
    found = await world.processes(3)
    heads = [one for one in found if one["name"] == "llama-server"]
    remote = [one for one in found if one["name"] == "ggml-rpc-server"]
    ports = {one["words"][one["words"].index("--port") + 1] for one in remote}
    ends = heads[0]["words"][heads[0]["words"].index("--rpc") + 1].split(",")
    assert {end.partition(":")[2] for end in ends} == ports
    assert sorted(one["visible"].count(",") for one in (*heads, *remote)) == [0, 0, 1]
    cancelled = await world.corral("cancel", job["job_id"])
    assert cancelled.returncode == 0
    await world.until_state(job["job_id"], "cancelled")
    assert all(is_gone(one["pid"]) for one in found)


def tiny_gguf(file: Path) -> None:
    """A model of random weights whose tokens are bytes."""
    numpy, gguf = pytest.importorskip("numpy"), pytest.importorskip("gguf")
    hidden, layers, wide, tokens = 64, 8, 128, ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    writer = gguf.GGUFWriter(file, "llama")
    for add, value in (
        (writer.add_block_count, layers), (writer.add_context_length, 512), (writer.add_embedding_length, hidden),
        (writer.add_feed_forward_length, wide), (writer.add_head_count, 4), (writer.add_head_count_kv, 4),
        (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_rope_dimension_count, hidden // 4),
        (writer.add_vocab_size, len(tokens)), (writer.add_tokenizer_model, "llama"), (writer.add_token_list, tokens),
        (writer.add_token_scores, [0.0] * len(tokens)), (writer.add_token_types, [2, 3, 3, *[6] * 256]),
        (writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2), (writer.add_unk_token_id, 0),
    ):  # fmt: skip
        add(value)
    random = numpy.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("token_embd", "output"), (len(tokens), hidden))
    shapes["output_norm"] = (hidden,)
    for at in range(layers):
        shapes |= {f"blk.{at}.{name}": (hidden, hidden) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
        shapes |= {f"blk.{at}.{name}": (hidden,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{at}.{name}": (wide, hidden) for name in ("ffn_gate", "ffn_up")}
        shapes[f"blk.{at}.ffn_down"] = (hidden, wide)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", (random.standard_normal(shape) * 0.05).astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


async def test_llama_cpp_itself_serves_a_model_over_two_hosts(world: World, tmp_path: Path) -> None:
    """With its real programs, which compute on the CPU."""
    programs = os.environ.get("CORRAL_LLAMA_CPP")
    if programs is None:
        pytest.skip("CORRAL_LLAMA_CPP names no folder with llama-server and ggml-rpc-server (built with -DGGML_RPC=ON)")
    for name in ("llama-server", "ggml-rpc-server"):
        (tmp_path / "bin" / name).unlink()
        (tmp_path / "bin" / name).symlink_to(Path(programs) / name)
    model = tmp_path / "tiny.gguf"
    tiny_gguf(model)
    fitted = await world.corral("fit", str(model), "--context", "256", "--sequences", "2", "--json")
    report = json.loads(fitted.stdout)
    first, *_ = report["fit"]["plans"]
    [device] = first["stages"][0]["devices"]
    halves = [
        {**first["stages"][0], "first_layer": at * 4, "layers": 4,
         "devices": [{**device, "host": f"node{at}", "device": f"GPU-node{at}-0"}]}
        for at in range(2)
    ]  # fmt: skip
    ways = [{"origin": -1, "target": 0}, {"origin": 0, "target": 1}, {"origin": 1, "target": -1}]
    report["fit"]["plans"] = [{**first, "kind": "pipeline", "stages": halves, "routes": ways}]
    (tmp_path / "plans.json").write_text(json.dumps(report))
    done = await world.start("--retries", "0")
    assert done.returncode == 0, done.stderr
    [job] = json.loads(done.stdout)["jobs"]
    body = json.dumps({"prompt": "abc", "n_predict": 32, "ignore_eos": True}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{world.port}/completion", body)

    def ask_it() -> Any:
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return json.loads(answer.read())
        except OSError:  # it still loads
            return None

    answer = None
    async with asyncio.timeout(120):
        while answer is None:
            [listed] = (await ask(world.nc, "jobs", {"job_ids": [job["job_id"]]}))["jobs"]
            assert listed["job"]["state"] != "failed"
            answer = await asyncio.to_thread(ask_it)
    assert answer["tokens_predicted"] == 32
    rates: list[Any] = []
    async with asyncio.timeout(60):
        while not rates:
            again = await world.corral("fit", str(model), "--context", "256", "--json")
            rates = json.loads(again.stdout)["work"]["rates"]
    assert rates[0]["source"].startswith("llama.cpp in job 1 of")
