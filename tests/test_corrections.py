"""What each correction is exact on in one step, and what sets it apart."""

import dataclasses
import inspect
from dataclasses import dataclass

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from problems import NUM_LAYERS, affine, diagonal, error, nonlinear, pair, scaled_translation, true_trace

from snlp_jax.config import MeshConfig
from snlp_jax.parallel import make_mesh, solve_sharded
from snlp_jax.solver import (
    Correction,
    Diagonal,
    Exact,
    HyperConnection,
    Identity,
    Iteration,
    Jacobi,
    LayerProblem,
    PrefixState,
    ScaledIdentity,
    Warm,
    solve,
)
from snlp_jax.solver.linear import DiagonalMap, IdentityMap, ScalarMap, correct, shift

# ---------------------------------------------------------------- one step on the own class

LAYERS, ROWS, COLUMNS = 4, 2, 3
SHAPE = (ROWS, COLUMNS)
SHAPES = {
    "scale": (LAYERS,),
    "slope": (LAYERS, *SHAPE),
    "mix": (LAYERS, ROWS, ROWS),
    "dense": (LAYERS, ROWS * COLUMNS, ROWS * COLUMNS),
    "shift": (LAYERS, *SHAPE),
    "start": (LAYERS, *SHAPE),
    "h_in": SHAPE,
}
# Whole numbers, and halves of them: six of at most 2 in a row of "dense" make four layers grow by 12**4, and such sums
# are exact in float32. "Equal" means bit for bit. A finite difference of step 1/2 is exact as well.
NUMBERS = st.fixed_dictionaries(
    {name: arrays(np.int8, shape, elements=st.integers(-2, 2)).map(np.float32) for name, shape in SHAPES.items()}
)
CLASSES = {
    "constants": (lambda p, h: p["shift"], [Jacobi(), ScaledIdentity(), Diagonal()], lambda p: 0.0),
    "translations": (lambda p, h: h + p["shift"], [Identity(), ScaledIdentity(), Diagonal()], lambda p: 1.0),
    "halvings": (lambda p, h: 0.5 * h + p["shift"], [Identity(damping=0.5)], None),
    "scaled": (lambda p, h: p["scale"] * h + p["shift"], [ScaledIdentity(), Diagonal()], lambda p: p["scale"]),
    "streams": (lambda p, h: p["mix"] @ h + p["shift"], [HyperConnection()], lambda p: p["mix"]),
    "diagonal": (
        lambda p, h: p["slope"] * h + p["shift"],
        [
            Diagonal(),
            Diagonal(num_probes=2, reuse=True),
            Diagonal(mode="vjp"),
            Diagonal(mode="finite_difference", step=0.5),
        ],
        None,
    ),
    "dense": (lambda p, h: (p["dense"] @ h.ravel()).reshape(h.shape) + p["shift"], [Exact()], None),
}
"""Name: layer, corrections that are exact on it, derivative of its skip path."""


@jax.jit
def one_step(numbers):
    """By class the sequential trace, and what one iteration makes of an arbitrary one."""
    results = {}
    for name, (layer, corrections, skip) in CLASSES.items():
        problem = LayerProblem(
            block_fn=lambda p, h, ctx, shared, layer=layer: (layer(p, h), ()),
            params=numbers,
            ctx=None,
            shared=None,
            h_in=numbers["h_in"][0],
            num_layers=LAYERS,
            residual_map=skip and (lambda p, ctx, aux, skip=skip: jnp.asarray(skip(p))),
            warm_L=numbers["start"],
        )
        solved = [solve(problem, correction, num_iters=1, init=Warm()).trace for correction in corrections]
        results[name] = (true_trace(problem, jnp), solved)
    return results


@given(NUMBERS)
def test_every_correction_is_exact_in_one_step_on_its_own_class(numbers):
    """From any trace, not only from h0."""
    tiled = numbers | {"h_in": np.broadcast_to(numbers["h_in"], (LAYERS, *SHAPE))}
    for name, (truth, traces) in one_step(tiled).items():
        for correction, trace in zip(CLASSES[name][1], traces, strict=True):
            np.testing.assert_array_equal(trace, truth, err_msg=f"{name}: {correction}")


# ---------------------------------------------------------------- a new one


