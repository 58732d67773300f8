"""`corral prompt`: what is held in one line, and in the prompts of real shells."""

from __future__ import annotations

import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from corral.cli.work.prompt import shown
from corral.schemas.requests import Grant, Lease, LeaseState
from support.local_cluster import CORRAL, LocalCluster, environment, wait_for

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def lease(*models: str, share: float = 1.0, ends: timedelta | None = None) -> Lease:
    grants = [Grant(host="h", device=f"GPU-{at}", model=model, share=share) for at, model in enumerate(models)]
    return Lease(
        lease_id="a", owner="o", state=LeaseState.ACTIVE, granted_at=NOW, expires_at=NOW, ttl_seconds=60, grants=grants,
        ends_at=None if ends is None else NOW + ends,
    )  # fmt: skip


def test_what_it_says() -> None:
    assert shown([], NOW) == ""
    assert shown([Lease(**{f: getattr(lease(), f) for f in Lease.__struct_fields__})], NOW) == ""
    h100 = "NVIDIA H100 80GB HBM3"
    assert shown([lease(h100, h100), lease("NVIDIA L40S")], NOW) == "2×H100+1×L40S"
    assert shown([lease("NVIDIA GeForce RTX 4090", share=0.25)], NOW) == "0.25×RTX4090"
    assert shown([lease(h100, ends=timedelta(minutes=65)), lease(h100, ends=timedelta(days=1))], NOW) == "2×H100 1h05m"
    assert shown([lease(h100, ends=timedelta(seconds=-5))], NOW) == "1×H100 0m"


def test_it_follows_what_is_held(cluster: LocalCluster, tmp_path: Path) -> None:
    file = tmp_path / "cache" / "prompt"
    asked = ("prompt", "--file", str(file))
    assert cluster.corral(*asked, CORRAL_OWNER="pr").stdout == ""
    assert file.read_text() == "\n"
    held = cluster.json("request", "--gpus", "2", "--owner", "pr")["lease"]
    done = cluster.corral(*asked, CORRAL_OWNER="pr")
    assert done.stdout == file.read_text()
    assert done.stdout.startswith("2×")
    assert cluster.json("prompt", CORRAL_OWNER="pr") == {"text": done.stdout.strip(), "leases": [held["lease_id"]]}
    cluster.json("release", held["lease_id"], "--owner", "pr")


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_shows_it_without_waiting(cluster: LocalCluster, tmp_path: Path, shell: str) -> None:
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    held = cluster.json("request", "--owner", "pr2")["lease"]
    bin = tmp_path / "bin"
    bin.mkdir()
    (bin / "corral").write_text(f'#!/bin/sh\nexec {" ".join(CORRAL)} "$@"\n')
    (bin / "corral").chmod(0o755)
    values = environment(
        CORRAL_NATS_URL=cluster.url, CORRAL_OWNER="pr2", XDG_CACHE_HOME=str(tmp_path), HOME=str(tmp_path)
    )
    values["PATH"] = f"{bin}:{values['PATH']}"
    script = 'PS1="$ "; eval "$(corral prompt --init SHELL)"; _corral_prompt; echo "first=[$corral_held]"; echo "$PS1"'
    command = [shell, "-c", script.replace("SHELL", shell)]
    done = subprocess.run(command, env=values, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "first=[]" in done.stdout  # nobody waited for the first answer
    assert "${corral_held:+[$corral_held] }$ " in done.stdout
    file = tmp_path / "corral" / "prompt"
    wait_for(lambda: file.exists() and "1×" in file.read_text())
    done = subprocess.run(command, env=values, capture_output=True, text=True, timeout=60, check=False)
    assert f"first=[{file.read_text().strip()}]" in done.stdout
    cluster.json("release", held["lease_id"], "--owner", "pr2")
