"""The form about a model to serve, without a browser: what it asks, what it refuses, what is drawn together."""

from __future__ import annotations

import json

import pytest
from corral.client import InvalidRequest
from corral.client.model_files.known import known_models
from corral.client.model_files.plain_numbers import described
from corral.client.server_commands import SERVERS, offer
from corral.dashboard.components.fit_split import Copy, copies_of, ways
from corral.dashboard.fit_form import CONFIG_CHARACTERS, kept_in_url, question_of
from corral.schemas.models.serving import PlanKind, ServePlan, ServeRoute, ServeStage, StageDevice

NUMBERS = {"source": "numbers", "params": "70B", "layers": "80"}


def stage(first: int, layers: int) -> ServeStage:
    return ServeStage(first_layer=first, layers=layers, devices=[StageDevice(host="a", device=f"GPU-{first}")])


def test_each_description_becomes_a_question() -> None:
    known = question_of({"known": "Llama-3-8B", "sequences": "8", "max_token_time": "50ms", "network": "25"})
    assert (known.work.model.name, known.path) == ("Llama-3-8B", "meta-llama/Meta-Llama-3-8B")
    assert (known.work.sequences, known.work.max_token_seconds) == (8, 0.05)
    assert known.work.links.network_bytes_per_second == 25e9 / 8
    config = json.dumps(known_models()["Llama-3-8B"].config)
    pasted = question_of({"source": "config", "config": config, "models": "*H100*, *A100*", "path": "./mine"})
    assert pasted.work.model.layers == known.work.model.layers
    assert (pasted.fields, pasted.path) == ({"models": ["*H100*", "*A100*"]}, "./mine")
    profile = '[[rate]]\ndevice = "*H100*"\nmemory_bytes_per_second = 2.4e12'
    measured = question_of({"profile": profile, "measured": "no"})
    assert (measured.work.rates[0].memory_bytes_per_second, measured.measured) == (2.4e12, False)
    assert question_of({"profile": '{"links": {"host_bytes_per_second": 5}}'}).work.links.host_bytes_per_second == 5
    numbers = question_of({**NUMBERS, "heads": "64", "dtype": "fp8"})
    assert numbers.work.model == described(70 * 10**9, 80, heads=64, dtype="fp8")


@pytest.mark.parametrize(
    ("form", "field", "said"),
    [
        ({"known": "Llama-9"}, "known", "there are Llama-3-8B"),
        ({"source": "numbers", "params": "70B"}, "layers", "is missing"),
        ({**NUMBERS, "params": "many"}, "", "no number of parameters"),
        ({**NUMBERS, "heads": "0"}, "heads", "1 or more"),
        ({**NUMBERS, "layers": "9000"}, "", "more than any model has"),
        ({"context": "long"}, "context", "not a number"),
        ({"sequences": "0"}, "", "sequences"),
        ({"prompt": "9" * 5000}, "prompt", "not a number"),
        ({"memory_share": "nan"}, "", "memory_share"),
        ({"max_token_time": "soon"}, "max_token_time", "no duration"),
        ({"dtype": "int3"}, "", "'int3' is not known"),
        ({"profile": "[[rate]]\ndevice = 1"}, "profile", "Expected `str`"),
        ({"profile": "[[rate"}, "profile", "end of document"),
        ({"profile": "x" * 20_000}, "profile", "no profile"),
        ({"source": "config"}, "config", "paste a config.json"),
        ({"source": "config", "config": "{"}, "", "config.json is no JSON object, or is truncated"),
        ({"source": "config", "config": "[" * 5000}, "", "config.json is no JSON object"),
        ({"source": "config", "config": " {}" + "x" * CONFIG_CHARACTERS}, "config", "no config.json"),
        ({"source": "config", "config": '{"hidden_size": 64}'}, "", "num_hidden_layers is missing"),
    ],
)
def test_a_wrong_value_is_refused_with_its_field(form: dict[str, str], field: str, said: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        question_of(form)
    assert (refused.value.field or "", said in str(refused.value)) == (field, True), refused.value


def test_a_configuration_is_in_the_url_without_spaces_or_not_at_all() -> None:
    assert kept_in_url({"config": '{"a": [1, 2]}', "hosts": " "}) == {"config": '{"a":[1,2]}'}
    assert kept_in_url({"config": '{"a": "' + "x" * 5000 + '"}', "plan": "2"}) == {"plan": "2"}
    assert kept_in_url({"config": "{"}) == {}


def test_copies_of_a_model_are_drawn_apart_and_shared_stages_together() -> None:
    replicas = ServePlan(
        kind=PlanKind.FLOW,
        stages=[stage(0, 4), stage(0, 1), stage(1, 3)],
        routes=[
            ServeRoute(origin=-1, target=0, weight=0.75), ServeRoute(origin=0, target=-1),
            ServeRoute(origin=-1, target=1, weight=0.25), ServeRoute(origin=1, target=2),
            ServeRoute(origin=2, target=-1),
        ],
        replicas=2,
    )  # fmt: skip
    assert copies_of(replicas) == [Copy("Replica 1", 0.75, (0,)), Copy("Replica 2", 0.25, (1, 2))]
    shared = ServePlan(
        kind=PlanKind.FLOW,
        stages=[stage(2, 2), stage(0, 2), stage(1, 3)],
        routes=[
            ServeRoute(origin=-1, target=1), ServeRoute(origin=1, target=0, weight=0.6),
            ServeRoute(origin=1, target=2, weight=0.4), ServeRoute(origin=0, target=-1),
            ServeRoute(origin=2, target=-1),
        ],
        replicas=0,
    )  # fmt: skip
    assert copies_of(shared) == [Copy("Stages that share requests", 1.0, (1, 2, 0))]
    assert ways(shared, 1) == [(0, 0.6), (2, 0.4)]
    work = question_of(NUMBERS).work
    assert all(offer(name, shared, work, "MODEL").refusal for name in SERVERS)
