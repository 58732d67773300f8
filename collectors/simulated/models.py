"""Products that a simulated fleet is made of, with the numbers of their public data sheets."""

from __future__ import annotations

from typing import Final

from msgspec import Struct


class Model(Struct, frozen=True, kw_only=True):
    """A GPU product.

    Attributes:
        key: its name in `--models`.
        name: product name that the driver gives.
        vendor: `nvidia` or `amd`.
        architecture: such as `Hopper`.
        compute_capability: empty on AMD.
        sm_count: streaming multiprocessors, or compute units.
        memory_bytes: device memory that the driver gives.
        bandwidth: peak memory bandwidth, bytes/s.
        sm_clock: highest SM clock, MHz.
        memory_clock: memory clock, MHz.
        power_limit: power limit, W.
        idle_power: power when idle, W.
        hot: temperature of the core at full power in a good case, °C.
        slowdown: temperature at which the clocks are held back, °C.
        time_constant: time constant of the cooler, s.
        hbm: True if the memory has a temperature sensor.
        ecc: True if the memory has ECC.
        remaps: True if memory rows are remapped (Ampere and later); if not, pages are retired.
        fan: True if the board has a fan.
        nvlinks: number of links per device; 0 without.
        pcie_generation: generation of the PCIe link.
        weight: weight in the default mix.
    """

    key: str
    name: str
    vendor: str = "nvidia"
    architecture: str
    compute_capability: str = ""
    sm_count: int
    memory_bytes: int
    bandwidth: float
    sm_clock: int
    memory_clock: int
    power_limit: float
    idle_power: float
    hot: float = 72.0
    slowdown: float = 87.0
    time_constant: float = 45.0
    hbm: bool = False
    ecc: bool = True
    remaps: bool = True
    fan: bool = False
    nvlinks: int = 0
    pcie_generation: int = 4
    weight: float = 1.0


_MIB: Final = 2**20

MODELS: Final[dict[str, Model]] = {
    model.key: model
    for model in (
        Model(
            key="H100",
            name="NVIDIA H100 80GB HBM3",
            architecture="Hopper",
            compute_capability="9.0",
            sm_count=132,
            memory_bytes=81559 * _MIB,
            bandwidth=3.35e12,
            sm_clock=1980,
            memory_clock=2619,
            power_limit=700.0,
            idle_power=70.0,
            hot=68.0,
            hbm=True,
            nvlinks=18,
            pcie_generation=5,
            weight=3.0,
        ),
        Model(
            key="A100",
            name="NVIDIA A100-SXM4-80GB",
            architecture="Ampere",
            compute_capability="8.0",
            sm_count=108,
            memory_bytes=81920 * _MIB,
            bandwidth=2.039e12,
            sm_clock=1410,
            memory_clock=1593,
            power_limit=400.0,
            idle_power=55.0,
            hot=66.0,
            hbm=True,
            nvlinks=12,
            weight=3.0,
        ),
        Model(
            key="L40S",
            name="NVIDIA L40S",
            architecture="Ada",
            compute_capability="8.9",
            sm_count=142,
            memory_bytes=46068 * _MIB,
            bandwidth=8.64e11,
            sm_clock=2520,
            memory_clock=9001,
            power_limit=350.0,
            idle_power=35.0,
            weight=2.0,
        ),
        Model(
            key="RTX4090",
            name="NVIDIA GeForce RTX 4090",
            architecture="Ada",
            compute_capability="8.9",
            sm_count=128,
            memory_bytes=24564 * _MIB,
            bandwidth=1.008e12,
            sm_clock=3105,
            memory_clock=10501,
            power_limit=450.0,
            idle_power=22.0,
            slowdown=83.0,
            time_constant=60.0,
            ecc=False,
            fan=True,
            # So that four hosts, the default, have a fan among them.
            weight=1.5,
        ),
        Model(
            key="T4",
            name="Tesla T4",
            architecture="Turing",
            compute_capability="7.5",
            sm_count=40,
            memory_bytes=15360 * _MIB,
            bandwidth=3.2e11,
            sm_clock=1590,
            memory_clock=5001,
            power_limit=70.0,
            idle_power=10.0,
            hot=76.0,
            slowdown=89.0,
            remaps=False,
            pcie_generation=3,
        ),
        Model(
            key="MI300X",
            name="AMD Instinct MI300X",
            vendor="amd",
            architecture="CDNA 3",
            sm_count=304,
            memory_bytes=196592 * _MIB,
            bandwidth=5.3e12,
            sm_clock=2100,
            memory_clock=1300,
            power_limit=750.0,
            idle_power=140.0,
            hot=74.0,
            slowdown=100.0,
            hbm=True,
            remaps=False,
            nvlinks=7,
            pcie_generation=5,
        ),
    )
}


def parse_mix(text: str) -> dict[str, float]:
    """Parse a mix such as `H100:3,T4` into weights by model; empty gives the default mix.

    Raises:
        ValueError: an unknown model or an impossible weight; the message lists the models.
    """
    if not text.strip():
        return {key: model.weight for key, model in MODELS.items()}
    by_key = {key.lower(): key for key in MODELS}
    mix: dict[str, float] = {}
    for part in text.split(","):
        name, _, weight = part.strip().partition(":")
        key = by_key.get(name.strip().lower().replace(" ", ""))
        if key is None:
            raise ValueError(f"{name.strip()!r} is no simulated model: choose from {', '.join(MODELS)}")
        try:
            value = float(weight or 1)
        except ValueError:
            value = -1.0
        if not 0 < value < float("inf"):
            raise ValueError(f"{part.strip()!r}: a weight is a number above 0, as in H100:3,T4:1")
        mix[key] = mix.get(key, 0.0) + value
    return mix
