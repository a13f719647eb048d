"""The Transformer under a schedule: exactness for every variant of the model, regions anywhere, causality."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import SMALL, VARIANTS, random_params, random_tokens, relative_error

from snlp_jax.chains import chains_of, method_data
from snlp_jax.config import MeshConfig
from snlp_jax.errors import InputError
from snlp_jax.forward import forward
from snlp_jax.layout import canonical, prepare, split
from snlp_jax.model import LanguageModel
from snlp_jax.notation import parse_schedule
from snlp_jax.parallel import make_mesh
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
    MethodData,
    ParallelSegment,
    PerLayer,
    PrefixState,
    ScaledIdentity,
    Schedule,
    TrustRegion,
    Warm,
    sequential,
    solve,
)
from snlp_jax.solver.linear import shift

ROUNDING = 2e-5
"""Relative to the largest entry: float32 rounding (6e-8 an operation) of scans and single layers against products
batched over layers, grown by six layers that each amplify a little."""
NUM_LAYERS = SMALL.num_layers


def corrections_of(config):
    """Every correction that the solver runs in parallel and that fits the model's residual path."""
    skip = HyperConnection() if config.num_streams else ScaledIdentity()
    trust = TrustRegion(0.0, Identity(), 0.5)
    return Jacobi(), Identity(), skip, trust, Calibrated(), Diagonal(mode="vjp")


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


def run_all(model, params, tokens, *cases):
    """Outputs of several cases ``(setting, layout)``, or settings of stacks, out of one compiled program."""
    cases = [case if isinstance(case, tuple) else (case, "stack") for case in cases]
    weights = [
        prepare(model, params, parse_schedule(setting, model.config.num_layers), num_tokens=tokens.size, layout=layout)
        for setting, layout in cases
    ]
    run = jax.jit(lambda weights, tokens: [forward(model, w, tokens, with_stats=True) for w in weights])
    return run(weights, tokens)


@pytest.fixture(scope="module")
def small():
    """The model with every feature: ``(model, params, tokens, the sequential pass)``."""
    model = LanguageModel(SMALL)
    params, tokens = random_params(model), random_tokens(SMALL, length=8)
    return model, params, tokens, run_all(model, params, tokens, "seq")[0]


# ---------------------------------------------------------------- the region of all layers, every variant


def whole_region(model, params, tokens, segment=None):
    """The chain of all layers, as ``forward`` builds it, and what its methods read."""
    segment = segment or ParallelSegment(0, model.config.num_layers, 1, Identity())
    weights = split(model, params, Schedule.of(model.config.num_layers, segment))
    x0 = model.embed(weights.embed_head, tokens)
    shared, (part,) = model.shared(x0), weights.parts
    (chain,) = chains_of(model, weights.embed_head, part, tokens, shared, model.expand(x0))
    return chain, method_data(part, shared, chain)


INITS = PrefixState(), BatchForward(), CalibratedInit()


