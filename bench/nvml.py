"""What does one tick of one device cost, beside the driver? Corral, pynvml's wrappers, nvitop and gpustat.

    python bench/nvml.py [--devices 8] [--seconds 2] [--peer-python PATH]

All of them read the same library (`bench/fake_nvml.c`, built on the spot), whose functions answer at once, so the
numbers are each reader's own overhead; CPU is that of the reading thread. `metrics` is how many a tick holds: Corral's
fast tick reads 12 of them anew and repeats the others, nvitop reads all of its, and gpustat sleeps 0.1 s in each query
to see how busy processes are. A real driver adds the time of its calls, the same for everyone who makes them.
nvitop and gpustat are measured with the interpreter that has them: `python -m venv peers && peers/bin/pip install
nvitop gpustat`, then `--peer-python peers/bin/python`. Where one is missing the script says so and goes on. Where the
machine has `nvidia-smi` and a driver, its loop is measured too, against the real driver.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
GOAL_MICROSECONDS = 30.0


def build(folder: Path) -> Path:
    """The library, compiled."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        sys.exit("bench/nvml.py needs a C compiler (cc, gcc or clang) to build the library that answers at once")
    library = folder / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(HERE / "fake_nvml.c")], check=True)
    return library


def use(library: Path) -> None:
    """Make pynvml use the library."""
    import pynvml

    pynvml.nvmlLib = ctypes.CDLL(str(library))


def clock(tick: Callable[[], object], seconds: float) -> dict[str, float]:
    """Wall and CPU time of a tick, from the best of five stretches; and the longest single one."""
    for _ in range(20):
        tick()
    best, cpu_best, worst = float("inf"), float("inf"), 0.0
    for _ in range(5):
        ticks, end = 0, time.perf_counter() + seconds / 5
        start, cpu = time.perf_counter(), time.thread_time()
        now = start
        while now < end:
            tick()
            before, now = now, time.perf_counter()
            worst = max(worst, now - before)
            ticks += 1
        best = min(best, (now - start) / ticks)
        cpu_best = min(cpu_best, (time.thread_time() - cpu) / ticks)
    return {"wall": best, "cpu": cpu_best, "worst": worst}


def corral(seconds: float) -> dict[str, float]:
    """Corral's source, a host's tick packed and ready to send. Back to back, GPM is read at most every 100 ms."""
    from corral.collectors.nvml.source import NvmlSource

    source = NvmlSource("bench")
    source.open(lambda _event: None)
    found = clock(source.read, seconds)
    found["metrics"] = len(source.read()[0].columns)
    source.close()
    return found


def corral_everything(seconds: float) -> dict[str, float]:
    """The dearest tick there is: every cadence and GPM due at once."""
    from corral.collectors.nvml.source import NvmlSource

    source = NvmlSource("bench")
    source.open(lambda _event: None)

    def tick() -> object:
        for device in source._devices:
            device.plan._gpm._due = 0.0
            for group in device.plan._order:
                group.due = 0.0
        return source.read()

    found = clock(tick, seconds)
    found["metrics"] = len(source.read()[0].columns)
    source.close()
    return found


def wrappers(seconds: float) -> dict[str, float]:
    """The calls of Corral's fast tick, through pynvml's own wrappers, as a dict per device."""
    import pynvml as n

    n.nvmlInit()
    handles = [n.nvmlDeviceGetHandleByIndex(i) for i in range(n.nvmlDeviceGetCount())]

    def one(handle: Any) -> dict[str, Any]:
        utilization = n.nvmlDeviceGetUtilizationRates(handle)
        memory = n.nvmlDeviceGetMemoryInfo(handle, n.nvmlMemory_v2)
        return {
            "time": time.time_ns(),
            "gpu": utilization.gpu,
            "memory": utilization.memory,
            "used": memory.used,
            "free": memory.free,
            "total": memory.total,
            "reserved": memory.reserved,
            "power": n.nvmlDeviceGetPowerUsage(handle) / 1000,
            "power_instant": n.nvmlDeviceGetFieldValues(handle, [n.NVML_FI_DEV_POWER_INSTANT])[0].value.ullVal / 1000,
            "energy": n.nvmlDeviceGetTotalEnergyConsumption(handle),
            "sm": n.nvmlDeviceGetClockInfo(handle, n.NVML_CLOCK_SM),
            "mem": n.nvmlDeviceGetClockInfo(handle, n.NVML_CLOCK_MEM),
            "throttle": n.nvmlDeviceGetCurrentClocksEventReasons(handle),
        }

    found = clock(lambda: [one(handle) for handle in handles], seconds)
    found["metrics"] = len(one(handles[0])) - 1
    return found


