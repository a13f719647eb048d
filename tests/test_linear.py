"""The affine recurrence along depth equals the plain loop, on one device and over a sharded layer axis."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.sharding import PartitionSpec

from snlp_jax.parallel import make_mesh
from snlp_jax.solver.linear import (
    Basis,
    Corrected,
    DiagonalMap,
    IdentityMap,
    MatrixMap,
    ScalarMap,
    SharedBasisMap,
    ZeroMap,
    affine_scan,
    correct,
    layer,
    shift,
)

ONE_LEAF = ("matrix", "basis")
"""Kinds whose states have stream and channel axes in every leaf; the others act on any tree."""
KINDS = ("zero", "identity", "scalar", "diagonal", *ONE_LEAF)
SIZES = (1, 2, 7, 8)
"""A single layer, a single combination, an odd and an even tree."""
TOKENS, STREAMS, WIDTH, RANK = 2, 2, 3, 2
SHAPES = {"a": (TOKENS, STREAMS, WIDTH), "b": ()}


@functools.cache
def shapes_of(num_layers):
    """Arrays behind the maps of every kind, and what enters the recurrence."""
    return {
        "scalar": (num_layers,),
        "diagonal_a": (num_layers, TOKENS, 1, WIDTH),  # the streams share their slopes
        "diagonal_b": (num_layers,),
        "matrix": (num_layers, 1, STREAMS, STREAMS),  # the tokens share theirs
        "basis_c": (num_layers,),
        "basis_m": (num_layers, RANK, RANK),
        "basis_u": (WIDTH, RANK),
        "basis_v": (WIDTH, RANK),
        "y_a": (num_layers, *SHAPES["a"]),
        "y_b": (num_layers,),
        "h_a": (num_layers, *SHAPES["a"]),
        "h_b": (num_layers,),
        "entering_a": SHAPES["a"],
        "entering_b": (),
    }


def whole(num_layers):
    """Whole numbers: sums of products of nine of them stay far below 2**53, so float64 is exact in any order of
    evaluation and "equal" means bit for bit."""
    draw = lambda shape: arrays(np.int8, shape, elements=st.integers(-2, 2)).map(np.float64)  # noqa: E731
    return st.fixed_dictionaries({name: draw(shape) for name, shape in shapes_of(num_layers).items()})


def random_numbers(num_layers, whole):
    rng = np.random.default_rng(0)
    draw = (lambda shape: rng.integers(-2, 3, shape) * 1.0) if whole else (lambda shape: 0.7 * rng.normal(size=shape))
    return {name: jnp.asarray(draw(shape)) for name, shape in shapes_of(num_layers).items()}


def make_maps(numbers):
    basis = Basis(jnp.asarray(numbers["basis_u"]), jnp.asarray(numbers["basis_v"]))
    return {
        "zero": ZeroMap(),
        "identity": IdentityMap(),
        "scalar": ScalarMap(numbers["scalar"]),
        "diagonal": DiagonalMap({"a": numbers["diagonal_a"], "b": numbers["diagonal_b"]}),
        "matrix": MatrixMap(numbers["matrix"]),
        "basis": SharedBasisMap(numbers["basis_c"], numbers["basis_m"], basis),
    }


def state_of(kind, numbers, name):
    leaves = {"a": numbers[f"{name}_a"], "b": numbers[f"{name}_b"]}
    return {"a": leaves["a"]} if kind in ONE_LEAF else leaves


def plain_apply(kind, numbers, index, d):
    """A_l d from its definition, for one leaf of a tree or a plain array."""
    if kind == "matrix":
        return np.einsum("rs,tsd->trd", numbers["matrix"][index, 0], d)
    if kind == "basis":
        low = np.einsum("dx,xy,ey,tre->trd", numbers["basis_u"], numbers["basis_m"][index], numbers["basis_v"], d)
        return numbers["basis_c"][index] * d + low
    slope = {"zero": 0.0, "identity": 1.0, "scalar": numbers["scalar"][index]}.get(kind)
    if slope is None:
        slope = numbers["diagonal_a" if np.ndim(d) else "diagonal_b"][index]
    return slope * d


def plain_tree(kind, numbers, index, tree):
    return {name: plain_apply(kind, numbers, index, leaf) for name, leaf in tree.items()}


def plain_loop(kind, numbers, r_L, start=None):
    """d_l = A_l d_{l-1} + r_l from d_0 = 0, and A_l d_{l-1}, layer by layer."""
    d = start or {name: np.zeros_like(leaf[0]) for name, leaf in r_L.items()}
    rows, carried = [], []
    for index in range(len(r_L["a"])):
        carried.append(plain_tree(kind, numbers, index, d))
        d = {name: carried[-1][name] + r_L[name][index] for name in d}
        rows.append(d)
    return tuple(jax.tree.map(lambda *leaves: np.stack(leaves), *trees) for trees in (rows, carried))


# ---------------------------------------------------------------- one device


def everything(numbers, num_layers):
    """What the tests below look at, of all kinds in one program."""
    results = {}
    for kind, maps in make_maps(numbers).items():
        y_L, h_L, entering = (state_of(kind, numbers, name) for name in ("y", "h", "entering"))
        products, d_L = affine_scan(maps, y_L)
        last, marked = num_layers - 1, jnp.arange(num_layers) % 2 == 0
        results[kind] = {
            "d_L": d_L,
            "product": layer(products, last).apply(entering),
            "applied": maps.apply(y_L),
            "composed": layer(maps, last).compose(layer(maps, 0)).apply(entering),
            "damped": [maps.damp(amount, num_layers).apply(y_L) for amount in (0.0, 0.25, 1.0)],
            "masked": maps.identity_where(marked).apply(y_L),
            "corrected": correct(maps, y_L, h_L, entering, taps=(0, last), packed=jnp.arange(2.0))._asdict(),
        }
    return results


compiled_everything = jax.jit(everything, static_argnums=1)


@pytest.mark.parametrize("num_layers", SIZES)
@given(st.data())
@settings(max_examples=6)
def test_scan_and_correction_are_the_plain_loop(num_layers, data):
    """Bit for bit, for every kind of map: apply, compose, damp, mask, the scan and the correction's formula."""
    numbers = data.draw(whole(num_layers))
    with jax.enable_x64(True):
        results = jax.device_get(compiled_everything(numbers, num_layers))
    last, rows = num_layers - 1, range(num_layers)
    for kind, actual in results.items():
        y_L, h_L, entering = (state_of(kind, numbers, name) for name in ("y", "h", "entering"))
        one = lambda index, tree: plain_tree(kind, numbers, index, tree)  # noqa: B023, E731
        stack = lambda trees: jax.tree.map(lambda *leaves: np.stack(leaves), *trees)  # noqa: E731
        applied = stack([one(i, layer(y_L, i)) for i in rows])
        corrections = plain_loop(kind, numbers, jax.tree.map(np.subtract, y_L, h_L))[1]
        h_new = jax.tree.map(np.add, y_L, corrections)
        expected = {
            "d_L": plain_loop(kind, numbers, y_L)[0],
            # A_N ... A_1 applied to a state is the recurrence without residuals.
            "product": layer(plain_loop(kind, numbers, jax.tree.map(np.zeros_like, y_L), entering)[0], last),
            "applied": applied,
            "composed": one(last, one(0, entering)),
            "damped": [jax.tree.map(lambda leaf: (1.0 - amount) * leaf, applied) for amount in (0.0, 0.25, 1.0)],  # noqa: B023
            "masked": stack([layer(applied if i % 2 else y_L, i) for i in rows]),
            "corrected": {
                "h_L": h_new,
                "entering": entering,
                "leaving": layer(h_new, last),
                "tapped": (layer(h_new, 0), layer(h_new, last)),
                "packed": np.arange(2.0)[None],
            },
        }
        chex.assert_trees_all_equal(actual, expected)