@pytest.mark.parametrize(
    "variant, stage",
    (
        ("everything", PerLayer()),
        ("hyper_dynamic", PerLayer()),
        *(
            pytest.param(variant, PerLayer(), marks=pytest.mark.slow)
            for variant in ("plain", "no_x0_resid", "no_value_embeds", "no_qk_norm", "no_smear_no_mid", "hyper_static")
        ),
        # Chunks of one layer are layers, for all of it. Layers whose maps depend on the token cannot be fused.
        pytest.param("everything", Chunkwise(NUM_LAYERS), marks=pytest.mark.slow),
        pytest.param("hyper_static", Chunkwise(NUM_LAYERS), marks=pytest.mark.slow),
    ),
)
def test_theorems_of_every_variant(variant, stage):
    """One compiled program per variant iterates from every initial trace under every correction."""
    model = LanguageModel(VARIANTS[variant])
    params, tokens = random_params(model), random_tokens(model.config, length=8)
    corrections = corrections_of(model.config)
    data = MethodData(any_calibration(model.config))

    @jax.jit
    def run(params, tokens, data):
        """The sequential pass, the layers at its trace, and traces [N + 1, corrections, inits, N, ...]."""
        chain, _ = whole_region(model, params, tokens, ParallelSegment(0, NUM_LAYERS, 1, Identity(), stage=stage))
        layers = whole_region(model, params, tokens)[0] if isinstance(stage, Chunkwise) else chain
        truth = sequential(chain, with_trace=True, with_aux=True)
        x_L = shift(truth.trace, chain.h_in)
        by_vmap = jax.vmap(chain.fns.block, in_axes=(0, 0, 0, None))(chain.stack(), x_L, chain.ctx, chain.shared)
        guesses = jnp.stack([init(chain, data).h_L for init in INITS])

        def advance(traces, index):
            x = jax.vmap(jax.vmap(lambda h_L: shift(h_L, chain.h_in)))(traces)
            y, aux = jax.vmap(jax.vmap(chain.sweep))(x)

            def correct(correction, *parts):
                def one(x_L, y_L, aux_L, h_L):
                    state = correction.start(chain, x_L, data)
                    return correction(chain, Iteration(index, x_L, y_L, aux_L, h_L, chain.h_in), state).h_L

                return jax.vmap(one)(*parts)

            rows = [jax.tree.map(lambda leaf: leaf[i], (x, y, aux, traces)) for i in range(len(corrections))]  # noqa: B023
            new = jnp.stack([correct(correction, *row) for correction, row in zip(corrections, rows, strict=True)])
            return new, new

        start = jnp.broadcast_to(guesses[None], (len(corrections), *guesses.shape))
        _, traces = jax.lax.scan(advance, start, jnp.arange(NUM_LAYERS + 1))
        in_order = sequential(layers, with_trace=True).trace
        return in_order, (truth.trace, truth.aux), chain.sweep(x_L), by_vmap, guesses, traces

    in_order, truth, swept, by_vmap, guesses, traces = jax.device_get(run(params, tokens, data))
    assert_close(truth[0], in_order)
    assert_close(swept, truth)  # a sweep of the true trace returns it, with the keys and values of the sequential pass
    assert_close(swept, by_vmap)
    # One Jacobi iteration from h0 evaluates every layer at the input, as BatchForward does; Identity adds up those
    # branches.
    jacobi, identity = traces[0, :2, 0]
    assert_close(jacobi, guesses[1])
    assert_close(identity, guesses[0] + np.cumsum(jacobi - guesses[0], axis=0))
    final = traces[NUM_LAYERS - 1, 0, 0]
    assert_close(final, truth[0])
    for k in range(1, NUM_LAYERS + 2):
        # The first k layers after k iterations, for any correction and initial trace, bit for bit the final ones; at N
        # all layers, and one more iteration changes nothing.
        settled = traces[k - 1, :, :, :k]
        np.testing.assert_array_equal(settled, np.broadcast_to(final[:k], settled.shape), err_msg=str(k))
    for trace in traces[NUM_LAYERS - 2, :, ::2].reshape(-1, *final.shape):  # BatchForward is one iteration ahead
        assert relative_error(trace, truth[0]) > 10 * ROUNDING  # and not sooner


# ---------------------------------------------------------------- stages


@pytest.mark.parametrize("variant", ("everything", pytest.param("hyper_static", marks=pytest.mark.slow)))
def test_chunks_of_one_layer_are_single_layers(variant):
    """C = N, M = 1, with either choice of scalars; and K = C iterations of larger chunks settle the fused model."""
    model = LanguageModel(VARIANTS[variant])
    params, tokens = random_params(model), random_tokens(model.config, length=8)
    skip, options = ("hcn", "") if model.config.num_streams else ("sid", ",scales=own,mid=interpolated")
    exact, single, chunked, *fused = run_all(
        model,
        params,
        tokens,
        "seq",
        "idn:n=6,k=2",
        f"idn:n=6,k=2,stage=6xF1{options}",
        *((f"{name}:n=6,k=3,stage=3xF2", "list") for name in ("idn", skip)),
    )
    assert_close(chunked[:3], single[:3])
    assert_close(chunked.solutions[0].trace, single.solutions[0].trace)
    assert_close(fused[0][:3], fused[1][:3])
    assert relative_error(fused[0].logits_BTV, exact.logits_BTV) > 0.01