@dataclass(frozen=True)
class ChannelSlopes(Correction):
    """``A_l = diag(a)``, one slope a channel that the network is known to have. Exact on ``h -> a * h + c_l``."""

    slopes: tuple[float, ...] = ()

    def surrogate(self, problem, iteration, state):
        a_LTD = jnp.broadcast_to(jnp.asarray(self.slopes)[None, None], (problem.num_layers, 1, len(self.slopes)))
        return DiagonalMap(a_LTD)


def test_a_new_correction_is_one_short_class():
    """No other part of the solver has to know of it: it is exact on its class, exact at N and runs sharded."""
    assert len(inspect.getsource(ChannelSlopes).splitlines()) < 25
    slopes = (0.5, -1.0, 1.5, 0.0)
    chain = diagonal()
    params = chain.params | {"a": jnp.broadcast_to(jnp.asarray(slopes)[None, None], chain.params["a"].shape)}
    mine, correction = dataclasses.replace(chain, params=params), ChannelSlopes(slopes=slopes)

    @jax.jit
    def run():
        once = solve(mine, correction, num_iters=1, init=PrefixState())
        sharded = solve_sharded(mine, correction, mesh=make_mesh(MeshConfig(layer=2)), num_iters=1, init=PrefixState())
        return once, sharded, solve(nonlinear(), correction, num_iters=NUM_LAYERS, init=PrefixState())

    once, sharded, other = run()
    # Float32 rounding: 6e-8 an operation, a few dozen operations on a state of size one.
    assert error(once.trace, mine) < 3e-6 and error(sharded.trace, mine) < 3e-6
    assert error(other.trace, nonlinear()) < 3e-6


# ---------------------------------------------------------------- trust region


def surrogate_of(problem, correction, index=0):
    """The maps of an iteration whose trace is h0."""

    @jax.jit
    def make(params, key):
        here = dataclasses.replace(problem, params=params, key=key)
        guess = PrefixState()(here)
        x_L = shift(guess.h_L, guess.entering)
        iteration = Iteration(index, x_L, *here.sweep(x_L), guess.h_L, guess.entering)
        return correction.surrogate(here, iteration, correction.start(here, x_L))

    return make(problem.params, problem.key)


def scaled_by(scales):
    chain = scaled_translation(len(scales))
    return dataclasses.replace(chain, params=chain.params | {"s": jnp.asarray(scales)})


def test_gains_of_three_layers_by_hand():
    """a = (2, 1/2, -1), lambda = 1: P- = 0, 1/4, 0.8/4 + 1; g = 1, 1/1.25, 1/2.2."""
    maps = surrogate_of(scaled_by([2.0, 0.5, -1.0]), ScaledIdentity(trust=1.0))
    np.testing.assert_allclose(maps.a_L, [2.0, 0.5 / 1.25, -1.0 / 2.2], rtol=1e-6)  # a few roundings
    # The identity has a = 1: P- = 0, 1, 1/2 + 1; lambda = 2 gives g = 1, 1/3 and P = 4/3, 1 / (1 + 2 * 4/3).
    np.testing.assert_allclose(surrogate_of(scaled_by([9.0] * 3), Identity(trust=1.0)).a_L, [1, 1 / 2, 1 / 2.5])
    np.testing.assert_allclose(surrogate_of(scaled_by([9.0] * 3), Identity(trust=2.0)).a_L, [1, 1 / 3, 1 / (1 + 8 / 3)])


def test_a_diagonal_is_held_back_entry_by_entry():
    """Against the filter written out, on slopes that differ from entry to entry."""
    problem, trust = diagonal(), 0.7
    variance, rows = 0.0, []
    for a_TD in np.asarray(problem.params["a"]):
        predicted = a_TD**2 * variance
        gain = 1.0 / (1.0 + trust * predicted)
        variance = gain * predicted + 1.0
        rows.append(gain * a_TD)
    maps = surrogate_of(problem, Diagonal(trust=trust))
    np.testing.assert_allclose(maps.a_L, np.stack(rows), rtol=1e-5, atol=1e-6)  # a few roundings


