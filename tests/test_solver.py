"""Theorems about the solver on small chains of layers: when it is exact, and what each part equals."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import (
    CHAINS,
    DIAGONAL,
    EXACT,
    HALF,
    HYPER,
    IDENTITY,
    ITERATIONS,
    JACOBI,
    NUM_LAYERS,
    SCALED,
    TRUSTED,
    bent_streams,
    error,
    listed,
    nonlinear,
    pair,
    posed,
    relative_error,
    scaled_translation,
    translation,
    true_trace,
)

from snlp_jax.solver import (
    BatchForward,
    Correction,
    Diagonal,
    Exact,
    HyperConnection,
    Identity,
    Jacobi,
    PrefixState,
    ScaledIdentity,
    Warm,
    relative_norm,
    safe_norm,
    sequential,
    solve,
)

ALL = (JACOBI, IDENTITY, SCALED, HALF, TRUSTED, DIAGONAL, HYPER, EXACT)
SETTINGS = (
    *ALL,
    ScaledIdentity(damping=0.25, trust=0.5),
    HyperConnection(damping=0.5),
    Diagonal(damping=0.5, trust=1.0, num_probes=2),
    Diagonal(mode="vjp"),
    Diagonal(mode="finite_difference", reuse=True),
    Exact(damping=0.5),
)
"""Every correction, damped and held back in some way."""
SCAN_LENGTH = 6
"""More than four iterations, which the solver does not unroll."""
INITS = (PrefixState(), BatchForward(), Warm())


def name_of(correction):
    defaults = type(correction)()
    fields = (field.name for field in dataclasses.fields(correction))
    changed = {
        name: getattr(correction, name) for name in fields if getattr(correction, name) != getattr(defaults, name)
    }
    return "-".join([type(correction).__name__, *(f"{name}={value}" for name, value in changed.items())])


def from_trace(problem, h_L):
    return dataclasses.replace(problem, warm_L=h_L)


def random_trace(problem):
    rng = np.random.default_rng(9)
    draw = lambda leaf: jnp.asarray(rng.normal(size=(problem.num_layers, *leaf.shape)), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, problem.h_in)


def applicable(name, corrections):
    return [c for c in corrections if next(n for d, n in ITERATIONS[name].items() if type(d) is type(c)) is not None]


def iterates(problem, corrections, num_iters, h_L=None):
    """Traces before and after each of ``num_iters`` single iterations, of all corrections by one compiled program."""
    by_name = {name_of(correction): correction for correction in corrections}

    @jax.jit
    def step(traces):
        one = lambda c, h_L: solve(from_trace(posed(problem, c), h_L), c, num_iters=1, init=Warm()).trace  # noqa: E731
        return {name: one(by_name[name], trace) for name, trace in traces.items()}

    rows = [dict.fromkeys(by_name, PrefixState()(problem).h_L if h_L is None else h_L)]
    for _ in range(num_iters):
        rows.append(step(rows[-1]))
    return {correction: [row[name] for row in rows] for name, correction in by_name.items()}


@functools.cache
def runs(name):
    """N + 1 iterations from h0 of every correction that applies to the chain."""
    return iterates(CHAINS[name](), applicable(name, ALL), NUM_LAYERS + 1)


# ---------------------------------------------------------------- exactness


@pytest.mark.parametrize("name", CHAINS)
def test_iterations_to_the_sequential_trace(name):
    problem = CHAINS[name]()
    for correction, expected in ITERATIONS[name].items():
        if expected is None:
            with pytest.raises(ValueError, match="use (HyperConnection|ScaledIdentity)"):
                solve(problem, correction, num_iters=1, init=PrefixState())
            continue
        traces = runs(name)[correction]
        # Exact up to float32 rounding: 6e-8 an operation, a few dozen operations on a state of size one.
        assert error(traces[expected], problem) < 3e-6, correction
        # One iteration fewer is not enough: hundreds of times that.
        assert error(traces[expected - 1], problem) > 1e-3, correction


def test_every_correction_has_a_row_in_the_table():
    """All but Calibrated, whose maps are fitted first: tests/test_calibrated.py."""

    def final(cls):
        below = cls.__subclasses__()
        return {cls} if not below else set().union(*map(final, below))

    library = {cls for cls in final(Correction) if cls.__module__.startswith("snlp_jax.")}
    assert set(ITERATIONS) == set(CHAINS)
    for row in ITERATIONS.values():
        assert {type(correction) for correction in row} == {cls for cls in library if cls.__name__ != "Calibrated"}


@pytest.mark.parametrize("name", ("nonlinear", "affine", "pair", "bent_streams"))
def test_after_k_iterations_the_first_k_layers_are_exact(name):
    """Bit for bit the final values, which one more iteration keeps: the residual is exactly 0.0, not a rounding.

    And with nothing left to correct the surrogate does not show: all corrections end in the same bits.
    """
    final = []
    for correction, (*traces, one_more) in runs(name).items():
        if correction == EXACT:
            continue  # it settles sooner, and in other sums
        for num_iters, trace in enumerate(traces):
            first = lambda tree: jax.tree.map(lambda leaf: leaf[:num_iters], tree)  # noqa: B023, E731
            chex.assert_trees_all_equal(first(trace), first(traces[-1]))
        chex.assert_trees_all_equal(one_more, traces[-1])
        final.append(traces[-1])
    assert error(final[0], CHAINS[name]()) < 3e-6  # rounding of another compiled program: scan instead of vmap
    for trace in final[1:]:
        chex.assert_trees_all_equal(trace, final[0])


@functools.cache
def looped(name):
    """N + 1 iterations through the compiled loop, of every setting, from the trace it is given."""

    @jax.jit
    def run(params, h_in, h_L):
        here = from_trace(dataclasses.replace(CHAINS[name](), params=params, h_in=h_in), h_L)
        settings = {"num_iters": NUM_LAYERS + 1, "init": Warm(), "with_stats": True}
        return {name_of(c): solve(posed(here, c), c, **settings).stats for c in applicable(name, SETTINGS)}

    return run


@pytest.mark.parametrize("init", INITS, ids=lambda init: type(init).__name__)
@pytest.mark.parametrize("name", ("nonlinear", "bent_streams"))
def test_the_loop_ends_with_a_residual_of_exactly_zero(name, init):
    """K = N is exact for every correction, setting and initial trace: iteration k + 1 finds nothing to correct in the
    first k layers."""
    problem = from_trace(CHAINS[name](), random_trace(CHAINS[name]()))
    for setting, stats in looped(name)(problem.params, problem.h_in, init(problem).h_L).items():
        residual_norm = np.asarray(stats["residual_norm"])
        chex.assert_shape(residual_norm, (NUM_LAYERS + 1, NUM_LAYERS))
        settled = np.tril(np.ones((NUM_LAYERS + 1, NUM_LAYERS), bool), -1)
        np.testing.assert_array_equal(residual_norm[settled], 0.0, err_msg=setting)
        assert np.all(residual_norm[0] > 0) or isinstance(init, BatchForward)
        assert residual_norm[NUM_LAYERS - 2, -1] > 0 or setting == "Exact"


def test_an_initial_trace_is_all_that_an_init_gives():
    """So the test above, which hands the trace over, speaks of ``solve(init=...)``."""
    problem = from_trace(nonlinear(), random_trace(nonlinear()))
    for init in INITS:
        handed = from_trace(problem, init(problem).h_L)
        one = solve(problem, IDENTITY, num_iters=1, init=init).trace
        chex.assert_trees_all_equal(one, solve(handed, IDENTITY, num_iters=1, init=Warm()).trace)


def test_one_iteration_on_the_true_trace_returns_it():
    """The Warm trace of an exact pass stays exact."""
    problem = nonlinear()
    truth = true_trace(problem)
    for _, trace in iterates(problem, ALL, 1, jnp.asarray(truth)).values():
        np.testing.assert_allclose(trace, truth, rtol=1e-6, atol=1e-6)  # rounding of single against batched calls
    with pytest.raises(ValueError, match="the Warm initial trace needs problem.warm_L"):
        solve(problem, IDENTITY, num_iters=1, init=Warm())


def test_exact_converges_quadratically():
    """Newton's method: the next error is of the order of this error's square."""
    with jax.enable_x64(True):
        problem = dataclasses.replace(nonlinear(), **in_float64(nonlinear()))
        errors = [error(trace, problem) for trace in iterates(problem, [EXACT], 4)[EXACT]]
    assert errors[3] > 1e-4  # so that the last step has something to show
    for before, after in zip(errors[1:], errors[2:], strict=False):
        assert after < 10 * before**2  # the constant of a chain whose curvature is of order one


def in_float64(problem):
    widen = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)  # noqa: E731
    return {"params": widen(problem.params), "h_in": widen(problem.h_in)}


# ---------------------------------------------------------------- equalities


def test_num_iters_is_that_many_single_iterations():
    """Unrolled up to four, a scan from five on."""
    problem, corrections = nonlinear(8), (ScaledIdentity(damping=0.3), Exact(damping=0.3))
    counts = (1, 4, SCAN_LENGTH)

    @jax.jit
    def run():
        return [[solve(problem, c, num_iters=k, init=PrefixState()) for k in counts] for c in corrections]

    for expected, solutions in zip(iterates(problem, corrections, SCAN_LENGTH).values(), run(), strict=True):
        for num_iters, solution in zip(counts, solutions, strict=True):
            assert relative_error(solution.trace, expected[num_iters]) < 1e-5  # rounding, amplified by eight layers
            np.testing.assert_array_equal(solution.value, solution.trace[-1])
            if num_iters < SCAN_LENGTH:
                assert relative_error(solution.trace, expected[num_iters + 1]) > 1e-4


def test_tapped_states_are_rows_of_the_trace():
    @jax.jit
    def run():
        taps = (3, 0, NUM_LAYERS - 1)
        settings = {"num_iters": 2, "init": PrefixState(), "taps": taps}
        return [solve(pair(), correction, **settings) for correction in (SCALED, EXACT)]

    for solution in run():
        for tap, state in zip((3, 0, NUM_LAYERS - 1), solution.tapped, strict=True):
            chex.assert_trees_all_equal(state, jax.tree.map(lambda leaf: leaf[tap], solution.trace))  # noqa: B023


def test_batch_forward_is_one_jacobi_iteration():
    problem = pair()
    guess = BatchForward()(problem)
    chex.assert_trees_all_close(
        guess.h_L, solve(problem, JACOBI, num_iters=1, init=PrefixState()).trace, rtol=1e-6, atol=1e-6
    )  # rounding of y against y + 0 * d in another program
    chex.assert_trees_all_equal(guess.entering, problem.h_in)


def test_identity_at_one_iteration_is_the_sum_of_the_branches():
    """From h0: h'_l = h_in + sum over j <= l of (f_j(h_in) - h_in)."""
    problem = nonlinear()
    solution = solve(problem, IDENTITY, num_iters=1, init=PrefixState())
    branches = jnp.tanh(jnp.einsum("TD,LDE->LTE", problem.h_in, problem.params["w"]) + problem.params["c"][:, None])
    np.testing.assert_allclose(solution.aux["branch"], branches, rtol=1e-6, atol=1e-6)  # rounding of the products
    summed = problem.h_in[None] + jnp.cumsum(branches, axis=0)
    np.testing.assert_allclose(solution.trace, summed, rtol=1e-5, atol=1e-5)  # (h + b) - h loses the last bits of b


