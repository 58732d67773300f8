"""How fast is the slowest stage of a model that is split over a mixed fleet, by whom it is split?

Real layer sizes (Llama-3 8B and 70B, Mixtral 8x7B, bf16) over fleets of unequal devices. The time of a stage is what
the devices' data sheets allow at best: bytes of weights that one token reads over memory bandwidth (decoding, one
sequence). A pipeline turns out one token each time its slowest stage is done; a single sequence waits for all stages.

Peers: `accelerate`'s `infer_auto_device_map` as it is (fill the devices in order), and after `get_balanced_memory`,
which is what `device_map="auto"` does; and counts of layers in proportion to memory. They run in another interpreter
that has accelerate and torch: --accelerate-python; without it their rows are left out, which is said.

    python bench/distribution.py [--accelerate-python VENV/bin/python] [--markdown]
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from typing import NamedTuple

from corral.planner.work.apportion import apportion
from corral.planner.work.balance import Machine, balance, lower_bound, span
from corral.planner.work.pipeline import pipeline

GB = 10**9
BYTES = 2  # bf16
USABLE = 0.9
"""Part of a device's memory that weights may take; the rest is for activations and the key-value cache."""


class Device(NamedTuple):
    """A product, by its data sheet.

    Attributes:
        memory: bytes.
        bandwidth: bytes per second.
    """

    memory: int
    bandwidth: float


DEVICES = {
    "H100-80": Device(80 * GB, 3.35e12),
    "A100-80": Device(80 * GB, 2.039e12),
    "A100-40": Device(40 * GB, 1.555e12),
    "L40S-48": Device(48 * GB, 0.864e12),
    "4090-24": Device(24 * GB, 1.008e12),
    "A10-24": Device(24 * GB, 0.600e12),
    "T4-16": Device(16 * GB, 0.320e12),
}


class Model(NamedTuple):
    """A decoder: parameters of its parts, and how many of a layer's one token reads."""

    embedding: int
    layers: int
    layer: int
    active: int


def decoder(hidden: int, layers: int, feed_forward: int, key_value: int, vocabulary: int, experts: int = 1) -> Model:
    attention = 2 * hidden * hidden + 2 * hidden * key_value
    expert = 3 * hidden * feed_forward
    gate = hidden * experts if experts > 1 else 0
    norms = 2 * hidden
    used = min(2, experts)
    return Model(
        vocabulary * hidden,
        layers,
        attention + experts * expert + gate + norms,
        attention + used * expert + gate + norms,
    )


MODELS = {
    "Llama-3 8B": decoder(4096, 32, 14336, 1024, 128256),
    "Llama-3 70B": decoder(8192, 80, 28672, 1024, 128256),
    "Mixtral 8x7B": decoder(4096, 32, 14336, 1024, 32000, experts=8),
}
FLEETS = {
    "Llama-3 8B": [
        ["4090-24", "A10-24", "T4-16", "T4-16"],
        ["T4-16", "T4-16", "A10-24"],
        ["A100-40", "4090-24", "T4-16"],
    ],
    "Llama-3 70B": [
        ["H100-80", "H100-80", "L40S-48", "L40S-48"],
        ["H100-80", "A100-40", "A100-40", "A100-40", "A10-24"],
        ["L40S-48", "L40S-48", "L40S-48", "A100-80", "A100-80"],
    ],
    "Mixtral 8x7B": [
        ["H100-80", "L40S-48", "L40S-48"],
        ["A100-40", "A100-40", "4090-24", "4090-24", "T4-16"],
        ["T4-16", "T4-16", "L40S-48", "L40S-48", "A10-24"],
    ],
}

PEER = r"""
import json, sys, warnings
warnings.simplefilter("ignore")
import logging; logging.disable(logging.WARNING)
import torch
from accelerate import infer_auto_device_map
from accelerate.utils import get_balanced_memory
class Layer(torch.nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(size, dtype=torch.bfloat16, device="meta"), requires_grad=False)
class Decoder(torch.nn.Module):
    def __init__(self, embedding, layers, layer):
        super().__init__()
        self.embed = Layer(embedding)
        self.layers = torch.nn.ModuleList([Layer(layer) for _ in range(layers)])
        self.head = Layer(embedding)
answers = []
for task in json.load(sys.stdin):
    model = Decoder(task["embedding"], task["layers"], task["layer"])
    memory = {at: size for at, size in enumerate(task["memory"])}
    maps = {}
    for name in ("sequential", "auto"):
        options = {"no_split_module_classes": ["Layer"], "dtype": torch.bfloat16}
        limits = dict(memory)
        if name == "auto":
            limits = get_balanced_memory(model, max_memory=limits, **options)
        limits["cpu"] = 10**13
        found = infer_auto_device_map(model, max_memory=limits, **options)
        names = ["embed", *[f"layers.{i}" for i in range(task["layers"])], "head"]
        place = []
        for part in names:
            where = found.get(part, found.get("layers" if part.startswith("layers") else part, found.get("", "cpu")))
            place.append(where if isinstance(where, int) else -1)
        maps[name] = place
    answers.append(maps)
import accelerate
json.dump({"version": accelerate.__version__, "maps": answers}, sys.stdout)
"""


def items(model: Model) -> tuple[list[float], list[int]]:
    """Bytes that one token reads of each part, and bytes that each part takes: embedding, layers, head."""
    costs = [0.0, *[float(model.active * BYTES)] * model.layers, float(model.embedding * BYTES)]
    sizes = [model.embedding * BYTES, *[model.layer * BYTES] * model.layers, model.embedding * BYTES]
    return costs, sizes


