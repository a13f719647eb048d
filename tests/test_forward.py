"""The Transformer under a schedule: exactness for every variant of the model, regions anywhere, causality."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import SMALL, VARIANTS, random_params, random_tokens, relative_error

from snlp_jax.errors import InputError
from snlp_jax.forward import forward, layer_problem
from snlp_jax.layout import Weights, prepare, split
from snlp_jax.model import LanguageModel
from snlp_jax.notation import parse_schedule
from snlp_jax.solver import (
    BatchForward,
    Calibrated,
    CalibratedInit,
    Calibration,
    Chunkwise,
    Diagonal,
    HyperConnection,
    Identity,
    Iteration,
    Jacobi,
    ParallelSegment,
    PerLayer,
    PrefixState,
    ScaledIdentity,
    Schedule,
    sequential,
    solve,
)
from snlp_jax.solver import Warm as LibraryWarm
from snlp_jax.solver.linear import shift

ROUNDING = 2e-5
"""Relative to the largest entry: float32 rounding (6e-8 an operation) of scans and single layers against products
batched over layers, grown by six layers that each amplify a little."""
NUM_LAYERS = SMALL.num_layers
CORRECTIONS = {"jac": Jacobi(), "idn": Identity(), "sid": ScaledIdentity()}


def corrections_of(config):
    """Every correction that the solver runs in parallel and that fits the model's residual path."""
    own = HyperConnection() if config.num_streams else ScaledIdentity()
    table = {"jac": Jacobi(), "idn": Identity(), "own": own, "trust": Identity(trust=0.5), "cal": Calibrated()}
    return table | {"diag": Diagonal(mode="vjp")}


def any_calibration(config, num_iters=3):
    """Numbers that were fitted to nothing: exactness must not depend on them."""
    rng = np.random.default_rng(5)
    draw = lambda *shape: jnp.asarray(0.3 * rng.normal(size=shape), jnp.float32)  # noqa: E731
    n, d = config.num_layers, config.embed_dim
    layers = {"scale": 1 + draw(n, num_iters), "core": draw(n, num_iters, 2, 2), "intercept": draw(n, num_iters, d)}
    init = {"init_scale": 1 + draw(n), "init_u": draw(n, d, 2), "init_v": draw(n, d, 2), "init_intercept": draw(n, d)}
    return Calibration(layers | init, {"u": draw(num_iters, d, 2), "v": draw(num_iters, d, 2)})


def assert_close(actual, desired):
    """Every leaf, relative to its own largest entry."""
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        assert relative_error(one, other) < ROUNDING


def run(model, params, tokens, setting, layout="stack", with_stats=True):
    schedule = parse_schedule(setting, model.config.num_layers)
    weights = prepare(model, params, schedule, num_tokens=tokens.size, layout=layout)
    return jax.jit(lambda w, t: forward(model, w, t, with_stats=with_stats))(weights, tokens)


@pytest.fixture(scope="module")
def small():
    """The model with every feature: ``(model, params, tokens, the sequential pass)``."""
    model = LanguageModel(SMALL)
    params, tokens = random_params(model), random_tokens(SMALL)
    return model, params, tokens, run(model, params, tokens, "seq")


# ---------------------------------------------------------------- the region of all layers, every variant


def whole_region(model, params, tokens, stage=None):
    """The problem of all layers, as ``forward`` builds it."""
    segment = ParallelSegment(0, model.config.num_layers, 1, Identity(), stage=stage or PerLayer())
    weights = split(model, params, Schedule.of(model.config.num_layers, segment))
    x0 = model.embed(weights.ends, tokens)
    return layer_problem(model, weights.ends, weights.blocks[0], tokens, model.shared(x0), segment, model.expand(x0))


SINGLE = {variant: (variant, PerLayer()) for variant in VARIANTS}
CHUNKS_OF_ONE = {
    f"{variant}-chunks": (variant, Chunkwise(NUM_LAYERS)) for variant in VARIANTS if variant != "hyper_dynamic"
}
"""Layers whose maps depend on the token cannot be fused."""


