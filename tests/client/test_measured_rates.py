"""Measured rates: what servers print, and tables of AIConfigurator."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from corral.client.measured.served import Throughput, bandwidth, best_rates, rate_of, same_model, throughputs
from corral.client.measured.tables import installed, table_rates
from corral.client.server_commands.jobs import ServedCopy
from corral.schemas.models.description import Attention, ModelDescription, Quantization
from corral.schemas.models.serving import DeviceRate, ServeStage, ServeWork, StageDevice
from corral.schemas.models.sizes import sizes
from msgspec.structs import replace

MODEL = ModelDescription(
    layers=32,
    hidden_size=4096,
    vocabulary=128256,
    intermediate_size=14336,
    attention=Attention(heads=32, kv_heads=8, head_dim=128),
)
# As vLLM 0.33 and llama.cpp 0.5 print it.
VLLM = """
INFO 11-30 19:00:01 [loggers.py:271] Engine 000: Avg prompt throughput: 812.0 tokens/s, Avg generation throughput: \
90.1 tokens/s, Running: 4 reqs, Waiting: 0 reqs, GPU KV cache usage: 0.4%, Prefix cache hit rate: 0.0%
INFO 11-30 19:00:11 [loggers.py:271] Engine 000: Avg prompt throughput: 0.0 tokens/s, Avg generation throughput: \
400.0 tokens/s, Running: 4 reqs, Waiting: 0 reqs, GPU KV cache usage: 0.4%, Prefix cache hit rate: 0.0%
INFO 11-30 19:00:21 [loggers.py:271] Engine 000: Avg prompt throughput: 0.0 tokens/s, Avg generation throughput: \
12.5 tokens/s, Running: 0 reqs, Waiting: 0 reqs, GPU KV cache usage: 0.0%, Prefix cache hit rate: 0.0%
"""
LLAMA_CPP = """
slot print_timing: id  0 | task 0 | prompt eval time =      50.10 ms /   128 tokens (    0.39 ms per token,  2554.9 \
tokens per second)
slot print_timing: id  0 | task 0 |        eval time =    1000.00 ms /   100 tokens (   10.00 ms per token,   100.00 \
tokens per second)
slot print_timing: id  0 | task 9 |        eval time =      10.00 ms /     4 tokens (    2.50 ms per token,   400.00 \
tokens per second)
"""


def copy(*counts: int, devices: int = 1, product: str = "NVIDIA L4") -> ServedCopy:
    """A model served on stages with so many layers."""
    stages, first = [], 0
    for count in counts:
        held = [StageDevice(host="a", device=f"GPU-{first}-{at}", index=at, model=product) for at in range(devices)]
        stages.append(ServeStage(first_layer=first, layers=count, devices=held))
        first += count
    return ServedCopy(server="vllm", work=ServeWork(model=MODEL), stages=stages)


def test_what_servers_print_is_read_where_they_only_generate() -> None:
    assert throughputs(VLLM) == [Throughput(400.0, 4)]
    assert throughputs(LLAMA_CPP) == [Throughput(100.0, 1)]
    assert throughputs("Avg generation throughput: many tokens/s, eval time = \x00") == []


def test_the_bandwidth_is_that_at_which_the_weights_were_read() -> None:
    counted = sizes(MODEL)
    read = sum(counted.layers) + counted.last
    assert bandwidth(copy(32), [Throughput(400.0, 4)]) == pytest.approx(100 * read)
    assert bandwidth(copy(32, devices=4), [Throughput(400.0, 4)]) == pytest.approx(25 * read)
    # A token has passed both stages before the next one of its request.
    assert bandwidth(copy(20, 12), [Throughput(100.0, 1), Throughput(10.0, 1)]) == pytest.approx(100 * read)
    assert bandwidth(copy(32), []) is None


def test_a_rate_names_its_job_and_counts_for_one_product_alone() -> None:
    when = datetime(2026, 3, 2, tzinfo=UTC)
    rate = rate_of(copy(32, product="GPU [a]"), VLLM, "12", when)
    assert rate is not None
    assert (rate.device, rate.source) == ("GPU [[]a]", "vllm in job 12 of 2026-03-02, at least")
    mixed = copy(16, 16)
    other = replace(mixed.stages[1], devices=[replace(mixed.stages[1].devices[0], model="Tesla T4")])
    assert rate_of(replace(mixed, stages=[mixed.stages[0], other]), VLLM, "12", when) is None
    assert rate_of(copy(32), "no figures", "12", when) is None
    slow = DeviceRate(device="GPU [[]a]", memory_bytes_per_second=1.0)
    assert best_rates([slow, rate, slow]) == [rate]


def test_the_same_model_has_the_same_layers_in_the_same_format() -> None:
    assert same_model(MODEL, replace(MODEL, name="a fine-tuned one", context_tokens=4096))
    assert not same_model(MODEL, replace(MODEL, layers=31))
    assert not same_model(MODEL, replace(MODEL, quantization=Quantization(method="fp8", bits_per_weight=8)))


def test_tables_give_rates_of_the_products_that_they_have(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [
        {"device": "NVIDIA X", "gemm_dtype": "bfloat16", "m": m, "n": n, "k": k, "latency": milliseconds}
        for n, k in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (64, 64))
        for m, milliseconds in ((1, n * k / 1e9), (8, 2 * n * k / 1e9), (2048, 2 * 2048 * n * k / 4e11))
    ]
    for version in ("0.9.0", "0.24.0"):
        place = tmp_path / "systems" / "data" / "x" / "gemm" / "vllm" / version
        place.mkdir(parents=True)
        parquet.write_table(pyarrow.Table.from_pylist(rows), place / "gemm_perf.parquet")
    work = ServeWork(model=MODEL, sequences=7)
    [rate] = table_rates(work, ["NVIDIA X", "NVIDIA Y"], tmp_path)
    assert rate.memory_bytes_per_second == pytest.approx(1e12)
    assert rate.operations_per_second == pytest.approx(4e14)
    assert rate.source.endswith("vLLM 0.24.0")
    assert table_rates(work, ["NVIDIA Y"], tmp_path) == []
    int4 = replace(MODEL, quantization=Quantization(method="int4", bits_per_weight=4.2))
    assert table_rates(replace(work, model=int4), ["NVIDIA X"], tmp_path) == []


def test_the_published_tables_hold_less_than_data_sheets_promise() -> None:
    folder = installed()
    if folder is None:
        pytest.skip("aiconfigurator-core is not installed here (82 MB, and pandas and scipy)")
    for dtype, quantization in (("bfloat16", None), ("bfloat16", Quantization(method="fp8", bits_per_weight=8))):
        work = ServeWork(model=replace(MODEL, dtype=dtype, quantization=quantization), sequences=8)
        [rate] = table_rates(work, ["NVIDIA H100 80GB HBM3"], folder)
        assert 1.2e12 < rate.memory_bytes_per_second < 3.36e12
        assert 4e14 < (rate.operations_per_second or 0) < (1.98e15 if quantization else 9.9e14)
