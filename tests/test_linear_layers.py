"""Layers whose branches are linear maps or dropped: everything that whole layers can do, and what they save."""

import dataclasses
import re

import decoding
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from problems import PLAIN, SMALL, random_params, random_tokens
from tiny_run import tiny

from snlp_jax.cli.infer import Args, open_engine
from snlp_jax.config import (
    Config,
    Kind,
    LoraConfig,
    LossConfig,
    MeshConfig,
    OptimConfig,
    SolverCEConfig,
    TrainConfig,
    to_json,
)
from snlp_jax.data.tokenizer import ByteTokenizer
from snlp_jax.errors import InputError
from snlp_jax.eval import evaluate_run
from snlp_jax.forward import Keep, forward
from snlp_jax.infer import Drafting, Engine, Placement, Request
from snlp_jax.infer.sampling import Features
from snlp_jax.io.checkpoint import Checkpointer
from snlp_jax.layout import prepare
from snlp_jax.linearize.replace import AffineMap, replace
from snlp_jax.model import LanguageModel, num_params
from snlp_jax.model.convert.nanochat import nanochat_rows
from snlp_jax.model.kinds import owners, take
from snlp_jax.notation import parse_schedule
from snlp_jax.parallel.mesh import make_mesh, put_batch
from snlp_jax.run import read_config, read_params
from snlp_jax.train.loop import train
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


FOUR = dataclasses.replace(SMALL, num_layers=4)
ATTENTION = {1: random_map(1), 2: None}
MLP = {2: random_map(2), 3: random_map(3)}
"""Layer 0 as trained; 1: linear attention; 2: dropped attention and linear MLP; 3: linear MLP."""


def mixed(config=FOUR, attention=ATTENTION, mlp=MLP, rank=0):
    return replace(config, random_params(LanguageModel(config)), attention=attention, mlp=mlp, rank=rank)


def tokens_of(config, batch=2, length=6):
    return jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (batch, length)))


def run_all(config, params, *settings, layout="auto"):
    """Outputs under several settings, out of one compiled program."""
    model, tokens = LanguageModel(config), tokens_of(config)
    schedules = [parse_schedule(setting, config.num_layers) for setting in settings]
    weights = [prepare(model, params, schedule, num_tokens=tokens.size, layout=layout) for schedule in schedules]
    return jax.jit(lambda weights, tokens: [forward(model, w, tokens, keep=Keep()) for w in weights])(weights, tokens)


def logits_of(config, params, *settings, layout="auto"):
    return [output.logits_BTV for output in run_all(config, params, *settings, layout=layout)]


def test_stacks_hold_the_layers_that_have_them():
    config, params = mixed()
    blocks = params["blocks"]
    assert config.kinds[2] == Kind("none", "linear") and config.kinds[1] == Kind("linear", "full")
    for path, leaf in jax.tree_util.tree_leaves_with_path(blocks):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert leaf.shape[0] == len(owners(config, name)), name
    assert blocks["attn"]["query"].shape[0] == 2 and blocks["mlp"]["up"].shape[0] == 2
    assert blocks["linear_mlp"]["kernel"].shape == (2, D, D) and blocks["resid_scale"].shape == (4,)
    fresh = LanguageModel(config).abstract_params()
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, fresh)
    low, low_params = mixed(rank=4)
    assert low_params["blocks"]["linear_attn"]["down"].shape == (1, D, 4)
    assert num_params(low_params) < num_params(params)


ROUNDING = 2e-5
"""Logits of up to 15 in float32: two programs that add up in another order differ by 1.5e-5 each."""


