"""Devices a run can be planned for, and clusters of them. Each figure is an input with a source; change any by name.

Peaks are dense (no structured sparsity). Links are bytes a second in one direction for one device. Prices are list
prices on demand; large reservations cost less. Figures from data sheets are sure; prices and the links of the RTX 4090
and of the CPU are rough, as their sources say.
"""

import re
from dataclasses import dataclass

from trinity.base.errors import UsageError
from trinity.base.units import parse_count
from trinity.config.knob import Settings, knob


@dataclass(frozen=True, kw_only=True)
class Device(Settings):
    """One accelerator, or one CPU machine."""

    section = "device"

    name: str = knob("how the command line calls it")
    bfloat16: float = knob("dense bfloat16 FLOP/s", above=0)
    float32: float = knob("dense float32 FLOP/s, without TF32", above=0)
    memory: float = knob("bytes of memory", above=0)
    bandwidth: float = knob("bytes a second to and from memory", above=0)
    link: float = knob("bytes a second to the other devices of the server", above=0)
    network: float = knob("bytes a second to other servers", above=0)
    per_server: int = knob("devices in one server", low=1)
    watts: float = knob("its share of the server's largest draw, processors and fans included", above=0)
    price: float = knob("dollars an hour", low=0)
    efficiency: float = knob("model FLOP/s of a running step as a share of the dense peak", above=0, high=1)
    source: str = knob("where the figures come from")
    price_source: str = knob("where the price comes from")
    efficiency_source: str = knob("where the efficiency comes from")

    @property
    def is_cpu(self) -> bool:
        """Whether it computes in host memory."""
        return self.name == "CPU"

    def peak(self, precision: str) -> float:
        """Dense FLOP/s in a precision of parallel.precision."""
        return self.bfloat16 if precision == "bfloat16" else self.float32


_T, _G = 1e12, 1e9
_INDEX = "median on demand of a price index over 58 providers, May 2026"
_HOPPER = "vendor data sheet: 1,979 TFLOP/s with sparsity, halved; NVLink 4; a DGX of 8 draws 10.2 kW"
_BLACKWELL = "vendor data sheet: 36 PFLOP/s with sparsity for 8, halved; NVLink 5"

EFFICIENCY = 0.123
_PUBLISHED = {
    "efficiency": EFFICIENCY,
    "efficiency_source": "set so that Trinity Large takes the published 33 days on 2,048 B300 (17T tokens); the same "
    "share is assumed for other GPUs and shapes",
}  # docs/guides/planning.md sets it beside other published runs

DEVICES = {
    device.name: device
    for device in (
        Device(name="B300", bfloat16=2250 * _T, float32=75 * _T, memory=288 * _G, bandwidth=8 * _T, link=900 * _G,
               network=100 * _G, per_server=8, watts=1750, price=6.5, **_PUBLISHED,
               source=f"{_BLACKWELL}; 288 GB; 800 Gb/s a GPU; a DGX of 8 draws 14 kW",
               price_source="assumed a little above B200; listings of 2026 differ by a factor of three"),
        Device(name="B200", bfloat16=2250 * _T, float32=75 * _T, memory=180 * _G, bandwidth=8 * _T, link=900 * _G,
               network=50 * _G, per_server=8, watts=1790, price=6.0, **_PUBLISHED,
               source=f"{_BLACKWELL}; 180 GB; 400 Gb/s a GPU; a DGX of 8 draws 14.3 kW",
               price_source="list prices of two providers, March 2026: 5.89 and 6.03 dollars"),
        Device(name="H200", bfloat16=989 * _T, float32=67 * _T, memory=141 * _G, bandwidth=4.8 * _T, link=450 * _G,
               network=50 * _G, per_server=8, watts=1275, price=4.0, **_PUBLISHED,
               source=f"{_HOPPER}; 141 GB; 400 Gb/s a GPU",
               price_source="middle of specialised providers, May 2026: 3.50 to 4.50 dollars"),
        Device(name="H100", bfloat16=989 * _T, float32=67 * _T, memory=80 * _G, bandwidth=3.35 * _T, link=450 * _G,
               network=50 * _G, per_server=8, watts=1275, price=2.95, **_PUBLISHED,
               source=f"{_HOPPER}; 80 GB; 400 Gb/s a GPU", price_source=_INDEX),
        Device(name="A100", bfloat16=312 * _T, float32=19.5 * _T, memory=80 * _G, bandwidth=2.039 * _T,
               link=300 * _G, network=25 * _G, per_server=8, watts=812, price=1.3, **_PUBLISHED,
               source="vendor data sheet, SXM 80 GB; NVLink 3; 200 Gb/s a GPU; a DGX of 8 draws 6.5 kW",
               price_source="middle of specialised providers, May 2026: 1.10 to 1.50 dollars"),
        Device(name="RTX4090", bfloat16=165.2 * _T, float32=82.6 * _T, memory=24 * _G, bandwidth=1.008 * _T,
               link=25 * _G, network=1.5 * _G, per_server=8, watts=600, price=0.69, **_PUBLISHED,
               source="vendor white paper (sums in float32); PCIe 4 x16, no peer access; assumed 100 Gb/s for 8 cards",
               price_source="list price of one provider, 2026"),
        Device(name="CPU", bfloat16=310 * _G, float32=310 * _G, memory=24 * _G, bandwidth=20 * _G, link=1.25 * _G,
               network=1.25 * _G, per_server=1, watts=60, price=0.1, efficiency=0.45,
               source="two server cores with AVX-512: float32 matmul at 300 to 340 GFLOP/s (records); the rest assumed",
               price_source="assumed: 0.05 dollars for a core and hour",
               efficiency_source="lab256 reaches 59 % of it with AMX and some 50 % without, demo a third (records)"),
    )
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """`size` equal devices, servers filled one after another."""

    device: Device
    size: int

    def __str__(self) -> str:
        return f"{self.size}x{self.device.name}"


def parse_cluster(text: str) -> Cluster:
    """'2048xB300' -> Cluster. A UsageError names the kinds that are known."""
    match = re.fullmatch(r"\s*([0-9][0-9_,]*)\s*[xX*]\s*([A-Za-z0-9_ -]+?)\s*", text)
    if not match:
        raise UsageError(f"'{text}' is not a cluster.", "Write a number, x and a kind, such as 2048xB300 or 1xCPU.")
    size = parse_count(match[1])
    if not 1 <= size <= 10**6:
        raise UsageError(f"A cluster of {size} devices cannot be planned.", "Write a number from 1 to 1,000,000.")
    return Cluster(device=device_named(match[2]), size=size)


def device_named(name: str) -> Device:
    """The device of that name, however it is spelt; an unknown one is a UsageError."""
    plain = re.sub(r"[ _-]", "", name).upper().removeprefix("NVIDIA")
    plain = "RTX4090" if plain == "4090" else plain
    if plain not in DEVICES:
        raise UsageError(f"There is no device kind '{name}'.", f"Known: {', '.join(DEVICES)}.")
    return DEVICES[plain]
