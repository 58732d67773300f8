"""`#CORRAL` and `#SBATCH` lines of scripts: what each means, and that nothing is dropped without a word."""

from __future__ import annotations

import contextlib
import shlex

import pytest
from corral.cli.work.jobs.directives import read_directives
from corral.cli.work.jobs.sbatch import RULES, seconds
from corral.schemas.values import units
from hypothesis import given
from hypothesis import strategies as st


def script(*lines: str, prefix: str = "#SBATCH ") -> str:
    return "#!/bin/bash\n" + "".join(f"{prefix}{line}\n" for line in lines) + "\npython train.py\n"


def options(*lines: str) -> str:
    """What lines of `#SBATCH` mean, as a command line; all must be known."""
    found = read_directives(script(*lines))
    assert found.unknown == ()
    return " ".join(word for line in found.options for word in line.words)


@pytest.mark.parametrize(
    ("lines", "meaning"),
    [
        (["--gpus=2"], "--gpus 2"),
        (["-G a100:2", "-J train"], "--gpus 2 --model *a100* --name train"),
        (["--gres=gpu:h100:4 -N2"], "--hosts 2 --gpus-per-host 4 --model *h100*"),
        (["--gres=gpu"], "--gpus-per-host 1"),
        (["--gpus-per-node=8", "--nodes=2", "--ntasks-per-node=8", "--cpus-per-task=4", "--mem=64G"],
         "--hosts 2 --tasks-per-host 8 --gpus-per-host 8 --cpus 64 --host-memory 128GiB"),
        (["-n 16 --ntasks-per-node 8 --gpus-per-task=1"], "--hosts 2 --tasks-per-host 8 --gpus 16"),
        (["-n4", "-N 2"], "--gpus 0 --cpus 4 --hosts 2 --tasks-per-host 2"),
        (["-c 4", "--mem-per-cpu=2000"], "--gpus 0 --cpus 4 --host-memory 8000MiB"),
        (["--gpus=2", "--cpus-per-gpu=6", "--mem-per-gpu=10G"], "--gpus 2 --cpus 12 --host-memory 20GiB"),
        (["--time=1-12:30"], "--gpus 0 --cpus 1 --max 131400s"),
        (["-t", "-a 0-99%10"], None),
        (["-a 0-99%10", "-o logs/%A_%a.out"], "--gpus 0 --cpus 1 --array 0-99%10 --output logs/%j_%a.out"),
        (["-J sweep", "-o logs/%x-%4j.out"], "--gpus 0 --cpus 1 --output logs/%x-%j.out --name sweep"),
        (["-a 1,3", "-o slurm-%j.out"], "--gpus 0 --cpus 1 --array 1,3 --output slurm-%j_%a.out"),
        (["-d afterok:12:13,afterany:14"], "--gpus 0 --cpus 1 --after 12:ok --after 13:ok --after 14:any"),
        (["--export=NONE,DATA,MODE=fast"], "--gpus 0 --cpus 1 --env DATA --env MODE=fast"),
        (["-D /data", "--requeue", "-H", "-W", "-w node-7"],
         "--gpus 0 --cpus 1 --host node-7 --cd /data --requeue --hold --wait"),
        (["-A vision"], "--gpus 0 --cpus 1 --group vision"),
        (["--job-name='my job'  # as it is called"], "--gpus 0 --cpus 1 --name my job"),
        (["--time=UNLIMITED", "--gpus=1", "--gpus=3"], "--gpus 3"),
    ],
)  # fmt: skip
def test_what_means_the_same_is_taken(lines: list[str], meaning: str | None) -> None:
    if meaning is None:
        assert [remark.text for remark in read_directives(script(*lines)).unknown] == ["-t"]
    else:
        assert options(*lines) == meaning


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("--exclusive", "all GPUs and cores"),
        ("--constraint=a100", "--host-label"),
        ("--gres=shard:1", "gpu:a100:2"),
        ("--nodes=2-4", "one number"),
        ("--dependency=singleton", "afterok:1234"),
        ("--output=%N.out", "%N"),
        ("--time=soon", "1:30:00"),
        ("--mem=0", "name an amount"),
        ("--mem=lots", "16G"),
        ("--nodelist=node[1-3]", "--host PATTERN"),
        ("--job-nam=x", "did you mean --job-name?"),
        ("--no-such-thing x", "no option of sbatch"),
        ("x", "no option of sbatch"),
        ("-n 3 -N 2", "can't be shared"),
        ("--cpus-per-gpu=2", "no GPUs"),
        ("--array=9-0", "smaller one first"),
        ("--mem", "needs a value"),
    ],
)
def test_what_is_unknown_is_named_with_its_line(line: str, why: str) -> None:
    [remark] = read_directives(script("--time=5", line)).unknown
    assert (remark.line, why in remark.why) == (3, True), remark


