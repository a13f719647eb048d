"""Knobs of low-rank adapters."""

from dataclasses import dataclass
from typing import Literal

from snlp_jax.config.check import Checked, Count, Positive, require

Target = Literal["query", "key", "value", "out", "up", "gate", "down", "linear_attn", "linear_mlp"]


@dataclass(frozen=True)
class LoraConfig(Checked, section="lora"):
    """Train ``W + (alpha / rank) A B`` with W frozen, in place of all parameters (snlp_jax/train/lora.py)."""

    rank: Count = 0
    """Of A [in, rank] and B [rank, out]; 0 trains all parameters."""
    alpha: Positive = 16.0
    targets: tuple[Target, ...] = ("query", "key", "value", "out", "up", "down")
    """Matrices of every layer that get adapters; ``gate`` is for models whose MLP has one, ``linear_attn`` and
    ``linear_mlp`` for those with linear maps in place of branches."""
    lr: Positive = 2e-3
    """Of AdamW on the adapters; ``optim.lr_scale`` and the schedule multiply it, the other rates play no part."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.targets) > 0, "lora.targets is empty; name a matrix, or set lora.rank to 0.")
        require(len(set(self.targets)) == len(self.targets), f"lora.targets {self.targets} names a matrix twice.")
