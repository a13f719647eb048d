"""Knobs of the linearization of a trained model."""

import math
from dataclasses import dataclass
from typing import Literal

from snlp_jax.config.check import require

RankBy = Literal["heldout", "nmse_residual", "nmse", "cca", "random"]


@dataclass(frozen=True)
class LinearizeConfig:
    """Which sub-layers of a model to replace by affine maps, and how to fit these; each field is also a flag of
    ``python -m snlp_jax.linearize``."""

    attention: int = 0
    """Attentions to replace."""
    mlp: int = 0
    """MLPs to replace."""
    blocks: int = 0
    """Whole layers to replace, each by one map; other layers are then chosen for the two above."""
    rank_by: RankBy = "heldout"
    """Replaced are the layers of the lowest: NMSE with the residual on text that the maps were not fitted to; the same
    on the text that they were; that without the residual; the authors' bound by canonical correlations; or a random
    choice, as a control."""
    greedy: bool = False
    """Take statistics anew on the model so far after every replacement, instead of once."""
    every: int = 1
    """Replacements between them."""
    drop: bool = False
    """The control: drop the chosen sub-layers, with nothing in their place."""
    rank: int = 0
    """Of the maps, as products of two matrices; 0 means whole ones."""
    ridge: float | None = None
    """Relative to the mean eigenvalue of C_xx. None means 0 where C_xx is well conditioned, and otherwise what is best
    on text that the maps were not fitted to."""
    shrinkage: float = 0.0
    """Share of a multiple of the identity that C_xx is mixed with."""
    tokens: int = 524_288
    """Of training text that the maps are fitted to; a quarter as many more choose and rank."""
    skip_first: int = 0
    """Tokens at the beginning of each window that do not count."""
    batch_size: int = 32
    """Windows at once."""
    layers_at_once: int = 0
    """Layers whose statistics are held at once, each group of which costs a pass over the text; 0 means all."""
    seed: int = 0
    """Of the choice of windows, and of a random choice of layers."""

    def __post_init__(self) -> None:
        for name in ("attention", "mlp", "blocks", "rank", "skip_first", "layers_at_once", "seed"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; it must be 0 or more.")
        for name in ("every", "tokens", "batch_size"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1.")
        require(
            self.attention + self.mlp + self.blocks > 0,
            "nothing is to be replaced; give a number of layers with --attention, --mlp or --blocks.",
        )
        require(
            self.ridge is None or 0 <= self.ridge < math.inf, f"ridge is {self.ridge}; it must be 0 or more, or None."
        )
        require(0 <= self.shrinkage <= 1, f"shrinkage is {self.shrinkage}; give 0 to 1.")
        require(self.every == 1 or self.greedy, f"every is {self.every}, but without --greedy there is one choice.")
