"""The import graph: parts know only the floors below them, and nothing imports in a circle."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONTRACT = {"schemas", "bus"}
ABOVE = {
    "schemas": set[str](),
    "bus": {"schemas"},
    **dict.fromkeys(("collectors", "processors", "planner", "runners", "client", "login"), CONTRACT),
    **dict.fromkeys(("exporter", "gateway", "notifier"), CONTRACT | {"client"}),
    "dashboard": CONTRACT | {"client", "login"},
    "cli": CONTRACT
    | {"collectors", "processors", "planner", "runners", "client", "login", "exporter", "notifier", "dashboard"}
    | {"gateway"},
}
"""Parts that each part may import, apart from itself."""
FILES = {file.relative_to(ROOT): file for part in ABOVE for file in (ROOT / part).rglob("*.py")}


def imports(file: Path) -> Iterator[Path]:
    """The files that one imports, inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(FILES[file].read_text())):
        names: list[tuple[str, ...]] = []
        if isinstance(node, ast.ImportFrom):
            module = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                base = file.parent.parts[: len(file.parent.parts) - node.level + 1] + module
            elif module[:1] == ("corral",):
                base = module[1:]
            else:
                continue
            names = [(*base, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [tuple(a.name.split("."))[1:] for a in node.names if a.name.startswith("corral.")]
        for name in names:
            # A name is a module, or something in one.
            for parts in (name, name[:-1]):
                found = [Path(*parts).with_suffix(".py"), Path(*parts) / "__init__.py"] if parts else []
                if hits := [path for path in found if path in FILES]:
                    yield hits[0]
                    break


@pytest.fixture(scope="module")
def import_graph() -> Mapping[Path, set[Path]]:
    """The files that each file imports."""
    return {file: set(imports(file)) - {file} for file in FILES}


def test_parts_import_only_the_floors_below_them(import_graph: Mapping[Path, set[Path]]) -> None:
    wrong = {
        (str(file), str(other))
        for file, others in import_graph.items()
        for other in others
        if file.parts[0] != other.parts[0] and other.parts[0] not in ABOVE[file.parts[0]]
    }
    assert wrong == set()
    assert {file.parts[0] for file in FILES} == set(ABOVE)


def test_no_files_and_no_folders_import_in_a_circle(import_graph: Mapping[Path, set[Path]]) -> None:
    folders: dict[Path, set[Path]] = defaultdict(set)
    for file, others in import_graph.items():
        for other in others:
            a, b = file.parent, other.parent
            # A folder and the one that it lies in are one room.
            if a != b and not a.is_relative_to(b) and not b.is_relative_to(a):
                folders[a].add(b)
    for graph in (import_graph, folders):
        try:
            list(TopologicalSorter(graph).static_order())
        except CycleError as error:
            raise AssertionError(" → ".join(map(str, error.args[1]))) from None


def test_programs_find_the_subjects_under_their_former_name() -> None:
    from corral.schemas import bus, subjects

    assert bus is subjects