@pytest.mark.parametrize(
    "variant, stage",
    [pytest.param(*case, id=name) for name, case in SINGLE.items()]
    + [pytest.param(*case, id=name, marks=pytest.mark.slow) for name, case in CHUNKS_OF_ONE.items()],
)
def test_theorems_of_every_variant(variant, stage):
    """One compiled program per variant maps a trace to the next one under every correction. Chunks of one layer are
    layers, for all of it."""
    model = LanguageModel(VARIANTS[variant])
    params, tokens = random_params(model), random_tokens(model.config)
    corrections, calibration = corrections_of(model.config), any_calibration(model.config)

    def whole(params, tokens):
        return dataclasses.replace(whole_region(model, params, tokens, stage), calibration=calibration)

    @jax.jit
    def start(params, tokens):
        problem = whole(params, tokens)
        truth = (
            sequential(whole_region(model, params, tokens), with_trace=True).trace,
            sequential(problem, with_trace=True, with_aux=True),
        )
        by_vmap = dataclasses.replace(problem, sweep_fn=None).sweep(shift(truth[1].trace, problem.h_in))
        guesses = {"h0": PrefixState(), "batch_forward": BatchForward(), "cal": CalibratedInit()}
        return truth, by_vmap, {name: init(problem).h_L for name, init in guesses.items()}

    @jax.jit
    def step(params, tokens, traces, index):
        """The next trace of every correction: one evaluation of its own, corrected as iteration ``index``."""
        problem = whole(params, tokens)

        def correct(correction, h_L):
            x_L = shift(h_L, problem.h_in)
            y_L, aux_L = problem.sweep(x_L)
            return correction(problem, Iteration(index, x_L, y_L, aux_L, h_L, problem.h_in)).h_L, aux_L

        return {name: correct(corrections[name], h_L) for name, h_L in traces.items()}

    (layers, truth), by_vmap, guesses = start(params, tokens)
    assert_close(truth.trace, layers)
    for name, (trace, aux) in step(params, tokens, dict.fromkeys(corrections, truth.trace), NUM_LAYERS).items():
        assert_close(trace, truth.trace), name  # one iteration on the true trace returns it
        assert_close(aux, truth.aux)  # with the keys and values of the sequential pass
        assert_close((trace, aux), by_vmap)  # sweep_fn is vmap(block_fn)

    finals = []
    for init, h_L in guesses.items():
        after = [dict.fromkeys(corrections, h_L)]
        for index in range(NUM_LAYERS + 1):
            after.append({name: new[0] for name, new in step(params, tokens, after[-1], index).items()})
        if init == "h0":
            # One Jacobi iteration from h0 evaluates every layer at the input, as batch_forward does; Identity adds up
            # those branches.
            assert_close(after[1]["jac"], guesses["batch_forward"])
            assert_close(after[1]["idn"], h_L + jnp.cumsum(after[1]["jac"] - h_L, axis=0))
        final = after[NUM_LAYERS]["jac"]
        assert_close(final, truth.trace)
        for name in corrections:
            for num_iters, traces in enumerate(after):
                # The first k layers after k iterations, for any correction, bit for bit the final ones; at N all
                # layers, and one more iteration changes nothing.
                np.testing.assert_array_equal(traces[name][:num_iters], final[:num_iters], err_msg=f"{name} {init}")
            if init != "batch_forward":  # which is one iteration ahead
                assert relative_error(after[NUM_LAYERS - 1][name], truth.trace) > 10 * ROUNDING  # and not sooner
        finals.append(final)
    for final in finals:
        np.testing.assert_array_equal(final, finals[0])


# ---------------------------------------------------------------- stages


