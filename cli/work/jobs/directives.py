"""Options of `corral submit` in the first lines of a script: `#CORRAL --gpus 2`, and `#SBATCH` of Slurm. Pure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Final, NamedTuple

from . import sbatch
from .sbatch import Remark

_DIRECTIVE: Final = re.compile(r"#(CORRAL|SBATCH)(?:\s+(.*))?")
_NEAR: Final = re.compile(r"#\s+(CORRAL|SBATCH)\s+-|#(corral|sbatch|Corral|Sbatch)\s+-")
_SLURM_NAMES: Final = re.compile(r"\bSLURM[A-Z]*_[A-Z0-9_]+\b")
_SRUN: Final = re.compile(r"(?:^|[;&|(]|\bexec|\bthen|\bdo|\btime)\s*srun\b")


class Words(NamedTuple):
    """Options on one line of a script.

    Attributes:
        line: number of the line, from 1.
        words: of the command line.
    """

    line: int
    words: tuple[str, ...]


class Directives(NamedTuple):
    """Directives of a script.

    Attributes:
        options: options of `corral submit`; a later one overrides an earlier one. Those of `#SBATCH` lines come first.
        notes: lines that have no effect, or another one than with Slurm, with the reason.
        unknown: lines that mean nothing here, and without which the job may not do what is meant.
    """

    options: tuple[Words, ...] = ()
    notes: tuple[Remark, ...] = ()
    unknown: tuple[Remark, ...] = ()


def read_directives(script: str) -> Directives:
    """Read the directives of a script: those before its first line that is neither empty nor a comment, as Slurm does.

    Raises:
        ValueError: a line can't be split into words; the message names it.
    """
    own: list[Words] = []
    options: list[sbatch.Given] = []
    unknown: list[Remark] = []
    for number, text in _header(script):
        found = _DIRECTIVE.fullmatch(text.rstrip())
        if found is None:
            if _NEAR.match(text):
                unknown.append(Remark(number, text.strip(), "a directive begins with #CORRAL or #SBATCH"))
            continue
        try:
            words = shlex.split(found[2] or "", comments=True)
        except ValueError as error:
            raise ValueError(f"line {number}: {text.strip()!r}: {str(error).lower()}") from None
        if found[1] == "CORRAL":
            own.append(Words(number, tuple(words)))
        else:
            given, wrong = sbatch.parse(number, words)
            options += given
            unknown += wrong
    if not options and not unknown:
        return Directives(tuple(own))
    meaning = sbatch.translate(options)
    remarks = [*meaning.notes, *_slurm_in_the_text(script)]
    return Directives(
        (*(Words(line, words) for line, words in meaning.words), *own), tuple(remarks), (*unknown, *meaning.unknown)
    )


def _header(script: str) -> Iterator[tuple[int, str]]:
    for number, text in enumerate(script.splitlines(), 1):
        if text.strip() and not text.lstrip().startswith("#"):
            return
        yield number, text


def _slurm_in_the_text(script: str) -> Iterator[Remark]:
    """Uses of Slurm's variables and of `srun`, each once, with what is there instead."""
    said: set[str] = set()
    for number, text in enumerate(script.splitlines(), 1):
        if text.lstrip().startswith("#"):
            continue
        found = list(_SLURM_NAMES.findall(text)) + (["srun"] if _SRUN.search(text) else [])
        for name in found:
            if name not in said:
                said.add(name)
                yield Remark(number, name, sbatch.INSTEAD.get(name, "it is not set here"))