def machines(fleet: list[str]) -> list[Machine]:
    return [Machine(DEVICES[name].bandwidth, int(DEVICES[name].memory * USABLE)) for name in fleet]


def by_ends(ends: list[int]) -> list[int]:
    return [at for at, (start, end) in enumerate(zip([0, *ends], ends, strict=False)) for _ in range(end - start)]


def proportional(model: Model, fleet: list[str]) -> list[int]:
    """Parts counted in proportion to memory, in order."""
    counts = apportion(model.layers + 2, [machine.memory for machine in machines(fleet)])
    return [at for at, count in enumerate(counts) for _ in range(count)]


def describe(model: Model, fleet: list[str], place: list[int]) -> tuple[float, float, str] | None:
    """Slowest stage and sum of stages in ms, and parts per device; None where something does not fit."""
    costs, sizes = items(model)
    found = machines(fleet)
    times = [0.0] * len(found)
    memory = [0] * len(found)
    counts = [0] * len(found)
    for part, at in enumerate(place):
        if at < 0:
            return None
        times[at] += costs[part] / found[at].speed
        memory[at] += sizes[part]
        counts[at] += 1
    if any(used > machine.memory for used, machine in zip(memory, found, strict=True)):
        return None
    return max(times) * 1e3, sum(times) * 1e3, "+".join(map(str, counts))


def peers(interpreter: str | None) -> tuple[str, list[dict[str, list[int]]]] | None:
    tasks = [
        {
            "embedding": MODELS[name].embedding,
            "layers": MODELS[name].layers,
            "layer": MODELS[name].layer,
            "memory": [machine.memory for machine in machines(fleet)],
        }
        for name, fleets in FLEETS.items()
        for fleet in fleets
    ]
    command = [interpreter or sys.executable, "-c", PEER]
    done = subprocess.run(command, input=json.dumps(tasks), capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        print(f"without accelerate ({done.stderr.strip().splitlines()[-1]})", file=sys.stderr)
        return None
    answer = json.loads(done.stdout)
    return answer["version"], answer["maps"]


def models(interpreter: str | None, markdown: bool) -> None:
    found = peers(interpreter)
    version, maps = found if found is not None else ("", [])
    line = "| {} | {} | {} | {} | {} | {} | {} |" if markdown else "{:<13} {:<46} {:<24} {:<18} {:>10} {:>8} {:>8}"
    print(line.format("model", "devices", "split by", "parts", "slowest ms", "× ours", "sum ms"))
    if markdown:
        print("| --- | --- | --- | --- | ---: | ---: | ---: |")
    number = 0
    for name, fleets in FLEETS.items():
        for fleet in fleets:
            model = MODELS[name]
            costs, sizes = items(model)
            start = time.perf_counter()
            staged = pipeline(costs, sizes, machines(fleet))
            spent = (time.perf_counter() - start) * 1e6
            ours = describe(model, fleet, by_ends(staged.ends))
            assert ours is not None
            rows = [(f"corral pipeline ({spent:.0f} µs)", by_ends(staged.ends))]
            if maps:
                rows.append((f"accelerate {version} auto", maps[number]["auto"]))
                rows.append((f"accelerate {version} sequential", maps[number]["sequential"]))
            rows.append(("memory-proportional", proportional(model, fleet)))
            for label, place in rows:
                told = describe(model, fleet, place)
                values = (
                    (told[2], f"{told[0]:.2f}", f"{told[0] / ours[0]:.2f}", f"{told[1]:.2f}")
                    if told is not None
                    else ("part goes to the CPU" if -1 in place else "does not fit", "–", "–", "–")
                )
                print(line.format(name, " + ".join(fleet), label, *values))
            number += 1


def jobs(markdown: bool) -> None:
    """Independent items with lognormal costs, over devices of unequal speed: when is the last one done?"""
    print()
    line = "| {} | {} | {} | {} | {} | {} |" if markdown else "{:>6} {:>8} {:>12} {:>12} {:>12} {:>10}"
    print(line.format("items", "devices", "uniform", "capacity", "balanced", "time ms"))
    if markdown:
        print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for count, devices in ((10, 3), (40, 4), (200, 8), (1000, 8), (5000, 16), (30000, 64)):
        rng = random.Random(count)
        costs = [rng.lognormvariate(0, 1) for _ in range(count)]
        sizes = [rng.randrange(1, 8) * GB // 10 for _ in range(count)]
        speeds = [rng.choice([1.0, 2.2, 3.1, 5.0]) for _ in range(devices)]
        room = sum(sizes) * 2 // devices + 2 * GB
        found = [Machine(speed, room) for speed in speeds]
        bound = lower_bound(costs, sizes, found, range(count))
        start = time.perf_counter()
        balanced = balance(costs, sizes, found)
        spent = (time.perf_counter() - start) * 1e3
        told = [
            span(costs, found, [at for at, share in enumerate(apportion(count, weights)) for _ in range(share)])
            for weights in ([1.0] * devices, speeds)
        ]
        best = " (optimal)" if balanced.optimal else ""
        print(
            line.format(
                count,
                devices,
                *(f"{value / bound:.4f}" for value in told),
                f"{balanced.makespan / bound:.4f}{best}",
                f"{spent:.1f}",
            )
        )
    print("\nmakespan over the lower bound; 1 can not be beaten" if not markdown else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accelerate-python")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    models(options.accelerate_python, options.markdown)
    jobs(options.markdown)


if __name__ == "__main__":
    main()
