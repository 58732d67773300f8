"""Status of a run, as its supervisor writes it."""

from __future__ import annotations

from msgspec import Struct


class Status(Struct, frozen=True, kw_only=True):
    """State of a run's processes.

    Attributes:
        pid: of the supervisor.
        started_ticks: its start in clock ticks since the boot.
        boot_id: of the machine.
        started_at: when the commands were executed, seconds since the epoch; null before.
        exited_at: when the last of them had ended; null before.
        ended_at: when nothing was left of the run; null before.
        exit_code: of the commands: 0, or that of the first that failed; null where a signal ended it.
        signal: that ended it; null if none did.
        failed: true if they could not be executed.
        host_fault: true if that was by the runner's own folder.
        expired: true if its time limit has ended it.
        peak_memory_bytes: most RAM of its processes together, as far as it was sampled.
        cpu_seconds: CPU time of its processes.
        message: why it could not be executed, or what it waits for.
        executor: what confines it.
        output: file of its output.
        output_device: device of that file.
        output_inode: inode of that file.
    """

    pid: int
    started_ticks: int = 0
    boot_id: str = ""
    started_at: float | None = None
    exited_at: float | None = None
    ended_at: float | None = None
    exit_code: int | None = None
    signal: int | None = None
    failed: bool = False
    host_fault: bool = False
    expired: bool = False
    peak_memory_bytes: int = 0
    cpu_seconds: float = 0.0
    message: str = ""
    executor: str = ""
    output: str = ""
    output_device: int = 0
    output_inode: int = 0
