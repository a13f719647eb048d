"""Knobs of low-rank adapters."""

import math
from dataclasses import dataclass
from typing import Literal

from snlp_jax.config.check import Checked, require

Target = Literal["query", "key", "value", "out", "up", "gate", "down", "linear_attn", "linear_mlp"]


@dataclass(frozen=True)
class LoraConfig(Checked, section="lora"):
    """Train ``W + (alpha / rank) A B`` with W frozen, in place of all parameters (snlp_jax/train/lora.py)."""

    rank: int = 0
    """Of A [in, rank] and B [rank, out]; 0 trains all parameters."""
    alpha: float = 16.0
    targets: tuple[Target, ...] = ("query", "key", "value", "out", "up", "down")
    """Matrices of every layer that get adapters; ``gate`` is for models whose MLP has one, ``linear_attn`` and
    ``linear_mlp`` for those with linear maps in place of branches."""
    lr: float = 2e-3
    """Of AdamW on the adapters; ``optim.lr_scale`` and the schedule multiply it, the other rates play no part."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(0, "rank")
        for name in ("alpha", "lr"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"lora.{name} is {value}; it must be positive.")
        require(len(self.targets) > 0, "lora.targets is empty; name a matrix, or set lora.rank to 0.")
        require(len(set(self.targets)) == len(self.targets), f"lora.targets {self.targets} names a matrix twice.")