def test_the_middle_of_a_fused_chunk_is_a_choice(small):
    """Layer 3 of 6 is the second of the chunk 2-5 of three layers: its output, its input, or 2/3 between them."""
    mids = ("output", "input", "interpolated")
    states = run_all(*small[:3], *(f"idn:2-5,k=1,stage=1xF3,mid={mid}" for mid in mids))
    after, before, between = (state.h_mid for state in states)
    np.testing.assert_array_equal(after, states[0].solutions[0].value)
    assert_close(between, before + 2 / 3 * (after - before))
    assert relative_error(before, after) > 0.01


def test_split_stage_is_one_iteration_without_scalars():
    """Without residual scalars all attentions of one iteration from h0 read the same input anyway."""
    model = LanguageModel(VARIANTS["no_x0_resid"])
    params, tokens = random_params(model), random_tokens(model.config, length=8)
    split_stage, single = run_all(model, params, tokens, "idn:n=4,k=1,stage=split", "idn:n=4,k=1")
    assert_close(split_stage[:3], single[:3])


# ---------------------------------------------------------------- controls and warm traces


def test_controls_leave_layers_out(small):
    """Skipped layers are the model without them; pairs are Identity on regions of two."""
    model, params, tokens, _ = small

    @jax.jit
    def without_two(params, tokens):
        h = mid = model.embed(params, tokens)
        shared = model.shared(h)
        for layer in (0, 1, 2, 5):
            ctx = model.context(params, params["blocks"], tokens, layer, layer + 1)
            block, ctx = jax.tree.map(lambda leaf: leaf[layer], params["blocks"]), jax.tree.map(lambda x: x[0], ctx)  # noqa: B023
            h, _ = model.block_fn()(block, h, ctx, shared)
            mid = h if layer == 2 else mid  # the head reads layer 3, which is left out: the state there
        return h, mid

    skipped, early, tail, pairs, regions = run_all(
        model, params, tokens, "skip:3-5", "exit:5", "skip:5-6", "pairs:n=4", "idn:2-4,k=1+idn:4-6,k=1"
    )
    assert_close((skipped.h_last, skipped.h_mid), without_two(params, tokens))
    assert_close(early[:3], tail[:3])
    assert_close(pairs[:3], regions[:3])


def test_warm_starts_from_the_previous_token(small):
    """The oracle's guess of layer l at token t is the exact state at t - 1; K = N is exact from it too."""
    model, params, tokens, truth = small
    segment = ParallelSegment(0, NUM_LAYERS, NUM_LAYERS, Identity(), Warm())

    @jax.jit
    def run(params, tokens):
        chain, data = whole_region(model, params, tokens, segment)
        solved = solve(chain, segment.correction, segment.init, data, num_iters=NUM_LAYERS)
        return chain.h_in, sequential(chain, with_trace=True).trace, data.warm_L, solved.value

    h_in, trace, warm_L, value = run(params, tokens)
    assert_close(warm_L[:, :, 1:], trace[:, :, :-1])
    np.testing.assert_array_equal(warm_L[:, :, 0], jnp.broadcast_to(h_in[None, :, 0], trace[:, :, 0].shape))
    assert_close(value, truth.h_last)


def test_adaptive_region_of_a_model(small):
    """A tolerance that nothing meets makes all iterations and ends exact; a loose one stops early."""
    exact, loose = run_all(*small[:3], "idn:n=6,tol=1e-30", "idn:n=6,tol=0.9")
    assert_close(exact[:3], small[3][:3])
    assert int(exact.solutions[0].stats["num_iters"]) == NUM_LAYERS
    assert np.all(loose.solutions[0].stats["sequence_iters"] < NUM_LAYERS)