@pytest.mark.parametrize(
    "variant",
    ("everything", *(pytest.param(name, marks=pytest.mark.slow) for name in ("no_x0_resid", "hyper_static"))),
)
def test_chunks_of_one_layer_are_single_layers(variant):
    """C = N, M = 1, with either choice of scalars; and K = C iterations of larger chunks settle the fused model."""
    model = LanguageModel(VARIANTS[variant])
    params, tokens = random_params(model), random_tokens(model.config)
    single = run(model, params, tokens, "idn:n=6,k=2")
    own_scales = [] if model.config.num_streams else ["stage=6xF1,scales=own,mid=interpolated"]
    for stage in ["stage=6xF1", *own_scales]:
        chunked = run(model, params, tokens, f"idn:n=6,k=2,{stage}")
        assert_close(chunked[:3], single[:3])
        assert_close(chunked.solutions[0].trace, single.solutions[0].trace)
    own = "hcn" if model.config.num_streams else "sid"
    fused = [run(model, params, tokens, f"{name}:n=6,k=3,stage=3xF2", layout="list") for name in ("idn", own)]
    assert_close(fused[0][:3], fused[1][:3])
    assert relative_error(fused[0].logits_BTV, run(model, params, tokens, "seq").logits_BTV) > 0.01


def test_the_middle_of_a_fused_chunk_is_a_choice(small):
    """Layer 3 of 6 is the second of the chunk 2-5 of three layers: its output, its input, or 2/3 between them."""
    model, params, tokens, _ = small
    states = {
        mid: run(model, params, tokens, f"idn:2-5,k=1,stage=1xF3,mid={mid}")
        for mid in ("output", "input", "interpolated")
    }
    np.testing.assert_array_equal(states["output"].h_mid, states["output"].solutions[0].value)
    between = states["input"].h_mid + 2 / 3 * (states["output"].h_mid - states["input"].h_mid)
    assert_close(states["interpolated"].h_mid, between)
    assert relative_error(states["input"].h_mid, states["output"].h_mid) > 0.01


def test_split_stage_is_one_iteration_without_scalars():
    """Without residual scalars all attentions of one iteration from h0 read the same input anyway."""
    model = LanguageModel(VARIANTS["no_x0_resid"])
    params, tokens = random_params(model), random_tokens(model.config)
    split_stage, single = (run(model, params, tokens, f"idn:n=4,k=1{stage}") for stage in (",stage=split", ""))
    assert_close(split_stage[:3], single[:3])


# ---------------------------------------------------------------- controls and warm traces


def test_controls_leave_layers_out(small):
    """Skipped layers are the model without them; pairs are Identity on regions of two."""
    model, params, tokens, _ = small
    keep = np.asarray([0, 1, 2, 5])
    shorter = {**params, "blocks": jax.tree.map(lambda leaf: leaf[keep], params["blocks"])}
    skipped = run(model, params, tokens, "skip:3-5")
    h = mid = model.embed(params, tokens)
    shared = model.shared(h)
    for row, layer in enumerate(keep):
        ctx = model.context(params, params["blocks"], tokens, layer, layer + 1)
        take = lambda leaf: leaf[row]  # noqa: B023, E731
        h, _ = model.block_fn()(jax.tree.map(take, shorter["blocks"]), h, jax.tree.map(lambda x: x[0], ctx), shared)
        mid = h if layer == 2 else mid  # the head reads layer 3, which is left out: the state there
    assert_close((skipped.h_last, skipped.h_mid), (h, mid))
    early = run(model, params, tokens, "exit:5")
    assert_close(early[:3], run(model, params, tokens, "skip:5-6")[:3])
    pairs = run(model, params, tokens, "pairs:n=4")
    assert_close(pairs[:3], run(model, params, tokens, "idn:2-4,k=1+idn:4-6,k=1")[:3])


