"""Hyper-connections: streams against the papers' formulas, the maps between them, their derivatives."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import PLAIN, SMALL, VARIANTS, random_params, random_tokens, relative_error

from snlp_jax.errors import InputError
from snlp_jax.model import LanguageModel
from snlp_jax.model.hyper import dynamic_maps, sinkhorn
from snlp_jax.model.layers import RMS_EPS
from snlp_jax.model.parameters import DYNAMIC_OFF_DIAGONAL, Wiring, fresh

HYPER = {name: VARIANTS[f"hyper_{name}"] for name in ("static", "dynamic")}


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def doubly_stochastic(logits, num_iters):
    """Sinkhorn's iteration as it is told: exponentials, rows, columns."""
    map_RR = np.exp(np.asarray(logits, np.float64))
    for _ in range(num_iters):
        map_RR /= map_RR.sum(-1, keepdims=True)
        map_RR /= map_RR.sum(-2, keepdims=True)
    return map_RR


def test_sinkhorn_is_its_definition():
    logits = 3 * draw(0, 5, 4, 4)
    run = jax.jit(sinkhorn, static_argnums=1)
    maps = [np.asarray(run(logits, num_iters)) for num_iters in (1, 4, 60)]
    for num_iters, map_RR in zip((1, 4), maps[:2], strict=True):
        np.testing.assert_allclose(map_RR, doubly_stochastic(logits, num_iters), atol=1e-6)  # float32, entries to 1
    off = [np.abs(map_RR.sum(-1) - 1).max() for map_RR in maps]
    for map_RR in maps:
        np.testing.assert_allclose(map_RR.sum(-2), 1, atol=1e-6)  # columns, after any number; rows in the limit
    assert off[0] > 0.1 and off[0] > off[1] > off[2] and off[2] < 0.01
    chex.assert_tree_all_finite(jax.jit(jax.grad(lambda x: sinkhorn(1e4 * x, 10).sum()))(logits))


def layers_of(model, params, tokens):
    """``step(l, h) -> (output of layer l, derivative of its skip path)``."""

    @jax.jit
    def step(layer, h):
        shared = model.shared(model.embed(params, tokens))
        ctx = model.context(params, params["blocks"], tokens, 0, model.config.num_layers)
        params_l, ctx_l = jax.tree.map(lambda leaf: leaf[layer], (params["blocks"], ctx))
        new, aux = model.block_fn()(params_l, h, ctx_l, shared)
        return new, model.residual_map(params_l, ctx_l, aux)

    return step