def test_regions_of_several_kinds_solve_the_chain():
    """K = N is exact for any correction, and so are the keys and values of layers that have attention. Newton's method
    settles one layer an iteration, and with it the affine ones that follow: K = 3 do, as 1 of the 4 is affine."""
    config, params = mixed()
    expected = jax.jit(LanguageModel(config))(params, tokens_of(config))
    exact, *solved = run_all(config, params, "seq", "jac:1-3,k=2", "sid:n=4,k=4", "exact:n=4,k=3", layout="list")
    np.testing.assert_allclose(exact.logits_BTV, expected, rtol=0, atol=ROUNDING)
    exact_kv = [kv for update in exact.updates if update.kv for kv in update.kv]
    for output in solved:
        np.testing.assert_allclose(output.logits_BTV, expected, rtol=0, atol=ROUNDING)
        if len(output.updates) == 1:  # a region of all layers
            kv = output.updates[0].kv
            assert len(kv) == 2  # of layers 0 and 3
            for one, other in zip(jax.tree.leaves(kv), jax.tree.leaves(exact_kv), strict=True):
                np.testing.assert_allclose(one, other, rtol=0, atol=ROUNDING)


AFFINE = {layer: random_map(layer) for layer in (1, 2)}


def test_wholly_linear_layers_cost_no_iteration():
    """Layers 1 and 2 have both branches linear. Their Jacobians do not depend on the state, so the affine scan of any
    correction carries whatever enters them to their end exactly: what is left are layers 0 and 3, or in a region that
    they begin one iteration for both of them and one for layer 3."""
    config, params = mixed(attention=AFFINE, mlp={layer: random_map(10 + layer) for layer in AFFINE})
    assert [config.kinds[layer] for layer in AFFINE] == [Kind("linear", "linear")] * 2
    settings = {"jac:1-3,k=1": True, "sid:n=4,k=2,trust=0.5": True, "sid:n=4,k=1": False, "exact:1-4,k=2": True}
    exact, *solved = logits_of(config, params, "seq", *settings)
    for (setting, is_exact), logits in zip(settings.items(), solved, strict=True):
        error = np.abs(logits - exact).max()
        assert error < ROUNDING if is_exact else error > 100 * ROUNDING, setting


def test_a_sweep_over_kinds_permutes_no_weight():
    """What is gathered, cut or joined for one token is smaller than the smallest matrix."""
    config, params = mixed(mlp={3: random_map(3)})
    model, schedule = LanguageModel(config), parse_schedule("sid:n=4,k=2", 4)
    weights = prepare(model, params, schedule, num_tokens=1, layout="stack")
    traced = jax.make_jaxpr(lambda w, t: forward(model, w, t).logits_BTV)(weights, jnp.zeros((1, 1), jnp.int32))

    def moved(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name in ("gather", "slice", "dynamic_slice", "concatenate", "scatter"):
                yield equation.outvars[0].aval.size
            for inner in jaxprs_in_params(equation.params):
                yield from moved(inner)

    assert 0 < max(moved(traced.jaxpr)) < D * D


def test_maps_in_the_scan_are_read_where_they_lie():
    """Two layers that are linear as a whole, with others between them: no map is written anywhere."""
    maps = {layer: random_map(layer) for layer in (1, 3)}
    config, params = mixed(attention=dict.fromkeys(maps), mlp=maps)
    model, schedule = LanguageModel(config), parse_schedule("sid:n=4,k=2", 4)
    weights = prepare(model, params, schedule, num_tokens=1, layout="stack")
    run = jax.jit(lambda w, t: forward(model, w, t).logits_BTV)
    program = run.lower(weights, jnp.zeros((1, 1), jnp.int32)).compile().as_text()
    made = re.findall(rf"= f32\[(?:1,)?{D},{D}\]\S* ([a-z-]+)\(", program)
    assert "parameter" in made and set(made) <= {"parameter", "bitcast"}


# ---------------------------------------------------------------- decoding

LONG = dataclasses.replace(decoding.TINY, num_layers=4)
"""Windows of 4 and 8: rings go round several times in a text. Other passes behind a cache are in test_corners.py."""


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["sid:n=3,k=2", "skip:n=2"])
def test_decoding_is_the_whole_pass(setting):
    """By a region over a mesh, with keys and values of every evaluation; and with drafts, whose text is exact."""
    config, params = mixed(LONG, mlp={2: random_map(2)})
    model, requests = LanguageModel(config), decoding.requests_of(config, new=8)
    schedule = parse_schedule(setting, config.num_layers)
    if setting.startswith("skip"):
        engine, setting = Engine(model, params, draft=Drafting(schedule, 3)), "seq"
    else:
        mesh = make_mesh(MeshConfig(data=2, tensor=2), devices=jax.devices()[:4])
        engine = Engine(model, params, schedule, rule="per_iteration", placement=Placement(mesh))
    decoding.assert_is_the_whole_pass(config, setting, requests, engine.generate(requests), params=params)


