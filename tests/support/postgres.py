"""A real PostgreSQL from Debian's packages, for the catalog of a lake."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest


def binaries() -> Path | None:
    """The folder of `initdb` and `postgres`, the newest version's; None where there is none."""
    for folder in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True):
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    found = shutil.which("initdb")
    return Path(found).parent if found and shutil.which("postgres") else None


class Postgres:
    """A cluster of its own on a free loopback port, as an unprivileged user; its files are not synced to disk."""

    def __init__(self) -> None:
        folder = binaries()
        if folder is None:
            pytest.skip("PostgreSQL is not installed (apt-get install postgresql): a lake has its catalog in one")
        self._bin = folder
        # Its user has to reach the folder, and pytest's own are closed to all others.
        self._home = Path(tempfile.mkdtemp(prefix="corral-pg-"))
        self._as_user: dict[str, object] = {}
        if os.geteuid() == 0:
            try:
                user = pwd.getpwnam("postgres")
            except KeyError:
                pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
            os.chown(self._home, user.pw_uid, user.pw_gid)
            self._as_user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None
        self._call("initdb", "-D", str(self._home / "data"), "-A", "trust", "-U", "corral", "--no-sync")

    def start(self) -> None:
        """Start, and wait until it answers."""
        options = ["-p", str(self.port), "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", "-k", str(self._home)]
        self.process = subprocess.Popen(
            [str(self._bin / "postgres"), "-D", str(self._home / "data"), *options],
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **self._as_user,  # pyright: ignore[reportArgumentType]
        )
        self._call("pg_isready", "-h", "127.0.0.1", "-p", str(self.port), "-t", "0", tries=200)

    def stop(self) -> None:
        """Stop at once; what is committed stays."""
        if self.process is not None:
            self.process.send_signal(signal.SIGQUIT)
            self.process.wait(20)
            self.process = None

    def remove(self) -> None:
        """Stop, and remove its files."""
        self.stop()
        shutil.rmtree(self._home, ignore_errors=True)

    def database(self, name: str) -> str:
        """Make a database. Returns its catalog as `corral process --lake` takes it."""
        self._call("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "corral", name)
        return f"postgres:dbname={name} user=corral host=127.0.0.1 port={self.port}"

    def _call(self, program: str, *arguments: str, tries: int = 1) -> None:
        for left in range(tries - 1, -1, -1):
            ended = subprocess.run(
                [str(self._bin / program), *arguments],
                cwd="/",
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
                **self._as_user,  # pyright: ignore[reportArgumentType]
            )
            if ended.returncode == 0:
                return
            if not left:
                raise AssertionError(f"{program}: {ended.stderr or ended.stdout}")
            time.sleep(0.05)