def test_full_damping_is_jacobi():
    full = [cls(damping=1.0) for cls in (Jacobi, Identity, ScaledIdentity, Diagonal, HyperConnection, Exact)]
    final = [traces[-1] for traces in iterates(scaled_translation(), full, 2).values()]
    for trace in final[1:]:
        np.testing.assert_allclose(trace, final[0], rtol=1e-6, atol=1e-6)  # rounding: y + 0 d is y


@pytest.mark.parametrize(
    "name, corrections",
    (
        ("nonlinear", (EXACT, IDENTITY, DIAGONAL)),
        ("pair", (EXACT, SCALED)),
        ("bent_streams", (HYPER,)),
    ),
)
def test_list_layout_is_stack_layout(name, corrections):
    problem = CHAINS[name]()
    unrolled = listed(problem)
    assert unrolled.is_unrolled and not problem.is_unrolled

    @jax.jit
    def run(*layouts):
        problems = [dataclasses.replace(problem, params=params) for params in layouts]
        settings = {"num_iters": 2, "init": BatchForward(), "with_stats": True}
        return [[solve(posed(p, c), c, **settings) for c in corrections] for p in problems]

    chex.assert_trees_all_close(*run(unrolled.params, problem.params), rtol=1e-5, atol=1e-5)  # batched, single products


