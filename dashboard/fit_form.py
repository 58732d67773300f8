"""Form about a model to serve: its fields, and the question that they ask."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple, cast

import msgspec

from ..client import InvalidRequest
from ..client.model_files.config_json import describe
from ..client.model_files.known import known_models
from ..client.model_files.plain_numbers import described, parameters
from ..client.model_files.read import read_config
from ..client.request import RequestFields
from ..client.serving import Profile, ServeFields, parse_profile, serve_work
from ..schemas.models.description import ModelDescription
from ..schemas.models.serving import ServeWork
from ..schemas.values import units

KNOWN: Final = "known"
NUMBERS: Final = "numbers"
CONFIG: Final = "config"
FIRST_MODEL: Final = "Llama-3.1-70B"
"""Well-known model that an empty form has."""
CONFIG_CHARACTERS: Final = 2**17
"""Longest configuration that a browser may send: the websocket takes messages of 1 MiB."""
PROFILE_CHARACTERS: Final = 2**14
"""Longest profile that a browser may send."""
_URL_CHARACTERS: Final = 4000
"""Longest configuration or profile that is kept in the URL of the page."""
FIELDS: Final = ("source", "known", "config", "params", "layers", "hidden", "heads", "kv_heads", "dtype", "context",
                 "sequences", "models", "kv_dtype", "prompt", "max_token_time", "max_first_token_time", "hosts",
                 "network", "memory_share", "tensor_parallel", "measured", "profile", "path", "plan")  # fmt: skip
"""Names of the fields, as in the URL."""
MORE: Final = FIELDS[12:23]
"""Fields that are folded away until they have a value."""
_WORK_NUMBERS: Final[dict[str, Callable[[str], float]]] = {
    "context": int, "sequences": int, "prompt": int, "memory_share": float,
}  # fmt: skip
_NUMBER_TEXTS: Final = ("layers", "hidden", "heads", "kv_heads")
_TIMES: Final = {"max_token_time": "max_token_seconds", "max_first_token_time": "max_first_token_seconds"}
_UNNAMED: Final = "MODEL"


class Question(NamedTuple):
    """Question that a form asks.

    Attributes:
        work: what is to be served.
        fields: limits on the devices.
        path: path or name of the model in the commands of servers.
        measured: use rates that the user's own jobs have measured, and tables.
    """

    work: ServeWork
    fields: RequestFields
    path: str
    measured: bool


def question_of(form: Mapping[str, str]) -> Question:
    """The question that the values of a form ask; empty ones take their defaults.

    Raises:
        InvalidRequest: a value is wrong; its `field` is the name of the field, where one alone is wrong.
    """
    given = {name: text.strip() for name, text in form.items() if text.strip()}
    model, path = _model(given)
    serve: ServeFields = {}
    values = cast("dict[str, Any]", serve)
    for name, kind in _WORK_NUMBERS.items():
        if name in given:
            values[name] = _number(given, name, kind)
    for name, field in _TIMES.items():
        if name in given:
            values[field] = _seconds(given, name)
    if "network" in given:
        serve["network_bytes_per_second"] = _number(given, "network", float) * 1e9 / 8
    if "kv_dtype" in given:
        serve["kv_dtype"] = given["kv_dtype"]
    if "dtype" in given and given.get("source") != NUMBERS:
        serve["dtype"] = given["dtype"]
    if given.get("tensor_parallel") == "no":
        serve["tensor_parallel"] = False
    if "profile" in given:
        serve["profile"] = _profile(given["profile"])
    fields: RequestFields = {}
    for name in ("models", "hosts"):
        if globs := [one.strip() for one in given.get(name, "").split(",") if one.strip()]:
            cast("dict[str, Any]", fields)[name] = globs
    return Question(serve_work(model, serve), fields, given.get("path") or path, given.get("measured") != "no")


def kept_in_url(form: Mapping[str, str]) -> dict[str, str]:
    """Values of a form for the URL of the page: a configuration without spaces; it or a profile not if it is long."""
    kept = {name: text for name, text in form.items() if text.strip()}
    if len(kept.get("profile", "")) > _URL_CHARACTERS:
        del kept["profile"]
    if text := kept.pop("config", ""):
        try:
            compact = msgspec.json.encode(msgspec.json.decode(text)).decode()
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            return kept
        if len(compact) <= _URL_CHARACTERS:
            kept["config"] = compact
    return kept


def _model(given: Mapping[str, str]) -> tuple[ModelDescription, str]:
    """The model, and the name by which servers load it."""
    source = given.get("source", KNOWN)
    if source == NUMBERS:
        return _by_numbers(given), _UNNAMED
    if source == CONFIG:
        text = given.get("config", "")
        if not text:
            raise InvalidRequest("paste a config.json, or choose the file", "invalid", "config")
        if len(text) > CONFIG_CHARACTERS:
            raise InvalidRequest(f"more than {CONFIG_CHARACTERS:,} characters are no config.json", "invalid", "config")
        return read_config(text), _UNNAMED
    name = given.get("known", FIRST_MODEL)
    known = known_models().get(name)
    if known is None:
        raise InvalidRequest(f"{name!r}: there are {', '.join(known_models())}", "invalid", "known")
    return describe(known.config, known.name), known.repository


def _by_numbers(given: Mapping[str, str]) -> ModelDescription:
    for name, example in (("params", "70B"), ("layers", "80")):
        if name not in given:
            raise InvalidRequest(f"is missing: a number such as {example}", "invalid", name)
    numbers = {name: _number(given, name, int) for name in _NUMBER_TEXTS if name in given}
    for name, number in numbers.items():
        if number < 1:
            raise InvalidRequest("has to be 1 or more", "invalid", name)
    return described(
        parameters(given["params"]),
        numbers["layers"],
        hidden=numbers.get("hidden"),
        heads=numbers.get("heads"),
        kv_heads=numbers.get("kv_heads"),
        dtype=given.get("dtype", "bf16"),
    )


def _number(given: Mapping[str, str], name: str, kind: Callable[[str], Any]) -> Any:
    try:
        return kind(given[name])
    except ValueError:
        raise InvalidRequest(f"{given[name]!r} is not a number", "invalid", name) from None


def _profile(text: str) -> Profile:
    if len(text) > PROFILE_CHARACTERS:
        raise InvalidRequest(f"more than {PROFILE_CHARACTERS:,} characters are no profile", "invalid", "profile")
    try:
        return parse_profile(text, json=text.startswith("{"))
    except InvalidRequest as error:
        raise InvalidRequest(str(error), "invalid", "profile") from None


def _seconds(given: Mapping[str, str], name: str) -> float:
    try:
        return units.parse_seconds(given[name])
    except ValueError as error:
        raise InvalidRequest(str(error), "invalid", name) from None
