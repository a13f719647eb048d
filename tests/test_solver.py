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
    WIDTH,
    bent_streams,
    listed,
    nonlinear,
    pair,
    posed,
    relative_error,
    translation,
    true_trace,
)

from snlp_jax.solver import (
    BatchAxes,
    BatchForward,
    Chain,
    Correction,
    Diagonal,
    Exact,
    HyperConnection,
    Identity,
    Jacobi,
    LayerFns,
    MethodData,
    PrefixState,
    Result,
    ScaledIdentity,
    TrustRegion,
    Wanted,
    Warm,
    relative_norm,
    safe_norm,
    sequential,
    solve,
    solve_until,
    with_affine,
)
from snlp_jax.solver.diagnostics import contraction
from snlp_jax.solver.linear import layer, shift, stack

ALL = (JACOBI, IDENTITY, SCALED, HALF, TRUSTED, DIAGONAL, HYPER, EXACT)
LOOPED = {
    "nonlinear": (
        Exact(damping=0.5),
        TrustRegion(0.25, SCALED, 0.5),
        TrustRegion(0.5, Diagonal(num_probes=2, mode="vjp"), 1.0),
        Diagonal(mode="finite_difference", reuse=True),
    ),
    "bent_streams": (HyperConnection(damping=0.5),),
}
"""Corrections damped and held back in some way."""
SCAN_LENGTH = 6
"""More than four iterations, which the solver does not unroll."""
STATS = Wanted(stats=True)


def random_trace(chain):
    rng = np.random.default_rng(9)
    draw = lambda leaf: jnp.asarray(rng.normal(size=(chain.num_nodes, *leaf.shape)), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, chain.h_in)


def applicable(name):
    return tuple(correction for correction, num_iters in ITERATIONS[name].items() if num_iters is not None)


@functools.partial(jax.jit, static_argnames="corrections")
def one_iteration(chain, traces, corrections):
    """What each correction makes of its own trace."""
    solved = lambda c, h_L: solve(posed(chain, c), c, Warm(), MethodData(warm_L=h_L), num_iters=1)  # noqa: E731
    return [solved(*pair).trace for pair in zip(corrections, traces, strict=True)]


def iterates(chain, corrections, num_iters, h_L=None):
    """Traces before and after each of ``num_iters`` single iterations, of all corrections by one compiled program."""
    rows = [[PrefixState()(chain).h_L if h_L is None else h_L] * len(corrections)]
    for _ in range(num_iters):
        rows.append(one_iteration(chain, rows[-1], corrections))
    return dict(zip(corrections, zip(*jax.device_get(rows), strict=True), strict=True))


chain_of = functools.cache(lambda name: CHAINS[name]())
exact_of = functools.cache(lambda name: jax.device_get(true_trace(chain_of(name))))


@functools.cache
def runs(name):
    """N + 1 iterations from h0 of every correction that applies to the chain."""
    return iterates(chain_of(name), applicable(name), NUM_LAYERS + 1)


def distance(trace, exact):
    return max(map(relative_error, jax.tree.leaves(trace), jax.tree.leaves(exact)))


# ---------------------------------------------------------------- exactness


@pytest.mark.parametrize("name", CHAINS)
def test_iterations_to_the_sequential_trace(name):
    chain, exact = chain_of(name), exact_of(name)
    for correction, expected in ITERATIONS[name].items():
        if expected is None:
            with pytest.raises(ValueError, match="use (HyperConnection|ScaledIdentity)"):
                jax.eval_shape(lambda c=correction: solve(chain, c, PrefixState(), num_iters=1))
            continue
        traces = runs(name)[correction]
        # Exact up to float32 rounding: 6e-8 an operation, a few dozen operations on a state of size one.
        assert distance(traces[expected], exact) < 3e-6, correction
        # One iteration fewer is not enough: hundreds of times that.
        assert distance(traces[expected - 1], exact) > 1e-3, correction


