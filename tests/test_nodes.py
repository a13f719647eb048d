"""Fused chunks of layers and the split stage, against formulas made of single layers."""

import copy
import dataclasses
import functools
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


def row_of(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


def assert_close(actual, expected):
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert relative_error(one, other) < ROUNDING


class Setting:
    """A model with random weights and the context of its layers ``start`` to ``stop - 1``, by chunks of M."""

    def __init__(self, config, start, stop, length=8):
        self.model, self.start, self.stop = LanguageModel(config), start, stop
        tokens = random_tokens(config, length=length)

        @jax.jit
        def lay_out(params):
            blocks, x0 = row_of(params["blocks"], slice(start, stop)), self.model.embed(params, tokens)
            ctx = self.model.context(params, blocks, tokens, start, stop)
            return blocks, ctx, self.model.shared(x0), self.model.expand(x0)

        self.blocks, self.ctx, self.shared, self.h_in = lay_out(random_params(self.model))

    def state(self, seed, *axes):
        return draw(seed, *axes, *self.h_in.shape)

    def without_branches(self):
        new = copy.copy(self)
        new.blocks = dict(self.blocks)
        for module, name in (("attn", "out"), ("mlp", "down")):
            new.blocks[module] = self.blocks[module] | {name: jnp.zeros_like(self.blocks[module][name])}
        return new

    def chunks(self, num_chunks):
        """Parameters and context [C, M, ...]."""
        shape = lambda leaf: (num_chunks, -1, *leaf.shape[1:])  # noqa: E731
        return jax.tree.map(lambda leaf: leaf.reshape(shape(leaf)), (self.blocks, self.ctx))

    def fns(self, num_chunks, scales="mean", branches="sum"):
        return self.model.chunk_fns(self.start, self.stop, num_chunks, scales, branches)

    @functools.cached_property
    def branches(self):
        """``attention(j, x)`` and ``mlp(j, u)`` of every layer, read off the layer of a plain model."""
        plain = LanguageModel(dataclasses.replace(self.model.config, use_x0_resid=False, num_streams=0))

        @functools.partial(jax.jit, static_argnums=0)
        def difference(zeroed, blocks, ctx, index, x):
            params, ctx = row_of(({key: blocks[key] for key in ("attn", "mlp")}, ctx), index)
            module, name = zeroed
            params |= {module: params[module] | {name: jnp.zeros_like(params[module][name])}}
            return plain.block_fn()(params, x, ctx._replace(hyper=None), self.shared)[0] - x

        def branch(*zeroed):
            return lambda index, x: np.asarray(difference(zeroed, self.blocks, self.ctx, index, x))

        return branch("mlp", "down"), branch("attn", "out")


@functools.cache
def setting_of(config, start, stop, length=8):
    return Setting(config, start, stop, length)


# ---------------------------------------------------------------- formulas


def test_a_chunk_is_its_formula():
    """Layers 1 to 3 of the model with every feature: windows 4, 4 and full, two of them with value embeddings."""
    setting = setting_of(SMALL, 1, 4)
    assert SMALL.windows[1:4] == (4, 4, 32) and SMALL.value_embed_layers == (1, 3, 5)
    h, x0, (attention, mlp) = np.asarray(setting.state(3)), np.asarray(setting.shared.x0_BTD), setting.branches
    s, m = (np.asarray(setting.blocks[name]) for name in ("resid_scale", "x0_scale"))

    @jax.jit
    def run(h, params, ctx):
        made = {}
        for way in EVERY_WAY:
            fns = setting.fns(1, *way)
            output, aux = fns.sweep_fn(params, h[None], ctx, setting.shared)
            made[way] = output[0], fns.residual_map(*row_of((params, ctx, aux), 0))
        return [made[way] for way in EVERY_WAY]

    for (scales, branches), (output, skip) in zip(EVERY_WAY, run(h, *setting.chunks(1)), strict=True):
        if scales == "mean":
            w, inputs = np.ones(3, np.float32), [s.mean() * h + m.mean() * x0] * 3
            x, slope = inputs[0], s.mean()
        else:
            w, inputs = [prod(s[j + 1 :]) for j in range(3)], [s[j] * h + m[j] * x0 for j in range(3)]
            x, slope = prod(s) * h + sum(w[j] * m[j] for j in range(3)) * x0, prod(s)
        divisor = 3 if branches == "mean" else 1
        u = x + sum(w[j] / divisor * attention(j, inputs[j]) for j in range(3))
        expected = u + sum(w[j] / divisor * mlp(j, u) for j in range(3))
        assert relative_error(output, expected) < ROUNDING
        np.testing.assert_allclose(skip, slope, rtol=1e-6)  # a product or mean of three numbers


def test_a_chunk_of_streams_is_its_formula():
    """Means of the projected maps, sub-layer by sub-layer, and the plain branches."""
    setting = setting_of(HYPER, 1, 4)
    h, (attention, mlp), fns = setting.state(3), setting.branches, setting.fns(1)
    attn_maps, mlp_maps = ([leaf.mean(0) for leaf in maps] for maps in (setting.ctx.hyper.attn, setting.ctx.hyper.mlp))
    expected = h
    for (res, pre, post), branch in ((attn_maps, attention), (mlp_maps, mlp)):
        x = read(pre, expected)
        expected = mix(res, expected) + write(post, sum(branch(j, x) for j in range(3)))

    @jax.jit
    def run(h, params, ctx):
        output, aux = fns.sweep_fn(params, h[None], ctx, setting.shared)
        return output[0], fns.residual_map(*row_of((params, ctx, aux), 0))

    output, skip = run(h, *setting.chunks(1))
    assert relative_error(output, expected) < ROUNDING
    np.testing.assert_allclose(skip, np.asarray(mlp_maps[0]) @ np.asarray(attn_maps[0]), atol=1e-6)


def test_skip_path_of_a_chunk():
    """Without branches a chunk is ``h -> s h + constant`` with s its residual map. With own scales that is its layers
    one after another; with their mean it is not."""
    setting = setting_of(SMALL, 1, 4).without_branches()
    h = setting.state(3)

    @jax.jit
    def run(h, blocks, ctx, chunk):
        ways = []
        for fns in (setting.fns(1, scales) for scales in ("mean", "own")):
            evaluate = lambda h, fns=fns: fns.block_fn(chunk[0], h, chunk[1], setting.shared)  # noqa: E731
            (output, origin), aux = jax.vmap(evaluate)(jnp.stack([h, jnp.zeros_like(h)]))
            ways.append((output, output - origin, fns.residual_map(*chunk, row_of(aux, 0)) * h))
        one = lambda h, row: (setting.model.block_fn()(row[0], h, row[1], setting.shared)[0], None)  # noqa: E731
        return ways, jax.lax.scan(one, h, (blocks, ctx))[0]

    ways, in_order = run(h, setting.blocks, setting.ctx, row_of(setting.chunks(1), 0))
    for _, difference, moved in ways:
        assert relative_error(difference, moved) < ROUNDING
    (mean, *_), (each, *_) = ways
    assert relative_error(each, in_order) < ROUNDING < 0.01 < relative_error(mean, in_order)


# ---------------------------------------------------------------- sweeps


@pytest.mark.parametrize(
    "config",
    (
        SMALL,  # windows (4, 4) and (4, 32): a chunk alone takes them from its context
        dataclasses.replace(HYPER, window_pattern="SL"),  # all (4, 32): compiled in
    ),
    ids=("unlike", "alike, streams"),
)
def test_sweep_of_chunks_is_the_chunks_one_by_one(config):
    setting = setting_of(config, 0, 4)
    fns, (params, ctx), h_C = setting.fns(2), setting.chunks(2), setting.state(3, 2)

    @jax.jit
    def run(*rows):
        one_by_one = jax.lax.map(lambda row: fns.block_fn(*row, setting.shared), rows)
        return fns.sweep_fn(*rows, setting.shared), one_by_one

    assert_close(*run(params, h_C, ctx))


def test_large_states_are_swept_one_by_one_on_a_cpu():
    setting, results = setting_of(HYPER, 0, 4), {}
    h_L = setting.state(3, 4)
    num_rows = h_L[0, ..., 0].size
    for rows in (num_rows, num_rows + 1):
        sweep = setting.model.adapted(one_by_one_from=rows).sweep_fn(0, 4)
        run = jax.jit(lambda h: sweep(setting.blocks, h, setting.ctx, setting.shared))  # noqa: B023
        traced = run.trace(h_L)
        results["scan[" in str(traced.jaxpr)] = traced.lower().compile()(h_L)
    assert_close(results[True], results[False])


def test_behind_a_cache_long_rows_with_many_keys_are_swept_one_by_one():
    """A loop copies the rings of all rows, which only many tokens of each row are worth."""
    config = SMALL
    for batch, length, num_slots, is_loop in (
        (1, 64, 200, True),
        (1, 64, 64, False),
        (256, 1, 1000, False),
    ):
        setting = setting_of(config, 0, 2, length)
        shape = (2, batch, config.num_kv_heads, num_slots, config.head_dim)
        ring, x0_BTD = jnp.broadcast_to(draw(1, num_slots, 1), shape), draw(3, batch, length, config.embed_dim)

        def run(sweep, h_L, ring, x0_BTD, setting=setting, batch=batch, first=num_slots - length):
            value_embed = setting.ctx.value_embed
            rows = value_embed.rows_BTKH[:, :1]
            rows = jnp.broadcast_to(rows, (2, batch, *rows.shape[2:]))
            ctx = setting.ctx._replace(past=Ring(ring, ring), value_embed=value_embed._replace(rows_BTKH=rows))
            shared = setting.model.shared(x0_BTD, jnp.full((batch,), first))
            return sweep(setting.blocks, h_L, ctx, shared)

        model, h_L = setting.model, draw(4, 2, *x0_BTD.shape)
        sweep = model.sweep_fn(0, 2)
        assert ("scan[" in str(jax.make_jaxpr(functools.partial(run, sweep))(h_L, ring, x0_BTD))) == is_loop
        if num_slots == 200:
            batched = model.adapted(one_by_one_from=10**6).sweep_fn(0, 2)
            both = jax.jit(lambda *data, run=run, fns=(sweep, batched): [run(fn, *data) for fn in fns])
            assert_close(*both(h_L, ring, x0_BTD))


def test_split_sweep():
    """``y_l = u + MLP_l(rms(u))``, ``u = x + Attention_l(rms(x))``, one x for all."""
    setting = setting_of(SMALL, 1, 4)
    h, sweep = setting.state(3), setting.model.split_sweep_fn(1, 4)
    actual = jax.jit(lambda h_L: sweep(setting.blocks, h_L, setting.ctx, setting.shared)[0])(jnp.stack([h] * 3))
    attention, mlp = setting.branches
    s, m = (np.asarray(setting.blocks[name]).mean() for name in ("resid_scale", "x0_scale"))
    x = s * np.asarray(h) + m * np.asarray(setting.shared.x0_BTD)
    u = [x + attention(j, x) for j in range(3)]
    assert relative_error(actual, np.stack([u[j] + mlp(j, u[j]) for j in range(3)])) < ROUNDING


def test_a_sweep_of_chunks_copies_no_weight():
    """No transpose, copy or concatenation in the compiled program is as large as the smallest stack of matrices."""
    setting = setting_of(SMALL, 0, 4, 1)
    fns, (params, ctx), h_C = setting.fns(2), setting.chunks(2), setting.state(3, 2)
    smallest = min(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim == 4)
    program = jax.jit(fns.sweep_fn).lower(params, h_C, ctx, setting.shared).compile().as_text()
    moved = re.findall(r"= \w+\[([\d,]+)\]\S* (?:transpose|copy|concatenate|gather)\(", program)
    assert moved and max(prod(map(int, shape.split(","))) for shape in moved) < smallest


def test_what_cannot_be_fused_is_refused():
    model, streams, dynamic = (LanguageModel(config) for config in (SMALL, HYPER, VARIANTS["hyper_dynamic"]))
    for call, keyword in (
        (lambda: model.chunk_fns(0, 6, 4), "4 equal chunks"),
        (lambda: model.chunk_fns(0, 6, 0), "0 equal chunks"),
        (lambda: dynamic.chunk_fns(0, 6, 2), "depend on the token"),
        (lambda: streams.chunk_fns(0, 6, 2, "own"), "scales"),
        (lambda: streams.split_sweep_fn(0, 6), "split stage"),
    ):
        with pytest.raises(InputError, match=keyword):
            call()
