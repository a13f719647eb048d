"""Small layer chains with known answers, and small language models with weights that make every branch count.

A new correction adds a column to ``ITERATIONS``: the number of solver iterations it needs on each chain.
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from snlp_jax.config import ModelConfig
from snlp_jax.model import LanguageModel
from snlp_jax.solver import (
    Chain,
    Diagonal,
    Exact,
    Guess,
    HyperConnection,
    Identity,
    Init,
    Jacobi,
    LayerFns,
    ScaledIdentity,
    Schedule,
    TrustRegion,
)

NUM_LAYERS, NUM_TOKENS, WIDTH = 5, 3, 4


@dataclass(frozen=True)
class Warm(Init):
    """An initial trace that is given: with it ``solve(num_iters=1)`` becomes a map from traces to traces."""

    h_L: object

    def __call__(self, chain, data=None):
        return Guess(self.h_L, chain.h_in)


def _normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def _chain(block, params, skip=None, h_in=None, **inputs):
    h_in = _normal(0, NUM_TOKENS, WIDTH) if h_in is None else h_in
    return Chain.of(LayerFns(block, skip=skip), params, h_in, **inputs)


def _shifts(num_layers):
    return _normal(1, num_layers, WIDTH)


def _scaled_block(params, h, ctx, shared):
    return params["s"] * h + params["c"][None], ()


def _scale_of(params, ctx, aux):
    return params["s"]


def _scaled(s_L):
    """Chains of one pair of functions, so that one compiled program serves them all."""
    return _chain(_scaled_block, {"s": s_L, "c": _shifts(len(s_L))}, _scale_of)


def translation(num_layers=NUM_LAYERS):
    """``h -> h + c_l``."""
    return _scaled(jnp.ones(num_layers))


def scaled_translation(num_layers=NUM_LAYERS):
    """``h -> s_l h + c_l``."""
    return _scaled(jnp.linspace(-0.8, 1.9, num_layers))


def half_translation():
    """``h -> h / 2 + c_l``, the identity damped by one half."""
    return _scaled(jnp.full(NUM_LAYERS, 0.5, jnp.float32))


def constant():
    """``h -> c_l``: the layers ignore their input."""
    return _scaled(jnp.zeros(NUM_LAYERS))


def affine():
    """``h -> h W_l + c_l`` with dense W."""

    def block(params, h, ctx, shared):
        return h @ params["w"] + params["c"][None], ()

    return _chain(block, {"w": _normal(2, NUM_LAYERS, WIDTH, WIDTH) * 0.6, "c": _shifts(NUM_LAYERS)})


def nonlinear(num_layers=NUM_LAYERS):
    """``h -> h + tanh(h W_l + c_l)``; each layer leaves its branch behind."""

    def block(params, h, ctx, shared):
        branch = jnp.tanh(h @ params["w"] + params["c"][None])
        return h + branch, {"branch": branch}

    params = {"w": _normal(2, num_layers, WIDTH, WIDTH) * 0.5, "c": _shifts(num_layers)}
    return _chain(block, params)


def pair():
    """A state of two leaves, ``(a, b) -> (s_l a + u, s_l b + v_l)``: u is shared, v_l is context."""

    def block(params, h, ctx, shared):
        return {"a": params["s"] * h["a"] + shared, "b": params["s"] * h["b"] + ctx}, ()

    params = {"s": jnp.linspace(2.0, -0.9, NUM_LAYERS)}
    h_in = {"a": _normal(3, NUM_TOKENS, WIDTH), "b": _normal(4, 2)}
    shared, ctx = _normal(5, NUM_TOKENS, WIDTH), _normal(6, NUM_LAYERS, 2)
    return _chain(block, params, lambda params, ctx, aux: params["s"], h_in=h_in, shared=shared, ctx=ctx)


def diagonal():
    """``h -> a_l * h + c_l``, another slope for every token and channel."""

    def block(params, h, ctx, shared):
        return params["a"] * h + params["c"][None], ()

    a_L = jnp.clip(_normal(7, NUM_LAYERS, NUM_TOKENS, WIDTH), -2.0, 2.0)
    return _chain(block, {"a": a_L, "c": _shifts(NUM_LAYERS)})


def streams(num_layers=NUM_LAYERS):
    """``h -> H_l h + c_l``: the rows of the state are residual streams that H_l mixes."""

    def block(params, h, ctx, shared):
        return params["mix"] @ h + params["c"][None], ()

    return _chain(block, _mixing(num_layers), lambda params, ctx, aux: params["mix"])


def bent_streams(num_layers=NUM_LAYERS):
    """``h -> H_l h + tanh(h W_l + c_l)``; H_l is left behind and read there, as dynamic maps are."""

    def block(params, h, ctx, shared):
        return params["mix"] @ h + jnp.tanh(h @ params["w"] + params["c"][None]), {"mix": params["mix"]}

    params = _mixing(num_layers) | {"w": _normal(2, num_layers, WIDTH, WIDTH) * 0.5}
    return _chain(block, params, lambda params, ctx, aux: aux["mix"])


def _mixing(num_layers):
    mix_L = jnp.eye(NUM_TOKENS)[None] + 0.3 * _normal(8, num_layers, NUM_TOKENS, NUM_TOKENS)
    return {"mix": mix_L, "c": _shifts(num_layers)}


def posed(chain, correction):
    """The chain with its skip path in the form that the correction reads: a scalar s is the matrix s I of streams."""
    if not isinstance(correction, HyperConnection) or isinstance(chain.h_in, dict):
        return chain
    x_L = jnp.broadcast_to(chain.h_in[None], (chain.num_nodes, *chain.h_in.shape))
    if jax.eval_shape(lambda: chain.skips(chain.sweep(x_L)[1])).ndim > 1:
        return chain
    skip = chain.fns.skip or (lambda params, ctx, aux: 1.0)
    fns = chain.fns._replace(skip=lambda *row: skip(*row) * jnp.eye(chain.h_in.shape[0]))
    return dataclasses.replace(chain, fns=fns)


CHAINS = {
    "translation": translation,
    "scaled_translation": scaled_translation,
    "half_translation": half_translation,
    "constant": constant,
    "affine": affine,
    "nonlinear": nonlinear,
    "pair": pair,
    "diagonal": diagonal,
    "streams": streams,
    "bent_streams": bent_streams,
}
JACOBI, IDENTITY, SCALED, HALF, EXACT = Jacobi(), Identity(), ScaledIdentity(), Identity(damping=0.5), Exact()
TRUSTED, DIAGONAL, HYPER = TrustRegion(0.0, Identity(), 0.2), Diagonal(), HyperConnection()
N = NUM_LAYERS
ITERATIONS = {
    name: dict(zip((JACOBI, IDENTITY, SCALED, HALF, TRUSTED, DIAGONAL, HYPER, EXACT), row, strict=True))
    for name, row in {
        "translation": (N, 1, 1, N, N, 1, 1, 1),
        "scaled_translation": (N, N, 1, N, N, 1, 1, 1),
        "half_translation": (N, N, 1, 1, N, 1, 1, 1),
        "constant": (1, N, 1, N, N, 1, 1, 1),
        "affine": (N, N, N, N, N, N, N, 1),
        "nonlinear": (N, N, N, N, N, N, N, 4),
        "pair": (N, N, 1, N, N, 1, None, 1),
        "diagonal": (N, N, N, N, N, 1, N, 1),
        "streams": (N, N, None, N, N, N, 1, 1),
        "bent_streams": (N, N, None, N, N, N, N, 4),
    }.items()
}
"""Fewest iterations from h0 to the sequential trace; None where the correction does not apply and says so. N is the
bound for any correction; Newton on the nonlinear chains converges quadratically and is there one sooner."""


def listed(chain):
    """The same chain with its parameters as a list of trees, one a node."""
    rows = [jax.tree.map(lambda leaf: leaf[i], chain.params) for i in range(chain.num_nodes)]  # noqa: B023
    return dataclasses.replace(chain, params=rows)


def error(trace, chain):
    """Largest distance of a trace from the sequential one, relative to the largest entry of that one."""
    both = zip(jax.tree.leaves(trace), jax.tree.leaves(true_trace(chain)), strict=True)
    return max(relative_error(*leaves) for leaves in both)


def true_trace(chain, numpy=np):
    """The chain, one node after another in plain Python; inside a compiled function with jax's ``numpy``."""
    h, rows = chain.h_in, []
    for index in range(chain.num_nodes):
        params, ctx = chain.node(index)
        h, _ = chain.fns.block(params, h, ctx, chain.shared)
        rows.append(h)
    return jax.tree.map(lambda *leaves: numpy.stack(leaves), *rows)