def test_every_correction_has_a_row_in_the_table():
    """All but Calibrated, whose maps are fitted first (tests/test_calibrated.py), and WithAffine (below)."""

    def final(cls):
        below = cls.__subclasses__()
        return {cls} if not below else set().union(*map(final, below))

    library = {cls for cls in final(Correction) if cls.__module__.startswith("snlp_jax.")}
    assert set(ITERATIONS) == set(CHAINS)
    for row in ITERATIONS.values():
        elsewhere = ("Calibrated", "WithAffine")
        assert {type(correction) for correction in row} == {c for c in library if c.__name__ not in elsewhere}


@pytest.mark.parametrize("name", ("nonlinear", "affine", "pair", "bent_streams"))
def test_after_k_iterations_the_first_k_layers_are_exact(name):
    """Bit for bit the final values, which one more iteration keeps: the residual is exactly 0.0, not a rounding.

    And with nothing left to correct the surrogate does not show: all corrections end in the same bits. Those of
    ``s a + u`` but for its rounding: some programs round once, with a fused multiply-add, others twice.
    """
    final = []
    for correction, (*traces, one_more) in runs(name).items():
        if correction == EXACT:
            continue  # it settles sooner, and in other sums
        for num_iters, trace in enumerate(traces):
            first = slice(num_iters)
            chex.assert_trees_all_equal(layer(trace, first), layer(traces[-1], first))
        chex.assert_trees_all_equal(one_more, traces[-1])
        final.append(traces[-1])
    for trace in final[1:]:
        chex.assert_trees_all_close(trace, final[0], rtol=0, atol=1e-6 if name == "pair" else 0)


@functools.partial(jax.jit, static_argnames="corrections")
def residuals_of_the_loop(chain, h_L, corrections):
    """Of N + 1 iterations through the compiled loop."""
    solved = lambda c: solve(  # noqa: E731
        posed(chain, c), c, Warm(), MethodData(warm_L=h_L), num_iters=NUM_LAYERS + 1, want=STATS
    )
    return [solved(correction).stats["residual_norm"] for correction in corrections]


@pytest.mark.parametrize("name", LOOPED)
def test_the_loop_ends_with_a_residual_of_exactly_zero(name):
    """K = N is exact for every correction, setting and initial trace: iteration k + 1 finds nothing to correct in the
    first k layers."""
    chain = chain_of(name)
    for h_L in (PrefixState()(chain).h_L, random_trace(chain)):
        for correction, residual_norm in zip(
            LOOPED[name], residuals_of_the_loop(chain, h_L, LOOPED[name]), strict=True
        ):
            chex.assert_shape(residual_norm, (NUM_LAYERS + 1, NUM_LAYERS))
            settled = np.tril(np.ones((NUM_LAYERS + 1, NUM_LAYERS), bool), -1)
            np.testing.assert_array_equal(np.asarray(residual_norm)[settled], 0.0, err_msg=str(correction))
            assert np.all(residual_norm[0] > 0)
            assert residual_norm[NUM_LAYERS - 2, -1] > 0


def test_one_iteration_on_the_true_trace_returns_it():
    """The Warm trace of an exact pass stays exact."""
    exact = exact_of("nonlinear")
    for trace in one_iteration(chain_of("nonlinear"), [exact] * len(applicable("nonlinear")), applicable("nonlinear")):
        np.testing.assert_allclose(trace, exact, rtol=1e-6, atol=1e-6)  # rounding of single against batched calls


def test_exact_converges_quadratically():
    """Newton's method: the next error is of the order of this error's square."""
    with jax.enable_x64(True):
        chain = in_float64(nonlinear())
        exact = true_trace(chain)
        errors = [distance(trace, exact) for trace in iterates(chain, (EXACT,), 4)[EXACT]]
    assert errors[3] > 1e-4  # so that the last step has something to show
    for before, after in zip(errors[1:], errors[2:], strict=False):
        assert after < 10 * before**2  # the constant of a chain whose curvature is of order one


def in_float64(chain):
    widen = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)  # noqa: E731
    return dataclasses.replace(chain, params=widen(chain.params), h_in=widen(chain.h_in))


# ---------------------------------------------------------------- equalities


