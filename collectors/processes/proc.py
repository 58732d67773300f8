"""Facts about a host and its processes, from `/proc` and `/sys`, without libraries or privileges.

Facts that can't be read (another user's environment, a process that has ended) are left empty.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import pwd
import re
from pathlib import Path
from typing import Final

from msgspec import Struct

from ...bus import process_identity
from ...bus.process_identity import MAX_ANCESTORS, process_stat
from ...schemas.limits import LEASE_VARIABLE
from ...schemas.telemetry import HostInfo
from ..text import clean
from .masking import masked

_CONTAINER: Final = re.compile(r"([0-9a-f]{64}|[0-9a-f]{32}-[0-9]{10})")
_ID: Final = re.compile(r"(?=.*[1-9a-f])[0-9a-f-]{32,36}")
_CLOCK_TICKS: Final = os.sysconf("SC_CLK_TCK")
_PATH_CHARACTERS: Final = 1024
_COMMAND_CHARACTERS: Final = 16 * 1024


class ProcessFacts(Struct, frozen=True, kw_only=True):
    """A process as the operating system sees it.

    Attributes:
        name: name of the executable, without arguments.
        user: account name, or the numeric id where there is no name.
        container: id of the container, else the cgroup path where it says more than the session.
        lease: `CORRAL_LEASE` of its environment or of the nearest ancestor that has one.
        started_ns: when it started, nanoseconds since the epoch; 0 if unknown.
        command: command line with arguments; empty unless requested.
    """

    name: str = ""
    user: str = ""
    container: str = ""
    lease: str = ""
    started_ns: int = 0
    command: str = ""


class ProcessTable:
    """Reads facts about processes, without a cache: a launcher may set a lease and execute the program under its id.

    Args:
        with_commands: True to read arguments, too. They often hold secrets; those that can be recognized are masked.
        root: path of the process file system.

    Attributes:
        identifies: True if it can attribute processes; False in a container that has its own process ids.
    """

    def __init__(self, *, with_commands: bool = False, root: Path = Path("/proc")) -> None:
        self._with_commands = with_commands
        self._root = root
        self.identifies = process_identity.sees_host_processes(root)

    def facts(self, pid: int) -> ProcessFacts:
        """Read the facts about a process by its id; fields are empty where it can't be seen."""
        stat = process_stat(pid, self._root) if self.identifies else None
        if stat is None:
            return ProcessFacts()
        folder = self._root / str(pid)
        return ProcessFacts(
            name=self._name(folder),
            user=_user(folder),
            container=container(_text(folder / "cgroup")),
            lease=self._lease(pid),
            started_ns=_boot_ns(self._root) + stat.started_ticks * (10**9 // _CLOCK_TICKS),
            command=self._command(folder) if self._with_commands else "",
        )

    def _name(self, folder: Path) -> str:
        try:
            return clean(os.path.basename(os.readlink(folder / "exe")).removesuffix(" (deleted)"))
        except OSError:
            return clean(_bytes(folder / "comm").removesuffix(b"\n"))

    def _command(self, folder: Path) -> str:
        return clean(" ".join(masked(_text(folder / "cmdline").split("\0"))), _COMMAND_CHARACTERS)

    def _lease(self, pid: int) -> str:
        for _ in range(MAX_ANCESTORS):
            found = _variable(_bytes(self._root / str(pid) / "environ"), LEASE_VARIABLE)
            if found:
                return found
            stat = process_stat(pid, self._root)
            if stat is None or stat.parent <= 1:
                return ""
            pid = stat.parent
        return ""


@functools.cache
def _boot_ns(root: Path) -> int:
    for line in _text(root / "stat").splitlines():
        if line.startswith("btime "):
            return int(line.split()[1]) * 10**9
    return 0


def container(cgroup: str) -> str:
    """Find the container in a `/proc/PID/cgroup` file: its id where one is in the path, else the path itself.

    Empty for a plain login session or system service, which is no container.
    """
    paths = [clean(line.split(":", 2)[2], _PATH_CHARACTERS) for line in cgroup.splitlines() if line.count(":") >= 2]
    for path in paths:
        ids = _CONTAINER.findall(path)
        if ids:
            return ids[-1]
    path = max(paths, key=len, default="/")
    if path == "/" or path.startswith(("/user.slice", "/system.slice", "/init.scope", "/../")):
        # Slurm's jobs live under system.slice and are worth telling apart.
        return path if "slurm" in path else ""
    return path


def _variable(environment: bytes, name: str) -> str:
    prefix = name.encode() + b"="
    for entry in environment.split(b"\0"):
        if entry.startswith(prefix):
            return clean(entry[len(prefix) :])
    return ""


def _user(folder: Path) -> str:
    try:
        number = folder.stat().st_uid
    except OSError:
        return ""
    try:
        return clean(pwd.getpwuid(number).pw_name)
    except KeyError:
        return str(number)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _text(path: Path) -> str:
    return _bytes(path).decode("utf-8", "replace")


def host_info(name: str, labels: dict[str, str], driver: str) -> HostInfo:
    """Facts about this host: address, logical cores that are online, memory, labels and machine ids."""
    return HostInfo(
        name=name,
        address=clean(platform.node()),
        cpus=_cpus(),
        memory_bytes=_memory_bytes(),
        driver=driver,
        labels={clean(key): clean(value) for key, value in labels.items()},
        machine_ids=machine_ids(),
        kernel=clean(platform.release()),
    )


def machine_ids(root: Path = Path("/")) -> list[str]:
    """Ids of this machine's installation and boot, whatever its host is called; hashed, since they are confidential.

    A container often has no machine-id(5), or that of its image; its boot id is that of the machine. Images that are to
    get an id at their first start have the word `uninitialized` in its place, which is left out.
    """
    texts = [_text(root / "etc/machine-id").strip(), process_identity.boot_id(root / "proc")]
    return [_hashed(text) for text in texts if _ID.fullmatch(text)]


def hashed_boot_id() -> str:
    """Id of this machine's boot, hashed as in `machine_ids`; empty where it can't be read."""
    boot = process_identity.boot_id()
    return _hashed(boot) if boot else ""


def _hashed(text: str) -> str:
    return hashlib.sha256(f"corral {text}".encode()).hexdigest()[:32]


def _cpus() -> int:
    # The agent itself is often confined to a core: count the cores that the host has for work.
    online = _text(Path("/sys/devices/system/cpu/online")).strip()
    return len(cpu_list(online)) or os.cpu_count() or 0


def _memory_bytes() -> int:
    for line in _text(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return 0


def cpu_list(text: str) -> list[int]:
    """Parse a Linux list of cores such as `0-3,8`."""
    found: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            found += range(int(first), int(last if last.isdigit() else first) + 1)
    return found


def pci_numa_node(address: str) -> int | None:
    """NUMA node of a PCI device such as `00000000:19:00.0`; None if unknown."""
    text = _text(Path("/sys/bus/pci/devices") / sysfs_address(address) / "numa_node").strip()
    return int(text) if text.isdigit() else None


def pci_cpus(address: str) -> list[int]:
    """Logical cores near a PCI device; empty if unknown."""
    return cpu_list(_text(Path("/sys/bus/pci/devices") / sysfs_address(address) / "local_cpulist"))


def sysfs_address(address: str) -> str:
    """Convert NVML's PCI address, with a domain of eight digits, to that of Linux: four digits, in lower case."""
    domain, _, rest = address.partition(":")
    return f"{int(domain, 16):04x}:{rest}".lower() if rest else address.lower()
