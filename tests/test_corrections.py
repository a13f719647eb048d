"""What each correction is exact on in one step, and what sets it apart."""

import dataclasses
import functools
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
from problems import NUM_LAYERS, affine, diagonal, nonlinear, pair, relative_error, scaled_translation, true_trace

from snlp_jax.config import MeshConfig
from snlp_jax.parallel import make_mesh, solve_sharded
from snlp_jax.solver import (
    Chain,
    Correction,
    Diagonal,
    Exact,
    HyperConnection,
    Identity,
    Iteration,
    Jacobi,
    LayerFns,
    MethodData,
    PrefixState,
    ScaledIdentity,
    TrustRegion,
    Warm,
    solve,
)
from snlp_jax.solver.linear import correct, shift
from snlp_jax.solver.maps import DiagonalMap

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
    results, data = {}, MethodData(warm_L=numbers["start"])
    for name, (layer, corrections, skip) in CLASSES.items():
        fns = LayerFns(
            lambda p, h, ctx, shared, layer=layer: (layer(p, h), ()),
            skip=skip and (lambda p, ctx, aux, skip=skip: jnp.asarray(skip(p))),
        )
        chain = Chain.of(fns, numbers, numbers["h_in"][0])
        solved = [solve(chain, correction, Warm(), data, num_iters=1).trace for correction in corrections]
        results[name] = (true_trace(chain, jnp), solved)
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

    def surrogate(self, chain, it, state):
        a_LTD = jnp.broadcast_to(jnp.asarray(self.slopes)[None, None], (chain.num_nodes, 1, len(self.slopes)))
        return DiagonalMap(a_LTD)


def test_a_new_correction_is_one_short_class():
    """No other part of the solver has to know of it: it is exact on its class and exact at N, over devices too."""
    assert len(inspect.getsource(ChannelSlopes).splitlines()) < 25
    slopes = (0.5, -1.0, 1.5, 0.0)
    chain, correction = diagonal(), ChannelSlopes(slopes=slopes)
    params = chain.params | {"a": jnp.broadcast_to(jnp.asarray(slopes)[None, None], chain.params["a"].shape)}
    chain, mesh = dataclasses.replace(chain, params=params), make_mesh(MeshConfig(layer=2))

    @jax.jit
    def run(chain, other):
        once = solve(chain, correction, PrefixState(), num_iters=1)
        sharded = solve_sharded(chain, correction, PrefixState(), mesh=mesh, num_iters=1)
        settled = solve(other, correction, PrefixState(), num_iters=NUM_LAYERS)
        exact, other = true_trace(chain, jnp), true_trace(other, jnp)
        return (once.trace, exact), (sharded.trace, exact), (settled.trace, other)

    for trace, exact in run(chain, nonlinear()):
        # Float32 rounding: 6e-8 an operation, a few dozen operations on a state of size one.
        assert relative_error(trace, exact) < 3e-6


# ---------------------------------------------------------------- trust region


def maps_of(chain, correction, index=0, key=None):
    """The maps of an iteration whose trace is h0."""
    guess = PrefixState()(chain)
    x_L = shift(guess.h_L, guess.entering)
    iteration = Iteration(index, x_L, *chain.sweep(x_L), guess.h_L, guess.entering)
    return correction.surrogate(chain, iteration, correction.start(chain, x_L, MethodData(key=key)))


@functools.partial(jax.jit, static_argnames="corrections")
def slopes_of(chain, corrections):
    """a_L of each correction."""
    return [maps_of(chain, correction).a_L for correction in corrections]


def scaled_by(scales):
    chain = scaled_translation(len(scales))
    return dataclasses.replace(chain, params=chain.params | {"s": jnp.asarray(scales)})


def test_gains_of_three_layers_by_hand():
    """a = (2, 1/2, -1), lambda = 1: P- = 0, 1/4, 0.8/4 + 1; g = 1, 1/1.25, 1/2.2."""
    held = (TrustRegion(0.0, base, trust) for base, trust in ((ScaledIdentity(), 1), (Identity(), 1), (Identity(), 2)))
    scaled, one, two = slopes_of(scaled_by([2.0, 0.5, -1.0]), tuple(held))
    np.testing.assert_allclose(scaled, [2.0, 0.5 / 1.25, -1.0 / 2.2], rtol=1e-6)  # a few roundings
    # The identity has a = 1: P- = 0, 1, 1/2 + 1; lambda = 2 gives g = 1, 1/3 and P = 4/3, 1 / (1 + 2 * 4/3).
    np.testing.assert_allclose(one, [1, 1 / 2, 1 / 2.5], rtol=1e-6)
    np.testing.assert_allclose(two, [1, 1 / 3, 1 / (1 + 8 / 3)], rtol=1e-6)


