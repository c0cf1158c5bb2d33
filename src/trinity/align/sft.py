"""Supervised fine-tuning: the pretrained model learns to answer. Ends in a model folder that can be served.

The selection biases are frozen, on purpose: a few thousand short conversations say nothing about how a model should
spread its experts, and a rule that moved them would unlearn the balance of pretraining. The folder's lineage says so.
"""

import math
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from trinity.align.conversations import Conversations, as_batch, pack
from trinity.base.durable import folder_aside, sha256_file
from trinity.base.errors import TrainingHalted
from trinity.base.lineage import fingerprint, write_lineage
from trinity.base.run import MetricsLog
from trinity.base.seeds import named_seed
from trinity.ckpt.model_folder import write_model_folder
from trinity.ckpt.opened import OpenedModel
from trinity.config.align import AlignConfig
from trinity.config.load import to_dict
from trinity.config.optim import OptimConfig
from trinity.data.loader import Batch
from trinity.model.attend import Packed
from trinity.model.loss import IGNORED, chunked_loss
from trinity.model.transformer import Transformer
from trinity.optim.groups import Optimisers, build_optimisers
from trinity.optim.schedule import rewarmed_factor


class SftStep(NamedTuple):
    step: int
    loss: float  # nats per assistant token


def fine_tune(
    opened: OpenedModel,
    conversations: Conversations,
    config: AlignConfig,
    data: Path,
    out: Path,
    show: Callable[[SftStep], None],
) -> list[SftStep]:
    """Fine-tune the opened model itself and write the result to `out` as a whole, or nothing at all."""
    rows = plan_rows(conversations, config)
    rows_per_step = config.batch_tokens // config.sequence_length
    steps = count_steps(conversations, config)
    model = opened.model.train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    optimisers = build_optimisers(
        model, OptimConfig(muon_lr=config.muon_lr, adamw_lr=config.adamw_lr, muon_weight_decay=0.0)
    )
    history = []
    with folder_aside(out) as aside, closing(MetricsLog(aside, resume_step=0)) as log:
        for step in range(1, steps + 1):
            started = time.perf_counter()
            factor = rewarmed_factor((step - 0.5) / steps, config.warmup_fraction)
            optimisers.set_rates(factor * config.muon_lr, factor * config.adamw_lr)
            batch = as_batch(
                rows[(step - 1) * rows_per_step : step * rows_per_step], config.sequence_length, opened.tokenizer.pad_id
            )
            loss, grad_norm = _step(model, optimisers, batch)
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                raise TrainingHalted(
                    f"The loss became {loss:.4g} and its gradient {grad_norm:.4g} at step {step}.",
                    "Nothing was written. Lower muon_lr and adamw_lr with --set.",
                )
            seconds = time.perf_counter() - started
            log.write(
                "step", step, loss=loss, grad_norm=grad_norm, lr_muon=factor * config.muon_lr, seconds=round(seconds, 4)
            )
            history.append(SftStep(step, loss))
            show(history[-1])
        model.eval().requires_grad_(False)
        write_model_folder(
            aside, model, opened.tokenizer, torch.float32, chat=True, load_balance_coeff=opened.load_balance_coeff
        )
        write_lineage(
            aside,
            "fine-tuned model",
            {"model": opened.name, "model_lineage": fingerprint(opened.lineage), "conversations": sha256_file(data)},
            {"method": "sft", "config": to_dict(config), "selection_biases": "frozen"},
        )
    return history


def plan_rows(conversations: Conversations, config: AlignConfig) -> list[list]:
    """All rows of the run, epoch after epoch, each epoch in its own order; a last part of an epoch may be short."""
    rows = []
    for epoch in range(math.ceil(config.epochs)):
        generator = np.random.default_rng(named_seed(config.seed, "sft", "epoch", epoch))
        order = generator.permutation(len(conversations.rendered))
        share = min(1.0, config.epochs - epoch)
        rows += list(pack(conversations.rendered, order[: math.ceil(share * len(order))], config.sequence_length))
    return rows


def count_learnt(conversations: Conversations, config: AlignConfig) -> int:
    """How many of the conversations the run reads at least once: with less than one epoch a part of them."""
    return math.ceil(min(1.0, config.epochs) * len(conversations.rendered))


def count_steps(conversations: Conversations, config: AlignConfig) -> int:
    """Optimiser steps of the run."""
    return math.ceil(len(plan_rows(conversations, config)) / (config.batch_tokens // config.sequence_length))


def _step(model: Transformer, optimisers: Optimisers, batch: Batch) -> tuple[float, float]:
    """One update on one batch; (loss in nats per assistant token, gradient norm before clipping)."""
    targets = int((batch.targets != IGNORED).sum())
    output = model(batch.tokens, attend=Packed(batch.document_ids))
    loss, cross_entropy = chunked_loss(
        output.hidden.flatten(0, 1), model.lm_head.weight, batch.targets.flatten(), 0.0, targets
    )
    loss.backward()
    grad_norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    optimisers.step()
    optimisers.zero_grad()
    return float(cross_entropy), grad_norm
