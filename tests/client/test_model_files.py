"""Readers of model files: sizes against published byte counts, headers as their own libraries write them, bad input."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest
from corral.client.model_files import read_model
from corral.client.model_files.config_json import describe
from corral.client.model_files.known import KNOWN_FILE
from corral.client.model_files.numbers import InvalidModelFile
from corral.client.model_files.plain_numbers import described, number_format, parameters
from corral.client.serving import read_profile, serve_work
from corral.schemas.models.description import AttentionKind, HeaderBytes, ModelDescription
from corral.schemas.models.quantization import GGUF_BLOCKS
from corral.schemas.models.sizes import kv_token_bytes, prediction_bytes, read_bytes, sizes

KNOWN: list[dict[str, Any]] = json.loads(KNOWN_FILE.read_text())
BUILT: list[dict[str, Any]] = json.loads((Path(__file__).parent / "small_models.json").read_text())
"""Small models of each architecture, with their parameters as transformers 5.24 builds them (on the device `meta`)."""
SMALL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 100,
    "torch_dtype": "float16",
}


def known(name: str) -> ModelDescription:
    return next(describe(entry["config"], name) for entry in KNOWN if entry["name"] == name)


def safetensors(shapes: dict[str, tuple[int, ...]]) -> bytes:
    """A header as the format has it, for 16-bit numbers; without their bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        size = 2
        for side in shape:
            size *= side
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded


def shapes(layer: int) -> dict[str, tuple[int, ...]]:
    at = f"model.layers.{layer}."
    return {
        f"{at}self_attn.q_proj.weight": (64, 64),
        f"{at}self_attn.k_proj.weight": (32, 64),
        f"{at}self_attn.v_proj.weight": (32, 64),
        f"{at}self_attn.o_proj.weight": (64, 64),
        f"{at}mlp.gate_proj.weight": (128, 64),
        f"{at}mlp.up_proj.weight": (128, 64),
        f"{at}mlp.down_proj.weight": (64, 128),
        f"{at}input_layernorm.weight": (64,),
        f"{at}post_attention_layernorm.weight": (64,),
    }


ENDS = {"model.embed_tokens.weight": (100, 64), "lm_head.weight": (100, 64), "model.norm.weight": (64,)}


@pytest.mark.parametrize("entry", KNOWN, ids=[entry["name"] for entry in KNOWN])
def test_weights_are_counted_as_published(entry: dict[str, Any]) -> None:
    model = describe(entry["config"])
    counted = sizes(model).total + prediction_bytes(model)
    assert counted == pytest.approx(entry["total_bytes"], rel=0.0001)


@pytest.mark.parametrize("entry", BUILT, ids=[entry["name"] for entry in BUILT])
def test_each_architecture_has_the_parameters_that_transformers_builds(entry: dict[str, Any]) -> None:
    counted = sizes(describe(entry["config"])).total / 4
    assert counted == pytest.approx(entry["parameters"], rel=0.001)


def test_quantization_in_a_file_of_its_own_counts(tmp_path: Path) -> None:
    config = {
        **next(one["config"] for one in KNOWN if one["name"] == "Llama-3.1-70B"),
        "time_step_limit": [0.0, float("inf")],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "Infinity" in (tmp_path / "config.json").read_text()
    plain = sizes(read_model(tmp_path)).total

    def quantized(algorithm: str, *left_out: str) -> ModelDescription:
        found = {"quant_algo": algorithm, "exclude_modules": list(left_out)}
        (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": found}))
        return read_model(tmp_path / "config.json")

    # Embedding and head keep their 2 bytes.
    ends = 2 * 2 * 128256 * 8192
    fp8 = quantized("FP8", "lm_head")
    assert sizes(fp8).total == pytest.approx((plain - ends) / 2 + ends, rel=1e-3)
    assert fp8.quantization is not None
    assert sizes(quantized("NVFP4", "lm_head", "model.layers.0.mlp.gate")).total < 0.36 * plain
    for algorithm, left_out, said in (
        ("NVFP4", "model.layers.0.self_attn*", "leaves 1 modules as they are"),
        ("MIXED_PRECISION", "lm_head", "is not known"),
    ):
        with pytest.raises(InvalidModelFile, match=said):
            quantized(algorithm, left_out)


def test_caches_are_as_the_papers_have_them() -> None:
    # Llama 2 and 3 technical reports; DeepSeek-V2, table 1: 576 numbers a token and layer.
    assert known("Llama-3.1-70B").attention.kind is AttentionKind.GROUPED_QUERY
    assert kv_token_bytes(known("Llama-3.1-70B")) == 2 * 8 * 128 * 2
    assert known("DeepSeek-V3").attention.kind is AttentionKind.LATENT
    assert kv_token_bytes(known("DeepSeek-V3"), "bfloat16") == 576 * 2
    assert kv_token_bytes(known("DeepSeek-V3"), "float8_e4m3fn") == 576
    assert known("Gemma-2-9B").attention.windowed_layers == 21


def test_a_token_reads_the_weights_of_its_experts_alone() -> None:
    model = known("Mixtral-8x7B")
    layer = sizes(model).layers[0]
    active = 32 * read_bytes(model, 0, 1) / 2 + 2 * 32000 * 4096
    assert active == pytest.approx(12.9e9, rel=0.01)  # "12.9B active parameters" (Jiang et al. 2024)
    assert layer / 4 < read_bytes(model, 0, 1) < read_bytes(model, 0, 8) < layer
    assert read_bytes(model, 0, 1000) == pytest.approx(layer)


def test_headers_of_sharded_files_are_counted_by_layer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    parts = {"a.safetensors": {**shapes(0), **shapes(1)}, "b.safetensors": {**shapes(2), **ENDS}}
    for name, held in parts.items():
        (tmp_path / name).write_bytes(safetensors(held))
    total = 0
    weight_map = {tensor: name for name, held in parts.items() for tensor in held}
    model = read_model(tmp_path)
    assert model.header is not None
    assert model.header.layers == [2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 128 + 2 * 64)] * 3
    total = sizes(model).total
    assert total == sizes(describe(SMALL)).total
    # The index alone, as where the weights are elsewhere: its bytes count where the formulas differ.
    for name in parts:
        (tmp_path / name).unlink()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    assert read_model(index).header is None
    index.write_text(json.dumps({"metadata": {"total_size": 2 * total}, "weight_map": weight_map}))
    assert sizes(read_model(tmp_path / "config.json")).total == pytest.approx(2 * total, abs=3)


def test_an_unknown_architecture_is_named_with_what_its_config_says(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, "architectures": ["NovelForCausalLM"]}))
    with pytest.raises(
        InvalidModelFile, match=r"'NovelForCausalLM' is not known.* 3 layers of 64.*--params N --layers 3"
    ):
        read_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(safetensors({**shapes(0), **shapes(1), **shapes(2), **ENDS}))
    model = read_model(tmp_path)
    assert sizes(model).total == sizes(describe(SMALL)).total
    assert "NovelForCausalLM is not known" in model.assumed[0]


