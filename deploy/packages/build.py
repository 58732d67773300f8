"""Build the Debian packages `corral` and `corral-server`, with the versions of the lock.

    python deploy/packages/build.py [--python 3.11] [--out dist] [--maintainer 'NAME <ADDRESS>']

Each has its libraries below /opt/corral, an environment on the distribution's own Python: Debian 12 has 3.11, Debian 13
has 3.13, Ubuntu 24.04 has 3.12. A package is for one of them, since libraries are compiled for one version of Python.
Nothing is downloaded when a package is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "requirements.lock"
NOBODY = "Unknown builder <unknown@packages.invalid>"
"""Maintainer where nothing names one: an address that never exists (RFC 2606)."""
EXTRAS = {
    "corral": ("collector", "top"),
    "corral-server": (
        "auth", "dashboard", "exporter", "fit", "lake", "notify", "oidc", "otlp", "planner", "processor", "report",
        "server", "simulated", "gateway",
    ),
}  # fmt: skip
"""Extras of each package. `corral-server` has what `corral` has not yet."""
_MAINTAINER = re.compile(r"[^<>\x00-\x1f]+ <[^<>@\s]+@[^<>@\s]+>")
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def maintainer(given: str, project: dict[str, Any], environment: Mapping[str, str], git: Callable[[str], str]) -> str:
    """Whom a package names as its maintainer, as `NAME <ADDRESS>`: whoever builds and gives it out.

    Args:
        given: option; empty for none.
        project: table `project` of pyproject.toml, whose `maintainers` and `authors` count next but one.
        environment: Debian's `DEBFULLNAME` and `DEBEMAIL` count next.
        git: returns a value of git's configuration, which counts last; empty without one.

    Raises:
        ValueError: it has no such form.
    """
    people = [{"name": environment.get("DEBFULLNAME", ""), "email": environment.get("DEBEMAIL", "")}]
    people += [*project.get("maintainers", ()), *project.get("authors", ())]
    people.append({"name": git("user.name"), "email": git("user.email")})
    named = (f"{one['name']} <{one['email']}>" for one in people if one.get("name") and one.get("email"))
    found = given or next(named, "") or NOBODY
    if not _MAINTAINER.fullmatch(found):
        raise ValueError(f"{found!r} is no maintainer: write 'NAME <ADDRESS>', as in 'Ann Lee <ann@lab.example>'")
    return found


def git_setting(key: str) -> str:
    """A value of git's configuration; empty without one, or without git."""
    try:
        done = subprocess.run(["git", "config", key], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def run(*command: str, **values: str) -> None:
    """Run a command; its output is shown."""
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | values)


def tool(name: str) -> str:
    """Path of a program of this environment."""
    return str(Path(sys.executable).with_name(name))


def install(target: Path, extras: tuple[str, ...], wheel: Path, python: str, work: Path) -> None:
    """Install Corral with extras into a folder, each package verified by the lock's hash."""
    project = ROOT / "pyproject.toml"
    wanted = work / "wanted.txt"
    uv = tool("uv")
    compile = [uv, "pip", "compile", "--quiet", "--python-version", python, "--generate-hashes", "--no-emit-index-url"]
    options = [option for extra in extras for option in ("--extra", extra)]
    run(*compile, str(project), *options, "--constraints", str(LOCK), "-o", str(wanted))
    into = ["--python-version", python, "--target", str(target), "--link-mode", "copy", "--quiet"]
    run(
        uv,
        "pip",
        "install",
        *into,
        "--require-hashes",
        "--only-binary",
        ":all:",
        "--no-binary",
        "nkeys",
        "-r",
        str(wanted),
    )
    run(uv, "pip", "install", *into, "--no-deps", str(wheel))
    shutil.rmtree(target / "bin", ignore_errors=True)
    (target / ".lock").unlink(missing_ok=True)


def environment(folder: Path, python: str) -> Path:
    """Make a virtual environment on the distribution's Python, and return its folder of packages."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python3").symlink_to(f"/usr/bin/python{python}")
    (folder / "pyvenv.cfg").write_text(
        f"home = /usr/bin\ninclude-system-site-packages = false\nversion = {python}\nprompt = corral\n"
    )
    command = folder / "bin" / "corral"
    command.write_text(
        "#!/opt/corral/bin/python3\nimport sys\n\nfrom corral.cli.main import main\n\nsys.exit(main())\n"
    )
    command.chmod(0o755)
    return folder / "lib" / f"python{python}" / "site-packages"


def copy_of_sources(folder: Path) -> Path:
    """Copy what a wheel is built of."""
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())
    parts = {name.split(".")[1] for name in tables["tool"]["setuptools"]["packages"] if "." in name}
    for part in parts:
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "node_modules"))
    for name in ("__init__.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def files(folder: Path) -> set[str]:
    """Paths of all files below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def main() -> None:
    """Build both packages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=f"{sys.version_info.major}.{sys.version_info.minor}", help="3.11, 3.12, …")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--only", choices=EXTRAS, help="build this one only")
    parser.add_argument("--maintainer", default="", metavar="'NAME <ADDRESS>'", help="who gives the packages out")
    parser.add_argument("--release", default="1", help="number of the build of this version")
    options = parser.parse_args()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    version = project["version"]
    try:
        who = maintainer(options.maintainer, project, os.environ, git_setting)
    except ValueError as error:
        parser.error(str(error))
    print(f"maintainer: {who}", flush=True)
    full = f"{version}-{options.release}+py{options.python}"
    options.out.mkdir(parents=True, exist_ok=True)
    major, minor = options.python.split(".")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        # Of a copy: what an earlier build left in this folder would be packed, too.
        source = copy_of_sources(work / "source")
        run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(work / "wheel"), str(source))
        [wheel] = (work / "wheel").glob("*.whl")
        base = environment(work / "corral", options.python)
        install(base, EXTRAS["corral"], wheel, options.python, work)
        if options.only != "corral":
            packages = work / "corral-server" / "lib" / f"python{options.python}" / "site-packages"
            install(packages, (*EXTRAS["corral"], *EXTRAS["corral-server"]), wheel, options.python, work)
            for path in files(packages) & files(base):
                (packages / path).unlink()
        for package in EXTRAS:
            if options.only not in (None, package):
                continue
            values = {
                "ARCH": ARCHITECTURES[platform.machine()],
                "VERSION": version,
                "RELEASE": f"{options.release}+py{options.python}",
                "FULL_VERSION": full,
                "MAINTAINER": json.dumps(who, ensure_ascii=False),
                "PYTHON": f"python{major}.{minor}",
                "TREE": str(work),
            }
            config = f"deploy/packages/{package}.yaml"
            text = (ROOT / config).read_text()
            for variable, value in values.items():
                text = text.replace(f"${{{variable}}}", value)
            (work / f"{package}.yaml").write_text(text)
            run(
                tool("nfpm"), "package", "--config", str(work / f"{package}.yaml"), "--packager", "deb",
                "--target", str(options.out),
            )  # fmt: skip


if __name__ == "__main__":
    main()
