"""Trinity Nano, Mini and Large as published: shapes, batch, schedule and balancing of the technical report.

Sources: report table 1 (shapes, learning rates, initialisation), section 2 (SMEBU constants), section 3 (batch,
schedule). What the report leaves open (weight decay, AdamW betas, clipping) takes the defaults of config/optim.py.
"""

from trinity.config.data import DataConfig
from trinity.config.model import ModelConfig
from trinity.config.optim import BalanceConfig, OptimConfig
from trinity.config.run import RunConfig
from trinity.config.train import TrainConfig

_TRILLION = 10**12


def nano() -> RunConfig:
    """Trinity Nano: 6.1B parameters, 8 of 128 experts, 10T tokens."""
    return RunConfig(
        name="nano",
        model=ModelConfig(
            vocab_size=200192,
            hidden_size=1024,
            intermediate_size=3072,
            moe_intermediate_size=256,
            num_hidden_layers=56,
            num_dense_layers=2,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            route_scale=2.826,
            sliding_window=2048,
            max_position_embeddings=131072,
        ),
        data=DataConfig(sequence_length=4096, buffer_documents=4096, intra_document_mask=False),
        optim=OptimConfig(
            muon_lr=1e-3,
            adamw_lr=3e-4,
            warmup_tokens=2000 * 4096 * 4096,
            decay_tokens=1_200_000_000_000,
            newton_schulz_dtype="bfloat16",
        ),
        balance=BalanceConfig(rule="sign", sign_gamma=1e-3, sequence_loss=0.0, z_loss=0.0),
        train=_cluster_training(tokens=10 * _TRILLION, batch_tokens=8192 * 4096),
    )


def mini() -> RunConfig:
    """Trinity Mini: 26.1B parameters, 8 of 128 experts, 10T tokens."""
    return RunConfig(
        name="mini",
        model=ModelConfig(
            vocab_size=200192,
            hidden_size=2048,
            intermediate_size=6144,
            moe_intermediate_size=1024,
            num_hidden_layers=32,
            num_dense_layers=2,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            route_scale=2.826,
            sliding_window=2048,
            max_position_embeddings=131072,
        ),
        data=DataConfig(sequence_length=4096, buffer_documents=4096, intra_document_mask=False),
        optim=OptimConfig(
            muon_lr=1e-3,
            adamw_lr=2e-4,
            warmup_tokens=2000 * 4096 * 4096,
            decay_tokens=1_200_000_000_000,
            newton_schulz_dtype="bfloat16",
        ),
        balance=BalanceConfig(rule="sign", sign_gamma=1e-3, sequence_loss=0.0, z_loss=0.0),
        train=_cluster_training(tokens=10 * _TRILLION, batch_tokens=8192 * 4096),
    )


def large() -> RunConfig:
    """Trinity Large: 398.6B parameters, 4 of 256 experts, 17T tokens, SMEBU, intra-document masks."""
    return RunConfig(
        name="large",
        model=ModelConfig(
            vocab_size=200192,
            hidden_size=3072,
            intermediate_size=12288,
            moe_intermediate_size=3072,
            num_hidden_layers=60,
            num_dense_layers=6,
            num_attention_heads=48,
            num_key_value_heads=8,
            head_dim=128,
            num_experts=256,
            num_experts_per_tok=4,
            route_scale=2.448,
            sliding_window=4096,
            max_position_embeddings=262144,
        ),
        data=DataConfig(sequence_length=8192, buffer_documents=4096),
        optim=OptimConfig(
            muon_lr=8e-4,
            adamw_lr=2e-4,
            warmup_tokens=2000 * 12288 * 8192,
            decay_tokens=3 * _TRILLION,
            decay="cosine",
            final_lr_fraction=0.1,
            newton_schulz_dtype="bfloat16",
        ),
        balance=BalanceConfig(rule="smebu", sequence_loss=1e-4, z_loss=1e-6),
        train=_cluster_training(tokens=17 * _TRILLION, batch_tokens=16384 * 8192),
    )


def _cluster_training(tokens: int, batch_tokens: int) -> TrainConfig:
    return TrainConfig(
        tokens=tokens,
        batch_tokens=batch_tokens,
        microbatch_rows=1,
        evaluate_every_tokens=1000 * batch_tokens,
        evaluate_bytes=2**26,
        save_every_tokens=250 * batch_tokens,
        keep_checkpoints=4,
        spike_action="rollback",
    )
