"""What the engine, training and evaluation read of a model. A model of your own needs this and no base class.

The parameters are ``{"embed": ..., "blocks": ..., "head": ...}``, dictionaries of arrays, the blocks stacked [L, ...].
Between the embedding and the head everything goes through the seam ``(params_l, h, ctx_l, shared) -> (h', aux_l)``.
Signatures, shapes and meanings are those of :class:`snlp_jax.model.LanguageModel`, and a model of
your own stands wherever a function takes a ``Model``. It must hash, as every object without an ``__eq__`` of its own
does: programs are kept by it. ``tests/test_protocol.py`` holds the list against what is really read, and decodes with
another model.
"""

from snlp_jax.model.lm import LanguageModel

Model = LanguageModel
"""The name by which functions take any model that has these:"""
READ_OF_A_MODEL = (
    *("config", "backend", "dtype", "transposed_from"),
    *("init", "abstract_params", "cast", "adapted"),
    # before the layers
    *("check_tokens", "embed", "expand", "shared", "context", "batch_axes"),
    # layers, alone and at once
    *("block_fn", "sweep_fn", "split_sweep_fn", "chunk_fns", "refresh_fn", "residual_map"),
    # behind them
    *("readout", "unembed", "padded_logits", "look_ahead", "logits_ahead"),
)