def test_the_cache_shrinks_by_the_layers_without_attention():
    """Of 3 layers with one window 2 have no attention: the cache is a third."""
    config = dataclasses.replace(SMALL, window_pattern="L", num_layers=3)
    whole = random_params(LanguageModel(config))

    def cache_slots(config, params, setting):
        """Of all layers; each is a key and a value of equal size."""
        engine = Engine(LanguageModel(config), params, parse_schedule(setting, 3))
        plans = engine._programs_for(64, Features(False, False, False), 1).plans
        return sum(plan.num_slots for plan in plans if plan is not None)

    full = cache_slots(config, whole, "seq")
    shrunk = replace(config, whole, attention={1: random_map(1), 2: None})
    for setting in ("seq", "sid:n=2,k=1"):
        assert 3 * cache_slots(*shrunk, setting) == full


# ---------------------------------------------------------------- training


TERMS = LossConfig(solver_ce=SolverCEConfig(weight=1.0, region_sizes=(2,), ramp_fraction=0.0))
PLAN = Plan((("solver_ce", (2,)),))


def two():
    """Layer 0 with linear attention, layer 1 with a linear MLP."""
    config = dataclasses.replace(PLAIN, num_layers=2, seq_len=4)
    return mixed(config, {0: random_map(1)}, {1: random_map(2)})


def one_step(config, lora=None, mesh=None):
    """Parameters before and after, and the metrics."""
    model_config, params = config
    lora = lora or LoraConfig()
    settings = TrainConfig(num_steps=2, batch_size=4, init_from="base")
    config = Config(model=model_config, loss=TERMS, lora=lora, train=settings, optim=OptimConfig(warmup_steps=1))
    model = LanguageModel(model_config)
    optimizer = optimizer_of(model, config, mesh)
    state = make_init(model, optimizer, config, mesh)(params)
    batch = Batch(np.asarray(random_tokens(model_config, batch=4, length=model_config.seq_len + 1)))
    before = jax.device_get(state["params"])
    state, metrics = make_step(model, optimizer, config, mesh)(state, put_batch(mesh, batch), plan=PLAN)
    return before, jax.device_get(state["params"]), jax.device_get(metrics)


def test_a_step_of_training_moves_every_map():
    before, after, metrics = one_step(two())
    moved = jax.tree.map(lambda a, b: bool(np.abs(a - b).max() > 0), before, after)
    assert all(jax.tree.leaves(moved)), moved
    assert np.isfinite(metrics["loss"])
    # With K = 1 the solver is not exact: the term adds something of its own.
    assert metrics["solver_ce"] != metrics["sequential_ce"]


@pytest.mark.slow
def test_adapters_of_maps_leave_the_rest_alone():
    before, after, _ = one_step(two(), LoraConfig(rank=2, targets=("linear_attn", "linear_mlp", "query")))
    assert set(after["blocks"]) == {"linear_attn", "linear_mlp", "attn"}
    assert after["blocks"]["linear_mlp"]["kernel"]["b"].shape == (1, 2, D)
    assert all(np.abs(leaf["b"]).max() > 0 for part in after["blocks"].values() for leaf in part.values())