@pytest.mark.parametrize("maps", HYPER)
def test_layers_by_hand(maps):
    """One token, which attends to itself alone: attention is its values. Streams as the papers write them, in float64;
    every branch reads H_pre . h and h becomes H_res h + H_post (outer) branch."""
    config = dataclasses.replace(HYPER[maps], num_layers=2)
    model = LanguageModel(config)
    params, tokens = random_params(model), random_tokens(config, batch=1, length=1)
    h = draw(3, 1, 1, config.num_streams, config.embed_dim)
    x0 = draw(4, 1, 1, config.embed_dim)
    np.testing.assert_array_equal(model.expand(x0), np.repeat(np.asarray(x0)[:, :, None], config.num_streams, axis=2))
    step, actual = layers_of(model, params, tokens), [(h, None)]
    for layer in range(config.num_layers):
        actual.append(step(layer, actual[-1][0]))
    actual = actual[1:]
    logits = jax.jit(model.logits)(params, actual[-1][0], actual[config.mid_layer][0])

    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    sigmoid, softmax = lambda x: 1 / (1 + np.exp(-x)), lambda x: np.exp(x) / np.exp(x).sum()  # noqa: E731
    norm = lambda x: x / np.sqrt(np.mean(np.square(x)) + RMS_EPS)  # noqa: E731
    h_RD, R = np.asarray(h[0, 0], np.float64), config.num_streams

    def wiring(w):
        if maps == "static":
            res = doubly_stochastic(w["res_logits"] / config.sinkhorn_tau, config.sinkhorn_iters)
            return res, softmax(w["pre_logits"]), softmax(w["post_logits"])
        pre, post, res = np.split(norm(h_RD.ravel()) @ w["phi"], (R, 2 * R))
        res = doubly_stochastic(w["alpha"][2] * res.reshape(R, R) + w["res_logits"], config.sinkhorn_iters)
        pre, post = w["alpha"][0] * pre + w["pre_logits"], w["alpha"][1] * post + w["post_logits"]
        return res, sigmoid(pre), 2 * sigmoid(post)

    def attention(w, x_D, layer):
        heads = (norm(x_D) @ w["value"]).reshape(config.num_kv_heads, -1)
        if layer in config.value_embed_layers:
            index = config.value_embed_layers.index(layer)
            gate = 3 * sigmoid(norm(x_D)[:12] @ params["embed"]["value_gate"][index])
            heads += gate[:, None] * params["embed"]["value"][index, tokens[0, 0]].reshape(heads.shape)
        return np.repeat(heads, config.num_heads // config.num_kv_heads, axis=0).ravel() @ w["out"]

    def mlp(w, x_D, layer):
        return np.square(np.maximum(norm(x_D) @ w["up"], 0)) @ w["down"]

    trace = []
    for layer in range(config.num_layers):
        row, skip = jax.tree.map(lambda leaf: leaf[layer], params["blocks"]), np.eye(R)  # noqa: B023
        for name, branch in (("attn", attention), ("mlp", mlp)):
            res, pre, post = wiring(row["hyper"][name])
            h_RD = res @ h_RD + np.outer(post, branch(row[name], pre @ h_RD, layer))
            skip = res @ skip
        trace.append(h_RD)
        # Float32 sums of up to 128 terms of size one, two layers of them; the MLP squares.
        assert relative_error(actual[layer][0][0, 0], h_RD) < 1e-5
        assert relative_error(actual[layer][1][0, 0] if maps == "dynamic" else actual[layer][1], skip) < 1e-5
    y_D = (trace[-1] - params["head"]["mid_scale"] * trace[config.mid_layer]).sum(0)
    expected = 15 * np.tanh(norm(y_D) @ params["head"]["kernel"][:, : config.vocab_size] / 15)
    assert relative_error(logits[0, 0], expected) < 1e-5


def test_fresh_wiring():
    """Static maps: H_res the identity, one preferred stream, outputs spread evenly. Dynamic ones: nearly the same."""
    static, dynamic = (dataclasses.replace(config, num_streams=4) for config in HYPER.values())
    model = LanguageModel(static)
    params = jax.jit(model.init)(jax.random.key(0))
    context = jax.jit(lambda params: model.context(params, params["blocks"], random_tokens(static), 0, 6))(params)
    maps = context.hyper
    for branch, of_branch in enumerate((maps.attn, maps.mlp)):
        np.testing.assert_allclose(of_branch.res_RR, np.broadcast_to(np.eye(4), (6, 4, 4)), atol=2e-4)  # 3 exp(-10)
        np.testing.assert_array_equal(of_branch.pre_R.argmax(-1), (2 * np.arange(6) + branch) % 4)
        np.testing.assert_allclose(of_branch.pre_R.max(-1), 1 / (1 + 3 / np.e), rtol=1e-6)
        np.testing.assert_allclose(of_branch.post_R, 0.25, rtol=1e-6)
    h_BTRD = draw(0, 2, 50, 4, 32)
    # The fourth layer's attention.
    dynamic_BT = jax.jit(lambda: dynamic_maps(fresh(Wiring, jax.random.key(0), dynamic, 6), h_BTRD, dynamic))()
    static_3 = jax.tree.map(lambda leaf: leaf[3][None, None], maps.attn)
    # Tokens move logits by 0.01 times a normal number; four of them apart is the most of 1600.
    np.testing.assert_allclose(dynamic_BT.pre_R, np.broadcast_to(static_3.pre_R, (2, 50, 4)), atol=0.01)
    np.testing.assert_allclose(dynamic_BT.post_R, np.broadcast_to(static_3.post_R, (2, 50, 4)), atol=0.02)
    difference = np.abs(dynamic_BT.res_RR - static_3.res_RR)
    assert 0.9 * np.exp(DYNAMIC_OFF_DIAGONAL) < difference.max() < 4 * np.exp(DYNAMIC_OFF_DIAGONAL)


@pytest.mark.parametrize("maps", HYPER)
def test_every_map_gets_a_gradient(maps):
    """Static maps reach the layers through their context, in either layout of the weights."""
    config = dataclasses.replace(PLAIN, num_layers=3, num_streams=2, hyper_maps=maps, sinkhorn_iters=4)
    model = LanguageModel(config)
    params, tokens = random_params(model), random_tokens(config, length=4)

    @jax.jit
    @jax.grad
    def gradient(blocks):
        x0 = model.embed(params, tokens)
        ctx = model.context(params, blocks, tokens, 0, 3)
        run = lambda h, row: (model.block_fn()(row[0], h, row[1], model.shared(x0))[0], None)  # noqa: E731
        return jnp.sin(jax.lax.scan(run, model.expand(x0), (blocks, ctx))[0].sum(-2)).sum()

    grads = gradient(params["blocks"])["hyper"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.abs(leaf[1]).max() > 1e-4, path
    if maps == "static":
        # Nothing hangs on how equal streams are weighed, nor on where in their sum the last branch ends up.
        for leaf in (grads["attn"]["pre_logits"][0], grads["mlp"]["post_logits"][2], grads["mlp"]["res_logits"][2]):
            assert np.abs(leaf).max() < 1e-5
    if maps == "dynamic":
        return
    blocks = params["blocks"]
    layers = [jax.tree.map(lambda leaf: leaf[i], blocks) for i in range(3)]  # noqa: B023
    padded = jax.tree.map(lambda leaf: jnp.concatenate([leaf, 0 * leaf[:1]]), blocks)
    forms = (blocks, layers, [blocks], padded)  # the third is a list of one chunk
    context = jax.jit(lambda forms: [model.context(params, form, tokens, 0, 3) for form in forms])
    whole, *others = context(forms)
    for other in others:
        chex.assert_trees_all_equal(other, whole)


def test_hyper_connections_replace_the_residual_scalars():
    for fields, keyword in (
        ({"num_streams": 4}, "use_x0_resid"),
        ({"num_streams": -1}, "num_streams is -1"),
        ({"sinkhorn_iters": 0}, "sinkhorn_iters"),
        ({"sinkhorn_tau": 0.0}, "sinkhorn_tau"),
    ):
        with pytest.raises(InputError, match=keyword):
            dataclasses.replace(SMALL, **fields)
