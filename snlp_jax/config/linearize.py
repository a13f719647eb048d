"""Knobs of the linearization of a trained model."""

from dataclasses import dataclass
from typing import Literal

from snlp_jax.config.check import Checked, Count, NonNegative, Share, Size
from snlp_jax.errors import InputError

RankBy = Literal["heldout", "nmse_residual", "nmse", "cca", "random"]


@dataclass(frozen=True)
class LinearizeConfig(Checked):
    """Which sub-layers of a model to replace by affine maps, and how to fit these; each field is also a flag of
    ``python -m snlp_jax.linearize``."""

    attention: Count = 0
    """In how many layers the attention is replaced."""
    mlp: Count = 0
    """In how many layers the MLP is replaced."""
    blocks: Count = 0
    """How many whole layers are replaced, each by one map; other layers are then chosen for the two above."""
    rank_by: RankBy = "heldout"
    """By what layers are ranked; the lowest are replaced. nmse: the share of the variance of a branch's output that the
    map leaves, on the text that it was fitted to; nmse_residual: of the output plus the input; heldout: that on other
    text; cca: the authors' bound of it by canonical correlations; random: a control."""
    greedy: bool = False
    """Rank again, by new statistics of the model so far, after every replacement; otherwise once."""
    every: Size = 1
    """With greedy: replacements between two rankings."""
    drop: bool = False
    """The control: leave the chosen sub-layers out, with nothing in their place."""
    rank: Count = 0
    """Rank of the maps, which are then products of two matrices; 0 means whole matrices."""
    ridge: NonNegative | None = None
    """What is added to the diagonal of the inputs' covariance, relative to its mean eigenvalue. None means 0 where that
    is well conditioned, and otherwise what is best on text that the maps were not fitted to."""
    shrinkage: Share = 0.0
    """Share, 0 to 1, of a multiple of the identity that the inputs' covariance is mixed with."""
    tokens: Size = 524_288
    """Tokens of training text that the maps are fitted to, or four fifths of the text where it is shorter; a quarter as
    many more choose ridges and rank."""
    skip_first: Count = 0
    """Tokens at the beginning of each window that are left out of the statistics."""
    batch_size: Size = 32
    """Windows of the model's seq_len tokens that are drawn together; fewer are evaluated at once where their states
    are large."""
    layers_at_once: Count = 0
    """Layers whose statistics are held at once, each group of which costs a pass over the text; 0 means as many as half
    of the free memory holds."""
    seed: int = 0
    """Of the choice of windows, and of a random choice of layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention + self.mlp + self.blocks == 0:
            raise InputError("nothing is to be replaced; give a number of layers with --attention, --mlp or --blocks.")
        if self.every != 1 and not self.greedy:
            raise InputError(f"every is {self.every}, but without --greedy there is one choice.")
