"""Questions about serving a model: what it has to hold, with measured rates from a profile."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Final, TypedDict

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from ..schemas.models.description import HeaderBytes, ModelDescription
from ..schemas.models.serving import DeviceRate, Links, ServeWork
from ..schemas.models.sizes import dtype_bytes, linear_bytes
from ..schemas.requests import Distribution, Method
from .model_files import read_model
from .model_files.architectures import ARCHITECTURES
from .model_files.numbers import UNREADABLE, InvalidModelFile
from .model_files.plain_numbers import number_format

_PROFILE_BYTES: Final = 4 * 2**20


class Profile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Measured rates, as a TOML or JSON file has them.

    Attributes:
        rate: rates of devices; the first whose glob matches a device counts.
        links: rates of links.
    """

    rate: list[DeviceRate] = []
    links: Links = Links()


class ServeFields(TypedDict, total=False):
    """Keyword arguments about a model to serve; see `ServeWork` for the meaning of each."""

    context: int
    """longest sequence in tokens, prompt and output together"""
    sequences: int
    """number of sequences at once"""
    prompt: int
    """length of a prompt, for the time to the first token"""
    dtype: str
    """number format of the weights in place of the model's own: `bf16`, `fp8`, `int4`, `q4_k`, …"""
    kv_dtype: str
    """number format of the KV cache"""
    max_token_seconds: float
    max_first_token_seconds: float
    memory_share: float
    tensor_parallel: bool
    profile: str | Path | Profile
    """measured rates and links, or the file that has them"""
    network_bytes_per_second: float
    seconds: float
    seed: int


def read_profile(path: str | Path) -> Profile:
    """Read measured rates from a file.

    Raises:
        InvalidModelFile: it can't be read, or is malformed.
    """
    file = Path(path)
    try:
        with file.open("rb") as source:
            data = source.read(_PROFILE_BYTES)
        return parse_profile(data.decode(), json=file.suffix == ".json")
    except OSError as error:
        raise InvalidModelFile(f"profile {file} can't be read: {error.strerror or error}") from None
    except (UnicodeDecodeError, InvalidModelFile) as error:
        raise InvalidModelFile(f"profile {file}: {error}") from None


def parse_profile(text: str, *, json: bool = False) -> Profile:
    """Parse measured rates.

    Args:
        text: of a profile.
        json: true if it is JSON, else it is TOML.

    Raises:
        InvalidModelFile: it is malformed.
    """
    try:
        return msgspec.convert(msgspec.json.decode(text) if json else tomllib.loads(text), Profile)
    except (*UNREADABLE, msgspec.ValidationError, tomllib.TOMLDecodeError) as error:
        raise InvalidModelFile(str(error)) from None


def serve_work(model: ModelDescription | str | Path, fields: ServeFields) -> ServeWork:
    """Build a question about serving a model.

    Args:
        model: its description, or a path that `read_model` reads.
        fields: what it has to hold.

    Raises:
        InvalidModelFile: the model or the profile is invalid, or a number is out of range.
    """
    described = model if isinstance(model, ModelDescription) else read_model(model)
    if "dtype" in fields:
        described = with_dtype(described, fields["dtype"])
    given = fields.get("profile")
    profile = given if isinstance(given, Profile) else Profile() if given is None else read_profile(given)
    links = profile.links
    if "network_bytes_per_second" in fields:
        links = replace(links, network_bytes_per_second=fields["network_bytes_per_second"])
    body: dict[str, Any] = {"model": described, "rates": profile.rate, "links": links}
    names = {"context": "context_tokens", "sequences": "sequences", "prompt": "prompt_tokens"}
    names |= {name: name for name in ServeFields.__annotations__ if name in ServeWork.__struct_fields__}
    body |= {field: fields[name] for name, field in names.items() if name in fields}
    if "kv_dtype" in body:
        body["kv_dtype"] = _kv_format(body["kv_dtype"])
    try:
        return _checked(msgspec.convert(msgspec.to_builtins(body), ServeWork))
    except msgspec.ValidationError as error:
        raise InvalidModelFile(str(error)) from None


def _kv_format(name: str) -> str:
    """Number format of a KV cache, as models' files call it."""
    try:
        plain, packed = number_format(name)
    except InvalidModelFile:
        plain, packed = "", None
    found = plain if packed is None else "float8_e4m3fn" if packed.bits_per_weight == 8 else ""
    if not found:
        raise InvalidModelFile(f"a KV cache of {name!r} is not known: there are bf16, fp16, fp32 and fp8")
    return found


def _checked(work: ServeWork) -> ServeWork:
    """A question whose lengths do not contradict each other."""
    if (work.prompt_tokens or 0) > work.context_tokens:
        raise InvalidModelFile(
            f"a prompt of {work.prompt_tokens} tokens is longer than the context of {work.context_tokens}, which holds "
            "prompt and output"
        )
    return work


def with_dtype(model: ModelDescription, dtype: str) -> ModelDescription:
    """A model with its weights in another number format.

    Bytes of its present files no longer count, except for an architecture that the formulas do not cover: these are
    scaled by the bits of a weight.
    """
    plain, packed = number_format(dtype)
    if (plain, packed) == (model.dtype, model.quantization):
        return model
    made = replace(
        model,
        dtype=plain,
        quantization=packed,
        header=None,
        converted_from=model.dtype if model.quantization is None else model.quantization.method,
    )
    if model.header is None or model.architecture in ARCHITECTURES:
        return made
    scale = linear_bytes(made) / linear_bytes(model)
    edge = scale if packed is not None and packed.everything else dtype_bytes(plain) / dtype_bytes(model.dtype)
    header = HeaderBytes(
        layers=[round(size * scale) for size in model.header.layers],
        embedding=round(model.header.embedding * edge),
        head=round(model.header.head * edge),
        other=round(model.header.other * edge),
    )
    return replace(made, header=header)


def serve_distribution(work: ServeWork) -> Distribution:
    """The distribution of a request that asks to serve a model."""
    return Distribution(method=Method.SERVE, serve=work)