def test_num_iters_is_that_many_single_iterations():
    """Unrolled up to four, a scan from five on. Tapped states are rows of the trace, bit for bit."""
    chain, corrections, counts, taps = nonlinear(8), (ScaledIdentity(damping=0.3),), (3, SCAN_LENGTH), (3, 0, 7)

    @jax.jit
    def run(chain):
        return [[solve(chain, c, PrefixState(), num_iters=k, want=Wanted(taps)) for k in counts] for c in corrections]

    for expected, solutions in zip(iterates(chain, corrections, SCAN_LENGTH).values(), run(chain), strict=True):
        for num_iters, solution in zip(counts, solutions, strict=True):
            assert relative_error(solution.trace, expected[num_iters]) < 1e-5  # rounding, amplified by eight layers
            np.testing.assert_array_equal(solution.value, solution.trace[-1])
            np.testing.assert_array_equal(jnp.stack(solution.tapped), solution.trace[jnp.asarray(taps)])
            if num_iters < SCAN_LENGTH:
                assert relative_error(solution.trace, expected[num_iters + 1]) > 1e-4


def test_batch_forward_is_one_jacobi_iteration():
    guess = jax.jit(BatchForward())(chain_of("pair"))
    # Rounding of y against y + 0 * d in another program.
    chex.assert_trees_all_close(guess.h_L, runs("pair")[JACOBI][1], rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_equal(guess.entering, chain_of("pair").h_in)


def test_identity_at_one_iteration_is_the_sum_of_the_branches():
    """From h0: h'_l = h_in + sum over j <= l of (f_j(h_in) - h_in)."""
    h_in, params = jax.device_get((chain_of("nonlinear").h_in, chain_of("nonlinear").params))
    branches = np.tanh(np.einsum("TD,LDE->LTE", h_in, params["w"]) + params["c"][:, None])
    summed = h_in[None] + np.cumsum(branches, axis=0)
    # (h + b) - h loses the last bits of b.
    np.testing.assert_allclose(runs("nonlinear")[IDENTITY][1], summed, rtol=1e-5, atol=1e-5)


def test_full_damping_is_jacobi():
    """Of maps (tests/test_linear.py has them all), and of Exact, which has none."""
    full = tuple(cls(damping=1.0) for cls in (Jacobi, ScaledIdentity, Exact))
    chain = chain_of("scaled_translation")
    jacobi, *others = one_iteration(chain, [random_trace(chain)] * len(full), full)
    for trace in others:
        np.testing.assert_allclose(trace, jacobi, rtol=1e-6, atol=1e-6)  # rounding: y + 0 d is y


def stacked(solution):
    """With the aux of a list as a stack."""
    return solution._replace(aux=stack(solution.aux)) if isinstance(solution.aux, list) else solution


@pytest.mark.parametrize(
    "name, corrections", (("nonlinear", (EXACT,)), ("pair", (SCALED,)), ("bent_streams", (HYPER,)))
)
def test_list_layout_is_stack_layout(name, corrections):
    """And both are the plain loop where the nodes run in order. ``refreshed`` is what nodes leave behind at the new
    trace."""
    chain = chain_of(name)
    assert listed(chain).is_list and not chain.is_list

    @jax.jit
    def run(chain):
        kept = posed(chain, corrections[0])
        solved = [
            solve(posed(chain, c), c, BatchForward(), num_iters=1, want=Wanted(stats=True, aux="refreshed"))
            for c in corrections
        ]
        expected = [kept.sweep(shift(solution.trace, chain.h_in))[1] for solution in solved]
        in_order = sequential(chain, with_trace=True, with_aux=True, taps=(3, 0))
        return [stacked(solution) for solution in (in_order, *solved)], expected

    (in_order, *solved), expected = run(chain)
    assert distance(in_order.trace, exact_of(name)) < 3e-6  # rounding of scan against single calls
    chex.assert_trees_all_equal(in_order.value, layer(in_order.trace, -1))
    for tap, state in zip((3, 0), in_order.tapped, strict=True):
        chex.assert_trees_all_equal(state, layer(in_order.trace, tap))
    chex.assert_trees_all_close([solution.aux for solution in solved], expected, rtol=1e-6, atol=1e-6)  # two sweeps
    # Batched against single products.
    chex.assert_trees_all_close(run(listed(chain))[0], [in_order, *solved], rtol=1e-5, atol=1e-5)
    lean = jax.eval_shape(sequential, chain)
    assert lean.trace is None and lean.aux is None and lean.result is None


def test_a_region_of_one_layer_is_that_layer():
    chain, corrections = nonlinear(num_layers=1), (IDENTITY, EXACT)
    for trace in one_iteration(chain, [random_trace(chain)] * len(corrections), corrections):
        np.testing.assert_allclose(trace, true_trace(chain), rtol=1e-6, atol=1e-6)  # rounding of scan


def test_a_sweep_is_used_in_place_of_vmap():
    chain = chain_of("nonlinear")
    marked = lambda mark: lambda params, x_L, ctx, shared: (jnp.zeros_like(x_L), mark)  # noqa: E731
    marked = dataclasses.replace(chain, fns=chain.fns._replace(sweep=marked("sweep"), keep=marked("keep")))
    x_L = PrefixState()(chain).h_L
    y_L, aux = marked.sweep(x_L)
    assert aux == "sweep" and not y_L.any() and marked.left_behind(x_L) == "keep"


@pytest.mark.parametrize("num_iters, sweeps", ((1, 1), (4, 2), (SCAN_LENGTH, 2)))
def test_the_nodes_are_traced_once_for_all_iterations_but_the_last(num_iters, sweeps):
    """So a program of one iteration holds one evaluation, and no program grows with the iterations."""
    calls, chain = [], nonlinear()
    block = chain.fns.block

    def counting(*arguments):
        calls.append(1)
        return block(*arguments)

    counted = dataclasses.replace(chain, fns=LayerFns(counting))
    jax.make_jaxpr(lambda chain: solve(chain, IDENTITY, PrefixState(), num_iters=num_iters))(counted)
    assert len(calls) == sweeps


# ---------------------------------------------------------------- weights that several nodes share


def looped(rows):
    """Three rows of weights, read as ``rows`` says; nodes that share weights differ by their context."""

    def block(params, h, ctx, shared):
        branch = jnp.tanh(h @ params["w"] + params["c"][None] + ctx[None])
        return params["s"] * h + branch, {"branch": branch}

    chain = nonlinear(3)
    params = chain.params | {"s": jnp.asarray([0.8, 1.1, 0.9])}
    ctx = 0.3 * jnp.asarray(np.random.default_rng(2).normal(size=(len(rows), WIDTH)), jnp.float32)
    fns = LayerFns(block, skip=lambda params, ctx, aux: params["s"])
    return Chain.of(fns, params, chain.h_in, ctx=ctx, rows=rows)


ROWS = {"loops": (0, 1, 2) * 3, "irregular": (0, 2, 1, 1, 0), "part": (1, 2) * 2}


@pytest.mark.parametrize("name", ROWS)
def test_shared_weights_are_solved_as_the_plain_loop(name):
    """K = N: every layout, the oracle and the solver are the plain loop, and so are the gradients of the weights, which
    add up over the nodes that read them."""
    rows = ROWS[name]
    chain, num_nodes = looped(rows), len(rows)
    assert chain.num_loops == {"loops": 3, "part": 2, "irregular": 1}[name]
    solved = lambda correction: lambda chain: solve(chain, correction, PrefixState(), num_iters=num_nodes).trace  # noqa: E731
    differentiated = {
        "plain": lambda chain: true_trace(chain, jnp),
        "sequential": lambda chain: sequential(chain, with_trace=True).trace,
        "scaled": solved(SCALED),
    }
    evaluated = {"exact": solved(EXACT), "list": lambda chain: solved(SCALED)(listed_rows(chain))}

    @jax.jit
    def run(params):
        at = dataclasses.replace(chain, params=params)
        if name == "part":
            return {name: method(at) for name, method in (differentiated | evaluated).items()}, {}
        loss = lambda params, method: loss_of(chain, method)(params, chain.h_in)  # noqa: E731
        slopes = {name: jax.grad(loss)(params, method) for name, method in differentiated.items()}
        return {name: method(at) for name, method in differentiated.items()}, slopes

    traces, gradients = run(chain.params)
    for method, trace in traces.items():
        assert relative_error(trace, traces["plain"]) < 1e-5, method  # rounding of nine layers
    for method, gradient in gradients.items():
        for leaf, expected in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradients["plain"]), strict=True):
            # Float32: what cancels is up to a hundred times as large as what is left.
            np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max(), err_msg=method)


