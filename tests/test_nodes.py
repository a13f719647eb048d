"""Fused chunks of layers and the split stage, against formulas made of single layers."""

import dataclasses
import re
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import SMALL, VARIANTS, random_params, random_tokens, relative_error

from snlp_jax.errors import InputError
from snlp_jax.model import LanguageModel
from snlp_jax.model.block import Ring
from snlp_jax.model.hyper import mix, read, write

ROUNDING = 3e-6
"""Relative to the largest entry: float32 sums of up to 400 terms in another order."""
HYPER = VARIANTS["hyper_static"]
EVERY_WAY = [(scales, branches) for scales in ("mean", "own") for branches in ("sum", "mean")]


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


class Setting:
    """A model with random weights and the context of its layers ``start`` to ``stop - 1``, by chunks of M."""

    def __init__(self, config, start=0, stop=6, length=8):
        self.model, self.start, self.stop = LanguageModel(config), start, stop
        params, tokens = random_params(self.model), random_tokens(config, length=length)
        self.blocks = jax.tree.map(lambda leaf: leaf[start:stop], params["blocks"])
        self.ctx = self.model.context(params, self.blocks, tokens, start, stop)
        x0 = self.model.embed(params, tokens)
        self.shared, self.h_in = self.model.shared(x0), self.model.expand(x0)

    def state(self, seed, *axes):
        return draw(seed, *axes, *self.h_in.shape)

    def without_branches(self):
        for module, name in (("attn", "out"), ("mlp", "down")):
            self.blocks[module][name] *= 0.0
        return self

    def layer(self, index):
        return jax.tree.map(lambda leaf: leaf[index], (self.blocks, self.ctx))

    def chunks(self, num_chunks):
        """Parameters and context [C, M, ...]."""
        shape = lambda leaf: (num_chunks, -1, *leaf.shape[1:])  # noqa: E731
        return jax.tree.map(lambda leaf: leaf.reshape(shape(leaf)), (self.blocks, self.ctx))

    def fns(self, num_chunks, scales="mean", branches="sum"):
        return self.model.chunk_fns(self.start, self.stop, num_chunks, scales, branches)

    def branches(self):
        """``attention(j, x)`` and ``mlp(j, u)`` of every layer, read off the layer of a plain model."""
        plain = LanguageModel(dataclasses.replace(self.model.config, use_x0_resid=False, num_streams=0))

        @jax.jit
        def difference(params, x, ctx):
            return plain.block_fn()(params, x, ctx._replace(hyper=None), self.shared)[0] - x

        def branch(module, name):
            def run(index, x):
                params, ctx = self.layer(index)
                params = {key: params[key] for key in ("attn", "mlp")}
                return difference(params | {module: params[module] | {name: 0.0 * params[module][name]}}, x, ctx)

            return run

        return branch("mlp", "down"), branch("attn", "out")


# ---------------------------------------------------------------- formulas


def test_a_chunk_is_its_formula():
    """Layers 1 to 3 of the model with every feature: windows 4, 4 and full, two of them with value embeddings."""
    setting = Setting(SMALL, 1, 4)
    assert SMALL.windows[1:4] == (4, 4, 32) and SMALL.value_embed_layers == (1, 3, 5)
    h, x0, (attention, mlp) = setting.state(3), setting.shared.x0_BTD, setting.branches()
    s, m = (np.asarray(setting.blocks[name]) for name in ("resid_scale", "x0_scale"))
    params, ctx = setting.chunks(1)
    all_fns = {way: setting.fns(1, *way) for way in EVERY_WAY}
    actual = jax.jit(
        lambda h: {way: fns.sweep_fn(params, h[None], ctx, setting.shared) for way, fns in all_fns.items()}
    )(h)
    for scales, branches in EVERY_WAY:
        if scales == "mean":
            w, inputs = np.ones(3), [s.mean() * h + m.mean() * x0] * 3
            x, slope = inputs[0], s.mean()
        else:
            w, inputs = [prod(s[j + 1 :]) for j in range(3)], [s[j] * h + m[j] * x0 for j in range(3)]
            x, slope = prod(s) * h + sum(w[j] * m[j] for j in range(3)) * x0, prod(s)
        divisor = 3 if branches == "mean" else 1
        u = x + sum(w[j] / divisor * attention(j, inputs[j]) for j in range(3))
        expected = u + sum(w[j] / divisor * mlp(j, u) for j in range(3))
        output, aux = actual[scales, branches]
        assert relative_error(output[0], expected) < ROUNDING
        one = jax.tree.map(lambda leaf: leaf[0], (params, ctx, aux))
        # A product or mean of three numbers.
        np.testing.assert_allclose(all_fns[scales, branches].residual_map(*one), slope, rtol=1e-6)