@pytest.mark.parametrize("with_trace", (True, False))
@pytest.mark.parametrize("with_aux", (True, False))
def test_sequential_list_layout_is_stack_layout(with_trace, with_aux):
    problem = nonlinear()
    stacked = sequential(problem, with_trace=with_trace, with_aux=with_aux)
    unrolled = sequential(listed(problem), with_trace=with_trace, with_aux=with_aux)
    chex.assert_trees_all_close(unrolled, stacked, rtol=1e-6, atol=1e-6)  # rounding of scan against single calls
    assert (stacked.trace is not None) == with_trace and (stacked.aux is not None) == with_aux
    if with_trace:
        np.testing.assert_array_equal(stacked.trace[-1], stacked.value)
    if with_aux:
        chex.assert_shape(stacked.aux["branch"], (NUM_LAYERS, *problem.h_in.shape))


def test_a_region_of_one_layer_is_that_layer():
    problem = nonlinear(num_layers=1)
    value = sequential(problem).value
    for _, trace in iterates(problem, SETTINGS, 1).values():
        np.testing.assert_allclose(trace[-1], value, rtol=1e-6, atol=1e-6)  # rounding of scan


def test_a_sweep_fn_is_used_in_place_of_vmap():
    problem = nonlinear()
    marked = dataclasses.replace(problem, sweep_fn=lambda params, x_L, ctx, shared: (jnp.zeros_like(x_L), "marked"))
    y_L, aux = marked.sweep(PrefixState()(problem).h_L)
    assert aux == "marked" and not y_L.any()