def listed_rows(chain):
    rows = [layer(chain.params, row) for row in range(3)]
    return dataclasses.replace(chain, params=rows, ctx=[layer(chain.ctx, i) for i in range(chain.num_nodes)])


def test_a_sweep_over_loops_reads_the_weights_where_they_lie():
    """No gather copies a row for every node that reads it; rows without an order have to be copied."""

    def program(rows):
        chain = looped(rows)
        x_L = PrefixState()(chain).h_L
        return jax.jit(lambda chain, x_L: chain.sweep(x_L)).lower(chain, x_L).compile().as_text()

    per_node = lambda rows: f"f32[{len(rows)},{WIDTH},{WIDTH}]"  # noqa: E731
    loops, irregular = program(ROWS["loops"]), program(ROWS["irregular"])
    assert "gather" not in loops and "dynamic-slice" not in loops and per_node(ROWS["loops"]) not in loops
    assert per_node(ROWS["irregular"]) in irregular


# ---------------------------------------------------------------- affine nodes


@functools.cache
def partly_affine():
    """``h -> h A_l + bend_l tanh(h W_l)``: nodes 1, 2 and 4 of six are affine. The context is the bend."""

    def block(params, h, ctx, shared):
        return h @ params["a"] + ctx * jnp.tanh(h @ params["w"]), ()

    rng = np.random.default_rng(4)
    draw = lambda: jnp.asarray(rng.normal(size=(6, WIDTH, WIDTH)), jnp.float32)  # noqa: E731
    params = {"a": jnp.eye(WIDTH)[None] + 0.3 * draw(), "w": 0.7 * draw()}
    return Chain.of(block, params, nonlinear().h_in, ctx=jnp.asarray([1.0, 0.0, 0.0, 1.0, 0.0, 1.0]))


