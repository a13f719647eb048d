"""Knobs of the model."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal, NamedTuple

from snlp_jax.config.check import Checked, Count, NonNegative, Positive, Rule, Size
from snlp_jax.config.family import NormConfig, RopeConfig
from snlp_jax.errors import InputError

Branch = Literal["full", "linear", "none"]
"""A sub-layer as trained, a map ``x W + b`` in place of its norm and itself, or nothing."""


class Kind(NamedTuple):
    """What a layer's two branches are; layers of one kind have trees of one structure."""

    attn: Branch = "full"
    mlp: Branch = "full"


@dataclass(frozen=True)
class ModelConfig(Checked, section="model"):
    """A decoder-only Transformer; the defaults are the nanochat family's (docs/math.md, section 1), others come with
    imported weights (snlp_jax/model/convert). Lengths are in tokens."""

    vocab_size: Annotated[int, Rule(lambda value: value >= 2, "it must be at least 2")] = 257
    """Entries of the tokenizer; embeddings are padded to a multiple of ``vocab_multiple`` and logits cropped."""
    num_layers: Size = 12
    embed_dim: Size = 128
    num_heads: Size = 4
    num_kv_heads: Size = 4
    mlp_ratio: Size = 4
    head_size: Count = 0
    """Channels of a head; 0 means ``embed_dim / num_heads``."""
    mlp_dim: Count = 0
    """Channels between the MLP's projections; 0 means ``mlp_ratio * embed_dim``."""
    seq_len: Size = 256
    """Training context; sets the windows. The rotary embedding reaches ``rotary_multiple * seq_len``."""
    context: Count = 0
    """Longest text; L layers see all of it, and training may read shorter ones. 0 is the published rule: L layers see
    ``seq_len`` tokens, and texts may be ``rotary_multiple`` times as long."""
    window_pattern: str = "L"
    """Tiled over the layers: L sees ``seq_len`` tokens to the left, S the ``short_window``; the last layer is an L."""
    short_window: Count = 0
    """Left window of S layers: key s is visible from query t iff t - w <= s <= t. 0 means the published rule,
    a quarter of ``seq_len`` rounded up to a multiple of 128."""
    ends_long: bool = True
    """The last layer is an L whatever the pattern says."""
    use_x0_resid: bool = True
    """Layer l reads ``resid_scale * h + x0_scale * x0`` instead of h."""
    use_value_embeds: bool = True
    """Every second layer, counted from the last, adds a gated per-token embedding to its values."""
    use_smear: bool = True
    """Mix a little of the previous token's embedding into each token's."""
    use_mid_subtract: bool = True
    """The head reads ``h_last - mid_scale * h_mid`` where h_mid is the output of layer ``num_layers // 2``."""
    num_mtp_heads: Count = 0
    """Multi-token prediction: matrices [D, D] before the one head, the k-th for the token k after the next. Trained by
    ``loss.mtp``, drafted with by ``--speculate mtp``."""
    num_streams: Count = 0
    """Residual streams of hyper-connections (mHC), which need ``use_x0_resid=False``; 0 is one plain stream."""
    hyper_maps: Literal["static", "dynamic"] = "static"
    """Maps between streams: parameters, or functions of each token's streams."""
    sinkhorn_iters: Size = 10
    """Row and column scalings that make a map between streams doubly stochastic."""
    sinkhorn_tau: Positive = 0.05
    """Temperature of static maps; dynamic ones have none."""
    mlp: Literal["relu2", "swiglu", "geglu"] = "relu2"
    """``relu(up)^2``, or ``silu(gate) * up``, or ``gelu(gate) * up`` in its tanh form."""
    norm: NormConfig = field(default_factory=NormConfig)
    use_qkv_bias: bool = False
    use_out_bias: bool = False
    """Of the attention's output projection."""
    use_mlp_bias: bool = False
    use_tied_head: bool = False
    """The head reads the token table instead of a matrix of its own."""
    embed_scale: Positive = 1.0
    """Token embeddings are multiplied by this."""
    use_qk_norm: bool = True
    attention_scale: NonNegative = 0.0
    """Factor of scores; 0 means one over the square root of the head size."""
    attention_softcap: NonNegative = 0.0
    """Scores are ``cap * tanh(z / cap)``; 0 switches the cap off."""
    logit_softcap: NonNegative = 15.0
    """Logits are ``cap * tanh(z / cap)``; 0 switches the cap off."""
    rope_base: Positive = 100_000.0
    rope: RopeConfig = field(default_factory=RopeConfig)
    rotary_multiple: Size = 10
    vocab_multiple: Size = 64
    linear_attention: tuple[int, ...] = ()
    """Layers, from 0, whose attention is a linear map (``snlp_jax/linearize``): no norm, no keys and values."""
    linear_mlp: tuple[int, ...] = ()
    """Layers whose MLP is a linear map."""
    dropped_attention: tuple[int, ...] = ()
    """Layers without attention; a layer that is one linear map has this and ``linear_mlp``."""
    dropped_mlp: tuple[int, ...] = ()
    linear_rank: Count = 0
    """Linear maps are products of [D, r] and [r, D]; 0 means whole matrices [D, D]."""
    remat: bool = True
    """Recompute each block in the backward pass: about one third more arithmetic, activations of one block only. False
    keeps those of all, for small models and large memories."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.head_size and self.embed_dim % self.num_heads:
            raise InputError(
                f"model.embed_dim {self.embed_dim} is not a multiple of model.num_heads {self.num_heads}; change one."
            )
        if self.head_dim % 2:
            raise InputError(f"the head size {self.head_dim} is odd; rotary embedding needs an even one.")
        if self.num_rotated < 2 or self.num_rotated % 2:
            raise InputError(
                f"model.rope.fraction {self.rope.fraction} turns {self.num_rotated} of {self.head_dim} channels; that "
                "must be an even number."
            )
        if 0 < self.context < self.seq_len:
            raise InputError(f"model.context is {self.context}, but model.seq_len is {self.seq_len}; lower the latter.")
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"model.num_heads {self.num_heads} is not a multiple of model.num_kv_heads {self.num_kv_heads}."
            )
        if not self.window_pattern or set(self.window_pattern) - {"S", "L"}:
            raise InputError(f"model.window_pattern {self.window_pattern!r} may hold only the letters S and L.")
        if self.num_mtp_heads >= self.seq_len:
            raise InputError(f"model.num_mtp_heads is {self.num_mtp_heads}; give 0 to {self.seq_len - 1}.")
        if self.num_streams and self.use_x0_resid:
            raise InputError(
                f"model.num_streams is {self.num_streams}, but hyper-connections replace the residual scalars; set "
                "model.use_x0_resid to False."
            )
        if (self.use_value_embeds or self.use_smear) and self.embed_dim < 24:
            raise InputError(f"model.embed_dim {self.embed_dim} is below 24, which the gates read.")
        if self.linear_rank > self.embed_dim:
            raise InputError(f"model.linear_rank is {self.linear_rank}; give 0 to {self.embed_dim}.")
        self._check_kinds()

    def _check_kinds(self) -> None:
        for branch in ("attention", "mlp"):
            linear, dropped = f"linear_{branch}", f"dropped_{branch}"
            for name in (linear, dropped):
                layers, last = getattr(self, name), self.num_layers - 1
                if list(layers) != sorted(set(layers) & set(range(self.num_layers))):
                    raise InputError(f"model.{name} is {layers}; name layers of 0 to {last} once, in order of depth.")
            if both := sorted(set(getattr(self, linear)) & set(getattr(self, dropped))):
                raise InputError(f"model.{linear} and model.{dropped} both name {both}; leave these out of one.")

    @property
    def head_dim(self) -> int:
        return self.head_size or self.embed_dim // self.num_heads

    @property
    def mlp_width(self) -> int:
        """Channels between the MLP's projections."""
        return self.mlp_dim or self.mlp_ratio * self.embed_dim

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Of every layer."""

        def branch(layer: int, linear: tuple[int, ...], dropped: tuple[int, ...]) -> Branch:
            return "linear" if layer in linear else "none" if layer in dropped else "full"

        attn, mlp = (self.linear_attention, self.dropped_attention), (self.linear_mlp, self.dropped_mlp)
        return tuple(Kind(branch(layer, *attn), branch(layer, *mlp)) for layer in range(self.num_layers))

    @property
    def replaced_layers(self) -> tuple[int, ...]:
        """Layers with a branch that is linear or dropped."""
        return tuple(layer for layer, kind in enumerate(self.kinds) if kind != Kind())

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Layers that have keys and values."""
        return tuple(layer for layer, kind in enumerate(self.kinds) if kind.attn == "full")

    @property
    def block_weights(self) -> int:
        """Entries of all layers' matrices, maps between streams left out."""
        return sum(map(self.weights_of, self.kinds))

    def weights_of(self, kind: Kind) -> int:
        """Entries of the matrices of a layer of a kind, maps between streams left out."""
        linear = 2 * self.embed_dim * self.linear_rank or self.embed_dim**2
        attention = 2 * self.embed_dim * (self.num_heads + self.num_kv_heads) * self.head_dim
        mlp = (2 + (self.mlp != "relu2")) * self.mlp_width * self.embed_dim
        entries = {"full": attention, "linear": linear, "none": 0}[kind.attn]
        return entries + {"full": mlp, "linear": linear, "none": 0}[kind.mlp]

    @property
    def num_rotated(self) -> int:
        """Channels of a head that the rotary embedding turns."""
        return int(self.rope.fraction * self.head_dim)

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def mid_layer(self) -> int:
        """Index, from 0, of the layer whose output the head subtracts."""
        return self.num_layers // 2

    @property
    def max_context(self) -> int:
        return self.context or self.rotary_multiple * self.seq_len

    @property
    def letters(self) -> str:
        """S or L for every layer."""
        tiled = self.window_pattern * (self.num_layers // len(self.window_pattern) + 1)
        return tiled[: self.num_layers - 1] + ("L" if self.ends_long else tiled[self.num_layers - 1])

    @property
    def windows(self) -> tuple[int, ...]:
        """Left window of every layer, in tokens."""
        short = self.short_window or math.ceil(math.ceil(self.seq_len / 4) / 128) * 128
        return tuple((self.context or self.seq_len) if letter == "L" else short for letter in self.letters)

    @property
    def value_embed_layers(self) -> tuple[int, ...]:
        """Indices of the layers that own a value-embedding table: they have values to add it to."""
        if not self.use_value_embeds:
            return ()
        return tuple(i for i in self.attention_layers if i % 2 == (self.num_layers - 1) % 2)
