"""Theorems about the solver on small chains of layers: when it is exact, and what each part equals."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import (
    CHAINS,
    EXACT,
    HALF,
    IDENTITY,
    ITERATIONS,
    JACOBI,
    NUM_LAYERS,
    SCALED,
    Warm,
    error,
    listed,
    nonlinear,
    pair,
    relative_error,
    scaled_translation,
    translation,
    true_trace,
)

from snlp_jax.solver import (
    BatchForward,
    Correction,
    Exact,
    Identity,
    Jacobi,
    ParallelSegment,
    PrefixState,
    ScaledIdentity,
    Schedule,
    SequentialSegment,
    relative_norm,
    safe_norm,
    sequential,
    solve,
)

ALL = (JACOBI, IDENTITY, SCALED, HALF, EXACT)
CHEAP = (JACOBI, IDENTITY, SCALED, HALF)
SCAN_LENGTH = 6
"""More than four iterations, which the solver does not unroll."""


def name_of(correction):
    damping = f"-damped-{correction.damping}" if correction.damping else ""
    return type(correction).__name__ + damping


def iterates(problem, correction, num_iters, init=None):
    """Traces before and after each of ``num_iters`` single iterations of one compiled program."""
    step = jax.jit(lambda h_L: solve(problem, correction, num_iters=1, init=Warm(h_L)).trace)
    traces = [(init or PrefixState())(problem).h_L]
    for _ in range(num_iters):
        traces.append(step(traces[-1]))
    return traces


# ---------------------------------------------------------------- exactness


@pytest.mark.parametrize("correction", ALL, ids=name_of)
@pytest.mark.parametrize("name", CHAINS)
def test_iterations_to_the_sequential_trace(name, correction):
    problem, expected = CHAINS[name](), ITERATIONS[name][correction]
    errors = [error(trace, problem) for trace in iterates(problem, correction, expected)]
    # Exact up to float32 rounding: 6e-8 an operation, a few dozen operations on a state of size one.
    assert errors[expected] < 3e-6
    # One iteration fewer is not enough: hundreds of times that.
    assert errors[expected - 1] > 1e-3


def test_every_correction_has_a_row_in_the_table():
    def final(cls):
        below = cls.__subclasses__()
        return {cls} if not below else set().union(*map(final, below))

    library = {cls for cls in final(Correction) if cls.__module__.startswith("snlp_jax.")}
    assert set(ITERATIONS) == set(CHAINS)
    for row in ITERATIONS.values():
        assert {type(correction) for correction in row} == library


@pytest.mark.parametrize("correction", CHEAP, ids=name_of)
@pytest.mark.parametrize("name", ("nonlinear", "affine", "pair"))
def test_after_k_iterations_the_first_k_layers_are_exact(name, correction):
    """Bit for bit the final values, which one more iteration keeps: the residual is exactly 0.0, not a rounding."""
    problem = CHAINS[name]()
    *traces, one_more = iterates(problem, correction, NUM_LAYERS + 1)
    for num_iters, trace in enumerate(traces):
        first = lambda tree: jax.tree.map(lambda leaf: leaf[:num_iters], tree)  # noqa: B023, E731
        chex.assert_trees_all_equal(first(trace), first(traces[-1]))
    chex.assert_trees_all_equal(one_more, traces[-1])
    assert error(traces[-1], problem) < 3e-6  # rounding of another compiled program: scan instead of vmap


@pytest.mark.parametrize("name", ("nonlinear", "affine", "pair"))
def test_all_corrections_agree_after_n_iterations(name):
    """Bit for bit: with nothing left to correct, the surrogate does not show."""
    problem = CHAINS[name]()
    final = [iterates(problem, correction, NUM_LAYERS)[-1] for correction in CHEAP]
    for trace in final[1:]:
        chex.assert_trees_all_equal(trace, final[0])


@pytest.mark.parametrize("init", (PrefixState(), BatchForward()), ids=lambda init: type(init).__name__)
def test_the_loop_ends_with_a_residual_of_exactly_zero(init):
    """Through the compiled loop itself: iteration k + 1 finds nothing to correct in the first k layers."""
    problem = nonlinear()

    @jax.jit
    def run(params, h_in):
        here = dataclasses.replace(problem, params=params, h_in=h_in)
        settings = {"num_iters": NUM_LAYERS + 1, "init": init, "with_stats": True}
        return {name_of(c): solve(here, c, **settings).stats["residual_norm"] for c in CHEAP}

    for residual_norm in run(problem.params, problem.h_in).values():
        chex.assert_shape(residual_norm, (NUM_LAYERS + 1, NUM_LAYERS))
        settled = np.tril(np.ones((NUM_LAYERS + 1, NUM_LAYERS), bool), -1)
        np.testing.assert_array_equal(residual_norm[settled], 0.0)
        assert np.all(residual_norm[0] > 0) or isinstance(init, BatchForward)
        assert residual_norm[NUM_LAYERS - 2, -1] > 0


def test_one_iteration_on_the_true_trace_returns_it():
    problem = nonlinear()
    truth = true_trace(problem)
    for correction in ALL:
        trace = iterates(problem, correction, 1, Warm(truth))[-1]
        np.testing.assert_allclose(trace, truth, rtol=1e-6, atol=1e-6)  # rounding of single against batched calls


def test_exact_converges_quadratically():
    """Newton's method: the next error is of the order of this error's square."""
    with jax.enable_x64(True):
        problem = dataclasses.replace(nonlinear(), **in_float64(nonlinear()))
        errors = [error(trace, problem) for trace in iterates(problem, EXACT, 4)]
    assert errors[3] > 1e-4  # so that the last step has something to show
    for before, after in zip(errors[1:], errors[2:], strict=False):
        assert after < 10 * before**2  # the constant of a chain whose curvature is of order one


def in_float64(problem):
    widen = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)  # noqa: E731
    return {"params": widen(problem.params), "h_in": widen(problem.h_in)}


# ---------------------------------------------------------------- equalities


@pytest.mark.parametrize("correction", (SCALED, EXACT), ids=name_of)
def test_num_iters_is_that_many_single_iterations(correction):
    """Unrolled up to four, a scan from five on."""
    problem, correction = nonlinear(8), dataclasses.replace(correction, damping=0.3)
    expected = iterates(problem, correction, SCAN_LENGTH)
    for num_iters in (1, 4, SCAN_LENGTH):
        run = jax.jit(lambda: solve(problem, correction, num_iters=num_iters, init=PrefixState()))  # noqa: B023
        solution = run()
        assert relative_error(solution.trace, expected[num_iters]) < 1e-5  # rounding, amplified by eight layers
        np.testing.assert_array_equal(solution.value, solution.trace[-1])
        if num_iters < SCAN_LENGTH:
            assert relative_error(solution.trace, expected[num_iters + 1]) > 1e-4


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


@pytest.mark.parametrize("correction", (Identity(damping=1.0), ScaledIdentity(damping=1.0), Exact(damping=1.0)))
def test_full_damping_is_jacobi(correction):
    problem = scaled_translation()
    expected = solve(problem, Jacobi(), num_iters=2, init=PrefixState()).trace
    actual = solve(problem, correction, num_iters=2, init=PrefixState()).trace
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)  # rounding: y + 0 d is y


@pytest.mark.parametrize(
    "name, correction", (("nonlinear", EXACT), ("nonlinear", IDENTITY), ("pair", EXACT), ("pair", SCALED))
)
def test_list_layout_is_stack_layout(name, correction):
    problem = CHAINS[name]()
    unrolled = listed(problem)
    assert unrolled.is_unrolled and not problem.is_unrolled

    @jax.jit
    def run(*layouts):
        problems = (dataclasses.replace(problem, params=params) for params in layouts)
        return [solve(p, correction, num_iters=2, init=BatchForward(), with_stats=True) for p in problems]

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


@pytest.mark.parametrize("correction", ALL, ids=name_of)
def test_a_region_of_one_layer_is_that_layer(correction):
    problem = nonlinear(num_layers=1)
    value = solve(problem, correction, num_iters=1, init=PrefixState()).value
    np.testing.assert_allclose(value, sequential(problem).value, rtol=1e-6, atol=1e-6)  # rounding of scan


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
    return lambda problem: solve(problem, correction, num_iters=num_iters, init=init).trace


@pytest.mark.parametrize(
    "correction, num_iters, init",
    (
        (IDENTITY, 2, PrefixState()),
        (SCALED, SCAN_LENGTH, BatchForward()),
        (JACOBI, 2, BatchForward()),
        (EXACT, 2, PrefixState()),
    ),
    ids=lambda value: name_of(value) if isinstance(value, Correction) else None,
)
def test_gradients_through_solve_are_finite_differences(correction, num_iters, init):
    with jax.enable_x64(True):
        problem = dataclasses.replace(nonlinear(8), **in_float64(nonlinear(8)))
        both = jax.jit(jax.value_and_grad(loss_of(problem, solved(correction, num_iters, init)), argnums=(0, 1)))
        point = (problem.params, problem.h_in)
        _, gradient = both(*point)
        rng = np.random.default_rng(0)
        direction = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), point)
        move = lambda step: jax.tree.map(lambda leaf, d: leaf + step * d, point, direction)  # noqa: E731
        step = 1e-5
        difference = (both(*move(step))[0] - both(*move(-step))[0]) / (2 * step)
        slope = sum(jnp.vdot(*leaves) for leaves in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
        assert abs(slope) > 1.0
        # A central difference errs by step**2 times the third derivative, which reaches hundreds here: about 1e-7.
        np.testing.assert_allclose(slope, difference, rtol=1e-6)


@pytest.mark.parametrize("correction", (IDENTITY, EXACT), ids=name_of)
def test_the_gradient_at_n_iterations_is_the_sequential_one(correction):
    """The two are the same function of the parameters, so all that the surrogate adds must cancel."""
    problem = nonlinear()
    gradient = lambda run: jax.jit(jax.grad(loss_of(problem, run), argnums=(0, 1)))(problem.params, problem.h_in)  # noqa: E731
    expected = gradient(lambda problem: sequential(problem, with_trace=True).trace)
    actual = gradient(solved(correction, NUM_LAYERS, PrefixState()))
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
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


# ---------------------------------------------------------------- refusals


def test_refusals():
    problem = translation()
    sharded = dataclasses.replace(problem, axis_name="layer")
    with pytest.raises(ValueError, match="num_iters is 0; a parallel region needs at least one iteration"):
        solve(problem, IDENTITY, num_iters=0, init=PrefixState())
    with pytest.raises(ValueError, match="cannot be sharded over a layer axis"):
        EXACT(sharded, *(PrefixState()(problem).h_L,) * 2, problem.h_in)
    with pytest.raises(ValueError, match="sequential pass over layers that are sharded"):
        sequential(sharded)
    with pytest.raises(AssertionError, match="shape"):
        dataclasses.replace(problem, num_layers=NUM_LAYERS - 1)
    for damping in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="lies outside 0 to 1"):
            Identity(damping=damping)
    with pytest.raises(ValueError, match="k=0: a parallel region needs at least one iteration"):
        ParallelSegment(0, 2, 0, IDENTITY)


# ---------------------------------------------------------------- schedules


def last(num_layers, n, num_iters, correction=IDENTITY, init=None):
    return ParallelSegment(num_layers - n, num_layers, num_iters, correction, init or PrefixState())


def test_schedule_counts_dependent_and_total_evaluations():
    """The published setting: 24 of 32 layers in two iterations has a critical path of ten blocks."""
    assert Schedule.of(32).depth == Schedule.of(32).num_block_evals == 32 and Schedule.of(32).is_sequential
    schedule = Schedule.of(32, last(32, 24, 2))
    assert (schedule.depth, schedule.num_block_evals, schedule.is_sequential) == (10, 8 + 2 * 24, False)
    schedule = Schedule.of(32, last(32, 24, 2, init=BatchForward()))
    assert (schedule.depth, schedule.num_block_evals) == (11, 8 + 3 * 24)
    # Exact substitutes forward through N JVPs in every iteration.
    schedule = Schedule.of(32, last(32, 8, 2, EXACT))
    assert (schedule.depth, schedule.num_block_evals) == (24 + 2 * (1 + 8), 24 + 2 * (8 + 8))
    pairs = Schedule.of(6, *(ParallelSegment(i, i + 2, 1, IDENTITY) for i in (4, 0, 2)))
    assert (pairs.depth, pairs.num_block_evals) == (3, 6)


def test_schedule_fills_the_gaps_in_order():
    late, early = ParallelSegment(6, 8, 2, IDENTITY), ParallelSegment(1, 4, 1, SCALED)
    schedule = Schedule.of(10, late, early)
    expected = (SequentialSegment(0, 1), early, SequentialSegment(4, 6), late, SequentialSegment(8, 10))
    assert schedule.segments == expected
    assert Schedule.of(3, ParallelSegment(0, 3, 1, JACOBI)).segments == (ParallelSegment(0, 3, 1, JACOBI),)


@pytest.mark.parametrize(
    "regions, message",
    (
        ([(2, 2)], "region 2-2 is empty or outside the model, whose layers are 0-8."),
        ([(5, 3)], "region 5-3 is empty"),
        ([(-1, 3)], "region -1-3 is empty or outside"),
        ([(4, 9)], "region 4-9 is empty or outside"),
        ([(0, 4), (3, 6)], "region 3-6 overlaps the region before it, which ends at layer 4."),
    ),
)
def test_schedule_refuses(regions, message):
    with pytest.raises(ValueError, match=message):
        Schedule.of(8, *(ParallelSegment(start, stop, 1, IDENTITY) for start, stop in regions))