@pytest.mark.parametrize("correction", (IDENTITY, Exact(damping=0.5)), ids=str)
def test_affine_nodes_cost_no_iteration(correction):
    """As many iterations as there are other nodes are exact for any base, and the diagnostics see the derivative that
    the solver takes: nothing of an affine node is left."""
    nodes, num_others, is_affine = (1, 2, 4), 3, np.asarray(partly_affine().ctx) == 0
    told = with_affine(correction, nodes)
    assert with_affine(correction, ()) == correction and with_affine(EXACT, nodes) == EXACT

    @jax.jit
    def run(chain):
        exact = true_trace(chain, jnp)
        guess = MethodData(warm_L=0.5 * exact)
        traces = [solve(chain, told, Warm(), guess, num_iters=k).trace for k in (num_others - 1, num_others)]
        return exact, traces, [contraction(chain, c, exact, num_steps=3) for c in (told, correction)]

    exact, (before, after), (left, untold) = run(partly_affine())
    assert relative_error(after, exact) < 1e-5  # rounding of six layers
    assert np.all(np.asarray(left)[is_affine] < 1e-6)
    assert relative_error(before, exact) > 1e-3
    assert np.all(np.asarray(left)[~is_affine] > 0.1) and np.all(np.asarray(untold)[is_affine] > 0.1)


# ---------------------------------------------------------------- gradients


def loss_of(chain, run):
    """A scalar of the solution's trace, as a function of parameters and of the entering state."""

    def loss(params, h_in):
        trace = run(dataclasses.replace(chain, params=params, h_in=h_in))
        return jnp.sum(jnp.sin(3.0 * trace) * jnp.arange(1.0, 1.0 + trace.shape[0])[:, None, None])

    return loss


def solved(correction, num_iters, init):
    return lambda chain: solve(posed(chain, correction), correction, init, num_iters=num_iters).trace


