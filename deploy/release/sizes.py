"""Measure what each extra installs, in empty environments, with the versions of the lock.

    python deploy/release/sizes.py [FILE]

The size is that of `site-packages` as pip leaves it, compiled, without pip itself; the time is CPU time of
`corral --help`. The table goes between the marks of FILE (docs/how-to/install.md), or to the terminal.
"""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "requirements.lock"
MARKS = ("<!-- sizes: make sizes -->\n", "<!-- sizes end -->\n")
SHOWN = (
    "", "top", "auth", "collector", "simulated", "replay", "planner", "processor", "lake", "exporter", "otlp",
    "dashboard", "notify", "gateway", "oidc", "report", "server", "all",
)  # fmt: skip


def megabytes(folder: Path) -> float:
    """Sum of the sizes of all files."""
    return sum(file.lstat().st_size for file in folder.rglob("*") if not file.is_dir()) / 1e6


def cpu_seconds(*command: str) -> float:
    """CPU time of a command, the least of five."""
    took: list[float] = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(took)


def measure(extra: str, folder: Path) -> tuple[float, int, float]:
    """Size in MB, number of packages, and CPU seconds of `corral --help` with an extra."""
    uv = str(Path(sys.executable).with_name("uv"))
    versions = folder / "versions.txt"
    versions.write_text("\n".join(re.findall(r"^[\w.-]+(?:\[[\w,-]+\])?==[^\\\n]+", LOCK.read_text(), re.M)))
    target = folder / "venv"
    subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(target)], check=True)
    install = [uv, "pip", "install", "--quiet", "--compile-bytecode", "--link-mode", "copy", "--constraints"]
    what = f"{ROOT}[{extra}]" if extra else str(ROOT)
    environment = os.environ | {"VIRTUAL_ENV": str(target)}
    subprocess.run([*install, str(versions), what], check=True, env=environment)
    packages = next(target.glob("lib/python*/site-packages"))
    count = len(list(packages.glob("*.dist-info")))
    return megabytes(packages), count, cpu_seconds(str(target / "bin" / "corral"), "--help")


def main() -> None:
    """Measure all extras."""
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lines = ["| extra | MB | packages | `corral --help`, CPU |", "| --- | --- | --- | --- |"]
    with tempfile.TemporaryDirectory() as folder:
        for extra in SHOWN:
            if extra and extra not in known:
                continue
            size, count, seconds = measure(extra, Path(folder))
            lines.append(f"| {f'`{extra}`' if extra else 'none'} | {size:.0f} | {count} | {seconds:.2f} s |")
            print(lines[-1], flush=True)
    if len(sys.argv) > 1:
        page = Path(sys.argv[1])
        before, begin, rest = page.read_text().partition(MARKS[0])
        _, end, after = rest.partition(MARKS[1])
        table = "\n".join(lines)
        page.write_text(f"{before}{begin}\n{table}\n\n{end}{after}")


if __name__ == "__main__":
    main()