@given(whole(3))
@settings(max_examples=6)
def test_composition_is_associative(numbers):
    @jax.jit
    def both_orders(numbers):
        triples = [[layer(maps, i) for i in range(3)] for maps in make_maps(numbers).values()]
        return [(c.compose(b).compose(a), c.compose(b.compose(a))) for a, b, c in triples]

    with jax.enable_x64(True):
        pairs = both_orders(numbers)
    for one, other in pairs:
        chex.assert_trees_all_equal(jax.tree.leaves(one), jax.tree.leaves(other))


def weigh(tree):
    """A scalar in which every entry has its own weight."""
    return sum(jnp.sum(jnp.sin(leaf + jnp.arange(leaf.size).reshape(leaf.shape))) for leaf in jax.tree.leaves(tree))


def correct_plainly(maps, y_L, h_L, entering):
    """The correction by the sequential recurrence."""
    d = jax.tree.map(jnp.zeros_like, entering)
    rows = []
    for index in range(jax.tree.leaves(y_L)[0].shape[0]):
        y, h = layer((y_L, h_L), index)
        new = jax.tree.map(jnp.add, y, layer(maps, index).apply(d))
        d = jax.tree.map(jnp.subtract, new, h)
        rows.append(new)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)


def states_of(kind, numbers):
    return tuple(state_of(kind, numbers, name) for name in ("y", "h", "entering"))


def plain_traces(numbers):
    return {kind: correct_plainly(maps, *states_of(kind, numbers)) for kind, maps in make_maps(numbers).items()}


def scanned_traces(numbers):
    return {kind: correct(maps, *states_of(kind, numbers)).h_L for kind, maps in make_maps(numbers).items()}


@functools.cache
def value_and_gradient(run, num_layers):
    """Traces of all kinds and the gradient of a scalar of each of them, in float64."""
    with jax.enable_x64(True):
        numbers = random_numbers(num_layers, whole=False)
        loss = lambda numbers: (weigh(traces := run(numbers)), traces)  # noqa: E731
        return jax.device_get(jax.jit(jax.grad(loss, has_aux=True))(numbers))


