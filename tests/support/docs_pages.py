"""The commands of a Markdown page: read from its fenced blocks, run in one shell in the order of the page.

A block is run by its language: `sh` and `console` command by command, `python` and `sql` whole; `toml`, `yaml` and
`json` are read. What a block needs, or why it can't be run here, is said in a comment before it, which the site hides:

    <!-- run: not here: REASON -->        it is not run; its `corral` commands are still held to their options
    <!-- run: exits 4 -->                 each of its commands ends with that code
    <!-- run: first
    COMMANDS -->                          run before it, in the language of the block
    <!-- run: output varies -->           of a console block: the output shown is only an example

A command has to end with 0 otherwise. What a `console` block shows behind a command is compared in its shape: words
must be the same, numbers and names of devices and leases may differ, and `…` stands for anything.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import subprocess
import textwrap
import tomllib
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
RUN = ("sh", "console", "python", "sql")
READ = ("toml", "yaml", "json")
TEXT = ("", "text", "promql")
SECONDS = 200


class Block(NamedTuple):
    """A fenced block with what is said of it.

    Attributes:
        line: of its first line of content, from 1.
        language: behind the fence.
        text: within.
        not_here: why it can't be run; empty if it can.
        first: what is run before it.
        code: that its commands end with.
        varies: whether the output shown is an example only.
    """

    line: int
    language: str
    text: str
    not_here: str = ""
    first: str = ""
    code: int = 0
    varies: bool = False


class Command(NamedTuple):
    """One command with the output that is shown behind it, and the code that it must end with; None if any."""

    line: int
    text: str
    shown: str = ""
    code: int | None = 0


_FENCE = re.compile(r"^( *)```([\w-]*)[^\n]*\n(.*?)^\1``` *$", re.MULTILINE | re.DOTALL)
_SAID = re.compile(r"<!-- run: (.*?) *-->\s*", re.DOTALL)


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page."""
    text = page.read_text()
    found: list[Block] = []
    for fence in _FENCE.finditer(text):
        block = Block(text.count("\n", 0, fence.start()) + 2, fence[2], textwrap.dedent(fence[3]))
        before = text[: fence.start()]
        while said := re.search(r"<!-- run: ((?:(?!-->).)*?)\s*-->\s*\Z", before, re.DOTALL):
            before = before[: said.start()]
            words = said[1]
            if words.startswith("not here: "):
                block = block._replace(not_here=words.removeprefix("not here: "))
            elif words.startswith("first"):
                block = block._replace(first=words.removeprefix("first").strip())
            elif match := re.fullmatch(r"exits (\d+)", words):
                block = block._replace(code=int(match[1]))
            elif words == "output varies":
                block = block._replace(varies=True)
            else:
                raise ValueError(f"{page}:{block.line}: {words!r} means nothing")
        found.append(block)
    return found


def logical_lines(text: str, line: int = 1) -> list[tuple[int, str]]:
    """Shell commands, each with its line: continued lines, quotes and here-documents are one."""
    found: list[tuple[int, str]] = []
    waiting, began = "", line
    for number, one in enumerate(text.splitlines(), line):
        if not waiting and (not one.strip() or one.lstrip().startswith("#")):
            continue
        began = began if waiting else number
        waiting += one + "\n"
        checked = subprocess.run(["bash", "-n"], input=waiting, capture_output=True, text=True, check=False)
        if checked.returncode == 0 and not checked.stderr and not one.endswith("\\"):
            found.append((began, waiting.rstrip("\n")))
            waiting = ""
    if waiting:
        raise ValueError(f"line {began}: {waiting!r} is no command")
    return found


def console(block: Block) -> list[Command]:
    """The commands of a console block, each with what is shown behind it."""
    found: list[Command] = []
    for offset, line in enumerate(block.text.splitlines()):
        if line.startswith("$ "):
            found.append(Command(block.line + offset, line[2:], code=block.code))
        elif found and found[-1].text.endswith("\\"):
            found[-1] = found[-1]._replace(text=found[-1].text + "\n" + line.removeprefix("> "))
        elif found:
            found[-1] = found[-1]._replace(shown=found[-1].shown + line + "\n")
    return found