def test_warm_starts_from_the_previous_token(small):
    """The oracle's guess of layer l at token t is the exact state at t - 1; K = N is exact from it too."""
    model, params, tokens, truth = small
    segment = dataclasses.replace(ParallelSegment(0, NUM_LAYERS, 1, Identity()), init=LibraryWarm())
    weights = split(model, params, Schedule.of(NUM_LAYERS, segment))
    h_in = model.embed(params, tokens)
    problem = layer_problem(model, weights.ends, weights.blocks[0], tokens, model.shared(h_in), segment, h_in)
    trace = sequential(whole_region(model, params, tokens), with_trace=True).trace
    assert_close(problem.warm_L[:, :, 1:], trace[:, :, :-1])
    np.testing.assert_array_equal(problem.warm_L[:, :, 0], jnp.broadcast_to(h_in[None, :, 0], trace[:, :, 0].shape))
    assert_close(run(model, params, tokens, "idn:n=6,k=6,init=warm")[:3], truth[:3])


def test_adaptive_region_of_a_model(small):
    """A tolerance that nothing meets makes all iterations and ends exact; a loose one stops early."""
    model, params, tokens, truth = small
    exact = run(model, params, tokens, "idn:n=6,tol=1e-30")
    assert_close(exact[:3], truth[:3])
    assert int(exact.solutions[0].stats["num_iters"]) == NUM_LAYERS
    loose = run(model, params, tokens, "idn:n=6,tol=0.9")
    assert np.all(loose.solutions[0].stats["sequence_iters"] < NUM_LAYERS)


@pytest.mark.parametrize(
    "variant, setting, sentence",
    (
        ("everything", "hcn:n=2", "hcn needs residual streams"),
        ("hyper_static", "sid:n=2", "sid scales a single residual stream"),
        ("hyper_dynamic", "idn:n=4,stage=2xF2", "cannot be fused"),
        ("hyper_static", "idn:n=4,stage=split", "a split stage is for a single residual stream"),
        ("everything", "cal:n=2,fit=mine", "there is no calibration 'mine'"),
    ),
)
def test_a_setting_that_the_model_cannot_run(variant, setting, sentence):
    model = LanguageModel(VARIANTS[variant])
    with pytest.raises(InputError, match=sentence):
        split(model, random_params(model), parse_schedule(setting, NUM_LAYERS))


# ---------------------------------------------------------------- whole schedules


@pytest.mark.parametrize(
    "setting",
    (
        "jac:n=6,k=7",
        "sid:n=6,k=7,init=batch_forward,damp=0.25",
    ),
)
def test_the_residual_ends_at_exactly_zero(small, setting):
    """In the compiled loop of a whole forward pass: 0.0, not a rounding, one iteration beyond N."""
    model, params, tokens, truth = small
    output = run(model, params, tokens, setting)
    (solution,) = output.solutions
    chex.assert_shape(solution.stats["residual_norm"], (7, NUM_LAYERS))
    np.testing.assert_array_equal(solution.stats["residual_norm"][-1], 0.0)
    assert solution.stats["residual_norm"][NUM_LAYERS - 2, -1] > 0
    assert_close((output.logits_BTV, output.h_mid), (truth.logits_BTV, truth.h_mid))


@pytest.mark.parametrize(
    "setting, layout",
    (
        ("seq", "list"),
        ("idn:n=2,k=2", "stack"),  # the mid-layer state, of layer 3, comes from the sequential prefix
        ("idn:2-5,k=3,init=batch_forward", "list"),  # from inside a region in the middle
        ("sid:0-2,k=2+idn:2-4,k=2+exact:5-6,k=1", "stack"),  # from the end of the second of three regions
    ),
)
def test_regions_anywhere_with_n_iterations_are_the_sequential_pass(small, setting, layout):
    model, params, tokens, truth = small
    output = run(model, params, tokens, setting, layout)
    assert_close(output[:3], truth[:3])
    regions = 0 if setting == "seq" else setting.count("+") + 1
    assert len(output.solutions) == regions
    for solution in output.solutions:
        chex.assert_tree_shape_prefix(solution.trace, (solution.stats["residual_norm"].shape[1], 2, 20))


