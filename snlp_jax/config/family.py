"""What families of Transformers differ in, beside their sizes: norms and rotary embeddings."""

import math
from dataclasses import dataclass, field
from typing import Literal

from snlp_jax.config.check import Checked, require


@dataclass(frozen=True)
class NormConfig(Checked, section="model.norm"):
    """``x / sqrt(mean(x^2) + eps)``, and what becomes of it."""

    weight: Literal["none", "plain", "plus_one"] = "none"
    """Factor of every channel: none, a parameter w, or 1 + w (Gemma). Where there is one, so it is in the norm of
    queries and keys, which then stands before their rotation and without nanochat's factor 1.2."""
    eps: float = 1.1920929e-07
    """The default is nanochat's, the machine epsilon of float32."""
    use_post: bool = False
    """Norm the output of each branch too, before it is added to the stream (Gemma)."""
    use_embed: bool = True
    """Norm the token embeddings (nanochat)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.eps < 1, f"model.norm.eps is {self.eps}; it must lie between 0 and 1.")


@dataclass(frozen=True)
class RopeScaling(Checked, section="model.rope.scaling"):
    """How frequencies are changed for texts longer than those of pretraining; fields as Hugging Face names them."""

    kind: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    original_context: int = 0
    """Tokens of the texts before; of llama3 and yarn."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above ``original_context`` over this are stretched by ``factor``."""
    high_freq_factor: float = 4.0
    """llama3: those below ``original_context`` over this stay, in between they are interpolated."""
    beta_fast: float = 32.0
    """yarn: channels that turn more often over ``original_context`` stay."""
    beta_slow: float = 1.0
    """yarn: those that turn less often are stretched by ``factor``."""
    attention_factor: float = 0.0
    """yarn: cosines and sines are multiplied by this; 0 means ``0.1 ln(factor) + 1``."""
    truncate: bool = True
    """yarn: round the bounds of the interpolated channels outwards."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.factor < math.inf, f"model.rope.scaling.factor is {self.factor}; it must be 1 or more.")
        require(
            self.kind not in ("llama3", "yarn") or self.original_context > 0,
            f"model.rope.scaling.kind {self.kind!r} needs model.rope.scaling.original_context.",
        )
        require(
            0 < self.low_freq_factor < self.high_freq_factor,
            f"model.rope.scaling.low_freq_factor is {self.low_freq_factor} and high_freq_factor "
            f"{self.high_freq_factor}; the first must be the smaller and positive.",
        )
        require(
            0 < self.beta_slow < self.beta_fast,
            f"model.rope.scaling.beta_slow is {self.beta_slow} and beta_fast {self.beta_fast}; the first must be the "
            "smaller and positive.",
        )

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
    fraction: float = 1.0
    """Of the head's channels, the first ones, that turn."""
    local_base: float = 0.0
    """Base in S layers, without scaling; 0 is the same table for all layers."""
    scaling: RopeScaling = field(default_factory=RopeScaling)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.fraction <= 1, f"model.rope.fraction is {self.fraction}; it must lie between 0 and 1.")
        self.at_least(0, "local_base")
