"""The Debian package: built, then installed, updated, removed and purged by dpkg over an overlay of this system."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
SYSTEM = Path("/usr/bin/python3")
STEPS = """
set -e
exec 2>&1
mount -t tmpfs tmpfs "$1"
mkdir "$1/up" "$1/work" "$1/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/up,workdir=$1/work" "$1/root"
mount --bind /proc "$1/root/proc"
cp "$2" "$1/root/var/tmp/corral.deb"
cd "$1/root"
exec chroot "$1/root" /bin/sh -ec '
cd /
dpkg -i /var/tmp/corral.deb
echo "## installed: $(corral --version)"
echo "## runs on $(corral doctor | sed -n "s/.*Python \\([0-9.]*\\) .*/\\1/p")"
echo "# mine" >> /etc/corral/corral.toml
touch /etc/corral/credentials/corral.creds
dpkg -i /var/tmp/corral.deb
echo "## updated: $(tail -n 1 /etc/corral/corral.toml)"
dpkg -r corral
echo "## removed: $(ls -d /opt/corral /usr/bin/corral 2>/dev/null | wc -l) left"
echo "## settings: $(tail -n 1 /etc/corral/corral.toml)"
dpkg -P corral
echo "## purged: $(find /etc/corral | sort | tr "\\n" " ")"
'
"""


def test_it_installs_updates_and_goes(tmp_path: Path) -> None:
    version = subprocess.run(
        [SYSTEM, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True, text=True, check=False
    ).stdout.strip()
    if not shutil.which("dpkg") or not SYSTEM.exists() or tuple(map(int, version.split("."))) < (3, 11):
        pytest.skip("this is no Debian with Python 3.11 or newer")
    nfpm = Path(sysconfig.get_path("scripts")) / "nfpm"
    if not nfpm.exists():
        pytest.skip("nfpm is not installed")
    build = [sys.executable, str(ROOT / "deploy" / "packages" / "build.py"), "--only", "corral", "--python", version]
    build += ["--maintainer", "Ann Lee: GPUs #1 <ann@lab.example>"]
    done = subprocess.run([*build, "--out", str(tmp_path)], capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    [package] = tmp_path.glob("corral_*.deb")
    assert package.stat().st_size < 20e6
    field = subprocess.run(["dpkg-deb", "-f", package, "Maintainer"], capture_output=True, text=True, check=True).stdout
    assert field.strip() == "Ann Lee: GPUs #1 <ann@lab.example>"
    listed = subprocess.run(["dpkg-deb", "-c", package], capture_output=True, text=True, check=True).stdout
    for path in ("usr/lib/systemd/system/corral-collector.service", "usr/bin/corral -> /opt/corral/bin/corral"):
        assert f"./{path}" in listed
    assert "__pycache__" not in listed
    root = tmp_path / "root"
    root.mkdir()
    steps = ["unshare", "--mount", "sh", "-c", STEPS, "sh", str(root), str(package)]
    done = subprocess.run(steps, capture_output=True, text=True, check=False, timeout=120)
    if "unshare" in done.stderr or "mount:" in done.stdout:
        pytest.skip(f"this account may not mount: {done.stdout[-200:]}{done.stderr[-200:]}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    said = dict(line[3:].split(": ", 1) for line in done.stdout.splitlines() if line.startswith("## ") and ": " in line)
    assert said["installed"].startswith("corral ")
    assert f"## runs on {version}" in done.stdout
    assert said["updated"] == said["settings"] == "# mine"
    assert said["removed"] == "0 left"
    assert said["purged"].split() == ["/etc/corral", "/etc/corral/credentials", "/etc/corral/credentials/corral.creds"]
