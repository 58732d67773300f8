"""Whom packages name as their maintainer."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

BUILD = runpy.run_path(str(Path(__file__).parents[2] / "deploy" / "packages" / "build.py"))
DEBIAN = {"DEBFULLNAME": "Deb Ian", "DEBEMAIL": "deb@lab.example"}
AUTHORS = {"authors": [{"name": "Only a name"}, {"name": "Au Thor", "email": "au@lab.example"}]}
GIT = {"user.name": "Gi Tea", "user.email": "git@lab.example"}


@pytest.mark.parametrize(
    ("given", "project", "environment", "git", "found"),
    [
        ("Ann Lee <ann@lab.example>", AUTHORS, DEBIAN, GIT, "Ann Lee <ann@lab.example>"),
        ("", AUTHORS, DEBIAN, GIT, "Deb Ian <deb@lab.example>"),
        ("", AUTHORS, {"DEBEMAIL": "deb@lab.example"}, GIT, "Au Thor <au@lab.example>"),
        ("", {}, {}, GIT, "Gi Tea <git@lab.example>"),
        ("", {}, {}, {}, BUILD["NOBODY"]),
    ],
)
def test_who_builds_a_package_is_its_maintainer(
    given: str, project: dict[str, Any], environment: dict[str, str], git: dict[str, str], found: str
) -> None:
    assert BUILD["maintainer"](given, project, environment, lambda key: git.get(key, "")) == found


@pytest.mark.parametrize("given", ["Ann", "ann@lab.example", "Ann <ann>", "Ann <a@b>\nDepends: x", "<a@b.example>"])
def test_another_form_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match="write 'NAME <ADDRESS>'"):
        BUILD["maintainer"](given, {}, {}, str)
