"""Twenty steps of the debug recipe, bit-equal from run to run and, to rounding, to a stored curve.

Bits depend on the matrix library of the machine, so two runs on one machine are compared to the bit, and the stored
curve (made by `python tests/golden/test_twenty_steps.py`) to 1e-4. A refactor may not move either; a change of the
mathematics updates the curve in the same commit and says why.
"""

import json
from pathlib import Path

import torch

from trinity.base.seeds import named_seed
from trinity.config.run import RunConfig
from trinity.data.loader import Batch
from trinity.model.loss import IGNORED
from trinity.recipes.table import recipe
from trinity.train.state import TrainState
from trinity.train.step import accumulate, apply_update, learning_rates

CURVE = Path(__file__).with_name("debug_losses.json")


class SyntheticLoader:
    """Rows of a fixed random walk over the vocabulary, two documents a row: no text, no tokenizer."""

    data_fingerprint = "synthetic"

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.generator = torch.Generator().manual_seed(named_seed(0, "golden"))

    def next_batch(self, rows: int) -> Batch:
        length = self.config.data.sequence_length
        steps = torch.randint(-3, 4, (rows, length + 1), generator=self.generator)
        walk = (steps.cumsum(-1) + 40 * torch.arange(rows)[:, None]) % self.config.model.vocab_size
        documents = (torch.arange(length) >= length // 2).long().expand(rows, length)
        targets = walk[:, 1:].clone()
        targets[:, length // 2 - 1] = IGNORED
        return Batch(walk[:, :-1].contiguous(), targets, documents)


def twenty_losses() -> tuple[list[float], dict[str, torch.Tensor]]:
    config = recipe("debug")
    loader = SyntheticLoader(config)
    state = TrainState.fresh(config, loader)  # type: ignore[arg-type]
    losses = []
    for _ in range(20):
        batches = [loader.next_batch(config.train.microbatch_rows) for _ in range(2)]
        measured = accumulate(state, batches, config)
        state.tokens += config.train.batch_tokens
        apply_update(state, measured, config, learning_rates(state.tokens, config))
        losses.append(measured.loss)
    return losses, state.model.state_dict()


def test_two_runs_are_equal_to_the_bit():
    (losses, weights), (again, weights_again) = twenty_losses(), twenty_losses()
    assert losses == again
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)


def test_the_curve_is_the_stored_one():
    stored = json.loads(CURVE.read_text())
    losses, _ = twenty_losses()
    assert max(abs(a - b) for a, b in zip(losses, stored, strict=True)) < 1e-4
    assert losses[-1] < losses[0] - 1.0, "and it learns"


if __name__ == "__main__":
    CURVE.write_text(json.dumps(twenty_losses()[0], indent=1) + "\n")
