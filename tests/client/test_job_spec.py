"""Jobs built from keyword arguments: what is right is sent as meant, and what is wrong is said with what is right."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from corral.client import InvalidRequest
from corral.client.jobs.functions import script_of, script_of_map, shell_map
from corral.client.jobs.names import compact, parse_selection
from corral.client.jobs.results import exit_code
from corral.client.jobs.spec import job_spec
from corral.schemas.work.jobs import Condition, Dependency, JobState, JobTask, parse_array
from hypothesis import given
from hypothesis import strategies as st

COMMAND = ["python", "train.py"]


def test_what_is_given_is_sent() -> None:
    spec = job_spec(
        "ann",
        COMMAND,
        ["--lr", 0.1],
        {
            "gpus_per_host": 4,
            "host_count": 2,
            "memory": "20GiB",
            "max": "2h",
            "grace": "1m",
            "array": [3, 1],
            "after": [17, "18:any"],
            "env": {"A": "1"},
            "retries": 2,
            "directory": "/data",
            "preempt_signal": "usr1",
        },  # pyright: ignore[reportArgumentType]
    )
    assert (spec.command, spec.hosts, spec.request.gpus, spec.array) == ([*COMMAND, "--lr", "0.1"], 2, 8, "3,1")
    assert (spec.request.max_seconds, spec.grace_seconds, spec.request.grace_seconds) == (7200, 60, 60)
    assert spec.after == [Dependency(job_id="17"), Dependency(job_id="18", condition=Condition.ANY)]
    assert (spec.preempt_signal, spec.request.name, spec.request.placement) == ("SIGUSR1", "python", "spread")
    assert job_spec("ann", "#!/bin/sh\ntrue\n", ["x"], {}).arguments == ["x"]


@pytest.mark.parametrize(
    ("work", "fields", "text"),
    [
        (COMMAND, {"gpuz": 2}, "did you mean `gpus`?"),
        (COMMAND, {"wait": "1h"}, "waits for as long as it takes"),
        (COMMAND, {"items": 3}, "`map`"),
        (COMMAND, {"gpus": 3, "host_count": 2}, "ask for 4"),
        (COMMAND, {"hosts": 2}, "`host_count`"),
        (COMMAND, {"array": "9-0"}, "the smaller one first"),
        (COMMAND, {"after": "17:never"}, "1234:any"),
        (COMMAND, {"preempt_signal": "SIGNONE"}, "SIGUSR1"),
        (COMMAND, {"retries": -1}, "retries"),
        (COMMAND, {"env": {"A": "x" * 200_000}}, "environment"),
        (["sh", *(["x" * 100_000] * 6)], {}, "at most 512 KiB"),
        ([], {}, "command is empty"),
        ("python train.py", {}, "as a list of words"),
        (Path("/no/such/script"), {}, "can't be read"),
    ],
)
def test_what_is_wrong_is_said_with_what_is_right(work: Any, fields: Any, text: str) -> None:
    with pytest.raises(InvalidRequest, match=text.replace("?", r"\?").replace("[", r"\[")):
        job_spec("ann", work, (), fields)


@given(st.sets(st.integers(0, 500), min_size=1), st.integers(1, 10**9))
def test_indexes_are_written_and_read_alike(indexes: set[int], job: int) -> None:
    text = compact(list(indexes))
    assert parse_array(text).indexes == tuple(sorted(indexes))
    assert parse_selection(f"{job}_[{text}]") == (str(job), tuple(sorted(indexes)))


@pytest.mark.parametrize("text", ["", "x", "12_", "12_x", "12_[", "12_[]", "12_[0-9%2]", "_3", "1.5", "12_[9-0]"])
def test_what_names_no_job_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_selection(text)


def test_the_exit_code_of_a_job_is_the_highest_of_its_tasks() -> None:
    done, failed = JobTask(index=0, state=JobState.DONE), JobTask(index=1, state=JobState.FAILED, exit_code=3)
    killed, lost = JobTask(index=2, state=JobState.FAILED, signal=9), JobTask(index=3, state=JobState.LOST)
    cancelled = JobTask(index=4, state=JobState.CANCELLED)
    codes = [exit_code(tasks) for tasks in ([done], [done, failed], [failed, killed], [lost], [cancelled], [])]
    assert codes == [0, 3, 137, 9, 1, 0]
    assert exit_code([done, JobTask(index=5, state=JobState.RUNNING)]) is None


# Functions, executed as a runner executes them: by their first line, elsewhere, with nothing of this process.

FACTOR = 3


def written(path: str, *values: object, end: str = "") -> None:
    Path(path).write_text(" ".join(map(str, values)) + end)


def executed(script: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    file = tmp_path / "script"
    file.write_text(script)
    file.chmod(0o700)
    return subprocess.run([str(file)], env=environment, capture_output=True, text=True, check=False, cwd="/")


def test_a_function_of_a_module_is_called_by_its_name(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    done = executed(script_of(partial(written, out, end="!"), [1, (2, 3)]), tmp_path)
    assert (done.returncode, Path(out).read_text()) == (0, "1 (2, 3)!"), done.stderr
    done = executed(script_of_map(partial(written, out), ["a b", "c'd"]), tmp_path, CORRAL_ARRAY_INDEX="1")
    assert (done.returncode, Path(out).read_text()) == (0, "c'd"), done.stderr
    assert executed(script_of(written, []), tmp_path).returncode == 1


def test_a_function_that_can_not_be_imported_is_sent_as_its_source(tmp_path: Path) -> None:
    def alone(path: str, value: int = 2) -> None:
        """It uses a module of this file, and functions of its own."""
        inner = [str(value) for _ in range(2)]
        with open(path, "w") as file:
            file.write(os.path.basename(path) + " ".join(inner))

    out = str(tmp_path / "out")
    done = executed(script_of(alone, [out]), tmp_path)
    assert (done.returncode, Path(out).read_text()) == (0, "out2 2"), done.stderr

    def needs_the_one_around(path: str) -> None:
        Path(path).write_text(out)

    def needs_a_global() -> int:
        return FACTOR

    for function, why in (
        (needs_the_one_around, "out of the function around"),
        (needs_a_global, "FACTOR"),
        (lambda: 1, "no function that has a name"),
    ):
        with pytest.raises(InvalidRequest, match=rf"{why}.*pip install cloudpickle"):
            script_of(function, [])
    with pytest.raises(InvalidRequest, match="names of files"):
        script_of(written, [sys.stdout])
    with pytest.raises(InvalidRequest, match="interpreter"):
        script_of(written, [], "/my python")


def test_a_command_gets_its_input_as_the_last_word(tmp_path: Path) -> None:
    script = shell_map(["printf", "%s|%s", "it's"], ["a b", "$HOME"])
    assert executed(script, tmp_path, CORRAL_ARRAY_INDEX="1", PATH="/usr/bin:/bin").stdout == "it's|$HOME"