def test_list_layout_is_stack_layout_where_the_solver_is_not_exact(small):
    model, params, tokens, truth = small
    setting = "sid:3-6,k=1"
    stacked, unrolled = (run(model, params, tokens, setting, layout) for layout in ("stack", "list"))
    assert_close(unrolled, stacked)
    assert relative_error(stacked.logits_BTV, truth.logits_BTV) > 100 * ROUNDING


def test_a_model_of_one_layer():
    model = LanguageModel(dataclasses.replace(SMALL, num_layers=1))
    params, tokens = random_params(model), random_tokens(model.config, batch=1, length=6)
    output = run(model, params, tokens, "idn:n=1,k=1")
    assert_close(output[:3], run(model, params, tokens, "seq")[:3])


def test_scaled_identity_is_exact_in_one_iteration_at_a_fresh_initialisation():
    """A fresh layer is ``h -> s_l h + m_l x0``: its branches end in zeros. Identity misses the scales."""
    model = LanguageModel(SMALL)
    params, tokens = random_params(model), random_tokens(SMALL)
    for module, name in (("attn", "out"), ("mlp", "down")):
        params["blocks"][module][name] *= 0.0

    def traces(params):
        problem = whole_region(model, params, tokens)
        solved = {
            name: solve(problem, CORRECTIONS[name], num_iters=1, init=PrefixState()).trace for name in CORRECTIONS
        }
        return sequential(problem, with_trace=True).trace, solved

    truth, solved = jax.jit(traces)(params)
    assert_close(solved["sid"], truth)
    assert relative_error(solved["idn"], truth) > 0.01 < relative_error(solved["jac"], truth)


def test_layouts_of_prepare():
    model = LanguageModel(SMALL)
    params, schedule = random_params(model), parse_schedule("idn:n=4,k=1", NUM_LAYERS)
    kinds = lambda weights: [isinstance(blocks, list) for blocks in weights.blocks]  # noqa: E731
    lay_out = lambda num_tokens, layout: prepare(model, params, schedule, num_tokens=num_tokens, layout=layout)  # noqa: E731
    assert kinds(lay_out(8, "stack")) == [False, False] and kinds(lay_out(8, "list")) == [True, True]
    if jax.default_backend() == "cpu":
        assert kinds(lay_out(15, "auto")) == [True, False] and kinds(lay_out(16, "auto")) == [False, False]
        wide = LanguageModel(dataclasses.replace(SMALL, embed_dim=512))
        of_wide = lambda params: prepare(wide, params, schedule, num_tokens=1024)  # noqa: E731
        assert kinds(jax.eval_shape(of_wide, wide.abstract_params())) == [True, False]
    for layout in ("stack", "list"):
        weights = lay_out(8, layout)
        assert isinstance(weights, Weights) and len(jax.tree.leaves(weights)) > 0
        assert weights.num_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        first = weights.blocks[1][0] if layout == "list" else jax.tree.map(lambda leaf: leaf[0], weights.blocks[1])
        chex.assert_trees_all_equal(first, jax.tree.map(lambda leaf: leaf[2], params["blocks"]))


def test_sequential_segments_end_where_the_head_reads_the_middle():
    model = LanguageModel(SMALL)
    spans = lambda setting: [  # noqa: E731
        (segment.start, segment.stop)
        for segment in split(model, random_params(model), parse_schedule(setting, NUM_LAYERS)).segments
    ]
    assert spans("seq") == [(0, 4), (4, 6)]
    assert spans("idn:n=2,k=1") == [(0, 4), (4, 6)]
    assert spans("idn:n=1,k=1") == [(0, 4), (4, 5), (5, 6)]
    assert spans("idn:2-5,k=1") == [(0, 2), (2, 5), (5, 6)]


# ---------------------------------------------------------------- gradients


