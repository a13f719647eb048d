"""What families of Transformers differ in, beside their sizes: norms and rotary embeddings."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from snlp_jax.config.check import Between, Checked, NonNegative, Positive, Rule
from snlp_jax.errors import InputError


@dataclass(frozen=True)
class NormConfig(Checked, section="model.norm"):
    """``x / sqrt(mean(x^2) + eps)``, and what becomes of it."""

    weight: Literal["none", "plain", "plus_one"] = "none"
    """Factor of every channel: none, a parameter w, or 1 + w (Gemma). Where there is one, so it is in the norm of
    queries and keys, which then stands before their rotation and without nanochat's factor 1.2."""
    eps: Between = 1.1920929e-07
    """The default is nanochat's, the machine epsilon of float32."""
    use_post: bool = False
    """Norm the output of each branch too, before it is added to the stream (Gemma)."""
    use_embed: bool = True
    """Norm the token embeddings (nanochat)."""


@dataclass(frozen=True)
class RopeScaling(Checked, section="model.rope.scaling"):
    """How frequencies are changed for texts longer than those of pretraining; fields as Hugging Face names them."""

    kind: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: Annotated[float, Rule(lambda value: 1 <= value < math.inf, "it must be 1 or more")] = 1.0
    original_context: int = 0
    """Tokens of the texts before; of llama3 and yarn."""
    low_freq_factor: Positive = 1.0
    """llama3: wavelengths above ``original_context`` over this are stretched by ``factor``."""
    high_freq_factor: float = 4.0
    """llama3: those below ``original_context`` over this stay, in between they are interpolated."""
    beta_fast: float = 32.0
    """yarn: channels that turn more often over ``original_context`` stay."""
    beta_slow: Positive = 1.0
    """yarn: those that turn less often are stretched by ``factor``."""
    attention_factor: float = 0.0
    """yarn: cosines and sines are multiplied by this; 0 means ``0.1 ln(factor) + 1``."""
    truncate: bool = True
    """yarn: round the bounds of the interpolated channels outwards."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind in ("llama3", "yarn") and self.original_context <= 0:
            raise InputError(f"model.rope.scaling.kind {self.kind!r} needs model.rope.scaling.original_context.")
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if getattr(self, low) >= getattr(self, high):
                raise InputError(f"model.rope.scaling.{low} is {getattr(self, low)}; it must be smaller than {high}.")

    @property
    def table_factor(self) -> float:
        """Of cosines and sines."""
        if self.kind != "yarn":
            return 1.0
        return self.attention_factor or 0.1 * math.log(self.factor) + 1.0


@dataclass(frozen=True)
class RopeConfig(Checked, section="model.rope"):
    """Rotary embedding, beside ``model.rope_base``."""

    direction: Literal["backward", "forward"] = "backward"
    """In which a pair (channel i, channel i + half) turns as positions go on: backward in nanochat, forward in the
    models of everybody else."""
    fraction: Annotated[float, Rule(lambda value: 0 < value <= 1, "it must lie between 0 and 1")] = 1.0
    """Of the head's channels, the first ones, that turn."""
    local_base: NonNegative = 0.0
    """Base in S layers, without scaling; 0 is the same table for all layers."""
    scaling: RopeScaling = field(default_factory=RopeScaling)
