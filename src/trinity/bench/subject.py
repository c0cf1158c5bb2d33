"""What is measured: a model or seeded random weights of a shape, in the engines asked for, and how much of what."""

import functools
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trinity.base.seeds import named_seed
from trinity.ckpt.opened import StoredModel, find_model, read_model
from trinity.config.model import ModelConfig
from trinity.engine.loaded import LoadedModel, loaded
from trinity.engine.weights import dtype_named
from trinity.model.init import build_on_meta, fill_initial
from trinity.plan.params import count_parameters
from trinity.text.tokenizer import Tokenizer
from trinity.text.train_bpe import train_bpe

BITS = {"float32": 32, "bfloat16": 16, "float8": 8, "q8_0": 8.5, "q4_0": 4.5, "int8": 8.5, "int4": 4.5}  # and scales
HEADS = {"int4": 8.5, "float8": 16}  # bits of the output's weights, where they are others: engine/weights.py, narrow.py
TEXT_ROW, TEXT_TOKENS = 512, 4096  # of a text whose loss is taken: tokens of a stretch, and in all
DRAWN = 2**24 - 3  # random values, a prime number of them: rows of matrices begin at ever other places


class DrawnWeights(Mapping[str, Tensor]):
    """Seeded random weights of a shape, each made when it is asked for: Nano whole would not fit.

    Distributed as model/init.py has it, but matrices are cut from one drawing, from a place of their own on: six
    billion values drawn one by one take longer than the measurement. `skew` is the deviation of the selection biases:
    it makes some experts popular. The weights of ckpt/weights.py, and a state dict.
    """

    def __init__(self, config: ModelConfig, skew: float = 0.0) -> None:
        self.config, self.skew, self.metas = config, skew, build_on_meta(config).state_dict()
        drawn = torch.empty(DRAWN, 1)
        fill_initial(drawn, "drawn", config, seed=0, rows=DRAWN)
        self.twice = drawn.flatten().repeat(2)

    def tensor(self, name: str) -> Tensor:
        shape = self.metas[name].shape
        if len(shape) > 2:
            return torch.stack([*self.experts(name)])
        if len(shape) == 2:
            return self._cut(name, shape)
        values = torch.zeros(shape)
        if not name.endswith("expert_bias"):
            fill_initial(values, name, self.config, seed=0, rows=len(values))
        elif self.skew:
            values.normal_(0, self.skew, generator=torch.Generator().manual_seed(named_seed(0, name)))
        return values

    def experts(self, name: str) -> Iterator[Tensor]:
        for expert in range(len(self.metas[name])):
            yield self._cut(f"{name}.{expert}", self.metas[name].shape[1:])

    def _cut(self, name: str, shape: torch.Size) -> Tensor:
        start, count = named_seed(0, name) % DRAWN, shape.numel()
        if count > DRAWN:
            return self.twice[start : start + DRAWN].repeat(1 + count // DRAWN)[:count].view(shape)
        return self.twice[start : start + count].view(shape)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensor(name).clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.metas)

    def __len__(self) -> int:
        return len(self.metas)


@functools.cache  # finding a model may read all of it: what was sealed is compared with its manifest
def _found(folder: Path) -> StoredModel:
    return find_model(folder)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model that is measured."""

    name: str
    config: ModelConfig
    folder: Path | None = None  # of its weights; None: seeded random ones

    def weights(self) -> Mapping[str, Tensor]:
        """In float32, by our names."""
        return DrawnWeights(self.config) if self.folder is None else read_model(_found(self.folder)).model.state_dict()

    def tokenizer(self) -> Tokenizer:
        return train_bpe([Path(__file__).read_text()], 512) if self.folder is None else _found(self.folder).tokenizer

    def stored(self) -> StoredModel:
        if self.folder is not None:
            return _found(self.folder)
        about = {"folder": Path(), "generation": {}, "lineage": {}, "load_balance_coeff": 0.0}
        return StoredModel(config=self.config, weights=DrawnWeights(self.config), tokenizer=self.tokenizer(),
                           name=self.name, **about)  # fmt: skip

    def loaded(self, kind: str, device: str) -> LoadedModel:
        """In our engine."""
        return loaded(self.stored(), dtype_named(kind), device)

    def gguf(self, work: Path, precision: str) -> Path:
        """llama.cpp's file of these weights, which is not that of others of the same name."""
        files = sorted(self.folder.rglob("*.safetensors")) if self.folder else []
        state = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        mark = hashlib.sha256(repr((self.config, str(self.folder), state)).encode()).hexdigest()[:8]
        return work / f"{self.name}-{mark}-{precision}.gguf"

    def weight_bytes_a_token(self, precision: str) -> float:
        """Bytes of weights that a token of one sequence needs: a row of the embedding, the chosen experts, the rest."""
        count = count_parameters(self.config)
        exact, row = count.router + count.norms, self.config.hidden_size
        rest = count.active - exact - count.head + row
        head = HEADS.get(precision, BITS[precision])
        return 4 * (exact + count.selection_bias) + (BITS[precision] * rest + head * count.head) / 8


@dataclass(frozen=True, kw_only=True)
class Side:
    """A subject in an engine, 'trinity', 'transformers' or 'llama', at a precision."""

    engine: str
    precision: str
    subject: Subject
    label: str = ""  # before the precision, where the engine's name would not tell it from another side

    @property
    def name(self) -> str:
        return f"{self.label or self.engine}-{self.precision}"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is measured of every side."""

    batches: tuple[int, ...]
    prefill: tuple[int, ...]  # tokens of the prompts that are read
    requests: int  # answered all together; 0: that is not measured
    prompt: int  # tokens before each decoding
    tokens: int  # decoded of each sequence
    repeats: int
    device: str  # 'cpu' or 'cuda'
    threads: int
    awake: bool  # whether threads wait by spinning, also for the next step
    text: str | None  # whose loss is taken
    drafts: int  # tokens proposed at once; 0: drafts are not measured
    work: Path  # folder of llama.cpp's files

    @property
    def longest(self) -> int:
        """Tokens of the longest text that llama.cpp is to hold."""
        return max(*self.prefill, self.prompt + self.tokens, TEXT_ROW)


Requests = list[tuple[list[int], int]]  # prompts, and how many tokens answer each


def random_requests(config: ModelConfig, asked: Asked, turn: int) -> Requests:
    """Prompts and answers of half the tokens asked for to all of them, others in each turn."""
    drawn = np.random.default_rng(turn)
    prompts, answers = (
        drawn.integers(max(1, most // 2), most, asked.requests, endpoint=True).tolist()
        for most in (asked.prompt, asked.tokens)
    )
    first = turn * asked.requests
    return [
        (random_prompt(config, length, first + row), tokens)
        for row, (length, tokens) in enumerate(zip(prompts, answers, strict=True))
    ]


def random_prompt(config: ModelConfig, length: int, row: int = 0) -> list[int]:
    low = min(32, config.vocab_size - 1)  # above the marks
    return np.random.default_rng(row).integers(low, config.vocab_size, length).tolist()