def test_a_chunk_of_streams_is_its_formula():
    """Means of the projected maps, sub-layer by sub-layer, and the plain branches."""
    setting = Setting(HYPER, 1, 4)
    h, (attention, mlp) = setting.state(3), setting.branches()
    attn_maps, mlp_maps = ([leaf.mean(0) for leaf in maps] for maps in (setting.ctx.hyper.attn, setting.ctx.hyper.mlp))
    expected = h
    for (res, pre, post), branch in ((attn_maps, attention), (mlp_maps, mlp)):
        x = read(pre, expected)
        expected = mix(res, expected) + write(post, sum(branch(j, x) for j in range(3)))
    fns, (params, ctx) = setting.fns(1), setting.chunks(1)
    actual, aux = jax.jit(fns.sweep_fn)(params, h[None], ctx, setting.shared)
    assert relative_error(actual[0], expected) < ROUNDING
    one = jax.tree.map(lambda leaf: leaf[0], (params, ctx, aux))
    np.testing.assert_allclose(fns.residual_map(*one), mlp_maps[0] @ attn_maps[0], atol=1e-6)


@pytest.mark.parametrize("config", (SMALL, HYPER), ids=("plain", "streams"))
def test_a_chunk_of_one_layer_is_the_layer(config):
    setting = Setting(config)
    h, (params, ctx) = setting.state(3), setting.layer(4)
    model = setting.model
    expected, aux = jax.jit(model.block_fn())(params, h, ctx, setting.shared)
    slope = model.residual_map(params, ctx, aux)
    row = jax.tree.map(lambda leaf: leaf[4], setting.chunks(6))
    for scales, branches in EVERY_WAY if config.use_x0_resid else [("mean", "sum")]:
        fns = setting.fns(6, scales, branches)
        actual, aux_M = jax.jit(fns.block_fn)(row[0], h, row[1], setting.shared)
        assert relative_error(actual, expected) < ROUNDING
        for one, other in zip(aux_M.kv, aux.kv, strict=True):
            assert relative_error(one[0], other) < ROUNDING
        np.testing.assert_allclose(fns.residual_map(row[0], row[1], aux_M), slope, atol=1e-6)


@pytest.mark.parametrize("config", (SMALL, HYPER), ids=("plain", "streams"))
def test_skip_path_of_a_chunk(config):
    """Without branches a chunk is ``h -> A h + constant`` with A its residual map. With own scales that is its layers
    one after another; with their mean it is not."""
    setting = Setting(config).without_branches()
    h, (params, ctx) = setting.state(3), setting.chunks(2)
    row = jax.tree.map(lambda leaf: leaf[1], (params, ctx))
    outputs = {}
    for scales in ("mean", "own") if config.use_x0_resid else ("mean",):
        fns = setting.fns(2, scales)
        run = jax.jit(lambda h, fns=fns: fns.block_fn(row[0], h, row[1], setting.shared))
        (outputs[scales], aux), (origin, _) = run(h), run(jnp.zeros_like(h))
        slope = fns.residual_map(*row, aux)
        moved = slope * h if config.use_x0_resid else mix(slope, h)
        assert relative_error(outputs[scales] - origin, moved) < ROUNDING
    if not config.use_x0_resid:
        return
    block = jax.jit(setting.model.block_fn())
    for index in (3, 4, 5):
        one = setting.layer(index)
        h, _ = block(one[0], h, one[1], setting.shared)
    assert relative_error(outputs["own"], h) < ROUNDING < 0.01 < relative_error(outputs["mean"], h)


# ---------------------------------------------------------------- sweeps


@pytest.mark.parametrize(
    "config, num_chunks",
    (
        (SMALL, 3),  # windows (4, 4), (4, 32), (4, 32): a chunk alone takes them from its context
        (dataclasses.replace(SMALL, window_pattern="SL", use_x0_resid=False), 3),  # all (4, 32): compiled in
        (HYPER, 2),
    ),
    ids=("unlike", "alike", "streams"),
)
def test_sweep_of_chunks_is_the_chunks_one_by_one(config, num_chunks):
    setting = Setting(config)
    fns, (params, ctx), h_C = setting.fns(num_chunks), setting.chunks(num_chunks), setting.state(3, num_chunks)
    actual, aux = jax.jit(fns.sweep_fn)(params, h_C, ctx, setting.shared)
    block = jax.jit(fns.block_fn)
    for index in range(num_chunks):
        row = jax.tree.map(lambda leaf: leaf[index], (params, h_C, ctx))  # noqa: B023
        expected = block(*row, setting.shared)
        got = jax.tree.map(lambda leaf: leaf[index], (actual, aux))  # noqa: B023
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            assert relative_error(one, other) < ROUNDING


def test_large_states_are_swept_one_by_one_on_a_cpu():
    setting = Setting(HYPER, 0, 3)
    h_L, results = setting.state(3, 3), {}
    num_rows = h_L[0, ..., 0].size
    for rows in (num_rows, num_rows + 1):
        sweep = setting.model.adapted(one_by_one_from=rows).sweep_fn(0, 3)
        run = lambda h: sweep(setting.blocks, h, setting.ctx, setting.shared)  # noqa: B023, E731
        is_loop = "scan[" in str(jax.make_jaxpr(run)(h_L))
        results[is_loop] = jax.jit(run)(h_L)
    for one, other in zip(*map(jax.tree.leaves, (results[True], results[False])), strict=True):
        assert relative_error(one, other) < ROUNDING