def test_gradients_through_solve_are_finite_differences():
    """Of every kind of correction, in reverse mode, along a random direction of all parameters and of the entering
    state."""
    chains = (nonlinear(3), bent_scales(3), bent_streams(3))
    cases = (
        (0, HALF, 2, BatchForward()),
        (0, TrustRegion(0.0, Diagonal(mode="vjp", reuse=True), 0.5), 2, PrefixState()),
        (0, EXACT, 2, PrefixState()),
        (1, SCALED, SCAN_LENGTH, PrefixState()),
        (2, HyperConnection(damping=0.3), 2, PrefixState()),
    )
    with jax.enable_x64(True):
        chains = [in_float64(chain) for chain in chains]
        point = [(chain.params, chain.h_in) for chain in chains]

        @jax.jit
        def values_and_gradients(point):
            losses = ((index, loss_of(chains[index], solved(*setting))) for index, *setting in cases)
            return [jax.value_and_grad(loss, argnums=(0, 1))(*point[index]) for index, loss in losses]

        rng = np.random.default_rng(0)
        direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), point)
        move = lambda step: jax.tree.map(lambda leaf, d: np.asarray(leaf) + step * d, point, direction)  # noqa: E731
        step = 1e-5
        at, after, before = jax.device_get([values_and_gradients(move(by)) for by in (0.0, step, -step)])
        for (index, *setting), (_, gradient), (up, _), (down, _) in zip(cases, at, after, before, strict=True):
            along = zip(jax.tree.leaves(gradient), jax.tree.leaves(direction[index]), strict=True)
            slope = sum(np.vdot(*leaves) for leaves in along)
            assert abs(slope) > 1.0, setting
            # A central difference errs by step**2 times the third derivative, which reaches hundreds here: about 1e-7.
            np.testing.assert_allclose(slope, (up - down) / (2 * step), rtol=1e-6, err_msg=str(setting))


def bent_scales(num_layers):
    """``h -> s_l h + tanh(h W_l + c_l)``."""
    chain = nonlinear(num_layers)

    def block(params, h, ctx, shared):
        return params["s"] * h + jnp.tanh(h @ params["w"] + params["c"][None]), ()

    params = chain.params | {"s": jnp.linspace(0.6, 1.3, num_layers)}
    fns = LayerFns(block, skip=lambda params, ctx, aux: params["s"])
    return dataclasses.replace(chain, fns=fns, params=params)


def test_the_gradient_at_n_iterations_is_the_sequential_one():
    """The two are the same function of the parameters, so all that the surrogate adds must cancel."""
    chain, corrections = nonlinear(), (IDENTITY, DIAGONAL)

    @jax.jit
    def gradients(params, h_in):
        runs = [lambda chain: sequential(chain, with_trace=True).trace]
        runs += [solved(correction, NUM_LAYERS, PrefixState()) for correction in corrections]
        return [jax.grad(loss_of(chain, run), argnums=(0, 1))(params, h_in) for run in runs]

    expected, *actual = gradients(chain.params, chain.h_in)
    for gradient in actual:
        for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
            # Float32: what cancels is up to a hundred times as large as what is left.
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * np.abs(other).max())


def test_safe_norm_is_the_norm_with_gradient_zero_at_zero():
    x = jnp.asarray([[3.0, 4.0], [0.0, 0.0]])
    norms, gradient = jax.jit(lambda x: (safe_norm(x), jax.grad(lambda x: safe_norm(x).sum())(x)))(x)
    np.testing.assert_allclose(norms, [5.0, 0.0], rtol=1e-7)  # a correctly rounded root
    np.testing.assert_allclose(gradient, [[0.6, 0.8], [0.0, 0.0]], rtol=1e-6)  # one division


def test_relative_norm_is_a_mean_over_tokens_and_leaves():
    b = {"u": np.ones((2, 3, 4), np.float32), "v": np.full((2, 4), 2.0, np.float32)}
    a = {"u": b["u"].copy(), "v": b["v"] + 1.0}
    a["u"][1, 0] = 3.0
    # Leaf u: one token of three is off by twice its norm in layer 1; leaf v: half its norm in both layers.
    expected = [0.25, (2 / 3 + 0.5) / 2]
    np.testing.assert_allclose(jax.jit(relative_norm)(a, b), expected, rtol=1e-6)  # a few roundings


# ---------------------------------------------------------------- a tolerance


TOLERANCE, DEPTH = 0.05, 8


