"""From logits to a token: pure functions of one row of logits [V] float32 and of what was written before."""

import torch
from torch import Tensor

from trinity.engine.request import SamplingParams, TokenLogprob


def choose(
    logits: Tensor, sampling: SamplingParams, prompt: list[int], answer: list[int], draw: torch.Generator
) -> int:
    """The next token of `answer` under `sampling`. With temperature 0 the likeliest, the lowest id among equals."""
    logits = biased(logits, sampling.logit_bias)
    logits = penalised(logits, sampling, prompt, answer)
    if sampling.temperature == 0:
        return int(logits.argmax())
    # Dividing by the distance to the maximum keeps tiny temperatures finite.
    logits = (logits - logits.max()) / sampling.temperature
    logits = keep_top_k(logits, sampling.top_k)
    logits = keep_top_p(logits, sampling.top_p)
    logits = keep_min_p(logits, sampling.min_p)
    return drawn(logits.softmax(-1), draw)


def drawn(probabilities: Tensor, draw: torch.Generator) -> int:
    """A token by its probability, from one random number (torch.multinomial draws one for each token)."""
    up_to = probabilities.cumsum(-1, dtype=torch.float64)
    place = torch.rand(1, generator=draw, dtype=torch.float64, device=draw.device).to(up_to.device) * up_to[-1]
    return int(torch.searchsorted(up_to[:-1], place, right=True))


def biased(logits: Tensor, bias: dict[int, float]) -> Tensor:
    """Logits with `bias` added to the named tokens."""
    if not bias:
        return logits
    added = torch.zeros_like(logits)
    added[list(bias)] = torch.tensor(list(bias.values()), dtype=logits.dtype, device=logits.device)
    return logits + added


def penalised(logits: Tensor, sampling: SamplingParams, prompt: list[int], answer: list[int]) -> Tensor:
    """Repetition penalty over prompt and answer (CTRL, section 4.1); presence and frequency over the answer alone."""
    if sampling.repetition_penalty != 1 and (prompt or answer):
        seen = torch.tensor(sorted({*prompt, *answer}), device=logits.device)
        old = logits[seen]
        new = torch.where(old > 0, old / sampling.repetition_penalty, old * sampling.repetition_penalty)
        logits = logits.index_put((seen,), new)
    if answer and (sampling.presence_penalty or sampling.frequency_penalty):
        counts = torch.bincount(torch.tensor(answer, device=logits.device), minlength=len(logits))
        logits = logits - sampling.presence_penalty * (counts > 0) - sampling.frequency_penalty * counts
    return logits


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """-inf everywhere but at the k largest, the lowest ids among equals; 0 keeps all."""
    if k == 0 or k >= len(logits):
        return logits
    least = logits.topk(k).values[-1]
    above = logits > least
    equal = (logits == least).nonzero().flatten()
    kept = above.index_fill(0, equal[: k - int(above.sum())], True)
    return logits.masked_fill(~kept, float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """-inf outside the smallest set of most likely tokens whose probabilities sum to at least p."""
    if p >= 1:
        return logits
    probabilities = logits.softmax(-1)
    # All tokens below this have less than half of 1 - p together: the set is found, and sorted, without them.
    likely = (probabilities >= (1 - p) / 2 / len(logits)).nonzero().flatten()
    likely = likely[logits[likely].argsort(descending=True, stable=True)]
    ordered = probabilities[likely]
    kept = likely[ordered.cumsum(-1) - ordered < p]
    return torch.full_like(logits, float("-inf")).index_put((kept,), logits[kept])


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """-inf at tokens less than p times as likely as the likeliest."""
    if p == 0:
        return logits
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.max(), float("-inf"))


def logprobs_of(logits: Tensor, tokens: Tensor, top: int) -> list[TokenLogprob]:
    """Log-probabilities of `tokens` [T] under `logits` [T, V], each with the `top` likeliest at its place."""
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(-1, tokens[:, None]).flatten().tolist()
    best = logprobs.topk(min(top, logprobs.shape[-1]), dim=-1)
    return [
        TokenLogprob(token, logprob, tuple(zip(ids, values, strict=True)))
        for token, logprob, ids, values in zip(
            tokens.tolist(), chosen, best.indices.tolist(), best.values.tolist(), strict=True
        )
    ]