def test_other_kinds_of_models_are_refused_by_name() -> None:
    for architecture, config, said in (
        ("T5ForConditionalGeneration", {"is_encoder_decoder": True, "d_model": 64}, "is an encoder-decoder"),
        (
            "MambaForCausalLM",
            {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 9},
            "not known, and num_attention_heads is missing",
        ),
        ("LlavaForConditionalGeneration", {"text_config": {"vocab_size": 9}}, "not known, and hidden_size is missing"),
    ):
        with pytest.raises(InvalidModelFile, match=f"{architecture}.* {said}"):
            describe({"architectures": [architecture], **config})


def test_the_longest_context_counts_the_scaling_of_positions() -> None:
    def longest(**scaling: Any) -> int:
        return describe({**SMALL, "max_position_embeddings": 40960, "rope_scaling": scaling}).context_tokens

    assert longest(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768) == 131072
    assert longest(type="linear", factor=2) == 81920
    assert longest(rope_type="llama3", factor=8.0, original_max_position_embeddings=8192) == 40960


def test_another_number_format_is_a_conversion() -> None:
    plain = known("Llama-3-8B")
    assert serve_work(plain, {"dtype": "bf16"}).model.converted_from == ""
    assert serve_work(plain, {"dtype": "fp8"}).model.converted_from == "bfloat16"
    # Bytes of headers are scaled where no formula has them.
    header = HeaderBytes(layers=[160, 320], embedding=100, head=100, other=10)
    novel = msgspec.structs.replace(plain, architecture="NovelForCausalLM", layers=2, header=header)
    assert serve_work(novel, {"dtype": "fp8"}).model.header == msgspec.structs.replace(header, layers=[80, 160])
    with pytest.raises(InvalidModelFile, match="a prompt of 9000 tokens is longer than the context of 4096"):
        serve_work(plain, {"prompt": 9000})