@functools.cache
def three_sequences():
    """Three sequences of two tokens, the larger the sooner solved: a layer whose tanh saturates is a translation."""

    def block(params, h, ctx, shared):
        branch = jnp.tanh(h @ params["w"] + params["c"][None, None])
        return h + branch, {"branch": branch}

    draw = np.random.default_rng(3).normal(size=(3, 2, WIDTH)) * np.asarray([3.0, 12.0, 50.0])[:, None, None]
    fns = LayerFns(block, batch_axes=BatchAxes(None, None, 0))
    return Chain.of(fns, nonlinear(DEPTH).params, jnp.asarray(draw, jnp.float32))


ADAPTED = {"stack": (three_sequences, EXACT), "list": (lambda: listed(three_sequences()), IDENTITY)}


@functools.partial(jax.jit, static_argnames="name")
def adapted(name, h_in):
    """The sequences ``h_in`` solved to the tolerance."""
    make, correction = ADAPTED[name]
    chain = dataclasses.replace(make(), h_in=h_in)
    want = Wanted((2,), stats=True)
    return stacked(solve_until(chain, correction, PrefixState(), tolerance=TOLERANCE, max_iters=DEPTH, want=want))


@pytest.mark.parametrize("name", ADAPTED)
def test_with_a_tolerance_each_sequence_is_solved_as_if_alone(name):
    """And leaves behind what it would alone, in a list of nodes as in a stack."""
    h_in, correction = three_sequences().h_in, ADAPTED[name][1]
    fixed = iterates(three_sequences(), (correction,), DEPTH)[correction]
    solution, *alone = jax.device_get([adapted(name, part) for part in (h_in, h_in[:1], h_in[1:2], h_in[2:])])
    made = solution.stats["sequence_iters"]
    assert len(set(made.tolist())) == 3 and solution.stats["num_iters"] == max(made) < DEPTH
    np.testing.assert_array_equal(solution.result, Result.CONVERGED)
    changes = []
    for b, single in enumerate(alone):
        assert single.stats["num_iters"] == single.stats["sequence_iters"][0] == made[b]
        expected = fixed[made[b]][:, b]
        aux = np.tanh(np.einsum("LTD,LDE->LTE", inputs(h_in[b], fixed[made[b] - 1][:, b]), weights()) + shifts())
        for found, row in ((solution, b), (single, 0)):
            parts = (found.value[row], found.tapped[0][row], found.trace[:, row], found.aux["branch"][:, row])
            for part, truth in zip(parts, (expected[-1], expected[2], expected, aux), strict=True):
                np.testing.assert_allclose(part, truth, rtol=1e-5, atol=1e-5)  # products of another batch size
        if made[b] < max(made):
            changes.append(relative_error(fixed[made[b] + 1][:, b], expected))
        # It stops after the first iteration that finds all its tokens' residuals below the tolerance.
        ratios = [worst_ratio(h_in[b], trace[:, b]) for trace in fixed]
        assert made[b] == 1 + next(k for k, ratio in enumerate(ratios) if ratio < TOLERANCE)
    assert max(changes) > 1e-4  # what sequences that stop before the others are kept from


def weights():
    return np.asarray(three_sequences().params["w"])


def shifts():
    return np.asarray(three_sequences().params["c"])[:, None]


def inputs(h_in, trace):
    return np.concatenate([np.asarray(h_in)[None], trace[:-1]])


def worst_ratio(h_in, trace):
    """The largest relative residual of a sequence's layers and tokens, from its definition."""
    x_L = inputs(h_in, trace)
    y_L = x_L + np.tanh(np.einsum("LTD,LDE->LTE", x_L, weights()) + shifts())
    return np.max(np.linalg.norm(y_L - trace, axis=-1) / np.linalg.norm(trace, axis=-1))


def test_statistics_with_a_tolerance():
    """Iterations that were not made are NaN; those made while no sequence had stopped are the plain ones."""

    @jax.jit
    def run(chain):
        plain = solve(chain, IDENTITY, PrefixState(), num_iters=DEPTH, want=STATS)
        strict = solve_until(chain, IDENTITY, PrefixState(), tolerance=1e-30, max_iters=DEPTH, want=STATS)
        return plain, strict

    plain, strict = jax.device_get(run(three_sequences()))
    adaptive = jax.device_get(adapted("list", three_sequences().h_in))
    made, first = adaptive.stats["num_iters"], adaptive.stats["sequence_iters"].min()
    actual, expected = (solution.stats["residual_norm"] for solution in (adaptive, plain))
    np.testing.assert_allclose(actual[:first], expected[:first], rtol=1e-4, atol=1e-6)  # rounding of differences y - h
    assert np.isfinite(actual[:made]).all() and np.isnan(actual[made:]).all() and made < DEPTH
    # So small a tolerance is met by a residual of exactly 0 alone, which only saturated sequences reach before N.
    assert strict.stats["num_iters"] == strict.stats["sequence_iters"][0] == DEPTH
    parts = lambda s: (s.value, s.trace, s.aux, s.stats["residual_norm"], s.result)  # noqa: E731
    chex.assert_trees_all_close(parts(strict), parts(plain), rtol=1e-5, atol=1e-5)  # rounding of another compiled loop


