"""Starts supervisors: forked from the zygote, or as systemd units."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from . import supervisor, zygote
from .start import CannotStart

log = logging.getLogger("corral.runner")

UNIT_SECONDS: Final = 30.0
"""Time limit of the start of a unit."""
_PYTHON: Final = (sys.executable, "-I", "-S")
_SUPERVISOR: Final = str(Path(supervisor.__file__).resolve())
_ZYGOTE: Final = str(Path(zygote.__file__).resolve())


class Launcher:
    """Starts supervisors that outlive this process.

    Attributes:
        process: the zygote; None before the first start.
    """

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def fork(self, starts: Mapping[str, dict[str, Any]]) -> None:
        """Have a supervisor forked for each run; a zygote that has ended is started anew.

        Args:
            starts: by the folders of the runs: content of `start.json`, which is not needed then.

        Raises:
            CannotStart: there is no zygote.
        """
        lines = "".join(f"{folder}\t{json.dumps(start)}\n" for folder, start in starts.items()).encode()
        for _ in range(2):
            if self._control is None or self.process is None or self.process.poll() is not None:
                self._start()
            assert self._control is not None
            with contextlib.suppress(OSError):
                self._control.sendall(lines)
                return
            self.close()
        raise CannotStart("the runner's zygote can't be started")

    async def start_unit(self, folder: str, options: list[str]) -> None:
        """Start a supervisor as a systemd unit.

        Raises:
            CannotStart: systemd refuses it.
        """
        words = ["systemd-run", *options, "--", *_PYTHON, _SUPERVISOR, folder]
        process = await asyncio.create_subprocess_exec(
            *words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(UNIT_SECONDS):
                _, said = await process.communicate()
        except TimeoutError:
            process.kill()
            raise CannotStart(f"systemd has not started its unit within {UNIT_SECONDS:.0f} s") from None
        if process.returncode:
            raise CannotStart(f"systemd: {said.decode(errors='replace').strip()}")

    def close(self) -> None:
        """Let the zygote end with the last of the supervisors, which go on."""
        if self._control is not None:
            self._control.close()
            self._control = None

    def _start(self) -> None:
        self.close()
        ours, theirs = socket.socketpair()
        theirs.set_inheritable(True)
        words = [*_PYTHON, _ZYGOTE, str(theirs.fileno())]
        # It starts with all signals blocked, until it can handle them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            # Nothing of the runner's environment is for the jobs, such as its credentials.
            self.process = subprocess.Popen(
                words,
                env={},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        self._control = ours