def test_bad_files_are_refused_with_the_reason(tmp_path: Path) -> None:
    def refused(name: str, data: bytes, reason: str) -> None:
        file = tmp_path / name
        file.write_bytes(data)
        with pytest.raises(InvalidModelFile, match=reason):
            read_model(file)
        file.unlink()

    whole = safetensors(shapes(0))
    config = json.dumps(SMALL).encode()
    refused("config.json", config[:40], "truncated")
    refused("config.json", json.dumps({**SMALL, "hidden_size": "big"}).encode(), "hidden_size is 'big'")
    refused("config.json", json.dumps({**SMALL, "num_hidden_layers": None}).encode(), "num_hidden_layers is missing")
    refused("model.safetensors", whole, "config.json is not beside")
    packed = {**SMALL, "quantization_config": {"quant_method": "rune"}}
    refused("config.json", json.dumps(packed).encode(), "quant_method 'rune' is not known")
    (tmp_path / "config.json").write_bytes(config)
    refused("model.safetensors", whole[: len(whole) // 2], "truncated: .* bytes of its header are there")
    refused("model.safetensors", b"\xff" * 64, "no safetensors file")
    refused("model.safetensors", struct.pack("<Q", 4) + b"[,,]", "no JSON object")
    refused("model.safetensors", whole, "2 of 3 layers have no tensor")
    refused("model.gguf", b"GGUF" + struct.pack("<IQQ", 3, 5, 5), "truncated or malformed")
    with pytest.raises(InvalidModelFile, match="does not exist"):
        read_model(tmp_path / "nothing")


def test_a_gguf_header_is_counted_by_type(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the extra corral[fit] is not installed")
    np = pytest.importorskip("numpy")
    writer = gguf.GGUFWriter(tmp_path / "small.gguf", "llama")
    writer.add_name("small")
    writer.add_block_count(2)
    writer.add_context_length(2048)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(512)
    writer.add_head_count(8)
    writer.add_head_count_kv(2)
    f32, q4 = np.zeros((256,), dtype=np.float32), np.zeros((256, 256), dtype=np.float32)
    writer.add_tensor("token_embd.weight", np.zeros((1000, 256), dtype=np.float16))
    for layer in range(2):
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", f32)
        packed = gguf.quants.quantize(q4, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(f"blk.{layer}.attn_q.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("output_norm.weight", f32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = read_model(tmp_path / "small.gguf")
    assert (model.layers, model.hidden_size, model.vocabulary, model.tied_embeddings) == (2, 256, 1000, True)
    assert model.attention.kv_heads == 2
    assert model.header is not None
    assert model.header.layers == [256 * 4 + 256 * 256 * 34 // 32] * 2
    assert model.header.embedding == 1000 * 256 * 2
    data = (tmp_path / "small.gguf").read_bytes()
    for length in (8, 60, len(data) // 2):
        (tmp_path / "cut.gguf").write_bytes(data[:length])
        with pytest.raises(InvalidModelFile, match=r"truncated or malformed|no GGUF file"):
            read_model(tmp_path / "cut.gguf")
    published = {kind.name: block for kind, block in gguf.constants.GGML_QUANT_SIZES.items()}
    assert {name: published[name] for name in GGUF_BLOCKS} == {
        name: tuple(block) for name, block in GGUF_BLOCKS.items()
    }


def test_a_model_by_its_parameters_alone() -> None:
    model = described(parameters("70B"), 80, hidden=8192, heads=64, kv_heads=8, dtype="bf16")
    assert sizes(model).total == pytest.approx(140e9, rel=1e-6)
    assert model.assumed == []
    guessed = described(parameters("70B"), 80, dtype="int4")
    assert sizes(guessed).total == pytest.approx(70e9 * (4 + 20 / 128) / 8, rel=1e-6)
    assert len(guessed.assumed) == 3
    wide = described(parameters("32B"), 64, hidden=5120, heads=64, kv_heads=8, head_dim=128)
    assert kv_token_bytes(wide) == 2 * 8 * 128 * 2
    for numbers in ({"hidden": 8192, "heads": 63}, {"heads": 32, "kv_heads": 7}, {"hidden": 100_096}):
        with pytest.raises(InvalidModelFile, match="contradict"):
            described(parameters("7B"), 32, **numbers)
    for text in ("seventy", "0B", "-1B", ""):
        with pytest.raises(InvalidModelFile, match="no number of parameters"):
            parameters(text)
    with pytest.raises(InvalidModelFile, match="dtype 'int3' is not known"):
        number_format("int3")


def test_published_files_of_llama_cpp() -> None:
    # llama-2-7b.Q8_0.gguf of TheBloke/Llama-2-7B-GGUF has 7161089728 bytes, its vocabulary included.
    config = {**known_config("Llama-3-8B"), "intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000}
    work = serve_work(describe(config), {"dtype": "q8_0"})
    assert sizes(work.model).total == pytest.approx(7161089728, rel=0.001)


def known_config(name: str) -> dict[str, Any]:
    return next(entry["config"] for entry in KNOWN if entry["name"] == name)


def test_a_profile_gives_measured_rates(tmp_path: Path) -> None:
    file = tmp_path / "rates.toml"
    file.write_text(
        '[[rate]]\ndevice = "*H100*"\nmemory_bytes_per_second = 2.4e12\nsource = "vLLM 0.12, batch 1"\n'
        "[links]\nnetwork_bytes_per_second = 12.5e9\n"
    )
    work = serve_work(known("Llama-3-8B"), {"profile": file, "context": 8192, "kv_dtype": "fp8"})
    assert work.rates[0].memory_bytes_per_second == 2.4e12
    assert work.links.network_bytes_per_second == 12.5e9
    assert work.kv_dtype == "float8_e4m3fn"
    file.write_text('[[rate]]\ndevice = "*H100*"\nmemory_bytes_per_second = -1\n')
    with pytest.raises(InvalidModelFile, match="memory_bytes_per_second"):
        read_profile(file)
    with pytest.raises(InvalidModelFile, match="context_tokens"):
        serve_work(known("Llama-3-8B"), {"context": 0})