def test_a_result_says_how_each_sequence_ended():
    """Of three sequences one holds a NaN, which stays with it."""
    converged, limit, nonfinite = Result.CONVERGED, Result.MAX_ITERS, Result.NONFINITE
    chain = three_sequences()
    broken = dataclasses.replace(chain, h_in=chain.h_in.at[1, 0, 0].set(jnp.nan))
    made = adapted("list", chain.h_in).stats["sequence_iters"]
    few = int(made[2])
    assert few < made[0]

    @jax.jit
    def run(broken, tree):
        fixed = [solve(broken, IDENTITY, PrefixState(), num_iters=k).result for k in (2, DEPTH)]
        until = solve_until(broken, IDENTITY, PrefixState(), tolerance=TOLERANCE, max_iters=few).result
        return *fixed, until, solve(tree, SCALED, PrefixState(), num_iters=2).result

    two, all_nodes, until, without_batch = run(broken, pair())
    np.testing.assert_array_equal(two, [limit, nonfinite, limit])
    np.testing.assert_array_equal(all_nodes, [converged, nonfinite, converged])
    np.testing.assert_array_equal(until, [limit, nonfinite, converged])
    assert without_batch.shape == () and without_batch == limit


def test_a_state_without_a_batch_axis_is_one_sequence_and_ends_early_when_converged():
    def block(params, h, ctx, shared):
        return jax.tree.map(lambda leaf: params * leaf + 1.0, h), ()

    @jax.jit
    def run(h_in):
        chain = Chain.of(block, jnp.linspace(0.5, 1.5, NUM_LAYERS), h_in)
        truth = sequential(chain, with_trace=True)
        solved = lambda init, data: solve_until(  # noqa: E731
            chain, IDENTITY, init, data, tolerance=TOLERANCE, max_iters=NUM_LAYERS
        )
        return truth, solved(PrefixState(), MethodData()), solved(Warm(), MethodData(warm_L=truth.trace))

    for h_in in (jnp.ones(3), {"a": jnp.ones(()), "b": jnp.full(2, 2.0)}):
        truth, solution, again = run(h_in)
        assert 1 < solution.stats["num_iters"] <= NUM_LAYERS
        chex.assert_trees_all_close(solution.value, truth.value, rtol=0.2)  # a few times the tolerance
        assert again.stats["num_iters"] == again.stats["sequence_iters"][0] == 1
        chex.assert_trees_all_close(again.trace, truth.trace, rtol=1e-6)  # rounding of scan against vmap


# ---------------------------------------------------------------- refusals


def test_refusals():
    chain, block = translation(), translation().fns.block
    refused = {
        "num_iters is 0": lambda: solve(chain, IDENTITY, PrefixState(), num_iters=0),
        "batch axis": lambda: solve_until(pair(), IDENTITY, PrefixState(), tolerance=0.1, max_iters=2),
        "needs data.warm_L": lambda: solve(chain, IDENTITY, Warm(), num_iters=1),
        "rows": lambda: Chain.of(block, chain.params, chain.h_in, rows=(0, NUM_LAYERS)),
        "ctx": lambda: Chain.of(block, chain.params, chain.h_in, ctx=jnp.zeros(NUM_LAYERS - 1)),
        "microbatches": lambda: sequential(chain, num_microbatches=2),
    }
    for keyword, call in refused.items():
        with pytest.raises(ValueError, match=keyword):
            jax.eval_shape(call)
    for damping in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="damping"):
            Identity(damping=damping)
