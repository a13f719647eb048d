"""What the engine, training and evaluation read of a model. A model of your own needs this and no base class.

``config`` gives sizes and windows (:class:`snlp_jax.config.ModelConfig`). The parameters are ``{"embed": ..., "blocks":
..., "head": ...}``, dictionaries of arrays, the blocks stacked [L, ...]. Between the embedding and the head everything
goes through the seam ``(params_l, h, ctx_l, shared) -> (h', aux_l)``. The shapes and meanings are those of the methods
of :class:`snlp_jax.model.LanguageModel`, which is such a model. ``tests/test_protocol.py`` holds this list against what
is really read, and decodes with another model.
"""

from collections.abc import Callable, Collection
from typing import Any, Literal, Protocol

from snlp_jax.config import ModelConfig
from snlp_jax.model.attention import Implementation
from snlp_jax.model.block import BlockAux, Context, Shared
from snlp_jax.model.nodes import NodeFn, NodeFns
from snlp_jax.types import Array, Params, PyTree


class Model(Protocol):
    """See the module. It must hash, as every object without an ``__eq__`` of its own does: programs are kept by it."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def backend(self) -> str:
        """``cpu``, ``gpu`` or ``tpu``: what programs are compiled for."""
        ...

    @property
    def dtype(self) -> Any:
        """Of matrix products, and of keys and values."""
        ...

    def init(self, key: Array) -> Params: ...

    def abstract_params(self) -> Params: ...

    def cast(self, params: Params) -> Params:
        """Parameters as evaluation reads them, matrices in ``dtype``."""
        ...

    def adapted(
        self,
        *,
        fetch: Callable[[PyTree], PyTree] | None = None,
        kernels: Collection[Implementation] | None = None,
    ) -> "Model":
        """The same model for a program over several devices."""
        ...

    # -- Before the layers ---------------------------------------------------------------------------------------------

    def check_tokens(self, tokens_BT: Any) -> None: ...

    def embed(
        self,
        params: Params,
        tokens_BT: Array,
        previous_B1: Array | None = None,
        document_BT: Array | None = None,
    ) -> Array:
        """``x0_BTD``."""
        ...

    def expand(self, x0_BTD: Array) -> Array:
        """The state that enters the first layer."""
        ...

    def shared(self, x0_BTD: Array, first_B: Array | None = None, document_BT: Array | None = None) -> Shared: ...

    def context(
        self,
        params: Params,
        blocks: PyTree,
        tokens_BT: Array,
        start: int,
        stop: int,
        *,
        num_rows: int = 0,
        tables: PyTree = None,
        num_shards: int = 1,
    ) -> Context: ...

    def batch_axes(self, ctx: Context, shared: Shared, before: int = 0) -> tuple[Context, Shared, int]: ...

    # -- Layers --------------------------------------------------------------------------------------------------------

    def block_fn(self, *, forward_mode: bool = False) -> NodeFn:
        """One layer."""
        ...

    def sweep_fn(self, start: int, stop: int, *, forward_mode: bool = False) -> NodeFn:
        """Layers ``start`` to ``stop - 1`` at once, ``vmap(block_fn)``."""
        ...

    def split_sweep_fn(self, start: int, stop: int, *, forward_mode: bool = False) -> NodeFn:
        """The same of a split stage."""
        ...

    def chunk_fns(
        self,
        start: int,
        stop: int,
        num_chunks: int,
        scales: Literal["mean", "own"] = "mean",
        branches: Literal["sum", "mean"] = "sum",
        *,
        forward_mode: bool = False,
    ) -> NodeFns:
        """Of fused layers."""
        ...

    @property
    def refresh_fn(self) -> NodeFn:
        """Keys and values of layers at once, alone."""
        ...

    @property
    def residual_map(self) -> Callable[[PyTree, Context, BlockAux], Array]:
        """Derivative of a layer's skip path."""
        ...

    # -- After the layers ----------------------------------------------------------------------------------------------

    def readout(self, params: Params, h_last: Array, h_mid: Array) -> Array:
        """``y_BTD``: what the head reads."""
        ...

    def unembed(self, params: Params, y_BTD: Array) -> Array:
        """Logits [B, T, padded_vocab_size] in float32."""
        ...

    def padded_logits(self, params: Params, h_last: Array, h_mid: Array) -> Array:
        """``unembed`` of ``readout``."""
        ...

    def look_ahead(self, params: Params, y_BTD: Array, k: int) -> Array:
        """What the head reads for the token k after the next; of models with ``config.num_mtp_heads`` alone."""
        ...

    def logits_ahead(self, params: Params, h_last: Array, h_mid: Array, num_heads: int) -> Array:
        """Logits [B, num_heads, V] of the tokens after the next."""
        ...
