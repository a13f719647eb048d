"""Knobs of the model."""

import math
from dataclasses import dataclass
from typing import Literal

from snlp_jax.config.check import require


@dataclass(frozen=True)
class ModelConfig:
    """The nanochat family of Transformers (docs/math.md, section 1). Lengths are in tokens."""

    vocab_size: int = 257
    """Entries of the tokenizer; embeddings are padded to a multiple of ``vocab_multiple`` and logits cropped."""
    num_layers: int = 12
    embed_dim: int = 128
    num_heads: int = 4
    num_kv_heads: int = 4
    mlp_ratio: int = 4
    seq_len: int = 256
    """Training context; sets the windows. The rotary embedding reaches ``rotary_multiple * seq_len``."""
    window_pattern: str = "L"
    """Tiled over the layers: L sees ``seq_len`` tokens to the left, S the ``short_window``; the last layer is an L."""
    short_window: int = 0
    """Left window of S layers: key s is visible from query t iff t - w <= s <= t. 0 means the published rule,
    a quarter of ``seq_len`` rounded up to a multiple of 128."""
    use_x0_resid: bool = True
    """Layer l reads ``resid_scale * h + x0_scale * x0`` instead of h."""
    use_value_embeds: bool = True
    """Every second layer, counted from the last, adds a gated per-token embedding to its values."""
    use_smear: bool = True
    """Mix a little of the previous token's embedding into each token's."""
    use_mid_subtract: bool = True
    """The head reads ``h_last - mid_scale * h_mid`` where h_mid is the output of layer ``num_layers // 2``."""
    num_mtp_heads: int = 0
    """Multi-token prediction: matrices [D, D] before the one head, the k-th for the token k after the next. Trained by
    ``loss.mtp``, drafted with by ``--speculate mtp``."""
    num_streams: int = 0
    """Residual streams of hyper-connections (mHC), which need ``use_x0_resid=False``; 0 is one plain stream."""
    hyper_maps: Literal["static", "dynamic"] = "static"
    """Maps between streams: parameters, or functions of each token's streams."""
    sinkhorn_iters: int = 10
    """Row and column scalings that make a map between streams doubly stochastic."""
    sinkhorn_tau: float = 0.05
    """Temperature of static maps; dynamic ones have none."""
    use_qk_norm: bool = True
    logit_softcap: float = 15.0
    """Logits are ``cap * tanh(z / cap)``; 0 switches the cap off."""
    rope_base: float = 100_000.0
    rotary_multiple: int = 10
    vocab_multiple: int = 64
    remat: bool = False
    """Recompute each block in the backward pass: about one third more compute, activations of one block only."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products: auto is bfloat16 on GPU and TPU, float32 on CPU. Parameters, the residual stream, norms and
    the solver's deltas are float32 always."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """auto: cuDNN flash attention on GPU, Pallas splash attention on TPU, blockwise XLA elsewhere."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "embed_dim", "num_heads", "num_kv_heads", "mlp_ratio", "seq_len", "rotary_multiple"):
            require(getattr(self, name) >= 1, f"model.{name} is {getattr(self, name)}; it must be at least 1.")
        require(self.vocab_size >= 2, f"model.vocab_size is {self.vocab_size}; it must be at least 2.")
        require(self.vocab_multiple >= 1, f"model.vocab_multiple is {self.vocab_multiple}; it must be at least 1.")
        require(
            self.embed_dim % self.num_heads == 0,
            f"model.embed_dim {self.embed_dim} is not a multiple of model.num_heads {self.num_heads}; change one.",
        )
        require(self.head_dim % 2 == 0, f"the head size {self.head_dim} is odd; rotary embedding needs an even one.")
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"model.num_heads {self.num_heads} is not a multiple of model.num_kv_heads {self.num_kv_heads}.",
        )
        require(
            len(self.window_pattern) > 0 and set(self.window_pattern) <= {"S", "L"},
            f"model.window_pattern {self.window_pattern!r} may hold only the letters S and L.",
        )
        require(self.short_window >= 0, f"model.short_window is {self.short_window}; it must be 0 or more.")
        require(0 < self.rope_base < math.inf, f"model.rope_base is {self.rope_base}; it must be positive.")
        require(self.logit_softcap >= 0, f"model.logit_softcap is {self.logit_softcap}; it must be 0 or more.")
        require(
            0 <= self.num_mtp_heads < self.seq_len,
            f"model.num_mtp_heads is {self.num_mtp_heads}; give 0 to {self.seq_len - 1}, as the last of {self.seq_len} "
            "tokens is the furthest ahead.",
        )
        require(self.num_streams >= 0, f"model.num_streams is {self.num_streams}; it must be 0 or more.")
        require(
            self.num_streams == 0 or not self.use_x0_resid,
            f"model.num_streams is {self.num_streams}, but hyper-connections replace the residual scalars; "
            "set model.use_x0_resid to False.",
        )
        require(self.sinkhorn_iters >= 1, f"model.sinkhorn_iters is {self.sinkhorn_iters}; it must be at least 1.")
        require(0 < self.sinkhorn_tau < math.inf, f"model.sinkhorn_tau is {self.sinkhorn_tau}; it must be positive.")
        if self.use_value_embeds or self.use_smear:
            require(self.embed_dim >= 24, f"model.embed_dim {self.embed_dim} is below 24, which the gates read.")

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def mid_layer(self) -> int:
        """Index, from 0, of the layer whose output the head subtracts."""
        return self.num_layers // 2

    @property
    def max_context(self) -> int:
        return self.rotary_multiple * self.seq_len

    @property
    def windows(self) -> tuple[int, ...]:
        """Left window of every layer, in tokens."""
        short = self.short_window or math.ceil(math.ceil(self.seq_len / 4) / 128) * 128
        pattern = [self.window_pattern[i % len(self.window_pattern)] for i in range(self.num_layers)]
        pattern[-1] = "L"
        return tuple(self.seq_len if letter == "L" else short for letter in pattern)

    @property
    def value_embed_layers(self) -> tuple[int, ...]:
        """Indices of the layers that own a value-embedding table."""
        if not self.use_value_embeds:
            return ()
        return tuple(i for i in range(self.num_layers) if i % 2 == (self.num_layers - 1) % 2)