# Rounding of float64 (1e-16 an operation) in another order, of sums that partly cancel.
ROUNDING = {"rtol": 1e-10, "atol": 1e-10}


def test_the_scan_has_the_gradient_of_the_recurrence():
    gradient, traces = value_and_gradient(scanned_traces, NUM_LAYERS)
    expected_gradient, expected = value_and_gradient(plain_traces, NUM_LAYERS)
    chex.assert_trees_all_close(traces, expected, **ROUNDING)
    chex.assert_trees_all_close(gradient, expected_gradient, **ROUNDING)
    # Every number counts but the state that enters, which the correction does not look at.
    assert all(np.abs(leaf).max() > 1e-2 for name, leaf in gradient.items() if "entering" not in name)


def test_shift_moves_every_layer_by_one():
    h_L, entering = {"a": jnp.arange(6.0).reshape(3, 2)}, {"a": jnp.full(2, -1.0)}
    chex.assert_trees_all_equal(shift(h_L, entering), {"a": np.asarray([[-1, -1], [0, 1], [2, 3]], np.float32)})


# ---------------------------------------------------------------- over a sharded layer axis

NUM_LAYERS = 8
TAPS = (0, 5, 7)
BY_LAYER = tuple(name for name in shapes_of(NUM_LAYERS) if not name.startswith(("basis_u", "basis_v", "entering")))


def correct_sharded(num_devices, numbers):
    """Corrected of every kind, with a leading axis of devices on the entering states; each device sends its number."""
    over, everywhere = PartitionSpec("layer"), PartitionSpec()

    def local(numbers):
        results = {}
        for kind, maps in make_maps(numbers).items():
            packed = {"device": jax.lax.axis_index("layer"), "scales": numbers["scalar"]}
            corrected = correct(maps, *states_of(kind, numbers), "layer", taps=TAPS, packed=packed)
            results[kind] = corrected._replace(entering=jax.tree.map(lambda leaf: leaf[None], corrected.entering))
        return results

    specs = {name: over if name in BY_LAYER else everywhere for name in numbers}
    out = dict.fromkeys(KINDS, Corrected(over, over, everywhere, everywhere, everywhere))
    mesh = make_mesh(layer=num_devices)
    return jax.shard_map(
        local, mesh=mesh, in_specs=(specs,), out_specs=out, axis_names={"layer"}, check_vma=False
    )(numbers)


@pytest.mark.parametrize("num_devices", (2, 4, 8))
def test_sharded_correct_is_unsharded(num_devices):
    """Bit for bit on whole numbers: traces, what enters and leaves, taps and what the devices tell each other."""
    with jax.enable_x64(True):
        numbers = random_numbers(NUM_LAYERS, whole=True)
        results = jax.device_get(jax.jit(functools.partial(correct_sharded, num_devices))(numbers))
        expected = jax.device_get(jax.jit(plain_traces)(numbers))
    every = NUM_LAYERS // num_devices
    for kind, actual in results.items():
        trace, entering = expected[kind], states_of(kind, numbers)[2]
        chex.assert_trees_all_equal(actual.h_L, trace)
        chex.assert_trees_all_equal(actual.leaving, layer(trace, -1))
        chex.assert_trees_all_equal(actual.tapped, tuple(layer(trace, tap) for tap in TAPS))
        # The state that enters a device's first layer is its neighbour's last one; the first gets the region's input.
        neighbours = jax.tree.map(lambda leaf: leaf[every - 1 : -1 : every], trace)  # noqa: B023
        chex.assert_trees_all_equal(actual.entering, shift_in(neighbours, entering))
        chex.assert_trees_all_equal(
            actual.packed, {"device": np.arange(num_devices), "scales": numbers["scalar"].reshape(num_devices, every)}
        )


def shift_in(rows, first):
    return jax.tree.map(lambda leaf, h: np.concatenate([np.asarray(h)[None], leaf]), rows, first)


@pytest.mark.parametrize("num_devices", (2, 4, 8))
def test_sharded_correct_has_the_unsharded_gradient(num_devices):
    """Through the trace and through the states that only the exchange brings."""

    def read(corrected):
        return {kind: (c.h_L, c.leaving, c.tapped) for kind, c in corrected.items()}

    def plainly(numbers):
        pick = lambda trace: (trace, layer(trace, -1), tuple(layer(trace, tap) for tap in TAPS))  # noqa: E731
        return {kind: pick(trace) for kind, trace in plain_traces(numbers).items()}

    gradient, traces = value_and_gradient(lambda numbers: read(correct_sharded(num_devices, numbers)), NUM_LAYERS)
    expected_gradient, expected = value_and_gradient(plainly, NUM_LAYERS)
    chex.assert_trees_all_close(traces, expected, **ROUNDING)
    chex.assert_trees_all_close(gradient, expected_gradient, **ROUNDING)
