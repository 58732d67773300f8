"""A container image for tests, made of this machine's own programs, and Podman's configuration on the machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

IMAGE = "localhost/corral-test:jobs"
PROGRAMS = ("sh", "env", "cat", "id", "sleep", "ls", "setsid")


def podman_environment(folder: Path) -> dict[str, str]:
    """Variables with which Podman runs within a container, too: that has no systemd, and limits of its own."""
    if "CONTAINERS_CONF" in os.environ:
        return {"CONTAINERS_CONF": os.environ["CONTAINERS_CONF"]}
    file = folder / "containers.conf"
    file.write_text(
        '[containers]\ndefault_ulimits=["nofile=4096:4096","nproc=8192:8192"]\n'
        '[engine]\nruntime="runc"\ncgroup_manager="cgroupfs"\n'
    )
    return {"CONTAINERS_CONF": str(file)}


def reason_against(variables: dict[str, str]) -> str:
    """Why no container can be run here; empty if one can."""
    if shutil.which("podman") is None:
        return "podman is not installed"
    made = subprocess.run(
        ["podman", "run", "--rm", "--network=host", IMAGE, "sh", "-c", "exit 3"],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    return "" if made.returncode == 3 else f"podman runs no container here: {made.stderr.strip()}"


def import_image(folder: Path, variables: dict[str, str]) -> None:
    """Import an image of a few programs with their libraries."""
    root = folder / "image"
    for name in (*("bin", "etc", "tmp", "proc", "sys", "dev"),):
        (root / name).mkdir(parents=True)
    for program in PROGRAMS:
        path = Path(shutil.which(program) or f"/bin/{program}").resolve()
        shutil.copy(path, root / "bin" / program)
        libraries = subprocess.run(["ldd", str(path)], capture_output=True, text=True, check=False).stdout
        for library in re.findall(r"/[^ ]+", libraries):
            target = root / library[1:]
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, target)
    archive = folder / "image.tar"
    subprocess.run(["tar", "-C", str(root), "-cf", str(archive), "."], check=True)
    subprocess.run(
        ["podman", "import", str(archive), IMAGE], env=os.environ | variables, check=False, capture_output=True
    )