# ---------------------------------------------------------------- gradients


def loss_of(problem, run):
    """A scalar of the solution's trace, as a function of parameters and of the entering state."""

    def loss(params, h_in):
        trace = run(dataclasses.replace(problem, params=params, h_in=h_in))
        return jnp.sum(jnp.sin(3.0 * trace) * jnp.arange(1.0, 1.0 + trace.shape[0])[:, None, None])

    return loss


def solved(correction, num_iters, init):
    return lambda problem: solve(posed(problem, correction), correction, num_iters=num_iters, init=init).trace


def test_gradients_through_solve_are_finite_differences():
    """Of every correction, in reverse mode, along a random direction of all parameters and of the entering state."""
    chains = (nonlinear(3), bent_scales(3), bent_streams(3))
    cases = (
        (0, JACOBI, 2, BatchForward()),
        (0, HALF, 2, PrefixState()),
        (0, TRUSTED, 2, PrefixState()),
        (0, DIAGONAL, 2, PrefixState()),
        (0, Diagonal(mode="vjp", trust=0.5, reuse=True), 2, PrefixState()),
        (0, EXACT, 2, PrefixState()),
        (1, SCALED, SCAN_LENGTH, BatchForward()),
        (2, HyperConnection(damping=0.3), 2, PrefixState()),
    )
    with jax.enable_x64(True):
        problems = [dataclasses.replace(chain, **in_float64(chain)) for chain in chains]
        point = [(problem.params, problem.h_in) for problem in problems]

        @jax.jit
        def values_and_gradients(point):
            losses = ((index, loss_of(problems[index], solved(*setting))) for index, *setting in cases)
            return [jax.value_and_grad(loss, argnums=(0, 1))(*point[index]) for index, loss in losses]

        rng = np.random.default_rng(0)
        direction = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), point)
        move = lambda step: jax.tree.map(lambda leaf, d: leaf + step * d, point, direction)  # noqa: E731
        step = 1e-5
        here, after, before = (values_and_gradients(move(by)) for by in (0.0, step, -step))
        for (index, *setting), (_, gradient), (up, _), (down, _) in zip(cases, here, after, before, strict=True):
            along = zip(jax.tree.leaves(gradient), jax.tree.leaves(direction[index]), strict=True)
            slope = sum(jnp.vdot(*leaves) for leaves in along)
            assert abs(slope) > 1.0, setting
            # A central difference errs by step**2 times the third derivative, which reaches hundreds here: about 1e-7.
            np.testing.assert_allclose(slope, (up - down) / (2 * step), rtol=1e-6, err_msg=str(setting))


def bent_scales(num_layers):
    """``h -> s_l h + tanh(h W_l + c_l)``."""
    chain = nonlinear(num_layers)

    def block(params, h, ctx, shared):
        return params["s"] * h + jnp.tanh(h @ params["w"] + params["c"][None]), ()

    params = chain.params | {"s": jnp.linspace(0.6, 1.3, num_layers)}
    return dataclasses.replace(chain, block_fn=block, params=params, residual_map=lambda params, ctx, aux: params["s"])


