"""Trinity Nano, Mini and Large as published: shapes, batch, schedule and balancing of the technical report.

Sources: report table 1 (shapes, learning rates, initialisation), section 2 (SMEBU constants), section 3 (batch,
schedule), 3.5 (context extension). What the report leaves open (weight decay, AdamW betas, clipping) takes the
defaults of config/optim.py.

The phases are as published: three mixes of data each, the anneal over the third, one widening of the step, and rows of
the context extension. Our choices, because nothing was found: when Nano and Mini widen their step (at the same share of
the run as Large), and of every extension the tokens in all (Large: those that its data holds; Nano and Mini: a tenth of
them), in a step (as many as before) and in the warm-up (a tenth). Large-TrueBase is published as the model after 10T
tokens, before the second mix: the checkpoint `phase-1`.

They are for GPUs: bfloat16, blocks computed again in backward. Large was spread with its experts over the 8 GPUs of a
machine and in replicas of 128 (16 of them); `parallel.replicate` stays 1 here, since 16 fits one size of cluster only:
`trinity plan` names the layout for another. The folders of the mixes are names to fill: make
them with `trinity data mix`, or set phases.N.mix.
"""

from trinity.config.data import DataConfig
from trinity.config.model import ModelConfig
from trinity.config.optim import BalanceConfig, OptimConfig
from trinity.config.parallel import ParallelConfig
from trinity.config.phases import ExtensionConfig, PhaseConfig
from trinity.config.run import RunConfig
from trinity.config.train import TrainConfig

_TRILLION, _BILLION = 10**12, 10**9


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
        train=_cluster_training(tokens=10 * _TRILLION, batch_tokens=4096 * 4096),
        parallel=_on_gpus(),
        phases=_three_mixes("nano", 7 * _TRILLION, 8_800 * _BILLION, 2_900 * _BILLION, 8192 * 4096),
        extension=ExtensionConfig(
            tokens=12 * _BILLION,
            sequence_length=262_144,
            batch_tokens=8192 * 4096,
            mix="mixes/nano-long",
            warmup_tokens=1_200_000_000,
            high_lr_fraction=0.1,
            final_lr_fraction=0.0,
        ),
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
        train=_cluster_training(tokens=10 * _TRILLION, batch_tokens=4096 * 4096),
        parallel=_on_gpus(),
        phases=_three_mixes("mini", 7 * _TRILLION, 8_800 * _BILLION, 2_900 * _BILLION, 8192 * 4096),
        extension=ExtensionConfig(
            tokens=12 * _BILLION,
            sequence_length=131_072,
            batch_tokens=8192 * 4096,
            mix="mixes/mini-long",
            warmup_tokens=1_200_000_000,
            high_lr_fraction=0.1,
            final_lr_fraction=0.0,
        ),
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
        train=_cluster_training(tokens=17 * _TRILLION, batch_tokens=12288 * 8192),
        parallel=_on_gpus(expert=8),
        phases=_three_mixes("large", 10 * _TRILLION, 14 * _TRILLION, 4_900 * _BILLION, 16384 * 8192),
        extension=ExtensionConfig(
            tokens=117 * _BILLION,
            sequence_length=262_144,
            batch_tokens=16384 * 8192,
            mix="mixes/large-long",
            high_lr_fraction=0.1,
            final_lr_fraction=0.05,
            decay="cosine",
        ),
    )


def _on_gpus(expert: int = 1) -> ParallelConfig:
    return ParallelConfig(expert=expert, precision="bfloat16", remat="block")


def _three_mixes(name: str, second: int, third: int, wide: int, wide_tokens: int) -> tuple[PhaseConfig, ...]:
    """Three mixes of data, the later two from tokens `second` and `third` on; steps of `wide_tokens` from `wide` on."""
    return (
        PhaseConfig(name="phase 1", from_tokens=0, mix=f"mixes/{name}-1"),
        PhaseConfig(name="wide steps", from_tokens=wide, batch_tokens=wide_tokens),
        PhaseConfig(name="phase 2", from_tokens=second, mix=f"mixes/{name}-2", keep="phase-1"),
        PhaseConfig(name="phase 3", from_tokens=third, mix=f"mixes/{name}-3"),
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