def test_trust_runs_from_the_chain_to_jacobi():
    problem = scaled_translation()
    assert isinstance(surrogate_of(problem, Identity(trust=0.0)), IdentityMap)
    maps = surrogate_of(problem, ScaledIdentity())
    assert isinstance(maps, ScalarMap) and np.array_equal(maps.a_L, problem.params["s"])
    near = surrogate_of(problem, ScaledIdentity(trust=1e-6)).a_L
    np.testing.assert_allclose(near, problem.params["s"], rtol=1e-4)  # lambda P-, and P- is a few units
    # The first layer keeps its slope, but no update enters it.
    far = surrogate_of(problem, ScaledIdentity(trust=1e9)).a_L
    assert far[0] == problem.params["s"][0] and np.all(np.abs(far[1:]) < 1e-7)
    corrections = (ScaledIdentity(trust=1e9), Jacobi())
    trace, jacobi = jax.jit(
        lambda: [solve(problem, correction, num_iters=2, init=PrefixState()).trace for correction in corrections]
    )()
    np.testing.assert_allclose(trace, jacobi, rtol=1e-6, atol=1e-6)  # 1 / lambda and rounding


# ---------------------------------------------------------------- Diagonal


def estimates(problem, correction, keys, index=0):
    """a_L of the correction for every key, [keys, N, ...]."""
    return jax.jit(jax.vmap(lambda key: surrogate_of(dataclasses.replace(problem, key=key), correction, index).a_L))(
        keys
    )


def small_affine(symmetric=False):
    """``h -> h W_l + c_l``, so small that no estimate reaches the clip at 2."""
    chain = affine()
    w_LDD = 0.3 * jnp.clip(chain.params["w"], -1.5, 1.5)
    w_LDD = (w_LDD + jnp.swapaxes(w_LDD, 1, 2)) / 2 if symmetric else w_LDD
    return dataclasses.replace(chain, params=chain.params | {"w": w_LDD})


def test_the_estimate_is_unbiased():
    """The mean over many keys is the true diagonal, within five standard errors; so is that of several probes."""
    problem, num_keys = small_affine(), 2000
    w_LDD = np.asarray(problem.params["w"])
    truth = np.diagonal(w_LDD, axis1=1, axis2=2)
    for num_probes in (1, 4):
        a_KLTD = estimates(problem, Diagonal(num_probes=num_probes), jax.random.split(jax.random.key(0), num_keys))
        # z_d * (z W)_d = W_dd + sum over e != d of z_d z_e W_ed: the variance is the column's off-diagonal square sum.
        variance = (np.square(w_LDD).sum(1) - np.square(truth)) / num_probes
        samples = num_keys * problem.h_in.shape[0]  # every token draws its own
        off = np.abs(np.mean(a_KLTD, axis=(0, 2)) - truth)
        assert np.all(off < 5 * np.sqrt(variance / samples))
        np.testing.assert_allclose(np.var(a_KLTD, axis=(0, 2)), variance, rtol=0.2)  # of 6000 draws; 5 deviations


def test_the_key_and_nothing_else_decides():
    problem, key = small_affine(), jax.random.key
    keys = jnp.stack([key(0), key(0), key(1)])
    same, again, other = estimates(problem, Diagonal(), keys)
    np.testing.assert_array_equal(same, again)
    assert np.any(same != other)
    assert np.any(same != estimates(problem, Diagonal(), keys, index=1)[0])  # every iteration draws anew
    # Without a key the seed stands in for it.
    without = surrogate_of(problem, Diagonal(seed=1)).a_L
    np.testing.assert_allclose(without, other, rtol=1e-5, atol=1e-6)  # rounding of another compiled program
    # Layers of equal weights draw different probes.
    equal = dataclasses.replace(
        problem, params=jax.tree.map(lambda leaf: leaf[:1].repeat(NUM_LAYERS, 0), problem.params)
    )
    a_LTD = np.asarray(surrogate_of(equal, Diagonal()).a_L)
    assert len(np.unique(a_LTD.round(5), axis=0)) == NUM_LAYERS


def test_the_modes_agree():
    keys = jax.random.split(jax.random.key(2), 1)
    modes = ("jvp", "vjp", "finite_difference")
    forward, backward, differences = (
        estimates(small_affine(symmetric=True), Diagonal(mode=mode), keys) for mode in modes
    )
    np.testing.assert_allclose(backward, forward, rtol=1e-5, atol=1e-6)  # rounding: z * (W z) = z * (W^T z)
    # Differences of states of size one at step 1e-2: a hundred times float32 rounding, 6e-8 an operation.
    np.testing.assert_allclose(differences, forward, atol=1e-4)
    forward, backward = (estimates(small_affine(), Diagonal(mode=mode), keys) for mode in modes[:2])
    assert np.abs(forward - backward).max() > 0.1