def test_the_gradient_at_n_iterations_is_the_sequential_one():
    """The two are the same function of the parameters, so all that the surrogate adds must cancel."""
    problem = nonlinear()
    corrections = (IDENTITY, DIAGONAL, EXACT)

    @jax.jit
    def gradients(params, h_in):
        runs = [lambda problem: sequential(problem, with_trace=True).trace]
        runs += [solved(correction, NUM_LAYERS, PrefixState()) for correction in corrections]
        return [jax.grad(loss_of(problem, run), argnums=(0, 1))(params, h_in) for run in runs]

    expected, *actual = gradients(problem.params, problem.h_in)
    for gradient in actual:
        for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
            # Float32: what cancels is up to a hundred times as large as what is left.
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * np.abs(other).max())


def test_safe_norm_is_the_norm_with_gradient_zero_at_zero():
    x = jnp.asarray([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(safe_norm(x), [5.0, 0.0], rtol=1e-7)  # a correctly rounded root
    gradient = jax.grad(lambda x: safe_norm(x).sum())(x)
    np.testing.assert_allclose(gradient, [[0.6, 0.8], [0.0, 0.0]], rtol=1e-6)  # one division


def test_relative_norm_is_a_mean_over_tokens_and_leaves():
    b = {"u": jnp.ones((2, 3, 4)), "v": jnp.full((2, 4), 2.0)}
    a = {"u": b["u"].at[1, 0].set(3.0), "v": b["v"] + 1.0}
    # Leaf u: one token of three is off by twice its norm in layer 1; leaf v: half its norm in both layers.
    np.testing.assert_allclose(relative_norm(a, b), [0.25, (2 / 3 + 0.5) / 2], rtol=1e-6)  # a few roundings


# ---------------------------------------------------------------- a tolerance


TOLERANCE = 0.05


def three_sequences():
    """Three sequences of two tokens, the larger the sooner solved: a layer whose tanh saturates is a translation."""

    def block(params, h, ctx, shared):
        branch = jnp.tanh(h @ params["w"] + params["c"][None, None])
        return h + branch, {"branch": branch}

    chain = nonlinear(8)
    draw = jnp.asarray(np.random.default_rng(3).normal(size=(3, 2, chain.h_in.shape[-1])), jnp.float32)
    h_in = draw * jnp.asarray([3.0, 12.0, 50.0])[:, None, None]
    return dataclasses.replace(chain, block_fn=block, h_in=h_in)


def adaptively(num_iters, corrections, h_in, tolerance=TOLERANCE):
    """Solutions of all corrections for the sequences ``h_in``."""
    problem = dataclasses.replace(three_sequences(), h_in=h_in)
    settings = {"num_iters": num_iters, "init": PrefixState(), "with_stats": True, "taps": (2,), "tolerance": tolerance}
    return [solve(problem, correction, **settings) for correction in corrections]


def test_with_a_tolerance_each_sequence_is_solved_as_if_alone():
    corrections = (IDENTITY, EXACT)
    h_in, run = three_sequences().h_in, jax.jit(functools.partial(adaptively, 8, corrections))
    fixed = iterates(three_sequences(), corrections, 8)
    together, alone = run(h_in), [run(h_in[b][None]) for b in range(3)]
    for correction, solution, *singles in zip(corrections, together, *alone, strict=True):
        made = solution.stats["sequence_iters"]
        assert len(set(made.tolist())) == 3
        assert solution.stats["num_iters"] == max(made) < 8
        changes = []
        for b, single in enumerate(singles):
            assert single.stats["num_iters"] == single.stats["sequence_iters"][0] == made[b]
            own = lambda tree, axis: jnp.take(tree, jnp.asarray([b]), axis)  # noqa: B023, E731
            mine = (own(solution.value, 0), own(solution.tapped[0], 0), own(solution.trace, 1))
            expected = own(fixed[correction][int(made[b])], 1)
            for state in (mine, (single.value, single.tapped[0], single.trace)):
                for part, row in zip(state, (expected[-1], expected[2], expected), strict=True):
                    np.testing.assert_allclose(part, row, rtol=1e-5, atol=1e-5)  # products of another batch size
            if made[b] < max(made):
                changes.append(relative_error(expected, own(fixed[correction][int(made[b]) + 1], 1)))
            # It stops after the first iteration that finds all its tokens' residuals below the tolerance.
            ratios = [worst_ratio(h_in[b], trace[:, b]) for trace in fixed[correction]]
            assert int(made[b]) == 1 + next(k for k, ratio in enumerate(ratios) if ratio < TOLERANCE)
        assert max(changes) > 1e-4  # what sequences that stop before the others are kept from


def worst_ratio(h_in, trace):
    """The largest relative residual of a sequence's layers and tokens, from its definition."""
    params = jax.tree.map(np.asarray, three_sequences().params)
    trace = np.asarray(trace)
    x_L = np.concatenate([np.asarray(h_in)[None], trace[:-1]])
    y_L = x_L + np.tanh(np.einsum("LTD,LDE->LTE", x_L, params["w"]) + params["c"][:, None])
    return np.max(np.linalg.norm(y_L - trace, axis=-1) / np.linalg.norm(trace, axis=-1))


def test_statistics_with_a_tolerance():
    """Iterations that were not made are NaN; those made while no sequence had stopped are the plain ones."""
    h_in = three_sequences().h_in
    plain, adaptive, strict = jax.jit(
        lambda h_in: [adaptively(8, (IDENTITY,), h_in, tolerance)[0] for tolerance in (0.0, TOLERANCE, 1e-30)]
    )(h_in)
    made, first = int(adaptive.stats["num_iters"]), int(adaptive.stats["sequence_iters"].min())
    actual, expected = (np.asarray(solution.stats["residual_norm"]) for solution in (adaptive, plain))
    np.testing.assert_allclose(actual[:first], expected[:first], rtol=1e-4, atol=1e-6)  # rounding of differences y - h
    assert np.isfinite(actual[:made]).all() and np.isnan(actual[made:]).all() and made < 8
    # So small a tolerance is met by a residual of exactly 0 alone, which only saturated sequences reach before N.
    assert strict.stats["num_iters"] == strict.stats["sequence_iters"][0] == 8
    chex.assert_trees_all_close(
        (strict.value, strict.trace, strict.aux, strict.tapped, strict.stats["residual_norm"]),
        (plain.value, plain.trace, plain.aux, plain.tapped, plain.stats["residual_norm"]),
        rtol=1e-5,
        atol=1e-5,  # rounding of another compiled loop
    )


@pytest.mark.parametrize("state", ("vector", "scalars"))
def test_a_state_without_a_batch_axis_is_one_sequence_and_ends_early_when_converged(state):
    def block(params, h, ctx, shared):
        return jax.tree.map(lambda leaf: params * leaf + 1.0, h), ()

    h_in = {"vector": jnp.ones(3), "scalars": {"a": jnp.ones(()), "b": jnp.full(2, 2.0)}}[state]
    problem = dataclasses.replace(
        translation(), block_fn=block, params=jnp.linspace(0.5, 1.5, NUM_LAYERS), h_in=h_in, residual_map=None
    )
    settings = {"num_iters": NUM_LAYERS, "tolerance": TOLERANCE}
    truth = sequential(problem, with_trace=True)
    solution = solve(problem, IDENTITY, init=PrefixState(), **settings)
    assert 1 < solution.stats["num_iters"] <= NUM_LAYERS
    chex.assert_trees_all_close(solution.value, truth.value, rtol=0.2)  # a few times the tolerance
    again = solve(from_trace(problem, truth.trace), IDENTITY, init=Warm(), **settings)
    assert again.stats["num_iters"] == again.stats["sequence_iters"][0] == 1
    chex.assert_trees_all_close(again.trace, truth.trace, rtol=1e-6)  # rounding of scan against vmap


# ---------------------------------------------------------------- refusals


def test_refusals():
    problem = translation()
    with pytest.raises(ValueError, match="num_iters is 0; a parallel region needs at least one iteration"):
        solve(problem, IDENTITY, num_iters=0, init=PrefixState())
    with pytest.raises(ValueError, match="a tolerance needs a state whose leaves share a batch axis"):
        solve(pair(), IDENTITY, num_iters=2, init=PrefixState(), tolerance=0.1)
    with pytest.raises(AssertionError, match="shape"):
        dataclasses.replace(problem, num_layers=NUM_LAYERS - 1)
    for damping in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="lies outside 0 to 1"):
            Identity(damping=damping)