def commands(block: Block, folder: Path, url: str = "") -> list[Command]:
    """What is run for a block, in shell; `url` is the bus at which pages find one on this machine."""
    if block.not_here or block.language not in RUN:
        return []
    name = f"block-{block.line}"
    if block.language == "sh":
        shell = [Command(line, text, code=block.code) for line, text in logical_lines(block.text, block.line)]
    elif block.language == "console":
        shell = console(block)
    elif block.language == "python":
        text = (f"{block.first}\n{block.text}" if block.first else block.text).replace("nats://127.0.0.1:4222", url)
        if re.search(r"^(await |async (for|with) |\w+ = await )", text, re.MULTILINE):
            text = f"import asyncio\nasync def main():\n{textwrap.indent(text, '    ')}\nasyncio.run(main())\n"
        (folder / f"{name}.py").write_text(text)
        return [Command(block.line, f"python {name}.py", code=block.code)]
    else:
        statements = [part for part in re.split(r";[ ]*(?:--[^\n]*)?\n", block.text + "\n") if part.strip()]
        shell = []
        for number, statement in enumerate(statements):
            (folder / f"{name}-{number}.sql").write_text(statement)
            shell.append(Command(block.line, f"corral query -f {name}-{number}.sql", code=block.code))
    first = [Command(block.line, text) for _, text in logical_lines(block.first)] if block.first else []
    return first + shell


def script(found: list[Command], results: Path) -> str:
    """A bash script that runs commands one after the other in one shell, and keeps what each prints and ends with."""
    lines = ["set -o pipefail"]
    for number, command in enumerate(found):
        out = shlex.quote(str(results / str(number)))
        lines += ["{", command.text, f"}} >{out}.out 2>{out}.err </dev/null", f"echo $? >{out}.code"]
    return "\n".join(lines) + "\n"


def run(page: Path, found: list[Command], folder: Path, environment: dict[str, str], varies: set[int]) -> list[str]:
    """Run the commands of a page; what is wrong, in words."""
    results = folder / ".results"
    results.mkdir()
    (results / "page.sh").write_text(script(found, results))
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(["bash", str(results / "page.sh")], cwd=folder, env=environment, check=False, timeout=SECONDS)
    wrong: list[str] = []
    for number, command in enumerate(found):
        where = f"{page.name}:{command.line}: {command.text}"
        code = results / f"{number}.code"
        if not code.exists():
            wrong.append(f"{where}\n  did not come to its end")
            break
        out, err = ((results / f"{number}.{kind}").read_text(errors="replace") for kind in ("out", "err"))
        if command.code is not None and int(code.read_text()) != command.code:
            wrong.append(
                f"{where}\n  ended with {code.read_text().strip()}, not {command.code}\n{out[-1500:]}{err[-1500:]}"
            )
        elif command.shown and command.line not in varies and (apart := differs(command.shown, out + err)):
            wrong.append(f"{where}\n  {apart}")
    return wrong


_NUMBER = re.compile(r"\d[\d.,:]*")
_IDENTITY = re.compile(r"\b(GPU-)?[0-9a-f]{8,}(-[0-9a-f]+)*\b|\bsim-\d+\b|\b[0-9a-f]{6,}-\d+-\d+\b")
_MODEL = re.compile(r"NVIDIA [A-Z0-9][\w-]*( \d+GB)?( \w*HBM\w*| PCIe)?|AMD Instinct \w+")


def shape(line: str) -> str:
    """A line without what may differ from run to run."""
    line = _IDENTITY.sub("ID", _MODEL.sub("MODEL", line))
    line = re.sub(r"-?" + _NUMBER.pattern + r"(s|m|h|d|ms|°|%)?", "#", line)
    return " ".join(re.sub(r"[█▏▎▍▌▋▊▉·]+", "", line).split())


def differs(shown: str, printed: str) -> str:
    """How an output differs from the one that a page shows; empty if only in what may."""
    actual = [shape(line) for line in printed.splitlines() if line.strip()]
    at = 0
    anything = False
    for line in shown.splitlines():
        if not line.strip():
            continue
        if line.strip() == "…":
            anything = True
            continue
        expected = re.escape(shape(line)).replace("…", ".*")
        found = next((index for index in range(at, len(actual)) if re.fullmatch(expected, actual[index])), None)
        if found is None or (found > at and not anything):
            there = actual[at] if at < len(actual) else "nothing more"
            return f"shows {line!r}, but prints {there!r}:\n{textwrap.indent(printed, '    ')}"
        at, anything = found + 1, False
    return "" if anything or at == len(actual) else f"shows nothing of {actual[at]!r}"


def read(page: Path, block: Block) -> str:
    """What is wrong with a block of data; empty if nothing."""
    try:
        match block.language:
            case "toml":
                tomllib.loads(block.text)
            case "json":
                json.loads(block.text)
            case "yaml":
                import yaml

                yaml.safe_load(block.text)
            case _:
                pass
    except Exception as error:
        return f"{page.name}:{block.line}: {error}"
    return ""
