"""Recipes for one small machine: `debug` (seconds), `demo` (about five minutes), `lab256` (4 of 256 experts)."""

from trinity.config.data import DataConfig
from trinity.config.model import ModelConfig
from trinity.config.optim import BalanceConfig, OptimConfig
from trinity.config.run import RunConfig
from trinity.config.train import TrainConfig


def debug() -> RunConfig:
    """A model that trains in seconds on any machine; what kill tests and the golden run use."""
    return RunConfig(
        name="debug",
        model=ModelConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=128,
            moe_intermediate_size=32,
            num_hidden_layers=4,
            num_dense_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            num_experts=8,
            num_experts_per_tok=2,
            route_scale=1.414,
            sliding_window=32,
            max_position_embeddings=512,
        ),
        data=DataConfig(sequence_length=128, buffer_documents=16),
        optim=OptimConfig(muon_lr=0.02, adamw_lr=3e-3, warmup_tokens=4 * 1024, decay_tokens=16 * 1024),
        balance=BalanceConfig(smebu_lambda=5e-3),
        train=TrainConfig(
            tokens=64 * 1024,
            batch_tokens=1024,
            microbatch_rows=4,
            evaluate_every_tokens=32 * 1024,
            evaluate_bytes=8192,
            sample_tokens=32,
            save_every_tokens=8 * 1024,
        ),
    )


def demo() -> RunConfig:
    """The five-minute model: a sparse mixture for two CPU cores, trained on the standard library's source."""
    return RunConfig(
        name="demo",
        model=ModelConfig(
            vocab_size=4096,
            hidden_size=192,
            intermediate_size=512,
            moe_intermediate_size=128,
            num_hidden_layers=4,
            num_dense_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=48,
            num_experts=32,
            num_experts_per_tok=4,
            route_scale=2.0,
            sliding_window=128,
            max_position_embeddings=2048,
        ),
        data=DataConfig(sequence_length=512, buffer_documents=256),
        optim=OptimConfig(muon_lr=0.02, adamw_lr=1e-2, warmup_tokens=48 * 1024, decay_tokens=600 * 1024),
        balance=BalanceConfig(smebu_lambda=5e-3),
        train=TrainConfig(
            tokens=1536 * 1024,
            batch_tokens=4096,
            microbatch_rows=4,
            evaluate_every_tokens=256 * 1024,
            evaluate_bytes=65536,
            save_every_tokens=512 * 1024,
        ),
    )


def lab256() -> RunConfig:
    """410M parameters, 4 of 256 experts: sparse as Trinity Large, small enough to train here; for comparing speed."""
    return RunConfig(
        name="lab256",
        model=ModelConfig(
            vocab_size=8192,
            hidden_size=384,
            intermediate_size=1152,
            moe_intermediate_size=192,
            num_hidden_layers=8,
            num_dense_layers=1,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=64,
            num_experts=256,
            num_experts_per_tok=4,
            route_scale=2.448,
            sliding_window=256,
            max_position_embeddings=4096,
        ),
        data=DataConfig(sequence_length=512, buffer_documents=256),
        optim=OptimConfig(muon_lr=5e-3, adamw_lr=2e-3, warmup_tokens=2 * 1024 * 1024, decay_tokens=16 * 1024 * 1024),
        train=TrainConfig(
            tokens=64 * 1024 * 1024,
            batch_tokens=128 * 1024,
            microbatch_rows=8,
            evaluate_every_tokens=4 * 1024 * 1024,
            save_every_tokens=4 * 1024 * 1024,
        ),
    )
