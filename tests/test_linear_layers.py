"""Layers whose branches are linear maps or dropped: everything that whole layers can do, and what they save."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import SMALL, random_params

from snlp_jax.config import Kind
from snlp_jax.forward import forward
from snlp_jax.layout import prepare
from snlp_jax.linearize.replace import AffineMap, replace
from snlp_jax.model import LanguageModel, num_params
from snlp_jax.model.kinds import owners, take
from snlp_jax.notation import parse_schedule

D = SMALL.embed_dim


def random_map(seed, rank=0):
    rng = np.random.default_rng(seed)
    kernel = 0.3 * rng.normal(size=(D, D)) / D**0.5
    if rank:
        kernel = 0.3 * rng.normal(size=(D, rank)) @ rng.normal(size=(rank, D)) / D
    return AffineMap(jnp.asarray(kernel, jnp.float32), jnp.asarray(0.1 * rng.normal(size=D), jnp.float32))


def mixed(config=SMALL, rank=0):
    """Layer 1: linear attention; 2: dropped; 3: linear as a whole; 4: linear MLP; 5: no attention."""
    params = random_params(LanguageModel(config))
    attention = {1: random_map(1, rank), 2: None, 3: None, 5: None}
    mlp = {2: None, 3: random_map(3, rank), 4: random_map(4, rank)}
    return replace(config, params, attention=attention, mlp=mlp, rank=rank)


def tokens_of(config, batch=2, length=12):
    return jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (batch, length)))


def run(config, params, setting="seq", layout="auto", **settings):
    model, tokens = LanguageModel(config), tokens_of(config)
    weights = prepare(model, params, parse_schedule(setting, config.num_layers), num_tokens=tokens.size, layout=layout)
    return jax.jit(lambda w, t: forward(model, w, t, **settings))(weights, tokens)


def layer_by_layer(config, params):
    """The definition, written out: each layer is a branch on what the stream is."""
    model, tokens = LanguageModel(config), tokens_of(config)
    x0 = model.embed(params, tokens)
    shared, h = model.shared(x0), model.expand(x0)
    states = []
    for layer in range(config.num_layers):
        blocks = take(config, params["blocks"], (layer,))
        ctx = model.context(params, blocks, tokens, layer, layer + 1)
        one = jax.tree.map(lambda leaf: leaf[0], (blocks, ctx))
        h, _ = model.block_fn()(one[0], h, one[1], shared)
        states.append(h)
    return model.logits(params, states[-1], states[config.mid_layer])


def test_stacks_hold_the_layers_that_have_them():
    config, params = mixed()
    blocks = params["blocks"]
    assert config.kinds[2] == Kind("none", "none") and config.kinds[1] == Kind("linear", "full")
    for path, leaf in jax.tree_util.tree_leaves_with_path(blocks):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert leaf.shape[0] == len(owners(config, name)), name
    assert blocks["attn"]["query"].shape[0] == 2 and blocks["mlp"]["up"].shape[0] == 3
    assert blocks["linear_mlp"]["kernel"].shape == (2, D, D) and blocks["resid_scale"].shape == (6,)
    fresh = LanguageModel(config).abstract_params()
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, fresh)
    low, low_params = mixed(rank=4)
    assert low_params["blocks"]["linear_attn"]["down"].shape == (1, D, 4)
    assert num_params(low_params) < num_params(params)


@pytest.mark.parametrize("layout", ["stack", "list"])
def test_layers_in_order_are_the_definition(layout):
    config, params = mixed()
    actual = run(config, params, layout=layout).logits_BTV
    np.testing.assert_allclose(actual, layer_by_layer(config, params), rtol=0, atol=2e-5)


ROUNDING = 2e-5
"""Logits of up to 15 in float32: two programs that add up in another order differ by 1.5e-5 each."""


@pytest.mark.parametrize("layout", ["stack", "list"])
@pytest.mark.parametrize("setting", ["jac:1-5,k=4", "sid:n=6,k=6", "exact:n=6,k=4"])
def test_regions_of_several_kinds_solve_the_chain(setting, layout):
    """K = N is exact for any correction, whether kinds are evaluated as stacks or layers one by one. Newton's method
    settles one layer an iteration, and with it the affine ones that follow: K = 4 do, as 2 of the 6 are affine."""
    config, params = mixed()
    out = run(config, params, setting, layout, with_stats=True)
    np.testing.assert_allclose(out.logits_BTV, exact_logits(), rtol=0, atol=ROUNDING)


@functools.cache
def exact_logits():
    return run(*mixed()).logits_BTV


def test_one_iteration_is_the_same_in_every_layout():
    config, params = mixed()
    outs = [run(config, params, "sid:n=6,k=2", layout, kept="last") for layout in ("stack", "list")]
    for a, b in zip(*map(jax.tree.leaves, outs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=ROUNDING)
    kv = outs[0].left[-1].kv
    assert kv.key_BTKH.shape[0] == 2  # layers 0 and 4, of two kinds