def test_what_has_no_effect_is_said() -> None:
    found = read_directives(
        script(
            "--partition=gpu -q high", "--mail-type=END", "--export=ALL", "-N 2", "--ntasks-per-node=2", "-i /dev/null"
        )
        + "srun python eval.py --seed $SLURM_ARRAY_TASK_ID ${SLURM_ARRAY_TASK_ID}\n# srun $SLURM_PROCID\n"
        + "export X=$SLURM_CLUSTER_NAME\n"
    )
    assert found.unknown == ()
    assert [(note.line, note.text) for note in found.notes] == [
        *((2, "--partition=gpu"), (2, "-q high"), (3, "--mail-type=END"), (4, "--export=ALL"), (5, "-N 2")),
        *((6, "--ntasks-per-node=2"), (10, "SLURM_ARRAY_TASK_ID"), (10, "srun"), (12, "SLURM_CLUSTER_NAME")),
    ]
    assert found.notes[6].why == "$CORRAL_ARRAY_INDEX"


def test_directives_end_where_the_script_begins() -> None:
    found = read_directives(
        "#!/bin/bash\n# A comment\n##SBATCH --gpus=7\n#CORRAL --gpus 2 -m '20 GiB'  # each\n\n"
        "#CORRAL --retries 2\nset -e\n#CORRAL --gpus 4\n"
    )
    assert [(line.line, line.words) for line in found.options] == [
        (4, ("--gpus", "2", "-m", "20 GiB")),
        (6, ("--retries", "2")),
    ]
    assert found.notes == found.unknown == ()
    [near] = read_directives("#!/bin/sh\n# CORRAL --gpus 2\n").unknown
    assert near.line == 2
    with pytest.raises(ValueError, match=r"line 2: .*quotation"):
        read_directives("#!/bin/sh\n#CORRAL --name 'x\n")


def test_own_directives_come_after_those_of_slurm() -> None:
    found = read_directives("#!/bin/sh\n#CORRAL --gpus 4\n#SBATCH --gpus=2\n")
    assert [line.words for line in found.options] == [("--gpus", "2"), ("--gpus", "4")]


@given(st.integers(0, 30), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_times_are_those_of_slurm(days: int, hours: int, minutes: int, rest: int) -> None:
    total = ((days * 24 + hours) * 60 + minutes) * 60 + rest
    assert seconds(f"{days}-{hours}:{minutes:02}:{rest:02}") == total
    assert seconds(f"{hours}:{minutes}:{rest}") == total - days * 86400
    assert seconds(f"{days}-{hours}") == days * 86400 + hours * 3600
    assert seconds(f"{minutes}:{rest}") == minutes * 60 + rest
    if minutes:
        assert seconds(str(minutes)) == minutes * 60
    assert units.parse_seconds(f"{total}s") == total


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"), max_size=20)


@given(st.sampled_from(RULES), TEXT)
def test_no_option_is_dropped_without_a_word(rule: object, value: str) -> None:
    """Whatever its value, a line has a meaning, or something is said of it; only a few values mean nothing at all."""
    assert isinstance(rule, tuple)
    long, takes_value = rule[0], rule[4]
    line = f"--{long}={shlex.quote(value)}" if takes_value else f"--{long}"
    found = read_directives(script("--gpus=1", line))
    said = {remark.line for remark in (*found.notes, *found.unknown)} | {words.line for words in found.options}
    nothing = (
        *("time", "nodes", "ntasks", "ntasks-per-node", "export", "input"),
        *("gpus-per-node", "gpus-per-task", "gres"),  # --gpus says it already
    )
    assert 3 in said or long in nothing


@given(st.lists(st.one_of(TEXT, st.sampled_from(["#SBATCH -", "#CORRAL --x", "#SBATCH --mem=", "#!"])), max_size=8))
def test_any_script_can_be_read(lines: list[str]) -> None:
    # `shlex.split` alone may raise, about a quotation that is not closed.
    with contextlib.suppress(ValueError):
        found = read_directives("\n".join(lines))
        assert all(0 < one.line <= len(lines) for one in (*found.options, *found.notes, *found.unknown))
