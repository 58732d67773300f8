"""What a release consists of, and that it works where nothing else of this repository is."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSION = PROJECT["project"]["version"]
PACKAGES = [name.split(".") for name in PROJECT["tool"]["setuptools"]["packages"]]
FOLDERS = sorted({package[1] for package in PACKAGES if package[1:]})
DATA = {".sql", ".typed", ".js", ".json", ".css", ".svg"}
NEVER = ("tests/", "bench/", "docs/", "deploy/", "shared/", "examples/", ".duckdb", ".parquet", ".csv", ".pyc")


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheel and source archive, built from a copy: other tests run in this folder."""
    source = tmp_path_factory.mktemp("source")
    hidden = shutil.ignore_patterns("__pycache__", "node_modules", "*.duckdb*")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=hidden)
    (source / "tests").mkdir()
    (source / "tests" / "test_nothing.py").write_text("")
    for name in ("__init__.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    out = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)],
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out


def files() -> set[str]:
    """What a package has, as the repository names it."""
    found: set[str] = set()
    for package in PACKAGES:
        folder = ROOT.joinpath(*package[1:])
        found |= {path.relative_to(ROOT).as_posix() for path in folder.glob("*.py")}
    for name in FOLDERS:
        for path in (ROOT / name).rglob("*"):
            if path.suffix in DATA and "node_modules" not in path.parts:
                found.add(path.relative_to(ROOT).as_posix())
    return found


def test_wheel_and_archive_hold_the_packages_and_nothing_else(dist: Path) -> None:
    with zipfile.ZipFile(dist / f"corral-{VERSION}-py3-none-any.whl") as wheel:
        names = wheel.namelist()
    packed = {name.removeprefix("corral/") for name in names if name.startswith("corral/")}
    assert packed == files()
    rest = {name for name in names if not name.startswith("corral/")}
    assert all(name.startswith(f"corral-{VERSION}.dist-info/") for name in rest)
    assert any(name.endswith("licenses/LICENSE") for name in rest)
    with tarfile.open(dist / f"corral-{VERSION}.tar.gz") as archive:
        inside = {name.partition("/")[2] for name in archive.getnames() if "." in name.rpartition("/")[2]}
    assert files() <= inside
    assert {"pyproject.toml", "README.md"} <= inside
    for name in (*packed, *inside):
        if not name.startswith("corral.egg-info"):
            assert not any(part in f"/{name}" for part in ("/tests/", *NEVER[1:])) or name == "tests/test_nothing.py"


def test_every_package_is_in_the_list() -> None:
    listed = {"/".join(package[1:]) for package in PACKAGES}
    there = {
        path.parent.relative_to(ROOT).as_posix()
        for name in FOLDERS
        for path in (ROOT / name).rglob("*.py")
        if "node_modules" not in path.parts
    }
    assert there | {""} == listed  # the root has the extension of IPython
    for name in FOLDERS:
        assert (ROOT / name / "py.typed").exists()


def test_a_wheel_works_in_an_environment_of_its_own(dist: Path, tmp_path: Path) -> None:
    home = tmp_path / "env"
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)}))
    # Its libraries are those of this environment; what makes this repository's own folders importable is left out.
    (site / "libraries.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)),
            *("install", "--quiet", "--no-deps", "--no-index", str(dist / f"corral-{VERSION}-py3-none-any.whl")),
        ],
        check=True,
        timeout=110,
        capture_output=True,
    )

    def run(*command: str) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path, timeout=60).stdout

    assert run(str(home / "bin" / "corral"), "--version").strip() == f"corral {VERSION}"
    where = run(str(python), "-c", "import corral.processors.views as v; print(v.__file__); print(len(v.VIEWS))")
    path, views = where.split()
    assert path.startswith(str(home))
    assert int(views) == len(list((ROOT / "processors" / "views").glob("*.sql")))


def test_the_bill_of_materials_names_what_the_lock_installs(tmp_path: Path) -> None:
    out = tmp_path / "sbom.json"
    script = ROOT / "deploy" / "release" / "sbom.py"
    subprocess.run([sys.executable, str(script), str(out)], check=True, capture_output=True, timeout=100)
    bill = json.loads(out.read_text())
    assert bill["bomFormat"] == "CycloneDX"
    assert bill["metadata"]["component"]["name"] == "corral"
    lock = (ROOT / "deploy" / "container" / "requirements.lock").read_text()
    locked = {line.split("==")[0].partition("[")[0] for line in lock.splitlines() if "==" in line and line[0].isalnum()}
    assert {component["name"] for component in bill["components"]} == locked
    for component in bill["components"]:
        assert component["version"]
        assert component["externalReferences"][0]["hashes"]
