"""`#SBATCH` options as those of `corral submit`: which mean the same, have no effect, or are unknown. Pure.

Their meaning is that of Slurm 24.11's sbatch(1).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

from ....schemas.values.misspelt import closest
from ....schemas.work.jobs import parse_array


class Rule(NamedTuple):
    """An option of sbatch.

    Attributes:
        long: its name.
        short: its letter; empty if it has none.
        corral: options of `corral submit` that mean the same; empty if none do.
        remark: what is different, or why it has no effect; empty if there is nothing to say.
        value: true if it takes a value.
        harmless: true if a job without it does the same work; false makes it an unknown one.
    """

    long: str
    short: str
    corral: str
    remark: str = ""
    value: bool = True
    harmless: bool = True


_ONE_SCRIPT = "the script itself runs on each host, so `srun` is not needed"
_NO_MAIL = "no mail is sent"
_PLACES = "cores are granted by number, not by place"

RULES: Final = (
    Rule("job-name", "J", "--name"),
    Rule("array", "a", "--array"),
    Rule("time", "t", "--max"),
    Rule("gpus", "G", "--gpus, and --model for a type"),
    Rule("gpus-per-node", "", "--gpus-per-host, and --model for a type"),
    Rule("gres", "", "--gpus-per-host, and --model for a type", "of `gpu` alone"),
    Rule("gpus-per-task", "", "--gpus", "times the number of tasks"),
    Rule("nodes", "N", "--hosts", _ONE_SCRIPT),
    Rule("ntasks", "n", "--tasks-per-host", "divided by the number of hosts; each task runs the script"),
    Rule("ntasks-per-node", "", "--tasks-per-host", "each task runs the script, so `srun` is not needed"),
    Rule("cpus-per-task", "c", "--cpus", "times the number of tasks"),
    Rule("cpus-per-gpu", "", "--cpus", "times the number of GPUs"),
    Rule("mem", "", "--host-memory", "times the number of hosts; 0 (all of it) is unknown"),
    Rule("mem-per-cpu", "", "--host-memory", "times the number of cores"),
    Rule("mem-per-gpu", "", "--host-memory", "times the number of GPUs"),
    Rule("dependency", "d", "--after", "`afterok`, `afternotok` and `afterany` of whole jobs"),
    Rule("output", "o", "--output", "with `%j`, `%A`, `%a` and `%x` alone"),
    Rule("chdir", "D", "--cd"),
    Rule("export", "", "--env", "`NONE` is always so: what the job needs is named"),
    Rule("nodelist", "w", "--host", "of one host"),
    Rule("account", "A", "--group", "of which the owner must be a member; without groups it has no effect"),
    Rule("requeue", "", "--requeue", value=False),
    Rule("hold", "H", "--hold", value=False),
    Rule("wait", "W", "--wait", value=False),
    Rule("no-requeue", "", "", "it is the default", value=False),
    Rule("kill-on-invalid-dep", "", "", "a job whose dependency can't be met is always cancelled"),
    Rule("error", "e", "", "errors go where the output goes"),
    Rule("open-mode", "", "", "attempts append to their file"),
    Rule("partition", "p", "", "there are no partitions: name what is needed, as --model or --host-label does"),
    Rule("qos", "q", "", "the group of the owner counts, and --priority within it"),
    Rule("reservation", "", "", "an owner's booked windows are used by themselves"),
    Rule("nice", "", "", "--priority orders the jobs of one group"),
    Rule("priority", "", "", "the scale is another: --priority is -1000 to 1000"),
    Rule("comment", "", "", "--label keeps notes"),
    Rule("wckey", "", "", "--label keeps notes"),
    Rule("mail-type", "", "", _NO_MAIL),
    Rule("mail-user", "", "", _NO_MAIL),
    Rule("signal", "", "", "nothing is sent before the time limit; --on-preempt is for preemptions"),
    Rule("parsable", "", "", "--quiet prints the id alone", value=False),
    Rule("quiet", "Q", "", "it is for the command line", value=False),
    Rule("verbose", "v", "", "it is for the command line", value=False),
    Rule("get-user-env", "", "", "the environment is that of the account, and --env", value=False),
    Rule("no-kill", "k", "", "a job on a host that is lost has the state lost", value=False),
    Rule("oversubscribe", "s", "", "cores and memory are shared by amount", value=False),
    Rule("overcommit", "O", "", "cores and memory are shared by amount", value=False),
    Rule("distribution", "m", "", _PLACES),
    Rule("hint", "", "", _PLACES),
    Rule("threads-per-core", "", "", _PLACES),
    Rule("ntasks-per-core", "", "", _PLACES),
    Rule("ntasks-per-socket", "", "", _PLACES),
    Rule("sockets-per-node", "", "", _PLACES),
    Rule("cores-per-socket", "", "", _PLACES),
    Rule("extra-node-info", "B", "", _PLACES),
    Rule("cpu-bind", "", "", _PLACES),
    Rule("mem-bind", "", "", _PLACES),
    Rule("gpu-bind", "", "", "all processes of a task see all its GPUs on their host"),
    Rule("profile", "", "", "the history has the telemetry of all GPUs"),
    Rule("acctg-freq", "", "", "the history has the telemetry of all GPUs"),
    Rule("gpu-freq", "", "", "clocks are not changed", harmless=False),
    Rule("cpu-freq", "", "", "clocks are not changed"),
    Rule("spread-job", "", "", "--hosts says on how many hosts GPUs are", value=False),
    Rule("use-min-nodes", "", "", "--hosts says on how many hosts GPUs are", value=False),
    Rule("constraint", "C", "", "hosts have labels: --host-label KEY=VALUE", harmless=False),
    Rule("exclude", "x", "", "hosts can only be named: --host PATTERN", harmless=False),
    Rule("exclusive", "", "", "ask for all GPUs and cores of a host", value=False, harmless=False),
    Rule("begin", "b", "", "submit it then, or submit it with --hold", harmless=False),
    Rule("deadline", "", "", "--max limits how long it runs", harmless=False),
    Rule("licenses", "L", "", "there are no licenses", harmless=False),
    Rule("switches", "", "", "--within LABEL keeps a job in one rack or NVLink domain", harmless=False),
    Rule("tmp", "", "", "disks are not counted", harmless=False),
    Rule("input", "i", "", "jobs read from /dev/null", harmless=False),
    Rule("container", "", "", "--image runs the command in a container", harmless=False),
    Rule("test-only", "", "", "`corral explain` says what a request would get", value=False, harmless=False),
    Rule("uid", "", "", "the owner of a job is whoever submits it", harmless=False),
    Rule("gid", "", "", "the owner of a job is whoever submits it", harmless=False),
    Rule("mincpus", "", "", "--cpus is the number of cores", harmless=False),
    Rule("clusters", "M", "", "--context names another fleet, on the command line", harmless=False),
)
"""Every option that is known. Those that mean the same come first, then those without an effect, then the others."""

INSTEAD: Final[Mapping[str, str]] = {
    "SLURM_JOB_ID": "$CORRAL_JOB_ID",
    "SLURM_JOBID": "$CORRAL_JOB_ID",
    "SLURM_ARRAY_JOB_ID": "$CORRAL_JOB_ID",
    "SLURM_ARRAY_TASK_ID": "$CORRAL_ARRAY_INDEX",
    "SLURM_ARRAY_TASK_MIN": "$CORRAL_ARRAY_FIRST",
    "SLURM_ARRAY_TASK_MAX": "$CORRAL_ARRAY_LAST",
    "SLURM_ARRAY_TASK_COUNT": "$CORRAL_ARRAY_COUNT",
    "SLURM_JOB_NAME": "$CORRAL_JOB_NAME",
    "SLURM_JOB_NODELIST": "$CORRAL_HOSTS",
    "SLURM_NODELIST": "$CORRAL_HOSTS",
    "SLURM_JOB_NUM_NODES": "$NNODES",
    "SLURM_NNODES": "$NNODES",
    "SLURM_NODEID": "$NODE_RANK",
    "SLURM_PROCID": "$RANK",
    "SLURM_LOCALID": "$LOCAL_RANK",
    "SLURM_NTASKS": "$WORLD_SIZE",
    "SLURM_NPROCS": "$WORLD_SIZE",
    "SLURM_NTASKS_PER_NODE": "$LOCAL_WORLD_SIZE",
    "SLURM_RESTART_COUNT": "$CORRAL_ATTEMPT, which is 1 at first",
    "srun": "each task runs the script itself: write the command alone",
}
"""Variables and commands of Slurm, with those that a job has here."""

_LONG: Final = {rule.long: rule for rule in RULES}
_SHORT: Final = {rule.short: rule for rule in RULES if rule.short}


class Given(NamedTuple):
    """An option as a script has it.

    Attributes:
        line: number of its line, from 1.
        text: as written.
        rule: the option.
        value: empty if it takes none.
    """

    line: int
    text: str
    rule: Rule
    value: str = ""


class Remark(NamedTuple):
    """Something to say of a line of a script.

    Attributes:
        line: number of the line, from 1.
        text: what it is about.
        why: what is different, or what to do.
    """

    line: int
    text: str
    why: str


class Meaning(NamedTuple):
    """Options of sbatch in the words of `corral submit`.

    Attributes:
        words: options, each with the line that it comes from.
        notes: options without an effect, or with another one.
        unknown: options that mean nothing here.
    """

    words: tuple[tuple[int, tuple[str, ...]], ...] = ()
    notes: tuple[Remark, ...] = ()
    unknown: tuple[Remark, ...] = ()


def parse(line: int, words: Sequence[str]) -> tuple[list[Given], list[Remark]]:
    """Options of a line as sbatch reads them: `--name=value`, `--name value`, `-n value` and `-nvalue`.

    Returns:
        Known options, and what is none.
    """
    found: list[Given] = []
    unknown: list[Remark] = []
    left = list(words)
    while left:
        word = left.pop(0)
        name, equals, value = word.partition("=")
        rule = _LONG.get(name[2:]) if name.startswith("--") else _SHORT.get(word[1:2]) if word.startswith("-") else None
        if rule is None:
            near = closest(name.lstrip("-"), _LONG) if name.startswith("--") else ""
            unknown.append(Remark(line, word, f"did you mean --{near}?" if near else "it is no option of sbatch"))
            if word.startswith("-") and not equals and left and not left[0].startswith("-"):
                left.pop(0)
            continue
        if not name.startswith("--"):
            value = word[2:].removeprefix("=")
            equals = value
        if rule.value and not equals:
            if not left:
                unknown.append(Remark(line, word, "it needs a value"))
                continue
            value = left.pop(0)
            word = f"{word} {value}"
        found.append(Given(line, word, rule, value))
    return found, unknown


class _Wrong(Exception):
    """A value has no meaning here; the text says why."""


def translate(options: Sequence[Given]) -> Meaning:
    """Say options in the words of `corral submit`. Without GPUs among them, the job has none, and a core for each task.

    These are Slurm's defaults.
    """
    last = {given.rule.long: given for given in options}
    notes: list[Remark] = []
    unknown: list[Remark] = []
    for given in last.values():
        if not given.rule.corral:
            same = given.rule.long == "input" and given.value == "/dev/null"
            if not same:
                (notes if given.rule.harmless else unknown).append(Remark(given.line, given.text, given.rule.remark))
    words: list[tuple[int, tuple[str, ...]]] = []
    numbers = _Numbers()
    for name in (*_COUNTS, *(name for name in _SAME if name not in _COUNTS)):
        given = last.get(name)
        if given is None:
            continue
        try:
            made = _SAME[name](given, numbers, last)
        except (_Wrong, ValueError) as error:  # a number of thousands of digits is none to Python
            unknown.append(Remark(given.line, given.text, str(error)))
            continue
        words += [(given.line, pair) for pair in made]
        if (remark := _difference(given, numbers)) and not any(note.why == remark for note in notes):
            notes.append(Remark(given.line, given.text, remark))
    if options and not any(name in last for name in _GPU_OPTIONS):
        words.insert(0, (options[0].line, ("--gpus", "0")))
        if not any(name in last for name in _CORES_OR_MEMORY):
            words.insert(1, (options[0].line, ("--cpus", str(numbers.tasks))))
    return Meaning(tuple(words), tuple(sorted(notes)), tuple(sorted(unknown)))


def _difference(given: Given, numbers: _Numbers) -> str:
    """Remark on an option that is understood; empty if there is none."""
    if given.rule.long == "nodes" and numbers.hosts > 1:
        return given.rule.remark
    if given.rule.long in ("ntasks", "ntasks-per-node") and numbers.tasks > 1:
        return _LONG["ntasks-per-node"].remark
    if given.rule.long == "export" and given.value.split(",")[0].upper() == "ALL":
        return "the environment of the shell is not taken over: name what the job needs, as --env NAME"
    return ""


class _Numbers:
    """Numbers by which others are multiplied.

    Attributes:
        hosts: of the job.
        per_host: tasks on each host.
        gpus: in all.
        cpus: in all; 0 if not asked for.
    """

    def __init__(self) -> None:
        self.hosts = 1
        self.per_host = 1
        self.gpus = 0
        self.cpus = 0

    @property
    def tasks(self) -> int:
        """Tasks in all."""
        return self.hosts * self.per_host


_Last = Mapping[str, Given]
_Pairs = list[tuple[str, ...]]
_CORES_OR_MEMORY: Final = ("cpus-per-task", "cpus-per-gpu", "mem", "mem-per-cpu", "mem-per-gpu")
_GPU_OPTIONS: Final = ("gpus", "gpus-per-node", "gres", "gpus-per-task")


def _whole(given: Given) -> int:
    if not given.value.isdecimal() or int(given.value) < 1:
        raise _Wrong(f"{given.value!r} is no number from 1 on")
    return int(given.value)


def _nodes(given: Given, numbers: _Numbers, last: _Last) -> _Pairs:
    if not given.value.isdecimal():
        raise _Wrong("give one number: all hosts start, or none")
    numbers.hosts = _whole(given)
    return [("--hosts", given.value)] if numbers.hosts > 1 else []


def _ntasks(given: Given, numbers: _Numbers, last: _Last) -> _Pairs:
    count = _whole(given)
    if "ntasks-per-node" in last:
        per_host = _whole(last["ntasks-per-node"])
        if "nodes" in last or count % per_host:
            return []
        numbers.hosts = count // per_host
        return [("--hosts", str(numbers.hosts))] if numbers.hosts > 1 else []
    if count % numbers.hosts:
        raise _Wrong(f"{count} tasks can't be shared by {numbers.hosts} hosts: each has the same number")
    numbers.per_host = count // numbers.hosts
    return [("--tasks-per-host", str(numbers.per_host))] if numbers.per_host > 1 else []


def _ntasks_per_node(given: Given, numbers: _Numbers, last: _Last) -> _Pairs:
    numbers.per_host = _whole(given)
    return [("--tasks-per-host", given.value)] if numbers.per_host > 1 else []


def _typed(value: str) -> tuple[str, int]:
    """Type and number of `a100:2`, `2` and `a100`."""
    kind, _, count = value.rpartition(":")
    if not count.isdecimal():
        kind, count = value, "1"
    return kind, int(count)


def _model(kind: str) -> _Pairs:
    return [("--model", f"*{kind}*")] if kind else []


def _gpus(given: Given, numbers: _Numbers, last: _Last) -> _Pairs:
    kind, numbers.gpus = _typed(given.value)
    return [("--gpus", str(numbers.gpus)), *_model(kind)]


def _gpus_per_node(given: Given, numbers: _Numbers, last: _Last) -> _Pairs:
    if "gpus" in last:
        return []
    kind, count = _typed(given.value)
    numbers.gpus = count * numbers.hosts
    return [("--gpus-per-host", str(count)), *_model(kind)]


def _gpus_per_task(given: Given, numbers: _Numbers, last: _Last) -> _Pairs:
    if any(name in last for name in _GPU_OPTIONS[:3]):
        return []
    kind, count = _typed(given.value)
    numbers.gpus = count * numbers.tasks
    return [("--gpus", str(numbers.gpus)), *_model(kind)]


def _gres(given: Given, numbers: _Numbers, last: _Last) -> _Pairs:
    if given.value.lower() == "none":
        return [("--gpus", "0")]
    name, _, rest = given.value.partition(":")
    if name != "gpu" or "," in given.value:
        raise _Wrong("only gpu is known, as in gpu:2 and gpu:a100:2")
    return _gpus_per_node(given._replace(value=rest or "1"), numbers, last)


def _cpus_per_task(given: Given, numbers: _Numbers, last: _Last) -> _Pairs:
    numbers.cpus = _whole(given) * numbers.tasks
    return [("--cpus", str(numbers.cpus))]


def _cpus_per_gpu(given: Given, numbers: _Numbers, last: _Last) -> _Pairs:
    if not numbers.gpus:
        raise _Wrong("the job asks for no GPUs")
    numbers.cpus = _whole(given) * numbers.gpus
    return [("--cpus", str(numbers.cpus))]


_MEMORY: Final = re.compile(r"(\d+)([KMGTkmgt]?)[Bb]?")


def _memory(given: Given, times: int) -> _Pairs:
    found = _MEMORY.fullmatch(given.value)
    if found is None:
        raise _Wrong(f"{given.value!r} is no amount of memory, such as 16G")
    amount = int(found[1]) * times
    if not amount:
        raise _Wrong("all memory of a host can't be asked for: name an amount")
    return [("--host-memory", f"{amount}{(found[2] or 'M').upper()}iB")]


def _mem(given: Given, numbers: _Numbers, last: _Last) -> _Pairs:
    return _memory(given, numbers.hosts)


def _mem_per_cpu(given: Given, numbers: _Numbers, last: _Last) -> _Pairs:
    return _memory(given, numbers.cpus or numbers.tasks)


def _mem_per_gpu(given: Given, numbers: _Numbers, last: _Last) -> _Pairs:
    if not numbers.gpus:
        raise _Wrong("the job asks for no GPUs")
    return _memory(given, numbers.gpus)


_TIME: Final = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


def seconds(text: str) -> int | None:
    """Seconds of a time limit: minutes, `minutes:seconds`, `hours:minutes:seconds`, `days-hours`,
    `days-hours:minutes` or `days-hours:minutes:seconds`; None for no limit.

    Raises:
        ValueError: it is none of these.
    """
    if text.upper() in ("0", "UNLIMITED", "INFINITE", "-1"):
        return None
    found = _TIME.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is no time, such as 90, 1:30:00 or 2-12")
    days, *numbers = (None if part is None else int(part) for part in found.groups())
    given = [part for part in numbers if part is not None]
    if days is not None:
        hours, minutes, rest = (*given, 0, 0)[:3]
        return ((days * 24 + hours) * 60 + minutes) * 60 + rest
    if len(given) == 3:
        return (given[0] * 60 + given[1]) * 60 + given[2]
    return given[0] * 60 + (given[1] if len(given) == 2 else 0)


def _time(given: Given, numbers: _Numbers, last: _Last) -> _Pairs:
    try:
        limit = seconds(given.value)
    except ValueError as error:
        raise _Wrong(str(error)) from None
    return [("--max", f"{limit}s")] if limit else []


_CONDITIONS: Final = {"afterok": "ok", "afternotok": "failed", "afterany": "any"}


def _dependency(given: Given, numbers: _Numbers, last: _Last) -> _Pairs:
    found: _Pairs = []
    for part in given.value.split(","):
        kind, *jobs = part.split(":")
        if kind not in _CONDITIONS or not jobs or not all(job.isdecimal() for job in jobs):
            known = "afterok:1234, afternotok:1234 and afterany:1234 are known, with , between them"
            raise _Wrong(known)
        found += [("--after", f"{job}:{_CONDITIONS[kind]}") for job in jobs]
    return found


_PATTERN: Final = re.compile(r"%\d*([a-zA-Z%])")


def _output(given: Given, numbers: _Numbers, last: _Last) -> _Pairs:
    kinds = set(_PATTERN.findall(given.value))
    if kinds - set("jAax"):
        wrong = ", ".join(f"%{kind}" for kind in sorted(kinds - set("jAax")))
        raise _Wrong(f"{wrong} is unknown in names of files: there are %j (the job), %a (the index) and %x (the name)")
    # Slurm gives each task of an array an id of its own.
    own = "%j_%a" if "array" in last and "a" not in kinds else "%j"
    text = re.sub(r"%\d*j", own, given.value)
    for pattern, meant in ((r"%\d*A", "%j"), (r"%\d*a", "%a"), (r"%\d*x", "%x")):
        text = re.sub(pattern, meant, text)
    return [("--output", text)]


def _array(given: Given, numbers: _Numbers, last: _Last) -> _Pairs:
    try:
        parse_array(given.value)
    except ValueError as error:
        raise _Wrong(str(error)) from None
    return [("--array", given.value)]


def _export(given: Given, numbers: _Numbers, last: _Last) -> _Pairs:
    parts = [part for part in given.value.split(",") if part.upper() not in ("ALL", "NONE", "NIL", "")]
    return [("--env", part) for part in parts]


def _nodelist(given: Given, numbers: _Numbers, last: _Last) -> _Pairs:
    if numbers.hosts > 1 or set(given.value) & set("[],*?/"):
        raise _Wrong("one host can be named: use --host PATTERN for hosts to choose from")
    return [("--host", given.value)]


def _as_it_is(option: str) -> Callable[[Given, _Numbers, _Last], _Pairs]:
    return lambda given, numbers, last: [(option, given.value)] if given.rule.value else [(option,)]


_COUNTS: Final = ("nodes", "ntasks", "ntasks-per-node", *_GPU_OPTIONS, "cpus-per-task", "cpus-per-gpu")
"""Options that others are multiplied by, in the order in which they are needed."""
_SAME: Final[dict[str, Callable[[Given, _Numbers, _Last], _Pairs]]] = {
    "nodes": _nodes,
    "ntasks": _ntasks,
    "ntasks-per-node": _ntasks_per_node,
    "gpus": _gpus,
    "gpus-per-node": _gpus_per_node,
    "gres": _gres,
    "gpus-per-task": _gpus_per_task,
    "cpus-per-task": _cpus_per_task,
    "cpus-per-gpu": _cpus_per_gpu,
    "mem": _mem,
    "mem-per-cpu": _mem_per_cpu,
    "mem-per-gpu": _mem_per_gpu,
    "time": _time,
    "array": _array,
    "dependency": _dependency,
    "output": _output,
    "export": _export,
    "nodelist": _nodelist,
    "job-name": _as_it_is("--name"),
    "chdir": _as_it_is("--cd"),
    "account": _as_it_is("--group"),
    "requeue": _as_it_is("--requeue"),
    "hold": _as_it_is("--hold"),
    "wait": _as_it_is("--wait"),
}
