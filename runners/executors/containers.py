"""Jobs in containers of Podman or Docker, with their devices by CDI names.

The client of the container runs under the supervisor like any command: it passes signals on and ends with the exit code
of the container's command, so that 137 is a command that ended with 137, or by SIGKILL. The client runs as the runner's
account, so nothing of the job may affect it: the job's variables are in a file in memory, neither in the client's
environment (such as `LD_PRELOAD`) nor in its arguments, which others see.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

from ..accounts import Account
from ..execution import VARIABLES_FILE
from .command import Command, Confined, Work, limits
from .devices import cdi_names

PROGRAMS: Final = ("podman", "docker")
_MESSAGE_QUEUES: Final = Path("/dev/mqueue")
_DOCKER_SOCKET: Final = Path("/var/run/docker.sock")
_IMAGES_OWN: Final = ("PATH", "SHELL", "LANG")
"""Variables that are the image's, unless the job sets them."""
_CLIENTS_OWN: Final = ("PATH", "HOME", "XDG_RUNTIME_DIR", "DOCKER_HOST", "CONTAINER_HOST", "CONTAINERS_CONF")
"""Variables of the runner that the client of the container needs."""


def available() -> list[str]:
    """The container programs of this host that can start containers: Docker's needs its daemon."""
    found = [program for program in PROGRAMS if shutil.which(program) is not None]
    daemon = "DOCKER_HOST" in os.environ or _DOCKER_SOCKET.exists()
    return [program for program in found if program != "docker" or daemon]


def names(key: str, processes: int) -> list[str]:
    """Names of the containers of a run."""
    return [f"corral-{key}-{rank}" for rank in range(processes)]


def confine(program: str, work: Work) -> Confined:
    """Execute the commands in a container each.

    Raises:
        ValueError: a device has no CDI name, the job can't be passed to a container's client, or its account may not
            enter its directory, which the client would mount with the runner's rights.
    """
    if work.image.startswith("-") or any(character.isspace() for character in work.image):
        raise ValueError("what it names as its image is none")
    if work.account.switched and not may_enter(work.account, work.directory):
        raise ValueError("its account may not enter its working directory")
    devices = cdi_names(work.run.grants)
    own = names(work.key, len(work.commands))
    return Confined(
        # As the runner's account: it is the container that gets the account of the owner.
        commands=[
            _command(program, work, name, command, devices) for name, command in zip(own, work.commands, strict=True)
        ],
        finish=[[program, "rm", "--force", *own]],
    )


def _command(program: str, work: Work, name: str, command: Command, devices: list[str]) -> Command:
    given = work.run.spec.environment if work.run.spec is not None else {}
    inside = {key: value for key, value in command.environment.items() if key not in _IMAGES_OWN or key in given}
    words = [program, "run", "--rm", "--name", name, "--init", "--log-driver=none", "--network=host"]
    words += _shared_memory(program)
    words += ["--security-opt=no-new-privileges", "--cap-drop=all", *_user(program, work.account)]
    cpus, memory = limits(work.run.grants)
    words += [f"--cpus={cpus:g}"] if cpus else []
    words += [f"--memory={memory}"] if memory else []
    words += [f"--device={device}" for device in devices]
    for path in dict.fromkeys((work.account.home, work.directory, work.folder)):
        # The folder of script and output is made later, by the supervisor.
        if path == work.folder or (path != "/" and Path(path).is_dir()):
            words += ["--volume", f"{path}:{path}"]
    words += ["--workdir", work.directory]
    for key, value in inside.items():
        if "\n" in key + value or key.startswith("#"):
            raise ValueError(f"{program} does not take one of its variables: with a line break, or as a comment")
    words += [f"--env-file={VARIABLES_FILE}"]
    own = {key: os.environ[key] for key in _CLIENTS_OWN if key in os.environ}
    return Command(words=[*words, work.image, *command.words], environment=own, variables=inside)


def _shared_memory(program: str) -> list[str]:
    """Options for the host's shared memory, which data loaders and NCCL need much of."""
    if _rootless(program) and not _MESSAGE_QUEUES.is_dir():
        # Podman without rights would bind the host's message queues, too, and fails where there are none.
        return ["--volume", "/dev/shm:/dev/shm"]
    return ["--ipc=host"]


def may_enter(account: Account, path: str) -> bool:
    """True if an account may enter a directory, through all those above it."""
    words = ["/usr/bin/test", "-x", path]
    found = subprocess.run(
        words, user=account.uid, group=account.gid, extra_groups=account.groups, cwd="/", env={}, check=False
    )
    return found.returncode == 0


def _user(program: str, account: Account) -> list[str]:
    if _rootless(program):
        return ["--userns=keep-id"]
    return [f"--user={account.uid}:{account.gid}", *(f"--group-add={group}" for group in account.groups)]


def _rootless(program: str) -> bool:
    return program == "podman" and os.geteuid() != 0