def nvitop(seconds: float) -> dict[str, float]:
    """nvitop's snapshot of each device."""
    from nvitop import Device

    devices = Device.all()
    found = clock(lambda: [device.as_snapshot() for device in devices], seconds)
    found["metrics"] = len(devices[0].SNAPSHOT_KEYS) if hasattr(devices[0], "SNAPSHOT_KEYS") else float("nan")
    return found


def gpustat(seconds: float) -> dict[str, float]:
    """gpustat's query of all devices."""
    from gpustat import GPUStatCollection

    found = clock(lambda: GPUStatCollection.new_query(), seconds)
    found["metrics"] = len(GPUStatCollection.new_query()[0].entry)
    return found


READERS: dict[str, tuple[str, Callable[[float], dict[str, float]], bool]] = {
    "corral": ("Corral, one fast tick after another", corral, False),
    "corral_everything": ("Corral, every metric and GPM in each tick", corral_everything, False),
    "wrappers": ("pynvml's wrappers, the fast tick's calls", wrappers, False),
    "nvitop": ("nvitop, Device.as_snapshot()", nvitop, True),
    "gpustat": ("gpustat, GPUStatCollection.new_query()", gpustat, True),
}


def measure(name: str, python: str, library: Path, devices: int, seconds: float) -> dict[str, float] | str:
    """One reader in a process of its own; a text says why it could not be measured."""
    if shutil.which(python) is None:
        return f"no interpreter at {python}"
    done = subprocess.run(
        [python, __file__, "--measure", name, "--library", str(library), "--seconds", str(seconds)],
        env={**os.environ, "FAKE_NVML_DEVICES": str(devices)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"failed with {done.returncode}"])[-1]
    return json.loads(done.stdout.strip().splitlines()[-1])


def nvidia_smi(seconds: float) -> str:
    """nvidia-smi's own loop at 10 Hz against the real driver: CPU per query."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return "nvidia-smi: not on this machine"
    fields = "utilization.gpu,utilization.memory,memory.used,memory.free,power.draw,temperature.gpu,clocks.sm"
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [command, f"--query-gpu={fields}", "--format=csv,noheader", "-lms", "100"], stdout=output
        )
        time.sleep(seconds)
        process.terminate()
        _, _, usage = os.wait4(process.pid, 0)
        output.seek(0)
        lines = len(output.read().splitlines())
    if not lines:
        return "nvidia-smi: no driver answers"
    return f"nvidia-smi -lms 100: {(usage.ru_utime + usage.ru_stime) / lines * 1e6:.0f} µs of CPU a device and query"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--measure", choices=READERS)
    parser.add_argument("--library", type=Path)
    arguments = parser.parse_args()
    if arguments.measure:
        use(arguments.library)
        print(json.dumps(READERS[arguments.measure][1](arguments.seconds)))
        return
    print(f"{arguments.devices} devices, a library that answers at once, {os.cpu_count()} cores\n")
    print(f"{'':44}{'µs/device/tick':>15}{'CPU µs':>9}{'metrics':>9}{'CPU at 1 Hz':>13}{'at 50 Hz':>10}")
    results: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        library = build(Path(folder))
        for name, (title, _, peer) in READERS.items():
            python = arguments.peer_python if peer else sys.executable
            found = measure(name, python, library, arguments.devices, arguments.seconds)
            if isinstance(found, str):
                print(f"{title:44}not measured: {found}")
                continue
            each, cpu = found["wall"] / arguments.devices * 1e6, found["cpu"] / arguments.devices * 1e6
            results[name] = each
            share = found["cpu"] * 100
            print(
                f"{title:44}{each:15.1f}{cpu:9.1f}{found['metrics']:9.0f}{share:12.3f}%"
                f"{f'{share * 50:.2f}%' if share * 50 < 100 else 'no':>10}"
            )
    print(f"\n{nvidia_smi(arguments.seconds)}")
    print(f"goal: less than {GOAL_MICROSECONDS:.0f} µs; {'met' if results['corral'] < GOAL_MICROSECONDS else 'missed'}")


if __name__ == "__main__":
    main()
