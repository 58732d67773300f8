"""`corral prompt`: the GPUs that are held, short enough for the prompt of a shell.

A prompt must not wait for a fleet: the shell shows a file, and has the command write it anew in the background.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final

import typer

from ...schemas.requests import Lease
from ..exits import USAGE, CommandError
from ..options import AsJson, NatsUrl, Timeout, connected, print_json, run

REFRESH_SECONDS: Final = 10
"""Time between two questions to the planner, while prompts are shown."""


class Shell(StrEnum):
    """Shells that have a snippet."""

    BASH = "bash"
    ZSH = "zsh"


# `[ -r … ]` and `read` are the shell's own: nothing is started but the refresh, and that in the background.
_SNIPPET: Final = """\
_corral_prompt_at=-{seconds}
_corral_prompt() {{
    corral_held=
    [ -r {file} ] && read -r corral_held < {file}
    if [ $((SECONDS - _corral_prompt_at)) -ge {seconds} ]; then
        _corral_prompt_at=$SECONDS
        (command corral prompt --file {file} >/dev/null 2>&1 &)
    fi
}}
"""
_HOOKS: Final = {
    Shell.BASH: 'PROMPT_COMMAND="_corral_prompt${PROMPT_COMMAND:+; $PROMPT_COMMAND}"\n'
    "PS1='${corral_held:+[$corral_held] }'$PS1\n",
    Shell.ZSH: "autoload -Uz add-zsh-hook\nadd-zsh-hook precmd _corral_prompt\nsetopt prompt_subst\n"
    "PS1='${corral_held:+[$corral_held] }'$PS1\n",
}


def prompt(
    init: Annotated[
        Shell | None,
        typer.Option("--init", metavar="SHELL", help="Print what to eval in the start-up file of bash or zsh."),
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", metavar="FILE", help="Write it to this file, too; empty for nothing held.")
    ] = None,
    json: AsJson = False,
    nats: NatsUrl = None,
    timeout: Timeout = 3.0,
) -> None:
    """Print the GPUs that you hold in one line, such as "2×H100 1h05m"; nothing if you hold none.

    The time is the shortest until a lease ends for good: by its limit, its window or a preemption.

    Examples:
      corral prompt
      eval "$(corral prompt --init bash)"
      corral prompt --json
    """
    if init is not None:
        if json or file is not None:
            raise CommandError("--init prints a snippet: leave --json and --file out", USAGE)
        print(_SNIPPET.format(file=_quoted(_cache()), seconds=REFRESH_SECONDS) + _HOOKS[init], end="")
        return

    async def work() -> list[Lease]:
        async with connected(nats, timeout=timeout) as client:
            return await client.leases(owner=client.owner)

    try:
        found = run(work())
    except BaseException:
        if file is not None:  # what was held is not known any more
            _write(file, "")
        raise
    text = shown(found, datetime.now(UTC))
    if file is not None:
        _write(file, text)
    if json:
        print_json({"text": text, "leases": [lease.lease_id for lease in found]})
    elif text:
        print(text)


def shown(leases: Iterable[Lease], now: datetime) -> str:
    """Devices by model, with the time that is left where it is limited; empty without devices."""
    counts: dict[str, float] = defaultdict(float)
    ends: list[datetime] = []
    for lease in leases:
        devices = [grant for grant in lease.grants if grant.device]
        for grant in devices:
            counts[_short(grant.model)] += grant.share
        end = lease.preemption.ends_at if lease.preemption is not None else lease.ends_at
        if devices and end is not None:
            ends.append(end)
    if not counts:
        return ""
    parts = [f"{count:g}×{model}" for model, count in sorted(counts.items())]
    left = [_duration((min(ends) - now).total_seconds())] if ends else []
    return " ".join(["+".join(parts), *left])


def _short(model: str) -> str:
    """The word of a model's name that says which it is: `H100` of `NVIDIA H100 80GB HBM3`."""
    words = [word for word in model.split() if word not in ("NVIDIA", "AMD", "GeForce", "Instinct", "Tesla", "Radeon")]
    if words[:1] == ["RTX"]:
        return "".join(words[:2])
    return words[0] if words else "GPU"


def _duration(seconds: float) -> str:
    minutes = max(0, int(seconds // 60))
    return f"{minutes // 60}h{minutes % 60:02}m" if minutes >= 60 else f"{minutes}m"


def _cache() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / "corral" / "prompt"


def _write(file: Path, text: str) -> None:
    """Write the file as a whole: a prompt may read it at any time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}")
    part.write_text(f"{text}\n", encoding="utf-8")
    part.replace(file)


def _quoted(file: Path) -> str:
    return "'" + str(file).replace("'", "'\\''") + "'"