@pytest.mark.parametrize(
    ("batch", "length", "num_slots", "is_loop"),
    [(1, 64, 200, True), (1, 64, 64, False), (1, 32, 1000, False), (256, 1, 1000, False), (1, 128, 130, True)],
)
def test_behind_a_cache_long_rows_with_many_keys_are_swept_one_by_one(batch, length, num_slots, is_loop):
    """A loop copies the rings of all rows, which only many tokens of each row are worth."""
    setting = Setting(SMALL, 0, 3, length)
    config, model = setting.model.config, setting.model
    shape = (3, batch, config.num_kv_heads, num_slots, config.head_dim)
    ctx = setting.ctx._replace(past=Ring(draw(1, *shape), draw(2, *shape)))
    if ctx.value_embed is not None:
        spread = lambda leaf: jnp.broadcast_to(leaf[:, :1], (3, batch, *leaf.shape[2:]))  # noqa: E731
        ctx = ctx._replace(value_embed=ctx.value_embed._replace(rows_BTKH=spread(ctx.value_embed.rows_BTKH)))
    x0_BTD = draw(3, batch, length, config.embed_dim)
    shared = model.shared(x0_BTD, jnp.full((batch,), num_slots - length))
    h_L = draw(4, 3, *x0_BTD.shape)
    run = lambda h: model.sweep_fn(0, 3)(setting.blocks, h, ctx, shared)  # noqa: E731
    assert ("scan[" in str(jax.make_jaxpr(run)(h_L))) == is_loop
    if batch == 1:
        other = model.adapted(one_by_one_from=10**6 if is_loop else 1).sweep_fn(0, 3)
        got, expected = jax.jit(run)(h_L), jax.jit(lambda h: other(setting.blocks, h, ctx, shared))(h_L)
        for one, its in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            assert relative_error(one, its) < ROUNDING


@pytest.mark.parametrize("use_x0_resid", (False, True))
def test_split_sweep(use_x0_resid):
    """``y_l = u + MLP_l(rms(u))``, ``u = x + Attention_l(rms(x))``, one x for all; without scales the sweep itself."""
    setting = Setting(dataclasses.replace(SMALL, use_x0_resid=use_x0_resid), 1, 4)
    h, (attention, mlp) = setting.state(3), setting.branches()
    h_L = jnp.broadcast_to(h[None], (3, *h.shape))
    sweep = jax.jit(setting.model.split_sweep_fn(1, 4))
    actual, aux = sweep(setting.blocks, h_L, setting.ctx, setting.shared)
    if use_x0_resid:
        s, m = (setting.blocks[name].mean() for name in ("resid_scale", "x0_scale"))
        x = s * h + m * setting.shared.x0_BTD
        u = [x + attention(j, x) for j in range(3)]
        assert relative_error(actual, np.stack([u[j] + mlp(j, u[j]) for j in range(3)])) < ROUNDING
        return
    expected = setting.model.sweep_fn(1, 4)(setting.blocks, h_L, setting.ctx, setting.shared)
    for one, other in zip(jax.tree.leaves((actual, aux)), jax.tree.leaves(expected), strict=True):
        assert relative_error(one, other) < ROUNDING


def test_a_sweep_of_chunks_copies_no_weight():
    """No transpose, copy or concatenation in the compiled program is as large as the smallest stack of matrices."""
    setting = Setting(SMALL, length=1)
    fns, (params, ctx), h_C = setting.fns(2), setting.chunks(2), setting.state(3, 2)
    smallest = min(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim == 4)
    program = jax.jit(fns.sweep_fn).lower(params, h_C, ctx, setting.shared).compile().as_text()
    moved = re.findall(r"= \w+\[([\d,]+)\]\S* (?:transpose|copy|concatenate|gather)\(", program)
    assert moved and max(prod(map(int, shape.split(","))) for shape in moved) < smallest


def test_what_cannot_be_fused_is_refused():
    dynamic = LanguageModel(VARIANTS["hyper_dynamic"])
    for call, message in (
        (
            lambda: LanguageModel(SMALL).chunk_fns(0, 6, 4),
            "6 layers do not divide into 4 equal chunks; choose a divisor",
        ),
        (lambda: LanguageModel(SMALL).chunk_fns(0, 6, 0), "6 layers do not divide into 0 equal chunks"),
        (lambda: dynamic.chunk_fns(0, 6, 2), "maps depend on the token cannot be fused; set model.hyper_maps to"),
        (lambda: LanguageModel(HYPER).chunk_fns(0, 6, 2, "own"), "scales 'own' is for residual scalars"),
        (lambda: LanguageModel(HYPER).split_sweep_fn(0, 6), "a split stage is for a single residual stream"),
    ):
        with pytest.raises(InputError, match=message):
            call()
