"""The affine recurrence along depth equals the plain loop, on one device and over a sharded layer axis."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.sharding import PartitionSpec

from snlp_jax.config import MeshConfig
from snlp_jax.parallel import make_mesh
from snlp_jax.solver.collectives import Axis, all_gather_packed
from snlp_jax.solver.linear import Corrected, affine_scan, correct, layer, shift
from snlp_jax.solver.maps import Basis, DiagonalMap, IdentityMap, MatrixMap, ScalarMap, SharedBasisMap, ZeroMap

NUM_LAYERS, TAPS = 6, (0, 4, 5)
"""Of the tests over devices."""
DIFFERENTIATED = ("diagonal", "basis")
"""Kinds whose gradients are looked at: a tree with an operand for each leaf, and maps of several operands."""
ONE_LEAF = ("matrix", "basis")
"""Kinds whose states have stream and channel axes in every leaf; the others act on any tree."""
KINDS = ("zero", "identity", "scalar", "diagonal", *ONE_LEAF)
SIZES = (1, 7)
"""A single layer, a tree with odd and even levels; six layers are below."""
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


def random_numbers(num_layers):
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.integers(-2, 3, shape) * 1.0) for name, shape in shapes_of(num_layers).items()}


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
            "composed": [map_l.apply(entering) for map_l in both_orders(maps, num_layers)],
            "damped": [maps.damp(amount, num_layers).apply(y_L) for amount in (0.0, 0.25, 1.0)],
            "masked": maps.identity_where(marked).apply(y_L),
            "corrected": correct(maps, y_L, h_L, entering, taps=(0, last), packed=jnp.arange(2.0))._asdict(),
        }
    return results


def both_orders(maps, num_layers):
    """Three maps composed from the left and from the right."""
    a, b, c = (layer(maps, index % num_layers) for index in range(3))
    return c.compose(b).compose(a), c.compose(b.compose(a))


compiled_everything = jax.jit(everything, static_argnums=1)


@pytest.mark.parametrize("num_layers", SIZES)
@given(st.data())
@settings(max_examples=6)
def test_scan_and_correction_are_the_plain_loop(num_layers, data):
    """Bit for bit, for every kind of map: apply, compose (in either order), damp, mask, the scan and the correction's
    formula."""
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
            "composed": [one(2 % num_layers, one(1 % num_layers, one(0, entering)))] * 2,
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


def correct_plainly(maps, y_L, h_L, entering):
    """The correction by the sequential recurrence."""

    def step(d, row):
        map_l, y, h = row
        new = jax.tree.map(jnp.add, y, map_l.apply(d))
        return jax.tree.map(jnp.subtract, new, h), new

    num_layers = jax.tree.leaves(y_L)[0].shape[0]
    return jax.lax.scan(step, jax.tree.map(jnp.zeros_like, entering), (maps, y_L, h_L), length=num_layers)[1]


def states_of(kind, numbers):
    return tuple(state_of(kind, numbers, name) for name in ("y", "h", "entering"))


def read(trace):
    """What every way to correct is asked for: the trace, its end and some of its layers."""
    return {"h_L": trace, "leaving": layer(trace, -1), "tapped": tuple(layer(trace, tap) for tap in TAPS)}


def plainly(numbers):
    return {kind: read(correct_plainly(maps, *states_of(kind, numbers))) for kind, maps in make_maps(numbers).items()}


def with_gradient(run):
    """Results of ``run`` for all kinds, and the gradient of a sum of some of them with whole weights.

    The results are polynomials of whole numbers with whole coefficients: again "equal" means bit for bit.
    """

    def loss(numbers):
        results = run(numbers)
        summed = [[results[kind][name] for name in ("h_L", "leaving", "tapped")] for kind in DIFFERENTIATED]
        weigh = lambda leaf: jnp.vdot(leaf, jnp.arange(leaf.size).reshape(leaf.shape) % 5 - 2.0)  # noqa: E731
        return sum(map(weigh, jax.tree.leaves(summed))), results

    with jax.enable_x64(True):
        return jax.device_get(jax.jit(jax.grad(loss, has_aux=True))(random_numbers(NUM_LAYERS)))


def test_shift_moves_every_layer_by_one():
    h_L, entering = {"a": jnp.arange(6.0).reshape(3, 2)}, {"a": jnp.full(2, -1.0)}
    chex.assert_trees_all_equal(shift(h_L, entering), {"a": np.asarray([[-1, -1], [0, 1], [2, 3]], np.float32)})


# ---------------------------------------------------------------- over a sharded layer axis

BY_LAYER = tuple(name for name in shapes_of(NUM_LAYERS) if not name.startswith(("basis_u", "basis_v", "entering")))


def over_devices(num_devices, numbers):
    """Corrected of every kind, with a leading axis of devices on the entering states; each device sends its number."""
    over, everywhere = PartitionSpec("layer"), PartitionSpec()

    def local(numbers):
        results, device = {}, jax.lax.axis_index("layer")
        for kind, maps in make_maps(numbers).items():
            packed = {"device": device, "scales": numbers["scalar"]}
            corrected = correct(maps, *states_of(kind, numbers), Axis("layer", device), taps=TAPS, packed=packed)
            entering = jax.tree.map(lambda leaf: leaf[None], corrected.entering)
            results[kind] = corrected._replace(entering=entering)._asdict()
        return results

    specs = {name: over if name in BY_LAYER else everywhere for name in numbers}
    out = Corrected(over, over, everywhere, everywhere, everywhere)._asdict()
    settings = {"axis_names": {"layer"}, "check_vma": False}
    mesh = make_mesh(MeshConfig(layer=num_devices))
    run = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=dict.fromkeys(KINDS, out), **settings)
    return run(numbers)


def test_sharded_correct_is_the_plain_loop():
    """Bit for bit: traces, what enters and leaves, taps, and what the devices tell each other. And so its gradients, up
    to rounding. Three devices of two layers are the fewest that compose totals and whose layers share what enters."""
    num_devices = 3
    numbers = jax.device_get(random_numbers(NUM_LAYERS))
    gradient, results = with_gradient(functools.partial(over_devices, num_devices))
    expected_gradient, expected = with_gradient(plainly)
    # A transposed shard_map divides by the devices and sums again: rounding of thirds in float64.
    chex.assert_trees_all_close(gradient, expected_gradient, rtol=1e-12, atol=1e-9)
    # Every number counts but the state that enters, which the correction does not look at.
    for name, leaf in gradient.items():
        assert np.any(leaf) == name.startswith(("diagonal", "basis", "y_", "h_")), name
    every = NUM_LAYERS // num_devices
    for kind, actual in results.items():
        chex.assert_trees_all_equal({name: actual[name] for name in expected[kind]}, expected[kind])
        # The state that enters a device's first layer is its neighbour's last one; the first gets the region's input.
        inputs = shift(expected[kind]["h_L"], states_of(kind, numbers)[2])
        chex.assert_trees_all_equal(actual["entering"], layer(inputs, slice(None, None, every)))
        scales = numbers["scalar"].reshape(num_devices, every)
        chex.assert_trees_all_equal(actual["packed"], {"device": np.arange(num_devices), "scales": scales})


def test_packed_trees_keep_their_types_in_one_exchange_for_each():
    """States in bfloat16 beside maps in float32 are sent as they are: not widened to the wider type."""
    tree = {
        "state": jnp.arange(6.0, dtype=jnp.bfloat16),
        "map": jnp.arange(2.0) + 0.1,
        "next": jnp.ones(4, jnp.bfloat16),
    }
    everywhere = jax.tree.map(lambda _: PartitionSpec(), tree)
    run = jax.jit(
        jax.shard_map(
            lambda tree: all_gather_packed(tree, Axis("layer", jax.lax.axis_index("layer"))),
            mesh=make_mesh(MeshConfig(layer=2)),
            in_specs=(everywhere,),
            out_specs=everywhere,
            axis_names={"layer"},
            check_vma=False,
        )
    )
    sent = re.findall(r":(\w+)\[[\d,]*\] = all_gather\[", str(jax.make_jaxpr(run)(tree)))
    assert sorted(sent) == ["bf16", "f32"]
    chex.assert_trees_all_equal(run(tree), jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), tree))