def test_estimates_are_clipped_and_made_for_every_other_layer():
    chain = diagonal()
    slopes = jnp.asarray([5.0, 2.0, -1.5, -7.0])
    params = chain.params | {"a": jnp.broadcast_to(slopes[None, None], chain.params["a"].shape)}
    problem = dataclasses.replace(chain, params=params)
    for correction in (Diagonal(), Diagonal(limit=4.0, stride=2)):
        a_LTD = np.array(jnp.broadcast_to(jnp.clip(slopes, -correction.limit, correction.limit), params["a"].shape))
        a_LTD[np.arange(NUM_LAYERS) % correction.stride > 0] = 1.0
        np.testing.assert_array_equal(surrogate_of(problem, correction).a_L, a_LTD)


def test_a_detached_estimate_is_a_constant_to_gradients():
    """``h -> a_l h + c_l``, one iteration: the gradient by a_l is that of a solver whose slopes are given numbers."""
    problem = diagonal()

    @dataclass(frozen=True)
    class Given(Correction):
        def surrogate(self, _, iteration, state):
            return DiagonalMap(problem.params["a"])

    def gradient(correction):
        run = lambda params: solve(  # noqa: E731
            dataclasses.replace(problem, params=params), correction, num_iters=1, init=PrefixState()
        )
        return jax.grad(lambda params: jnp.sum(jnp.sin(run(params).value)))(problem.params)["a"]

    detached, given, full = gradient(Diagonal(detach=True)), gradient(Given()), gradient(Diagonal())
    np.testing.assert_allclose(detached, given, rtol=1e-5, atol=1e-6)  # rounding of z * (z * a)
    assert np.abs(full - detached).max() > 0.01


def test_reuse_keeps_the_estimate_of_the_first_inputs():
    """The second iteration by hand: the first one's maps on the second one's residuals."""
    problem = nonlinear()
    reuse, fresh = Diagonal(reuse=True), Diagonal()
    maps = surrogate_of(problem, fresh)

    @jax.jit
    def run(maps):
        first = solve(problem, fresh, num_iters=1, init=PrefixState()).trace
        second = correct(maps, problem.sweep(shift(first, problem.h_in))[0], first, problem.h_in).h_L
        return second, *(solve(problem, c, num_iters=2, init=PrefixState()).trace for c in (reuse, fresh))

    by_hand, kept, drawn_anew = run(maps)
    np.testing.assert_allclose(kept, by_hand, rtol=1e-5, atol=1e-5)  # rounding of other programs
    assert np.abs(drawn_anew - by_hand).max() > 1e-3


def test_several_leaves_have_their_own_slopes():
    maps = surrogate_of(pair(), Diagonal())
    chex.assert_trees_all_equal_shapes(maps.a_L, shift(PrefixState()(pair()).h_L, pair().h_in))
    for leaf in jax.tree.leaves(maps.a_L):
        np.testing.assert_allclose(leaf, np.broadcast_to(scales_like(leaf), leaf.shape), rtol=1e-6)  # one rounding


def scales_like(leaf):
    return np.asarray(pair().params["s"]).reshape(-1, *(1,) * (leaf.ndim - 1))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "make, message",
    (
        (lambda: Identity(damping=1.5), "damping 1.5 lies outside 0 to 1"),
        (lambda: Identity(damping=float("nan")), "damping nan lies outside 0 to 1"),
        (lambda: Identity(trust=-1.0), "trust -1.0 must be 0 or more"),
        (lambda: Diagonal(trust=float("inf")), "trust inf must be 0 or more"),
        (lambda: Diagonal(trust=float("nan")), "trust nan must be 0 or more"),
        (lambda: Diagonal(num_probes=0), "probes=0: the Diagonal correction needs at least one probe"),
        (lambda: Diagonal(mode="exact"), "mode 'exact' is not one of jvp, vjp, finite_difference"),
        (lambda: Diagonal(step=0.0), "step 0.0, limit 2.0 and stride 1 must be positive"),
        (lambda: Diagonal(stride=0), "stride 0 must be positive"),
    ),
)
def test_settings_that_make_no_sense(make, message):
    with pytest.raises(ValueError, match=message):
        make()