def test_a_setting_that_the_model_cannot_run():
    for variant, setting, keyword in (
        ("everything", "hcn:n=2", "needs residual streams"),
        ("hyper_static", "sid:n=2", "single residual stream"),
        ("hyper_dynamic", "idn:n=4,stage=2xF2", "cannot be fused"),
        ("hyper_static", "idn:n=4,stage=split", "split stage"),
        ("everything", "cal:n=2,fit=absent", "absent"),
    ):
        model = LanguageModel(VARIANTS[variant])
        with pytest.raises(InputError, match=keyword):
            jax.eval_shape(
                lambda params: split(model, params, parse_schedule(setting, NUM_LAYERS)),  # noqa: B023
                model.abstract_params(),
            )


# ---------------------------------------------------------------- whole schedules


def test_the_residual_ends_at_exactly_zero(small):
    """In the compiled loop of a whole forward pass: 0.0, not a rounding, one iteration beyond N."""
    (output,) = run_all(*small[:3], "sid:n=6,k=7,init=batch_forward,damp=0.25")
    (solution,) = output.solutions
    chex.assert_shape(solution.stats["residual_norm"], (7, NUM_LAYERS))
    np.testing.assert_array_equal(solution.stats["residual_norm"][-1], 0.0)
    assert solution.stats["residual_norm"][NUM_LAYERS - 2, -1] > 0
    assert_close(output[:3], small[3][:3])


def test_regions_anywhere_with_n_iterations_are_the_sequential_pass(small):
    """In either layout; and where the solver is not exact both layouts are equal."""
    truth = small[3]
    cases = (
        ("seq", "list"),
        ("idn:2-5,k=3,init=batch_forward", "list"),  # from inside a region in the middle
        ("sid:0-2,k=2+idn:2-4,k=2+exact:5-6,k=1", "stack"),  # from the end of the second of three regions
    )
    # The mid-layer state, of layer 3, comes from the sequential prefix.
    *exact, stacked, unrolled = run_all(*small[:3], *cases, ("sid:n=2,k=1", "stack"), ("sid:n=2,k=1", "list"))
    assert_close(unrolled.h_mid, truth.h_mid)
    for (setting, _), output in zip(cases, exact, strict=True):
        assert_close(output[:3], truth[:3])
        assert len(output.solutions) == (0 if setting == "seq" else setting.count("+") + 1)
        for solution in output.solutions:
            chex.assert_tree_shape_prefix(solution.trace, (solution.stats["residual_norm"].shape[1], 2, 8))
    assert_close(unrolled[:3], stacked[:3])
    assert_close(unrolled.solutions[0].trace, stacked.solutions[0].trace)
    assert relative_error(stacked.logits_BTV, truth.logits_BTV) > 100 * ROUNDING


def test_a_model_of_one_layer():
    model = LanguageModel(dataclasses.replace(SMALL, num_layers=1))
    params, tokens = random_params(model), random_tokens(model.config, batch=1, length=6)
    region, exact = run_all(model, params, tokens, "idn:n=1,k=1", "seq")
    assert_close(region[:3], exact[:3])


def test_scaled_identity_is_exact_in_one_iteration_at_a_fresh_initialisation(small):
    """A fresh layer is ``h -> s_l h + m_l x0``: its branches end in zeros. Identity misses the scales."""
    model, params, tokens, _ = small
    blocks = params["blocks"]
    zeroed = {
        module: blocks[module] | {name: jnp.zeros_like(blocks[module][name])}
        for module, name in (("attn", "out"), ("mlp", "down"))
    }

    @jax.jit
    def traces(params):
        chain, _ = whole_region(model, params, tokens)
        corrections = (ScaledIdentity(), Identity(), Jacobi())
        solved = [solve(chain, correction, PrefixState(), num_iters=1).trace for correction in corrections]
        return sequential(chain, with_trace=True).trace, solved

    truth, (scaled, identity, jacobi) = traces(params | {"blocks": blocks | zeroed})
    assert_close(scaled, truth)
    assert relative_error(identity, truth) > 0.01 < relative_error(jacobi, truth)


# ---------------------------------------------------------------- layouts