def test_a_diagonal_is_held_back_entry_by_entry():
    """Against the filter written out, on slopes that differ from entry to entry."""
    chain, trust = diagonal(), 0.7
    variance, rows = 0.0, []
    for a_TD in np.asarray(chain.params["a"]):
        predicted = a_TD**2 * variance
        gain = 1.0 / (1.0 + trust * predicted)
        variance = gain * predicted + 1.0
        rows.append(gain * a_TD)
    (a_LTD,) = slopes_of(chain, (TrustRegion(0.0, Diagonal(), trust),))
    np.testing.assert_allclose(a_LTD, np.stack(rows), rtol=1e-5, atol=1e-6)  # a few roundings


def test_trust_runs_from_the_chain_to_jacobi():
    chain = scaled_translation()
    s_L = np.asarray(chain.params["s"])
    held = tuple(TrustRegion(0.0, ScaledIdentity(), trust) for trust in (0.0, 1e-6, 1e9))
    none, near, far = slopes_of(chain, held)
    np.testing.assert_array_equal(none, s_L)
    np.testing.assert_allclose(near, s_L, rtol=1e-4)  # lambda P-, and P- is a few units
    # The first layer keeps its slope, but no update enters it.
    assert far[0] == s_L[0] and np.all(np.abs(far[1:]) < 1e-7)
    with pytest.raises(ValueError, match="scalars and diagonals"):
        jax.eval_shape(lambda: maps_of(chain, TrustRegion(0.0, Jacobi(), 1.0)))


# ---------------------------------------------------------------- Diagonal


@functools.partial(jax.jit, static_argnames=("corrections", "index"))
def estimates(chain, keys, corrections, index=0):
    """a_L of each correction for every key, [keys, N, ...]."""
    return [jax.vmap(lambda key, c=c: maps_of(chain, c, index, key).a_L)(keys) for c in corrections]


def small_affine(symmetric=False):
    """``h -> h W_l + c_l``, so small that no estimate reaches the clip at 2."""
    chain = affine()
    w_LDD = 0.3 * jnp.clip(chain.params["w"], -1.5, 1.5)
    w_LDD = (w_LDD + jnp.swapaxes(w_LDD, 1, 2)) / 2 if symmetric else w_LDD
    return dataclasses.replace(chain, params=chain.params | {"w": w_LDD})


def test_the_estimate_is_unbiased():
    """The mean over many keys is the true diagonal, within five standard errors; so is that of several probes."""
    chain, keys, probes = small_affine(), jax.random.split(jax.random.key(0), 2000), (1, 4)
    w_LDD = np.asarray(chain.params["w"])
    truth = np.diagonal(w_LDD, axis1=1, axis2=2)
    found = estimates(chain, keys, tuple(Diagonal(num_probes=number) for number in probes))
    for num_probes, a_KLTD in zip(probes, found, strict=True):
        # z_d * (z W)_d = W_dd + sum over e != d of z_d z_e W_ed: the variance is the column's off-diagonal square sum.
        variance = (np.square(w_LDD).sum(1) - np.square(truth)) / num_probes
        samples = len(keys) * chain.h_in.shape[0]  # every token draws its own
        off = np.abs(np.mean(a_KLTD, axis=(0, 2)) - truth)
        assert np.all(off < 5 * np.sqrt(variance / samples))
        np.testing.assert_allclose(np.var(a_KLTD, axis=(0, 2)), variance, rtol=0.2)  # of 6000 draws; 5 deviations


def test_the_key_and_nothing_else_decides():
    chain, key = small_affine(), jax.random.key
    keys = jnp.stack([key(0), key(0), key(1)])

    @jax.jit
    def run(chain, keys):
        draw = lambda index: jax.vmap(lambda key: maps_of(chain, Diagonal(), index, key).a_L)(keys)  # noqa: E731
        # Layers of equal weights draw different probes.
        equal = jax.tree.map(lambda leaf: leaf[:1].repeat(NUM_LAYERS, 0), chain.params)
        of_equal = maps_of(dataclasses.replace(chain, params=equal), Diagonal()).a_L
        return draw(0), draw(1), maps_of(chain, Diagonal(seed=1)).a_L, of_equal

    (same, again, other), (later, *_), without, of_equal = run(chain, keys)
    np.testing.assert_array_equal(same, again)
    assert np.any(same != other) and np.any(same != later)  # every iteration draws anew
    # Without a key the seed stands in for it: rounding of a single against batched products.
    np.testing.assert_allclose(without, other, rtol=1e-5, atol=1e-6)
    assert len(np.unique(np.asarray(of_equal).round(5), axis=0)) == NUM_LAYERS


