"""The affine recurrence along depth equals the plain loop, on one device and over a sharded layer axis."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from snlp_jax.parallel import make_mesh
from snlp_jax.solver.linear import IdentityMap, ScalarMap, ZeroMap, affine_scan, correct, layer, shift

KINDS = ("zero", "identity", "scalar")


def make_maps(kind, scales):
    return {"zero": ZeroMap(), "identity": IdentityMap(), "scalar": ScalarMap(jnp.asarray(scales, jnp.float32))}[kind]


def slopes_of(kind, scales):
    """a_l of every layer, as plain numbers."""
    return {"zero": [0] * len(scales), "identity": [1] * len(scales), "scalar": list(scales)}[kind]


def plain_loop(slopes, r_L):
    """d_l = a_l d_{l-1} + r_l from d_0 = 0."""
    d, rows = np.zeros_like(r_L[0]), []
    for slope, r in zip(slopes, r_L, strict=True):
        d = slope * d + r
        rows.append(d)
    return np.stack(rows)


# Small whole numbers: products of nine of them and sums of those stay far below 2**24, so float32 is exact in any order
# of evaluation and "equal" means bit for bit.
whole = st.integers(-3, 3)
layers = st.integers(1, 9).flatmap(
    lambda n: st.tuples(st.lists(whole, min_size=n, max_size=n), st.lists(whole, min_size=2 * n, max_size=2 * n))
)


@pytest.mark.parametrize("kind", KINDS)
@given(layers)
def test_affine_scan_is_the_plain_loop(kind, drawn):
    scales, flat = drawn
    r_L = np.asarray(flat, np.float32).reshape(len(scales), 2)
    products, d_L = affine_scan(make_maps(kind, scales), {"a": jnp.asarray(r_L), "b": jnp.asarray(r_L[:, 0])})
    truth = plain_loop(slopes_of(kind, scales), r_L)
    chex.assert_trees_all_equal(d_L, {"a": truth, "b": truth[:, 0]})
    if kind == "scalar":
        np.testing.assert_array_equal(products.a_L, np.cumprod(scales).astype(np.float32))


@pytest.mark.parametrize("kind", KINDS)
@given(st.lists(whole, min_size=3, max_size=3), st.lists(whole, min_size=6, max_size=6))
def test_composition_is_associative_and_applies_in_order(kind, scales, flat):
    first, second, third = (layer(make_maps(kind, scales), i) for i in range(3))
    d = jnp.asarray(flat, jnp.float32).reshape(3, 2)
    chex.assert_trees_all_equal(third.compose(second).compose(first), third.compose(second.compose(first)))
    chex.assert_trees_all_equal(second.compose(first).apply(d), second.apply(first.apply(d)))


@pytest.mark.parametrize("kind", KINDS)
@given(layers, st.sampled_from((0.0, 0.25, 0.5, 1.0)))  # powers of two: exact again
def test_damping_scales_the_map(kind, drawn, amount):
    scales, flat = drawn
    d_L = jnp.asarray(flat, jnp.float32).reshape(len(scales), 2)
    maps = make_maps(kind, scales)
    chex.assert_trees_all_equal(maps.damp(amount, len(scales)).apply(d_L), (1.0 - amount) * maps.apply(d_L))


@pytest.mark.parametrize("kind", KINDS)
@given(layers)
def test_correct_is_its_formula(kind, drawn):
    """h'_l = y_l + a_l d_{l-1}, with d from the loop over the residuals."""
    scales, flat = drawn
    n, slopes = len(scales), np.asarray(slopes_of(kind, scales), np.float32)[:, None]
    y_L = np.asarray(flat, np.float32).reshape(n, 2)
    h_L = np.roll(y_L, 1, axis=1) + 1.0
    d_L = plain_loop(slopes[:, 0], y_L - h_L)
    truth = y_L + slopes * np.concatenate([np.zeros((1, 2), np.float32), d_L[:-1]])
    new_L, entering, leaving = correct(
        make_maps(kind, scales), {"h": jnp.asarray(y_L)}, {"h": jnp.asarray(h_L)}, {"h": jnp.asarray([7.0, 8.0])}
    )
    chex.assert_trees_all_equal(new_L, {"h": truth})
    chex.assert_trees_all_equal(leaving, {"h": truth[-1]})
    chex.assert_trees_all_equal(entering, {"h": np.asarray([7.0, 8.0], np.float32)})


