"""Models from the command line to the planner and back: what fits, a lease on the GPUs of a plan, one that is taken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from corral.client import InvalidRequest, Rejected, SyncClient
from corral.schemas.models.description import Attention, ModelDescription
from corral.schemas.models.serving import FitVerdict, ServeWork
from corral.schemas.requests import Distribution, Method
from support.local_cluster import LocalCluster, invoke

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
}


def test_a_plan_is_made_leased_and_refused_while_its_gpus_are_taken(cluster: LocalCluster, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    done = cluster.corral("fit", str(tmp_path), "--sequences", "4", "--gpu", "*H100*", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["fit"]["verdict"] == "one_device"
    assert report["fit"]["weights_bytes"] == 16060522496
    plans = report["fit"]["plans"]
    number, plan = next((at, plan) for at, plan in enumerate(plans, 1) if plan["kind"] != "flow")
    file = tmp_path / "plans.json"
    file.write_text(done.stdout)
    arguments = ["serve", "--plan", str(file), "--choose", str(number), "--server", "vllm"]
    # Nothing is leased for a server that can't express the plan, nor with a wrong option.
    for wrong, said in (
        (["--server", "llama.cpp"], "llama.cpp loads GGUF files"),
        (["--ttl", "soon"], "--ttl: 'soon'"),
    ):
        refused = cluster.corral(*arguments[:5], *wrong)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert said in refused.stderr
    served = cluster.json(*arguments)
    try:
        named = [device["device"] for stage in plan["stages"] for device in stage["devices"]]
        assert [grant["device"] for grant in served["lease"]["grants"]] == named
        [offer] = served["offers"]
        assert ",".join(named) in offer["commands"][0]["environment"]["CUDA_VISIBLE_DEVICES"]
        again = cluster.corral(*arguments)
        assert again.returncode == 4
        assert "named devices can't be had" in again.stdout
        assert "leased" in again.stdout
        # What is free now is planned without them.
        with SyncClient(cluster.url, owner="tester") as client:
            found = client.fit(tmp_path, serve={"seconds": 0.05})
        assert not {device.device for plan in found.plans for device in plan.devices} & set(named)
    finally:
        cluster.corral("release", served["lease"]["lease_id"])


def test_a_model_too_large_says_by_how_much(cluster: LocalCluster) -> None:
    done = cluster.corral("fit", "--params", "9000B", "--layers", "120", "--hidden", "24576", "--heads", "128")
    assert done.returncode == 4
    assert "Does not fit" in done.stdout
    assert "nearest: " in done.stdout
    assert "assumed: 128 heads of keys and values" in done.stdout


def test_devices_that_may_not_be_used_are_counted_by_their_reasons(cluster: LocalCluster) -> None:
    done = cluster.corral("fit", "--params", "7B", "--layers", "32", "--gpu", "*no-such*")
    assert done.returncode == 4
    assert "wrong model" in done.stdout
    done = cluster.corral("fit", "--params", "7B", "--layers", "32", "--with-more", "4xno-such")
    assert done.returncode == 2
    assert "--with-more: no model" in done.stderr


def test_wrong_input_is_refused_before_it_is_sent(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "architectures": ["NovelForCausalLM"]}))
    for arguments, said in (
        ([str(tmp_path)], "'NovelForCausalLM' is not known"),
        ([], "give a model's folder"),
        (["--params", "70B"], "--params goes with --layers"),
        (["--params", "many", "--layers", "80"], "no number of parameters"),
        ([str(tmp_path), "--layers", "3"], "--layers goes with --params"),
        (["--params", "7B", "--layers", "32", "--server", "tgi"], "there are vllm"),
        (["--params", "7B", "--layers", "32", "--context", "99999999"], "--context: Expected"),
        (["--params", "7B", "--layers", "32", "--kv-dtype", "int3"], "a KV cache of 'int3' is not known"),
    ):
        done = invoke("fit", *arguments, url="nats://127.0.0.1:9")
        assert (done.returncode, done.stdout) == (2, ""), arguments
        assert said in done.stderr


def test_a_request_gets_the_layers_of_each_device(cluster: LocalCluster) -> None:
    attention = Attention(heads=32, kv_heads=8, head_dim=128)
    model = ModelDescription(
        layers=32, hidden_size=4096, vocabulary=128256, intermediate_size=14336, attention=attention
    )
    work = Distribution(method=Method.SERVE, serve=ServeWork(model=model, seconds=0.05))
    with SyncClient(cluster.url, owner="tester") as client:
        lease = client.request(gpus=2, distribution=work).lease
        try:
            assert lease.distribution is not None
            assert lease.distribution.plan is not None
            assert {layer for grant in lease.grants for layer in grant.items} == set(range(32))
        finally:
            client.release(lease.lease_id)
        explained = client.explain(distribution=work)
        assert explained.granted
        assert explained.fit is not None
        assert explained.fit.verdict is FitVerdict.ONE_DEVICE
        for wrong, field in (
            ({"devices": ["GPU-x"], "gpus": 2}, "$.gpus"),
            ({"devices": ["GPU-x"], "wait": "1m"}, "$.wait_seconds"),
            ({"distribution": Distribution(method=Method.SERVE)}, "$.distribution.serve"),
        ):
            with pytest.raises(InvalidRequest) as refused:
                client.request(**wrong)  # pyright: ignore[reportArgumentType]
            assert refused.value.field == field
        with pytest.raises(Rejected, match="no such device"):
            client.request(devices=["GPU-x"])
