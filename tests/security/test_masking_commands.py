"""Secrets on the command lines of processes do not get into telemetry, even where these are published."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from corral.collectors.processes.masking import MASK, masked
from corral.collectors.processes.proc import ProcessTable
from hypothesis import given
from hypothesis import strategies as st

SECRET = "hunter2-Xq9"


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", f"--password={SECRET}"],
        ["train", "--password", SECRET],
        ["train", "--db-passwd", SECRET, "--epochs", "3"],
        ["train", f"--api-key={SECRET}"],
        ["train", "--apiKey", SECRET],
        ["train", f"-token={SECRET}"],
        ["env", f"HF_TOKEN={SECRET}", "python", "x.py"],
        ["env", f"AWS_SECRET_ACCESS_KEY={SECRET}", "python"],
        ["psql", f"postgres://me:{SECRET}@db/x"],
        ["curl", "-H", f"Authorization: Bearer {SECRET}"],
        ["curl", f"https://x/y?a=1&access_token={SECRET}&b=2"],
        ["sh", "-c", f"MY_TOKEN={SECRET} python train.py"],
        ["sh", "-c", f"python train.py --wandb-api-key {SECRET} --lr 1"],
        ["bash", "-lc", f"export DB_PASSWORD={SECRET}; run"],
    ],
)
def test_what_looks_like_a_secret_is_masked(arguments: list[str]) -> None:
    text = " ".join(masked(arguments))
    assert SECRET not in text
    assert MASK in text


@pytest.mark.parametrize(
    "form",
    [
        "hf_" + "a1B2" * 8,
        "sk-" + "a1B2" * 8,
        "ghp_" + "a1B2" * 9,
        "AKIA" + "ABCD" * 4,
        "SU" + "A2B3" * 14,
        "eyJhbGciOiJI.eyJzdWIiOiIx.SflKxwRJSM",
    ],
)
def test_keys_are_told_by_their_form(form: str) -> None:
    assert masked(["run", "x", f"--with={form}"]) == ["run", "x", f"--with={MASK}"]


def test_the_rest_stays_readable() -> None:
    line = ["python", "train.py", "--seed", "42", "--max-tokens", "100", "--tokenizer", "llama", "--lr=1e-3", "a=b"]
    assert masked(line) == line


@given(st.lists(st.text(max_size=40), max_size=12))
def test_any_command_line_is_taken(arguments: list[str]) -> None:
    assert len(masked(arguments)) == len(arguments)


def test_a_real_process_is_told_without_its_secret() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()", "--password", SECRET], stdin=subprocess.PIPE)
    try:
        facts = ProcessTable(with_commands=True, root=Path("/proc")).facts(process.pid)
        assert "--password" in facts.command
        assert SECRET not in facts.command
        assert ProcessTable().facts(process.pid).command == ""
    finally:
        process.communicate(b"\n")