def test_the_gradient_at_n_iterations_is_the_sequential_one():
    """With respect to every parameter, through a region with the mid-layer tap in it, its blocks recomputed."""
    config = dataclasses.replace(SMALL, num_layers=3)
    params, tokens = random_params(LanguageModel(config)), random_tokens(config, batch=1, length=8)

    def loss(params, setting, remat):
        model = LanguageModel(dataclasses.replace(config, remat=remat))
        output = forward(model, split(model, params, parse_schedule(setting, 3)), tokens)
        return jnp.sum(jnp.sin(output.logits_BTV))

    run = jax.jit(jax.grad(loss), static_argnums=(1, 2))
    expected, actual = run(params, "seq", False), run(params, "sid:n=2,k=2", True)
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        assert np.abs(leaf).max() > 1e-3, path  # every parameter counts
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        # Float32: what the surrogate adds is as large as the gradient itself and must cancel.
        assert relative_error(one, other) < 1e-4


@pytest.mark.parametrize(
    "setting, reach", (("seq", 2), ("idn:n=3,k=1", 1), pytest.param("sid:n=3,k=2", 2, marks=pytest.mark.slow))
)
def test_causality_and_windows_by_gradient(setting, reach):
    """No logit depends on a later token, and a short layer reads ``window`` tokens back, in parallel regions too.

    The embedding of token s reaches the mid-layer state at t, behind two layers with a window of 2, iff 0 <= t - s <=
    2 * (layers that can follow each other) + 1 for the smear. One iteration from h0 evaluates both layers on the
    input: there is no second hop.
    """
    window, num_tokens = 2, 12
    config = dataclasses.replace(SMALL, num_layers=3, window_pattern="S", short_window=window)
    assert config.windows[:2] == (window, window) and config.mid_layer == 1
    model = LanguageModel(config)
    params = random_params(model)
    tokens = jnp.asarray(np.random.default_rng(0).permutation(config.vocab_size)[None, :num_tokens])  # all different
    weights = split(model, params, parse_schedule(setting, 3))

    @jax.jit
    def influence(weights):
        """[t, s]: largest derivative of the logits, and of the mid-layer state, at t by any embedding of token s."""

        def read(tables):
            embed = weights.ends["embed"] | tables
            output = forward(model, dataclasses.replace(weights, ends=weights.ends | {"embed": embed}), tokens)
            mix = lambda x_BTD: jnp.sin(x_BTD).sum(-1)[0]  # noqa: E731
            return mix(output.logits_BTV), mix(output.h_mid)

        tables = {name: weights.ends["embed"][name] for name in ("token", "value")}
        (_, middle), pull = jax.vjp(read, tables)
        eye, nothing = jnp.eye(num_tokens, dtype=middle.dtype), jnp.zeros(num_tokens, middle.dtype)
        # Row by row: batched over a dozen cotangents (jax.jacrev) the CPU's program reads memory it has not written
        # in about one compilation of eight (docs/log.md).
        of_logits = jax.lax.map(lambda row: pull((row, nothing))[0], eye)
        of_middle = jax.lax.map(lambda row: pull((nothing, row))[0], eye)

        def largest(jacobian):
            by_token = jnp.abs(jacobian["token"][:, tokens[0]]).max(-1)
            return jnp.maximum(by_token, jnp.abs(jacobian["value"][:, :, tokens[0]]).max((1, 3)))

        return largest(of_logits), largest(of_middle)

    on_logits, on_middle = map(np.asarray, influence(weights))
    distance = np.arange(num_tokens)[:, None] - np.arange(num_tokens)[None, :]
    # Exactly zero: masked weights are exactly zero. The last layer sees everything, so everything earlier counts.
    np.testing.assert_array_equal(on_logits > 0, distance >= 0)
    np.testing.assert_array_equal(on_middle > 0, (distance >= 0) & (distance <= reach * window + 1))
