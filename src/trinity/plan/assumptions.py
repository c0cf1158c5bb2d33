"""What a plan assumes beyond the recipe and the device: each an input with a default and its reason."""

from dataclasses import dataclass

from trinity.config.knob import Settings, knob


@dataclass(frozen=True, kw_only=True)
class Assumptions(Settings):
    section = "assume"

    usable_memory: float = knob("share of a device's memory that a run may plan with", 0.92, above=0, high=1)
    overlap: float = knob(
        "share of the shorter of computing and gathering weights that the longer hides", 0.8, low=0, high=1
    )
    kernel_seconds: float = knob("seconds from the start of one kernel to that of the next, at least", 8e-6, low=0)
    call_seconds: float = knob("seconds that a collective takes however little it sends", 3e-5, low=0)
    power_usage: float = knob("energy of the building over that of the servers (PUE)", 1.25, low=1)
    failure_hours: float = knob("hours of one device between failures that stop a run", 50_000.0, above=0)
    restart_minutes: float = knob("minutes from a failure to the next step", 10.0, low=0)
    copy_rate: float = knob("bytes a second from a device to its host, while a checkpoint is copied", 25e9, above=0)


REASONS = {
    "usable_memory": "fragmentation of the allocator and what the driver keeps; assumed",
    "overlap": "assumed; matters to the roofline alone",
    "kernel_seconds": "assumed: eager PyTorch without graphs starts some 100,000 kernels a second",
    "call_seconds": "assumed: small messages of NCCL within and between servers take 10 to 50 microseconds",
    "power_usage": "between large operators' 1.1 and a survey's average of 1.56",
    "failure_hours": "Llama 3, arXiv 2407.21783: 419 unexpected stops in 54 days on 16,384 H100",
    "restart_minutes": "assumed; start of processes, reading a checkpoint, refilling the data buffer",
    "copy_rate": "half of PCIe 5 x16; writing to disk goes on beside training",
}