def test_shift_moves_every_layer_by_one():
    h_L, entering = {"a": jnp.arange(6.0).reshape(3, 2)}, {"a": jnp.full(2, -1.0)}
    chex.assert_trees_all_equal(shift(h_L, entering), {"a": np.asarray([[-1, -1], [0, 1], [2, 3]], np.float32)})


# ---------------------------------------------------------------- over a sharded layer axis

NUM_LAYERS = 8


def whole_state(seed, *lead):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.integers(-3, 4, (*lead, *shape)), jnp.float32)  # noqa: E731
    return {"a": draw(2, 3), "b": draw()}


def correct_all(scales_L, y_L, h_L, entering, axis_name=None):
    """The new traces of all three kinds of map, so that one compilation serves them all."""
    maps = {"zero": ZeroMap(), "identity": IdentityMap(), "scalar": ScalarMap(scales_L)}
    return {kind: correct(m, y_L, h_L, entering, axis_name) for kind, m in maps.items()}


def correct_all_sharded(num_devices, scales_L, y_L, h_L, entering):
    """As ``correct_all``, with an extra leading axis of devices on the entering states."""
    over, everywhere = PartitionSpec("layer"), PartitionSpec()

    @functools.partial(
        jax.shard_map,
        mesh=make_mesh(layer=num_devices),
        in_specs=(over, over, over, everywhere),
        out_specs=(over, over, everywhere),
        axis_names={"layer"},
        check_vma=False,
    )
    def run(*args):
        corrected = correct_all(*args, axis_name="layer")
        pick = lambda name: {kind: getattr(c, name) for kind, c in corrected.items()}  # noqa: E731
        return pick("h_L"), jax.tree.map(lambda leaf: leaf[None], pick("entering")), pick("leaving")

    return run(scales_L, y_L, h_L, entering)


@pytest.mark.parametrize("num_devices", (2, 4, 8))
def test_sharded_correct_is_unsharded(num_devices):
    scales_L = jnp.asarray([2.0, -1.0, 0.0, 3.0, 1.0, -2.0, 2.0, 1.0])
    y_L, h_L, entering = whole_state(0, NUM_LAYERS), whole_state(1, NUM_LAYERS), whole_state(2)
    whole_trace = correct_all(scales_L, y_L, h_L, entering)
    new_L, entering_C, leaving = jax.jit(functools.partial(correct_all_sharded, num_devices))(
        scales_L, y_L, h_L, entering
    )
    for kind in KINDS:
        # Whole numbers again, so the order of the sums does not show.
        chex.assert_trees_all_equal(new_L[kind], whole_trace[kind].h_L)
        chex.assert_trees_all_equal(leaving[kind], whole_trace[kind].leaving)
        # The state that enters a device's first layer is its neighbour's last one; the first gets the region's input.
        every = NUM_LAYERS // num_devices
        neighbours = jax.tree.map(lambda leaf: leaf[every - 1 : -1 : every], whole_trace[kind].h_L)  # noqa: B023
        chex.assert_trees_all_equal(entering_C[kind], shift_in(neighbours, entering))


def shift_in(rows, first):
    return jax.tree.map(lambda leaf, h: jnp.concatenate([h[None], leaf]), rows, first)


def test_sharded_correct_has_the_unsharded_gradient():
    scales_L = jnp.linspace(-1.5, 1.5, NUM_LAYERS)
    y_L, h_L, entering = whole_state(0, NUM_LAYERS), whole_state(1, NUM_LAYERS), whole_state(2)
    weigh = lambda trees: sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(trees))  # noqa: E731

    def on_one(scales_L, y_L, h_L):
        corrected = correct_all(scales_L, y_L, h_L, entering)
        return weigh([(c.h_L, c.leaving) for c in corrected.values()])

    def on_four(scales_L, y_L, h_L):
        new_L, _, leaving = correct_all_sharded(4, scales_L, y_L, h_L, entering)
        return weigh((new_L, leaving))

    arguments = (scales_L, y_L, h_L)
    expected = jax.jit(jax.grad(on_one, argnums=(0, 1, 2)))(*arguments)
    actual = jax.jit(jax.grad(on_four, argnums=(0, 1, 2)))(*arguments)
    # Float32 sums of at most eight products of size about ten, in another order.
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-4)
    assert all(np.abs(leaf).max() > 0.1 for leaf in jax.tree.leaves(expected))
