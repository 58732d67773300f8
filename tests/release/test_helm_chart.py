"""The Helm chart: rendered by Helm with several values, checked as Kubernetes does, and held to the plain manifests."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.helm import CHART, RenderError, lint, render

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
ALL: dict[str, Any] = {
    "image": {"repository": "registry.example/corral", "tag": "1.2.3", "pullSecrets": [{"name": "pull"}]},
    "bus": {"auth": True},
    "nats": {"authSecret": "nats-auth", "storage": {"size": "20Gi", "className": "fast"}},
    "planner": {"env": {"CORRAL_POLICY": "pack"}, "tolerations": [{"operator": "Exists"}]},
    "processor": {"replicas": 2, "credentialsSecret": "history"},
    "exporter": {"serviceMonitor": {"enabled": True, "labels": {"release": "prom"}}, "otlp": "http://otel:4317"},
    "dashboard": {
        "enabled": True,
        "hosts": ["gpus.example"],
        "ingress": {"enabled": True, "className": "nginx", "tlsSecret": "tls", "annotations": {"a": "b"}},
    },
    "collector": {"source": "amd", "runtimeClassName": "", "supplementalGroups": [44, 109]},
    "runner": {"enabled": True, "image": "registry.example/jobs:1"},
    "notifier": {"enabled": True, "replicas": 2, "targetsSecret": "addresses", "rulesConfigMap": "rules"},
    "gateway": {
        "enabled": True,
        "hosts": ["http.gpus.example"],
        "trustedProxies": ["10.0.0.0/8"],
        "ingress": {"enabled": True, "tlsSecret": "tls"},
    },
    "login": {
        "enabled": True,
        "authoritySecret": "authority",
        "rulesSecret": "login-rules",
        "credentialsSecret": "login-operator",
        "busUrl": "tls://bus.example:4222",
        "hosts": ["login.gpus.example"],
        "ingress": {"enabled": True, "tlsSecret": "tls"},
    },
}
VALUES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "all": ALL,
    "elsewhere": {
        "bus": {"url": "tls://bus.example:4222", "auth": True},
        **{part: {"enabled": False} for part in ("planner", "processor", "exporter")},
    },
    "https": {
        "bus": {"auth": True},
        "gateway": {"enabled": True, "tlsSecret": "tls"},
        "login": {"enabled": True, "authoritySecret": "a", "rulesSecret": "r", "tlsSecret": "tls"},
        "notifier": {"enabled": True, "targetsSecret": "addresses"},
    },
    "one planner": {"planner": {"replicas": 1}, "collector": {"nodeSelector": None, "hostPID": False}},
}


def objects(name: str) -> dict[tuple[str, str], dict[str, Any]]:
    return {(found["kind"], found["metadata"]["name"]): found for found in render(VALUES[name])}


def pods(found: dict[tuple[str, str], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Pod specs by the component that they are."""
    return {
        each["metadata"]["labels"]["app.kubernetes.io/component"]: each["spec"]["template"]["spec"]
        for each in found.values()
        if "template" in each.get("spec", {})
    }


def env(pod: dict[str, Any]) -> dict[str, str]:
    return {each["name"]: each.get("value", "") for each in pod["containers"][0].get("env", ())}


@pytest.mark.parametrize("name", VALUES)
def test_what_it_renders_is_what_kubernetes_knows(name: str) -> None:
    validation = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    for (kind, _), found in objects(name).items():
        if kind != "ServiceMonitor":  # of the Prometheus operator
            for version in ("1.30", "1.34"):
                validation.validate(found, version, strict=True)


@pytest.mark.parametrize("name", VALUES)
def test_pods_satisfy_the_restricted_standard_but_for_what_they_say(name: str) -> None:
    for part, pod in pods(objects(name)).items():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert bool(pod.get("hostNetwork")) is (part == "runner")
        every = [*pod["containers"], *pod.get("initContainers", ())]
        assert len(every) == 1 or (part == "nats" and "login" in VALUES[name])
        for container in every:
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"].get("readOnlyRootFilesystem", False) is (part != "runner")
            assert part == "runner" or container["resources"]["limits"]["memory"]
        mounted = {mount["name"] for container in every for mount in container["volumeMounts"]}
        claims = {"data"} if part in ("nats", "processor", "dashboard") else set()
        assert mounted - claims == {volume["name"] for volume in pod["volumes"]}


