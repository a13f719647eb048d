"""Layers whose branches are linear maps or dropped: everything that whole layers can do, and what they save."""

import dataclasses
import functools

import decoding
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import SMALL, random_params, random_tokens

from snlp_jax.config import Config, Kind, LoraConfig, LossConfig, MeshConfig, OptimConfig, SolverCEConfig, TrainConfig
from snlp_jax.forward import forward
from snlp_jax.infer import Engine
from snlp_jax.layout import prepare
from snlp_jax.linearize.replace import AffineMap, replace
from snlp_jax.model import LanguageModel, num_params
from snlp_jax.model.kinds import owners, take
from snlp_jax.notation import parse_schedule
from snlp_jax.parallel.mesh import make_mesh, put_batch
from snlp_jax.train.loss import Plan
from snlp_jax.train.step import make_init, make_step, optimizer_of
from snlp_jax.types import Batch

D = SMALL.embed_dim


def random_map(seed, rank=0):
    rng = np.random.default_rng(seed)
    kernel = 0.3 * rng.normal(size=(D, D)) / D**0.5
    if rank:
        kernel = 0.3 * rng.normal(size=(D, rank)) @ rng.normal(size=(rank, D)) / D
    return AffineMap(jnp.asarray(kernel, jnp.float32), jnp.asarray(0.1 * rng.normal(size=D), jnp.float32))


ATTENTION = {1: random_map(1), 2: None, 3: None, 5: None}
MLP = {2: None, 3: random_map(3), 4: random_map(4)}
"""Layer 1: linear attention; 2: dropped; 3: linear as a whole; 4: linear MLP; 5: no attention."""


def mixed(config=SMALL, attention=ATTENTION, mlp=MLP, rank=0):
    return replace(config, random_params(LanguageModel(config)), attention=attention, mlp=mlp, rank=rank)


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


# ---------------------------------------------------------------- decoding

LONG = decoding.TINY
"""Windows of 4 and 8: rings go round several times in a text."""


@functools.cache
def decoded():
    config, params = mixed(LONG, {1: random_map(1), 2: None}, {2: random_map(2)})
    return config, params


@pytest.mark.parametrize(
    ("setting", "settings"),
    [
        ("seq", {}),
        ("seq", {"layout": "list"}),
        ("sid:n=3,k=3", {"rule": "last_eval"}),
        ("sid:n=3,k=3", {"rule": "refreshed", "layout": "list"}),
        ("sid:n=3,k=2", {"rule": "per_iteration"}),
    ],
)
def test_decoding_is_the_whole_pass(setting, settings):
    config, params = decoded()
    engine = Engine(LanguageModel(config), params, parse_schedule(setting, config.num_layers), **settings)
    requests = decoding.requests_of(config, new=12)
    done = engine.generate(requests)
    setting = "seq" if settings.get("rule") != "per_iteration" else setting
    decoding.assert_is_the_whole_pass(config, setting, requests, done, params=params)


@pytest.mark.parametrize("draft", ["sid:n=3,k=1", "skip:n=2"])
def test_speculation_with_several_kinds_gives_the_sequential_text(draft):
    config, params = decoded()
    model, requests = LanguageModel(config), decoding.requests_of(config, new=12)
    drafter = parse_schedule(draft, config.num_layers)
    done = Engine(model, params, draft=drafter, draft_len=3).generate(requests)
    decoding.assert_is_the_whole_pass(config, "seq", requests, done, params=params)


def test_the_cache_shrinks_by_the_layers_without_attention():
    """Of 6 layers with one window 4 have no attention: the cache is a third, in every layout."""
    config = dataclasses.replace(SMALL, window_pattern="L", num_layers=6)
    model, requests = LanguageModel(config), decoding.requests_of(SMALL, new=4)
    whole = random_params(model)

    def cache_bytes(config, params, setting):
        engine = Engine(LanguageModel(config), params, parse_schedule(setting, 6))
        state, _ = engine._prefill(requests)
        return sum(leaf.nbytes for leaf in jax.tree.leaves(state.rings))

    full = cache_bytes(config, whole, "seq")
    shrunk = replace(config, whole, attention={1: random_map(1), 2: random_map(2), 3: None, 5: None})
    for setting in ("seq", "sid:n=4,k=1"):
        assert 3 * cache_bytes(*shrunk, setting) == full


# ---------------------------------------------------------------- training


TERMS = LossConfig(solver_ce=SolverCEConfig(weight=1.0, region_sizes=(4,), ramp_fraction=0.0))
PLAN = Plan((("solver_ce", (4,)),))


def one_step(config, lora=None, mesh=None):
    """Parameters before and after, and the metrics."""
    model_config, params = config
    lora = lora or LoraConfig()
    settings = TrainConfig(num_steps=2, batch_size=4, init_from="base")
    config = Config(model=model_config, loss=TERMS, lora=lora, train=settings, optim=OptimConfig(warmup_steps=1))
    model = LanguageModel(model_config)
    optimizer = optimizer_of(model, config, mesh)
    state = make_init(model, optimizer, 0, mesh, config)(params)
    batch = Batch(np.asarray(random_tokens(model_config, batch=4, length=model_config.seq_len + 1)))
    before = jax.device_get(state["params"])
    state, metrics = make_step(model, optimizer, config, mesh)(state, put_batch(mesh, batch), plan=PLAN)
    return before, jax.device_get(state["params"]), jax.device_get(metrics)


def test_a_step_of_training_moves_every_map():
    before, after, metrics = one_step(mixed())
    moved = jax.tree.map(lambda a, b: bool(np.abs(a - b).max() > 0), before, after)
    assert all(jax.tree.leaves(moved)), moved
    assert np.isfinite(metrics["loss"])
    # With K = 1 the solver is not exact: the term adds something of its own.
    assert metrics["solver_ce"] != metrics["sequential_ce"]


def test_adapters_of_maps_leave_the_rest_alone():
    before, after, _ = one_step(mixed(), LoraConfig(rank=2, targets=("linear_attn", "linear_mlp", "query")))
    assert set(after["blocks"]) == {"linear_attn", "linear_mlp", "attn"}
    assert after["blocks"]["linear_mlp"]["kernel"]["b"].shape == (2, 2, D)
    assert all(np.abs(leaf["b"]).max() > 0 for part in after["blocks"].values() for leaf in part.values())


@pytest.mark.parametrize("axes", [{"data": 2}, {"tensor": 2}])
def test_training_and_evaluation_over_devices_equal_one_device(axes):
    mesh = make_mesh(MeshConfig(**({"data": 1} | axes)), devices=jax.devices()[:2])
    config, params = mixed()
    before, after, metrics = one_step((config, params), mesh=mesh)
    alone = one_step((config, params))
    np.testing.assert_allclose(metrics["loss"], alone[2]["loss"], rtol=1e-5)  # float32, another order of summation
    model, schedule = LanguageModel(config), parse_schedule("sid:n=5,k=2", config.num_layers)
    weights = prepare(model, params, schedule, num_tokens=24, mesh=mesh)
    tokens = tokens_of(config)
    logits = jax.jit(lambda w, t: forward(model, w, t, mesh=mesh).logits_BTV)(weights, tokens)
    np.testing.assert_allclose(logits, run(config, params, "sid:n=5,k=2").logits_BTV, rtol=0, atol=ROUNDING)
