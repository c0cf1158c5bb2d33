"""How fast a model could write at best: the roofline of decoding, for each kind of device.

    seconds a token step = max( (weights touched + caches read) / bandwidth,  FLOPs / peak )  over the devices together

Weights and cache are bfloat16 on every side. The devices are the least power of two that hold the weights and the
caches of the batch. Nothing is lost to launches or links here, so real engines are slower, at batch 1 by
latency most of all.
"""

from typing import NamedTuple

from trinity.plan.hardware import Device
from trinity.plan.peers import Peer

VALUE_BYTES = 2


class Decode(NamedTuple):
    """The most tokens a second, for one sequence and for one device."""

    devices: int
    per_sequence: float
    per_device: float


def decode_roofline(model: Peer, device: Device, batch: int, context: int, usable: float) -> Decode:
    """The bound for `batch` sequences that each have `context` tokens behind them."""
    cache = batch * model.kv_bytes(context)
    held = VALUE_BYTES * model.total + cache
    devices = 1
    while devices * device.memory * usable < held:
        devices *= 2
    moved = (VALUE_BYTES * model.touched(batch) + cache) / (devices * device.bandwidth)
    computed = batch * _decode_flops(model, context) / (devices * device.bfloat16)
    seconds = max(moved, computed)
    return Decode(devices, 1 / seconds, batch / seconds / devices)


def _decode_flops(model: Peer, context: int) -> float:
    """One token behind `context` tokens. Latent attention attends in the latent space, for every head."""
    keys = (model.layers - model.windowed_layers) * context
    keys += model.windowed_layers * min(context, model.window or context)
    wide = 2 * model.head if model.latent is None else 2 * model.latent.key + model.latent.rotary
    return 2 * model.active + 2 * model.heads * wide * keys
