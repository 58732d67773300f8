"""What containers, pods and units may do: as little as they can."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
MANIFESTS = sorted((ROOT / "deploy" / "kubernetes").glob("*.yaml"))
RUNNERS = ("corral-runner.service", "runner-daemonset.yaml")
"""They start the jobs of others, which would inherit what confines them: root on a host, the pod's account in a pod."""
UNITS = [unit for unit in sorted((ROOT / "deploy" / "systemd").glob("*.service")) if unit.name not in RUNNERS]
MOST_EXPOSED = 25
"""Of 100, as `systemd-analyze security` counts: a service that reads GPUs can hardly have less."""


def test_the_image_runs_as_nobody_in_particular() -> None:
    text = (ROOT / "deploy" / "container" / "Dockerfile").read_text()
    last = text[text.rindex("\nFROM ") :]
    [user] = re.findall(r"^USER (\S+)", last, re.M)
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", user), "a number, so that runAsNonRoot can be checked"
    assert last.index("\nUSER ") > last.rindex("\nRUN ")
    assert "--require-hashes" in text
    assert not re.search(r"^ADD ", text, re.M)
    assert "pip uninstall" in text


def test_the_image_is_built_of_every_package_and_nothing_else() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {name.split(".")[1] for name in setuptools["packages"] if "." in name} | {"__init__.py"}
    first, *rest = (ROOT / ".dockerignore").read_text().splitlines()
    admitted = {line[1:] for line in rest if line.startswith("!")}
    assert first == "**"
    assert admitted == packages | {"pyproject.toml", "README.md", "LICENSE", "deploy/container"}


@pytest.mark.parametrize("name", list(COMPOSE["services"]))
def test_every_container_of_the_compose_file_is_fenced_in(name: str) -> None:
    service: dict[str, Any] = COMPOSE["services"][name]
    assert service.get("read_only") is True
    assert service.get("cap_drop") == ["ALL"]
    assert "no-new-privileges:true" in service.get("security_opt", [])
    assert not service.get("privileged")
    assert not service.get("cap_add")
    assert str(service.get("user", "")).partition(":")[0] not in ("0", "root")
    for port in service.get("ports", []):
        assert str(port).startswith("127.0.0.1:"), "this machine alone"
    for volume in service.get("volumes", []):
        source, _, rest = str(volume).partition(":")
        assert "docker.sock" not in source
        if source.startswith((".", "/")):
            assert rest.endswith(":ro"), f"{source} is the host's"


def containers(manifest: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each container of a manifest, with its pod."""
    found: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for document in yaml.safe_load_all(manifest.read_text()):
        pod = ((document or {}).get("spec") or {}).get("template", {}).get("spec")
        if pod:
            found += [(pod, each) for each in [*pod["containers"], *pod.get("initContainers", [])]]
    return found


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_pods_satisfy_the_restricted_standard_but_for_what_they_say(manifest: Path) -> None:
    assert containers(manifest)
    for pod, container in containers(manifest):
        context, own = pod["securityContext"], container["securityContext"]
        runs_jobs = manifest.name in RUNNERS
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] > 0
        assert context["seccompProfile"]["type"] == "RuntimeDefault"
        assert own["allowPrivilegeEscalation"] is False
        assert own.get("readOnlyRootFilesystem", False) is not runs_jobs
        assert own["capabilities"] == {"drop": ["ALL"]}
        assert not own.get("privileged")
        assert bool(pod.get("hostNetwork")) is runs_jobs  # tasks on several hosts find each other
        assert not pod.get("hostIPC")
        assert pod["automountServiceAccountToken"] is False
        assert runs_jobs or container["resources"]["limits"]["memory"]


def test_a_runner_that_is_stopped_leaves_its_jobs_running() -> None:
    text = (ROOT / "deploy" / "systemd" / RUNNERS[0]).read_text()
    assert re.search(r"^KillMode=process$", text, re.M)
    assert not re.search(r"^(DynamicUser|NoNewPrivileges|PrivateTmp|ProtectHome|SystemCallFilter)=", text, re.M)


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_units_are_fenced_in(unit: Path) -> None:
    text = unit.read_text()
    # The login service writes the authority's folder and signals the server, so it has the account of both.
    for setting in (
        "User=nats" if unit.name == "corral-login.service" else "DynamicUser=yes",
        "NoNewPrivileges=yes",
        "CapabilityBoundingSet=",
        "ProtectSystem=strict",
        "SystemCallFilter=@system-service",
        "DevicePolicy=closed",
    ):
        assert re.search(rf"^{re.escape(setting)}$", text, re.M), setting


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_systemd_itself_finds_little_to_take_away(unit: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not on this machine")
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", f"--threshold={MOST_EXPOSED}", "--no-pager", str(unit)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if "offline" in done.stderr:
        pytest.skip("this systemd can't look at a file")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.name)
@pytest.mark.parametrize("version", ["1.30", "1.34"])
def test_kubernetes_knows_every_field_of_a_manifest(file: Path, version: str) -> None:
    validation = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    for resource in yaml.safe_load_all(file.read_text()):
        validation.validate(resource, version, strict=True)
