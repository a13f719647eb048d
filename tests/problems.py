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
from snlp_jax.solver import Exact, Identity, Jacobi, LayerProblem, ScaledIdentity, Schedule
from snlp_jax.solver.init import Guess

NUM_LAYERS, NUM_TOKENS, WIDTH = 5, 3, 4


@dataclass(frozen=True)
class Warm:
    """An initial trace that is given: with it ``solve(num_iters=1)`` becomes a map from traces to traces."""

    h_L: object
    num_evals: int = 0

    def __call__(self, problem):
        return Guess(self.h_L, problem.h_in)


def _normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def _chain(block, params, residual_map=None, num_layers=NUM_LAYERS, **overrides):
    parts = {"ctx": None, "shared": None, "h_in": _normal(0, NUM_TOKENS, WIDTH)} | overrides
    return LayerProblem(
        block_fn=block, params=params, num_layers=num_layers, residual_map=residual_map, sweep_fn=None, **parts
    )


def _shifts(num_layers):
    return _normal(1, num_layers, WIDTH)


def translation(num_layers=NUM_LAYERS):
    """``h -> h + c_l``."""

    def block(params, h, ctx, shared):
        return h + params["c"][None], ()

    return _chain(block, {"c": _shifts(num_layers)}, num_layers=num_layers)


def scaled_translation(num_layers=NUM_LAYERS):
    """``h -> s_l h + c_l``."""

    def block(params, h, ctx, shared):
        return params["s"] * h + params["c"][None], ()

    params = {"s": jnp.linspace(-0.8, 1.9, num_layers), "c": _shifts(num_layers)}
    return _chain(block, params, lambda params, ctx: params["s"], num_layers)


def half_translation():
    """``h -> h / 2 + c_l``, the identity damped by one half."""

    def block(params, h, ctx, shared):
        return 0.5 * h + params["c"][None], ()

    return _chain(block, {"c": _shifts(NUM_LAYERS)}, lambda params, ctx: jnp.asarray(0.5))


def constant():
    """``h -> c_l``: the layers ignore their input."""

    def block(params, h, ctx, shared):
        return jnp.broadcast_to(params["c"][None], h.shape), ()

    return _chain(block, {"c": _shifts(NUM_LAYERS)}, lambda params, ctx: jnp.zeros(()))


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
    return _chain(block, params, num_layers=num_layers)


def pair():
    """A state of two leaves, ``(a, b) -> (s_l a + u, s_l b + v_l)``: u is shared, v_l is context."""

    def block(params, h, ctx, shared):
        return {"a": params["s"] * h["a"] + shared, "b": params["s"] * h["b"] + ctx}, ()

    params = {"s": jnp.linspace(2.0, -0.9, NUM_LAYERS)}
    h_in = {"a": _normal(3, NUM_TOKENS, WIDTH), "b": _normal(4, 2)}
    shared, ctx = _normal(5, NUM_TOKENS, WIDTH), _normal(6, NUM_LAYERS, 2)
    return _chain(block, params, lambda params, ctx: params["s"], h_in=h_in, shared=shared, ctx=ctx)


CHAINS = {
    "translation": translation,
    "scaled_translation": scaled_translation,
    "half_translation": half_translation,
    "constant": constant,
    "affine": affine,
    "nonlinear": nonlinear,
    "pair": pair,
}
JACOBI, IDENTITY, SCALED, HALF, EXACT = Jacobi(), Identity(), ScaledIdentity(), Identity(damping=0.5), Exact()
N = NUM_LAYERS
ITERATIONS = {
    "translation": {JACOBI: N, IDENTITY: 1, SCALED: 1, HALF: N, EXACT: 1},
    "scaled_translation": {JACOBI: N, IDENTITY: N, SCALED: 1, HALF: N, EXACT: 1},
    "half_translation": {JACOBI: N, IDENTITY: N, SCALED: 1, HALF: 1, EXACT: 1},
    "constant": {JACOBI: 1, IDENTITY: N, SCALED: 1, HALF: N, EXACT: 1},
    "affine": {JACOBI: N, IDENTITY: N, SCALED: N, HALF: N, EXACT: 1},
    "nonlinear": {JACOBI: N, IDENTITY: N, SCALED: N, HALF: N, EXACT: 4},
    "pair": {JACOBI: N, IDENTITY: N, SCALED: 1, HALF: N, EXACT: 1},
}
"""Fewest iterations from h0 to the sequential trace. N is the bound for any correction; Newton on the nonlinear chain
converges quadratically and is there one sooner."""


def listed(problem):
    """The same problem with its parameters as a list of trees, one a layer."""
    rows = [jax.tree.map(lambda leaf: leaf[i], problem.params) for i in range(problem.num_layers)]  # noqa: B023
    return dataclasses.replace(problem, params=rows)


def error(trace, problem):
    """Largest distance of a trace from the sequential one, relative to the largest entry of that one."""
    both = zip(jax.tree.leaves(trace), jax.tree.leaves(true_trace(problem)), strict=True)
    return max(relative_error(*leaves) for leaves in both)


def true_trace(problem):
    """The chain, one layer after another in plain Python."""
    h, rows = problem.h_in, []
    for index in range(problem.num_layers):
        params, ctx = problem.layer(index)
        h, _ = problem.block_fn(params, h, ctx, problem.shared)
        rows.append(h)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


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
    "no_qk_norm": dataclasses.replace(SMALL, use_qk_norm=False, num_kv_heads=4, window_pattern="S"),
}


def random_params(model: LanguageModel, seed=0):
    """Weights of about the size of trained ones. A fresh initialisation would not do: its branches are all zero."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        names = [key.key for key in path]
        num_axes = leaf.ndim - (names[0] == "blocks")
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