@pytest.mark.slow
def test_training_over_devices_equals_one_device():
    mesh = make_mesh(MeshConfig(data=2, tensor=2), devices=jax.devices()[:4])
    sharded, alone = one_step(two(), mesh=mesh), one_step(two())
    np.testing.assert_allclose(sharded[2]["loss"], alone[2]["loss"], rtol=1e-5)  # another order of summation
    for a, b in zip(jax.tree.leaves(sharded[1]), jax.tree.leaves(alone[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-3)  # Adam's first step is a sign where a gradient is near 0


# ---------------------------------------------------------------- replacement


FEW = dataclasses.replace(PLAIN, num_layers=2)


def test_a_map_of_zeros_is_a_dropped_branch_and_low_rank_maps_are_the_nearest():
    zero, whole, low = AffineMap(jnp.zeros((D, D)), jnp.zeros(D)), random_map(1), random_map(1, rank=4)
    (dropped,) = logits_of(*mixed(FEW, {1: None}, {1: None}), "seq")
    found = [(zero, zero, 0), (low, zero, 0), (low, zero, 4)]
    mapped, expected, factored = (logits_of(*mixed(FEW, {1: a}, {1: b}, rank=r), "seq")[0] for a, b, r in found)
    np.testing.assert_array_equal(dropped, mapped)
    np.testing.assert_allclose(factored, expected, rtol=0, atol=ROUNDING)
    factors = mixed(FEW, {1: whole}, {}, rank=4)[1]["blocks"]["linear_attn"]
    error = np.linalg.norm(whole.kernel_DD - factors["down"][0] @ factors["up"][0])
    np.testing.assert_allclose(error, np.linalg.norm(np.linalg.svd(whole.kernel_DD)[1][4:]), rtol=1e-5)


def test_branches_that_are_affine_are_replaced_by_themselves():
    """An output projection of zeros leaves a bias: the branch is ``x 0 + b``."""
    config = dataclasses.replace(FEW, use_mlp_bias=True, use_out_bias=True)
    params = random_params(LanguageModel(config))
    blocks = params["blocks"]
    for part, name in (("attn", "out"), ("mlp", "down")):
        blocks[part][name] = blocks[part][name].at[1].set(0.0)
    bias = lambda part, name: AffineMap(jnp.zeros((D, D)), blocks[part][name][1])  # noqa: E731
    replaced = replace(config, params, attention={1: bias("attn", "out_bias")})
    replaced = replace(*replaced, mlp={1: bias("mlp", "down_bias")})  # one after the other
    (actual,), (expected,) = logits_of(*replaced, "seq"), logits_of(config, params, "seq")
    np.testing.assert_allclose(actual, expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("maps", ["static", pytest.param("dynamic", marks=pytest.mark.slow)])
def test_branches_between_streams(maps):
    """A branch reads the mixed stream; a layer without branches is its skip path alone."""
    config = dataclasses.replace(FEW, num_streams=2, hyper_maps=maps)
    config, params = mixed(config, {0: random_map(1), 1: None}, {1: None})
    exact, solved = logits_of(config, params, "seq", "hcn:n=2,k=2")
    np.testing.assert_allclose(solved, exact, rtol=0, atol=ROUNDING)
    model, tokens = LanguageModel(config), tokens_of(config)
    h = jax.random.normal(jax.random.key(0), (2, 6, 2, D))

    @jax.jit
    def last(params, h):
        blocks = take(config, params["blocks"], 1, 2)
        rows = jax.tree.map(lambda leaf: leaf[0], (blocks, model.context(params, blocks, tokens, 1, 2)))
        new, aux = model.block_fn()(rows[0], h, rows[1], model.shared(model.embed(params, tokens)))
        return new, model.residual_map(rows[0], rows[1], aux)

    new, skip = last(params, h)
    expected = jnp.einsum("...QR,...RD->...QD", jnp.broadcast_to(skip, (2, 6, 2, 2)), h)
    np.testing.assert_allclose(new, expected, rtol=0, atol=1e-5)  # float32 rounding of sums of two


def run_directory(path, config, params):
    path.mkdir()
    (path / "tokenizer.json").write_text(ByteTokenizer().to_json())
    with Checkpointer(path / "checkpoints", config_json=to_json(config)) as checkpoints:
        checkpoints.save(0, {"params": params}, None, {})
    (path / "config.json").write_text(to_json(config))


def test_a_replaced_model_is_an_ordinary_run(tmp_path):
    """Saved, evaluated and decoded by the paths of any other; the base's schedule may name its regions."""
    usual = tiny(tmp_path / "run")
    model, params = replace(usual.model, random_params(LanguageModel(usual.model)), attention={1: None, 2: None})
    config = dataclasses.replace(usual, model=model)
    run_directory(tmp_path / "run", config, params)
    assert read_config(tmp_path / "run") == config
    step, restored = read_params(tmp_path / "run", LanguageModel(model), "last")
    assert step == 0
    jax.tree.map(np.testing.assert_array_equal, restored, params)
    engine = open_engine(Args(tmp_path / "run", checkpoint="last", solver="idn:n=3,k=1"))
    done = engine.generate([Request([1, 2, 3], 2)])
    assert len(done[0].tokens) == 2


@pytest.mark.slow
def test_a_replaced_run_is_evaluated_and_tuned(tmp_path):
    usual = tiny(tmp_path / "run")
    whole = random_params(LanguageModel(usual.model))
    maps = {1: AffineMap(jnp.zeros((32, 32)), jnp.zeros(32))}
    model, params = replace(usual.model, whole, attention=maps, mlp={2: None})
    config = dataclasses.replace(usual, model=model)
    run_directory(tmp_path / "run", config, params)
    few = dataclasses.replace(config.eval, solvers=("sid:n=3,k=3",), num_windows=2, batch_size=2, greedy_prompts=0)
    report = evaluate_run(tmp_path / "run", dataclasses.replace(config, eval=few), "last")
    assert abs(report.results[1].ppl_change) < 1e-4  # as many iterations as layers
    tuned = tiny(tmp_path / "tuned", num_steps=2, init_from=str(tmp_path / "run"))
    train(dataclasses.replace(tuned, model=model))
    _, after = read_params(tmp_path / "tuned", LanguageModel(model), "last")
    assert np.abs(after["blocks"]["linear_attn"]["kernel"]).max() > 0


def test_what_cannot_be_is_refused_in_one_sentence():
    config, params = mixed()
    mesh = make_mesh(MeshConfig(layer=2), devices=jax.devices()[:2])
    lora = LoraConfig(rank=1, targets=("linear_attn",))
    for make, keyword in (
        (lambda: mixed(FOUR, {4: None}, {}), "no layer 4"),
        (lambda: replace(config, params, attention={1: None}), "replaced already"),
        (lambda: replace(config, params, attention={0: random_map(0)}, rank=2), "rank 2"),
        (lambda: mixed(FOUR, {1: AffineMap(jnp.zeros((D, 3)), jnp.zeros(3))}, {}), "width 32 to 3"),
        (lambda: dataclasses.replace(SMALL, linear_mlp=(2, 1)), "in order"),
        (lambda: dataclasses.replace(SMALL, linear_mlp=(1,), dropped_mlp=(1,)), "both"),
        (lambda: dataclasses.replace(SMALL, dropped_attention=(6,)), r"\(6,\)"),
        (lambda: prepare(LanguageModel(config), params, parse_schedule("IDN 1xF2 n2 K1", 4)), r"\[2, 3\]"),
        (lambda: nanochat_rows(config), r"layers \(1, 2, 3\)"),
        (lambda: Config(model=config, mesh=MeshConfig(layer=2)), "mesh.layer is 2"),
        (lambda: Config(model=SMALL, lora=lora, train=TrainConfig(init_from="base")), "linear_attn"),
        (lambda: prepare(LanguageModel(config), params, parse_schedule("seq", 4), mesh=mesh), "layer=2"),
    ):
        with pytest.raises(InputError, match=keyword):
            make()