def test_layouts_of_prepare(small):
    model, params, _, _ = small
    schedule = parse_schedule("idn:n=4,k=1", NUM_LAYERS)
    kinds = lambda weights: [isinstance(part.blocks, list) for part in weights.parts]  # noqa: E731
    lay_out = lambda num_tokens, layout: prepare(model, params, schedule, num_tokens=num_tokens, layout=layout)  # noqa: E731
    assert kinds(lay_out(8, "stack")) == [False, False] and kinds(lay_out(8, "list")) == [True, True]
    if jax.default_backend() == "cpu":
        assert kinds(lay_out(15, "auto")) == [True, False] and kinds(lay_out(16, "auto")) == [False, False]
        wide = LanguageModel(dataclasses.replace(SMALL, embed_dim=512))
        of_wide = lambda params: prepare(wide, params, schedule, num_tokens=1024)  # noqa: E731
        assert kinds(jax.eval_shape(of_wide, wide.abstract_params())) == [True, False]
    for layout in ("stack", "list"):
        weights = lay_out(8, layout)
        blocks = weights.parts[1].blocks
        first = blocks[0] if layout == "list" else jax.tree.map(lambda leaf: leaf[0], blocks)
        chex.assert_trees_all_equal(first, jax.tree.map(lambda leaf: leaf[2], params["blocks"]))
    with pytest.raises(InputError, match="mesh"):
        prepare(model, params, schedule, layout="list", mesh=make_mesh(MeshConfig(layer=2)))


TEN = (
    "seq",
    "idn:n=2,k=1",
    "sid:n=3,k=2",
    "jac:n=4,k=1",
    "diag:n=5,k=1",
    "exact:1-4,k=2",
    "idn:n=6,k=2,stage=3xF2",
    "idn:n=4,k=1,stage=2xF2",
    "idn:n=4,k=1,stage=split",
    "sid:0-2,k=1+idn:4-6,k=1",
)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="weights are views of one memory on a CPU alone")
def test_weights_of_many_schedules_hold_every_array_once(small):
    """All leaves lie in the canonical arrays; only scalars of a layer, whose rows are not aligned, are copied."""
    model, params, _, _ = small
    params = canonical(model, params)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    schedules = [parse_schedule(setting, NUM_LAYERS) for setting in TEN]
    weights = [
        prepare(model, params, schedule, layout=layout)
        for schedule in schedules
        for layout in ("auto", "stack", "list")
    ]
    leaves = jax.tree.leaves((params, weights))
    spans = sorted((leaf.unsafe_buffer_pointer(), leaf.unsafe_buffer_pointer() + leaf.nbytes) for leaf in leaves)
    distinct, end = 0, 0
    for first, stop in spans:
        distinct += max(stop - max(first, end), 0)
        end = max(end, stop)
    assert held <= distinct <= 1.05 * held
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(weights)) > 20 * held


def test_sequential_segments_end_where_the_head_reads_the_middle():
    model = LanguageModel(SMALL)

    def spans(setting):
        lay_out = lambda params: split(model, params, parse_schedule(setting, NUM_LAYERS))  # noqa: E731
        weights = jax.eval_shape(lay_out, model.abstract_params())
        return [(segment.start, segment.stop) for segment in weights.segments]

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

    gradient = jax.grad(loss)
    both = jax.jit(lambda params: (gradient(params, "seq", False), gradient(params, "sid:n=2,k=2", True)))
    expected, actual = both(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        assert np.abs(leaf).max() > 1e-3, path  # every parameter counts
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        # Float32: what the surrogate adds is as large as the gradient itself and must cancel.
        assert relative_error(one, other) < 1e-4


@pytest.mark.parametrize("setting, reach", (("seq", 2), ("idn:n=3,k=1", 1)))
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
            embed_head = weights.embed_head | {"embed": weights.embed_head["embed"] | tables}
            output = forward(model, dataclasses.replace(weights, embed_head=embed_head), tokens)
            mix = lambda x_BTD: jnp.sin(x_BTD).sum(-1)[0]  # noqa: E731
            return mix(output.logits_BTV), mix(output.h_mid)

        tables = {name: weights.embed_head["embed"][name] for name in ("token", "value")}
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