def relative_error(actual, desired):
    """``max |a - b| / max |b|`` of two arrays."""
    actual, desired = np.asarray(actual, np.float64), np.asarray(desired, np.float64)
    assert actual.shape == desired.shape
    return float(np.abs(actual - desired).max() / np.abs(desired).max())


SMALL = ModelConfig(
    vocab_size=50,
    num_layers=6,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    seq_len=32,
    window_pattern="SSSL",
    short_window=4,
)
"""Every feature on, grouped heads, windows that bite from the sixth token on, one padded vocabulary entry and more."""
PLAIN = dataclasses.replace(
    SMALL,
    num_kv_heads=4,
    window_pattern="L",
    use_x0_resid=False,
    use_value_embeds=False,
    use_smear=False,
    use_mid_subtract=False,
    use_qk_norm=False,
    logit_softcap=0.0,
)
VARIANTS = {
    "everything": SMALL,
    "plain": PLAIN,
    "no_x0_resid": dataclasses.replace(SMALL, use_x0_resid=False),
    "no_value_embeds": dataclasses.replace(SMALL, use_value_embeds=False, num_kv_heads=1),
    # Grouping SLSSLL by window is a permutation that is not its own inverse.
    "no_smear_no_mid": dataclasses.replace(SMALL, use_smear=False, use_mid_subtract=False, window_pattern="SLS"),
    "hyper_static": dataclasses.replace(SMALL, use_x0_resid=False, num_streams=4),
    "hyper_dynamic": dataclasses.replace(
        SMALL, use_x0_resid=False, num_streams=2, hyper_maps="dynamic", sinkhorn_iters=4, window_pattern="SLS"
    ),
    "no_qk_norm": dataclasses.replace(SMALL, use_qk_norm=False, num_kv_heads=4, window_pattern="S"),
}


def random_params(model: LanguageModel, seed=0):
    """Weights of about the size of trained ones. A fresh initialisation would not do: its branches are all zero."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        names = [key.key for key in path]
        num_axes = leaf.ndim - (names[0] == "blocks")
        if names[-1] in ("res_logits", "pre_logits", "post_logits"):
            return jnp.asarray(0.1 * rng.normal(size=leaf.shape), jnp.float32)  # static ones are divided by 0.05
        if names[-1] in ("token", "value") and names[0] == "embed":
            return jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)
        if num_axes >= 2:
            return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(leaf.shape[-2]), jnp.float32)
        if names[-1] == "smear_gate":
            return jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)
        return jnp.asarray(rng.uniform(0.5, 1.2, size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(fill, model.abstract_params())


def random_tokens(config: ModelConfig, batch=2, length=20, seed=1):
    return jnp.asarray(np.random.default_rng(seed).integers(0, config.vocab_size, (batch, length)), jnp.int32)


def all_sequential(config: ModelConfig) -> Schedule:
    return Schedule.of(config.num_layers)
