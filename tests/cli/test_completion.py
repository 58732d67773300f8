"""Shell completion with Tab, in a real bash."""

import shutil
import subprocess
from pathlib import Path

import pytest
from support.local_cluster import CORRAL, LocalCluster, environment, invoke

SCRIPT = """
eval "$(_CORRAL_COMPLETE=source_bash corral)"
complete -p corral >&2
while read -r -a COMP_WORDS; do
    [ "${COMP_WORDS[-1]}" = TAB ] && COMP_WORDS[-1]=
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMPREPLY=()
    _corral_completion corral
    echo "${COMPREPLY[@]}"
done
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_commands_options_and_what_there_is(cluster: LocalCluster, tmp_path: Path) -> None:
    program = tmp_path / "corral"
    program.write_text(f'#!/bin/sh\nexec {" ".join(CORRAL)} "$@"\n')
    program.chmod(0o755)
    config = tmp_path / "corral.toml"
    config.write_text(f'[contexts.lab]\nnats = "{cluster.url}"\n[contexts.far]\nnats = "nats://127.0.0.1:9"\n')
    models = {device["model"] for device in cluster.json("devices")["devices"]}
    escaped = sorted(model.replace(" ", "\\ ") for model in models)
    lease = cluster.json("request")["lease"]["lease_id"]
    # Each of them starts a process: one of each kind in a shell, the others in this process.
    in_bash = {
        "corral que": ["query", "queue"],
        "corral collect --source TAB": ["amd", "auto", "nvml", "replay", "simulated"],
        f"corral --context lab release {lease[:4]}": [lease],
    }
    here = {
        "corral request --mem": ["--memory", "--memory-per-item"],
        "corral run --placement s": ["same_host", "spread"],
        "corral jobs --state c": ["cancelled", "completing"],
        "corral run --policy pa": ["pack"],
        "corral context use TAB": ["far", "lab"],
        "corral --context l": ["lab"],
        "corral --context lab drain --host TAB": ["sim-0001", "sim-0002"],
        "corral --context far drain --host TAB": [],
        "corral --context lab request --model TAB": escaped,
        "corral config set collect.inter": ["collect.interval"],
    }
    done = subprocess.run(
        ["bash", "-c", SCRIPT],
        input="\n".join(in_bash) + "\n",
        env=environment(PATH=f"{tmp_path}:/usr/bin:/bin", CORRAL_CONFIG=str(config)),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    found = {line: sorted(words.split()) for line, words in zip(in_bash, done.stdout.splitlines(), strict=True)}
    assert found == in_bash
    assert "_corral_completion corral" in done.stderr
    assert [line for line in done.stderr.splitlines() if not line.startswith("complete ")] == []
    for line, words in here.items():
        asked = line.replace("TAB", "")
        values = {"COMP_WORDS": asked, "COMP_CWORD": str(len(asked.split(" ")) - 1), "CORRAL_CONFIG": str(config)}
        told = invoke(url="", _CORRAL_COMPLETE="complete_bash", **values)
        assert (sorted(filter(None, told.stdout.splitlines())), told.stderr) == (words, ""), line
    cluster.corral("release", "--all")