def test_the_modes_agree():
    keys = jax.random.split(jax.random.key(2), 1)
    modes = tuple(Diagonal(mode=mode) for mode in ("jvp", "vjp", "finite_difference"))
    forward, backward, differences = estimates(small_affine(symmetric=True), keys, modes)
    np.testing.assert_allclose(backward, forward, rtol=1e-5, atol=1e-6)  # rounding: z * (W z) = z * (W^T z)
    # Differences of states of size one at step 1e-2: a hundred times float32 rounding, 6e-8 an operation.
    np.testing.assert_allclose(differences, forward, atol=1e-4)
    forward, backward, _ = estimates(small_affine(), keys, modes)
    assert np.abs(forward - backward).max() > 0.1


def test_estimates_are_clipped_and_made_for_every_other_layer():
    chain = diagonal()
    slopes = jnp.asarray([5.0, 2.0, -1.5, -7.0])
    params = chain.params | {"a": jnp.broadcast_to(slopes[None, None], chain.params["a"].shape)}
    corrections = (Diagonal(), Diagonal(limit=4.0, stride=2))
    found = slopes_of(dataclasses.replace(chain, params=params), corrections)
    for correction, a_LTD in zip(corrections, found, strict=True):
        expected = np.clip(params["a"], -correction.limit, correction.limit)
        expected[np.arange(NUM_LAYERS) % correction.stride > 0] = 1.0
        np.testing.assert_array_equal(a_LTD, expected)


def test_a_detached_estimate_is_a_constant_to_gradients():
    """``h -> a_l h + c_l``, one iteration: the gradient by a_l is that of a solver whose slopes are given numbers."""
    chain = diagonal()

    @dataclass(frozen=True)
    class Given(Correction):
        def surrogate(self, _, it, state):
            return DiagonalMap(chain.params["a"])

    def loss(params, correction):
        moved = dataclasses.replace(chain, params=params)
        return jnp.sum(jnp.sin(solve(moved, correction, PrefixState(), num_iters=1).value))

    corrections = (Diagonal(detach=True), Given(), Diagonal())
    gradients = jax.jit(lambda params: [jax.grad(loss)(params, correction)["a"] for correction in corrections])
    detached, given, full = gradients(chain.params)
    np.testing.assert_allclose(detached, given, rtol=1e-5, atol=1e-6)  # rounding of z * (z * a)
    assert np.abs(full - detached).max() > 0.01


def test_reuse_keeps_the_estimate_of_the_first_inputs():
    """The second iteration by hand: the first one's maps on the second one's residuals."""
    reuse, fresh = Diagonal(reuse=True), Diagonal()

    @jax.jit
    def run(chain):
        first = solve(chain, fresh, PrefixState(), num_iters=1).trace
        second = correct(maps_of(chain, fresh), chain.sweep(shift(first, chain.h_in))[0], first, chain.h_in).h_L
        return second, *(solve(chain, c, PrefixState(), num_iters=2).trace for c in (reuse, fresh))

    by_hand, kept, drawn_anew = run(nonlinear())
    np.testing.assert_allclose(kept, by_hand, rtol=1e-5, atol=1e-5)  # rounding of other programs
    assert np.abs(drawn_anew - by_hand).max() > 1e-3


def test_several_leaves_have_their_own_slopes():
    chain = pair()
    (a_L,) = slopes_of(chain, (Diagonal(),))
    chex.assert_trees_all_equal_shapes(a_L, PrefixState()(chain).h_L)
    for leaf in jax.tree.leaves(a_L):
        np.testing.assert_allclose(leaf, np.broadcast_to(scales_like(leaf), leaf.shape), rtol=1e-6)  # one rounding


def scales_like(leaf):
    return np.asarray(pair().params["s"]).reshape(-1, *(1,) * (leaf.ndim - 1))


# ---------------------------------------------------------------- refusals


def test_settings_that_make_no_sense():
    refused = (
        (lambda: Identity(damping=1.5), "damping 1.5"),
        (lambda: TrustRegion(0.0, Identity(), -1.0), "trust -1.0"),
        (lambda: TrustRegion(0.0, Diagonal(), float("inf")), "trust inf"),
        (lambda: TrustRegion(0.0, Diagonal(), float("nan")), "trust nan"),
        (lambda: TrustRegion(2.0, Diagonal(), 1.0), "damping 2.0"),
        (lambda: Diagonal(num_probes=0), "probe"),
        (lambda: Diagonal(mode="exact"), "mode 'exact'"),
        (lambda: Diagonal(step=0.0), "step 0.0"),
        (lambda: Diagonal(stride=0), "stride 0"),
    )
    for make, message in refused:
        with pytest.raises(ValueError, match=message):
            make()
