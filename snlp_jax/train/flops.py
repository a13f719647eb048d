"""Floating-point operations of training, and the peaks of known devices, for model FLOP utilisation."""

from snlp_jax.config import ModelConfig
from snlp_jax.parallel.chips import chip_of


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 operations per second of a device by its data sheet, None where it is not known."""
    chip = chip_of(device_kind)
    return None if chip is None else chip.bf16_flops


def train_flops_per_token(config: ModelConfig) -> float:
    """Forward and backward of the sequential pass: 6 per matrix weight, 12 per visible key, head channel and layer,
    and with R residual streams 6 per channel and entry of the maps between them.

    Auxiliary loss terms and recomputation are not counted: utilisation is that of plain training.
    """
    D, H = config.embed_dim, config.head_dim
    attention = 2 * D * config.num_heads * H + 2 * D * config.num_kv_heads * H
    matrices = config.num_layers * (attention + 2 * config.mlp_ratio * D * D) + D * config.padded_vocab_size
    if R := config.num_streams:
        entries = R * R + 2 * R
        matrices += 2 * config.num_layers * D * entries * (1 + R * (config.hyper_maps == "dynamic"))
    visible = sum(min(window, config.seq_len) for window in config.windows)
    return 6.0 * matrices + 12.0 * config.num_heads * H * visible
