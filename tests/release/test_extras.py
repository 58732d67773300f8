"""What extras must not bring: an installation that nobody wants to wait for is not made."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BRINGS = re.compile(r"^([\w.-]+)(?:\[[^\]]*\])?==.*?(?=^[\w.-]+(?:\[|==)|\Z)", re.M | re.S)
HEAVY = {"duckdb", "grpcio", "nicegui", "numpy", "pillow", "pyarrow", "uvloop"}


def needed_by() -> dict[str, set[str]]:
    """Who needs each package of the lock, as its comments have it."""
    found: dict[str, set[str]] = {}
    for block in BRINGS.finditer((ROOT / "requirements.lock").read_text()):
        comments = "\n".join(line.strip(" #") for line in block[0].splitlines() if line.strip().startswith("#"))
        found[canonicalize_name(block[1])] = {
            canonicalize_name(name) for name in re.findall(r"([\w.-]+)", comments.removeprefix("via"))
        }
    return found


def brought(extra: str) -> set[str]:
    """Names of all packages that `corral[extra]` installs, or more where another extra of a package needs them."""
    wanted, todo, extras = set[str](), list(PROJECT["dependencies"]), [extra] if extra else []
    for name in extras:
        for text in PROJECT["optional-dependencies"][name]:
            requirement = Requirement(text)
            if requirement.name == "corral":
                extras += requirement.extras
            else:
                todo.append(text)
    wanted |= {canonicalize_name(Requirement(text).name) for text in todo}
    parents = needed_by()
    grown = True
    while grown:
        more = {name for name, by in parents.items() if by & wanted} - wanted
        wanted |= more
        grown = bool(more)
    return wanted


@pytest.mark.parametrize(
    ("extra", "allowed"),
    [
        ("", set[str]()),
        ("top", set[str]()),
        ("auth", set[str]()),
        ("collector", {"uvloop"}),
        ("exporter", {"uvloop"}),
        ("simulated", {"numpy", "uvloop"}),
        ("planner", {"numpy", "uvloop"}),
        ("dashboard", {"nicegui", "uvloop"}),
    ],
)
def test_an_extra_brings_nothing_heavy(extra: str, allowed: set[str]) -> None:
    found = brought(extra)
    assert "msgspec" in found
    assert found & HEAVY == allowed