def test_what_values_change() -> None:
    assert lint({}) == []
    plain = pods(objects("defaults"))
    assert set(plain) == {"nats", "planner", "processor", "exporter", "collector"}
    assert {env(pod)["CORRAL_NATS_URL"] for part, pod in plain.items() if part != "nats"} == {"nats://corral-nats:4222"}
    assert not [pod for pod in plain.values() if "credentials" in str(pod)]
    found = objects("all")
    every = pods(found)
    assert set(every) == {*plain, "dashboard", "runner", "notifier", "gateway"}
    for part, pod in every.items():
        image = pod["containers"][0]["image"]
        assert image == ("registry.example/jobs:1" if part == "runner" else "registry.example/corral:1.2.3")
        if part != "nats":
            assert env(pod)["CORRAL_NATS_CREDS"] == "/etc/corral/credentials/corral.creds"
            secrets = [v["secret"]["secretName"] for v in pod["volumes"] if v["name"] == "credentials"]
            assert secrets == ["history" if part == "processor" else f"corral-{part}"]
    assert env(every["planner"])["CORRAL_POLICY"] == "pack"
    assert every["collector"]["securityContext"]["supplementalGroups"] == [44, 109]
    assert "runtimeClassName" not in every["collector"]
    assert every["exporter"]["containers"][0]["args"][-2:] == ["--otlp", "http://otel:4317"]
    assert 'include "auth/nats-auth.conf"' in found["ConfigMap", "corral-nats"]["data"]["nats.conf"]
    options = {part: pod["containers"][0]["args"] for part, pod in every.items() if "args" in pod["containers"][0]}
    assert options["notifier"] == [
        "notifier", "--targets=/etc/corral/targets/notify-targets.toml", "--rules=/etc/corral/rules/notify-rules.toml"
    ]  # fmt: skip
    assert options["gateway"][2:] == ["--plain", "--name=http.gpus.example", "--trusted-proxy=10.0.0.0/8"]
    secrets = {v["secret"]["secretName"] for pod in every.values() for v in pod["volumes"] if "secret" in v}
    assert {"addresses", "authority", "login-rules", "login-operator"} < secrets
    (login,) = (each for each in every["nats"]["containers"] if each["name"] == "login")
    assert login["args"][-2:] == ["--behind-proxy", "--bus=tls://bus.example:4222"]
    assert found["Service", "corral-login"]["spec"]["selector"]["app.kubernetes.io/component"] == "nats"
    for part in ("login", "gateway"):
        rules = found["Ingress", f"corral-{part}"]["spec"]["rules"]
        assert rules[0]["http"]["paths"][0]["backend"]["service"]["name"] == f"corral-{part}"
    assert found["ServiceMonitor", "corral-exporter"]["metadata"]["labels"]["release"] == "prom"
    assert found["Ingress", "corral-dashboard"]["spec"]["rules"][0]["host"] == "gpus.example"
    other = pods(objects("elsewhere"))
    assert set(other) == {"collector"}
    assert env(other["collector"])["CORRAL_NATS_URL"] == "tls://bus.example:4222"
    # A release with another name has names of its own.
    names = {each["metadata"]["name"] for each in render({}, release="lab")}
    assert all(name.startswith("lab-corral-") for name in names)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"nats": {"enabled": False}}, "bus.url"),
        ({"bus": {"auth": True}}, "nats.authSecret"),
        ({"dashboard": {"enabled": True}}, "dashboard.hosts"),
        ({"notifier": {"enabled": True}}, "notifier.targetsSecret"),
        ({"login": {"enabled": True}}, "bus.auth"),
        ({"bus": {"auth": True}, "login": {"enabled": True}}, "login.authoritySecret"),
        ({"gateway": {"enabled": True, "ingress": {"enabled": True}}}, "gateway.hosts"),
        ({"planer": {"replicas": 3}}, "planer"),
        ({"planner": {"replicas": "two"}}, "replicas"),
    ],
)
def test_wrong_values_are_refused_by_name(values: dict[str, Any], word: str) -> None:
    with pytest.raises(RenderError, match=re.escape(word)):
        render(values)


@pytest.mark.parametrize("part", ["collector", "runner"])
def test_pods_on_gpu_hosts_are_those_of_the_plain_manifests(part: str) -> None:
    documents = list(yaml.safe_load_all((ROOT / "deploy" / "kubernetes" / f"{part}-daemonset.yaml").read_text()))
    plain = documents[1]["spec"]["template"]["spec"]
    rendered = {(each["kind"], each["metadata"]["name"]): each for each in render(ALL | {"collector": {}})}
    chart = pods(rendered)[part]
    for field in ("securityContext", "nodeSelector", "tolerations", "runtimeClassName", "hostPID", "hostNetwork"):
        assert chart.get(field) == plain.get(field), field
    ours, theirs = chart["containers"][0], plain["containers"][0]
    for field in ("args", "resources", "securityContext"):
        assert ours[field] == theirs[field], field
    # The plain manifest has some of the variables in a ConfigMap.
    assert set(env(plain)) | set(documents[0]["data"]) <= set(env(chart)) | {"CORRAL_BATCH"}


def test_chart_and_package_have_one_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert chart["version"] == chart["appVersion"] == version
