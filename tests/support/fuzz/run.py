"""The long form: a target with atheris, guided by coverage. `make fuzz` runs all of them, one after the other.

    PYTHONPATH=tests python -P -m support.fuzz.run TARGET [--seconds 60] [--corpus FOLDER]

`all` runs every target; without one they are listed.

What breaks a target ends it with another exit code than 0, and its input is in a file: an exception that is no
documented refusal, 10 s for one input, more memory than `MEMORY_BYTES`.
"""

from __future__ import annotations

import argparse
import logging
import re
import resource
import subprocess
import sys
from pathlib import Path

MEMORY_BYTES = 4 * 2**30
INPUT_BYTES = 64 * 1024
INPUT_SECONDS = 10
THIS = (sys.executable, "-P", "-m", "support.fuzz.run")
_EXECUTED = re.compile(r"number_of_executed_units: (\d+)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path, default=Path(".fuzz"), help="inputs that were found, kept for next time")
    arguments = parser.parse_args()
    try:
        import atheris
    except ImportError:
        sys.exit(
            "fuzz: atheris is not here. It has wheels for Linux on x86-64 and Python 3.11 to 3.13; elsewhere "
            "`pytest tests/fuzz` is the short form, by hypothesis alone"
        )
    if arguments.target == "all":
        sys.exit(_all(arguments.seconds, arguments.corpus))
    with atheris.instrument_imports(include=["corral"], enable_loader_override=False):
        from support.fuzz import targets
    if arguments.target is None:
        print("\n".join(targets.TARGETS))
        return
    logging.disable(logging.CRITICAL)
    target = targets.TARGETS[arguments.target]
    corpus = arguments.corpus / arguments.target
    crashes = arguments.corpus / "crashes" / arguments.target
    for folder in (corpus, crashes):
        folder.mkdir(parents=True, exist_ok=True)
    for at, seed in enumerate(target.seeds):
        (corpus / f"seed-{at}").write_bytes(seed)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    options = [
        *(sys.argv[0], str(corpus), f"-max_total_time={arguments.seconds}", f"-max_len={INPUT_BYTES}"),
        *(f"-timeout={INPUT_SECONDS}", f"-artifact_prefix={crashes}/", "-print_final_stats=1"),
    ]
    atheris.Setup(options, target.run)
    atheris.Fuzz()


def _all(seconds: int, corpus: Path) -> int:
    """Each target in a process of its own, and a line for each."""
    listed = subprocess.run([*THIS], capture_output=True, text=True, check=True).stdout.split()
    broken = total = 0
    for name in listed:
        log = corpus / f"{name}.log"
        corpus.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as out:
            code = subprocess.run(
                [*THIS, name, f"--seconds={seconds}", f"--corpus={corpus}"],
                stdout=out,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode
        found = _EXECUTED.search(log.read_text(errors="replace"))
        executed = int(found[1]) if found else 0
        total += executed
        broken += code != 0
        print(f"{name:12} {executed:12,} inputs  {'well' if not code else f'BROKEN ({code}): {log}'}", flush=True)
    print(f"{'in all':12} {total:12,} inputs, {broken} of {len(listed)} targets broken")
    return min(1, broken)


if __name__ == "__main__":
    main()
