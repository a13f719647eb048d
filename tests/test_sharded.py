"""Layers that are sharded over devices: a region is the region on one device at K exchanges and no more, and the
sequential pass goes round."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from problems import nonlinear, posed, relative_error, true_trace

from benchmarks.hlo import count_collectives
from snlp_jax.config import MeshConfig
from snlp_jax.errors import InputError
from snlp_jax.parallel import make_mesh, sequential_sharded, solve_sharded
from snlp_jax.parallel.region import first_nodes, num_padded, pad_layers
from snlp_jax.solver import (
    BatchAxes,
    BatchForward,
    Chain,
    Diagonal,
    Exact,
    HyperConnection,
    Identity,
    LayerFns,
    MethodData,
    Place,
    PrefixState,
    ScaledIdentity,
    TrustRegion,
    Wanted,
    Warm,
    sequential,
    solve,
    solve_until,
)

ROUNDING = 2e-5
"""Relative to the largest entry: float32 rounding (6e-8 an operation) of sums in another order, of layers batched by
twos and fours instead of by eight, grown by eight layers."""


def assert_close(actual, desired, tolerance=ROUNDING):
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        assert relative_error(one, other) < tolerance


def assert_same_solution(actual, desired):
    parts = lambda solution: (solution.value, solution.trace, solution.aux, solution.tapped)  # noqa: E731
    assert_close(parts(actual), parts(desired))
    np.testing.assert_array_equal(actual.result, desired.result)
    # Rounding of differences y - h; NaN where an iteration was not made.
    chex.assert_trees_all_close(actual.stats, desired.stats, rtol=1e-4, atol=1e-5)


def name_of(value):
    """Names of classes: whole reprs would fill the line."""
    return str(value) if isinstance(value, int) else type(value).__name__


# ---------------------------------------------------------------- small chains


def scaled(num_layers):
    """``h -> s_l h + tanh(h W_l + c_l)``, a state of three sequences (or streams, for HyperConnection), and a trace to
    start from."""
    bent = nonlinear(num_layers)

    def block(params, h, ctx, shared):
        branch = jnp.tanh(h @ params["w"] + params["c"][None])
        return params["s"] * h + branch, {"branch": branch}

    params = bent.params | {"s": jnp.linspace(0.5, 1.3, num_layers)}
    warm_L = 0.1 * jnp.arange(1.0, 1.0 + num_layers)[:, None, None] + bent.h_in[None]
    fns = LayerFns(block, skip=lambda params, ctx, aux: params["s"])
    return Chain.of(fns, params, bent.h_in), MethodData(warm_L=warm_L)


def spread(chain, mesh):
    """The chain laid out as ``prepare`` does it: filled up to a multiple of the devices and spread over them."""
    over_layers, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("layer",), ()))
    num_rows = num_padded(chain.num_nodes, mesh.shape["layer"])
    place = chain.place
    if num_rows > chain.num_nodes:
        place = Place(chain.num_nodes, jax.device_put(jnp.arange(num_rows), everywhere), is_padded=True)
    params = jax.device_put(pad_layers(chain.params, num_rows), over_layers)
    h_in = jax.device_put(chain.h_in, everywhere)
    return dataclasses.replace(chain, params=params, h_in=h_in, place=place, num_nodes=num_rows)


@pytest.mark.parametrize(
    "num_devices, num_layers, correction, init, num_iters",
    (
        # Layers of zero weights fill up the devices; nothing that comes back shows them.
        (4, 5, Identity(damping=0.25), BatchForward(), 2),  # the last device holds none that counts
        # These run down the depth, and go round the devices.
        (4, 4, Exact(), PrefixState(), 2),
        (2, 4, TrustRegion(0.0, ScaledIdentity(), 0.5), PrefixState(), 2),
        pytest.param(4, 6, TrustRegion(0.0, Diagonal(), 2.0), Warm(), 2, marks=pytest.mark.slow),
    ),
    ids=name_of,
)
def test_sharded_chains_are_unsharded_chains(num_devices, num_layers, correction, init, num_iters):
    """Value, trace, taps, what the layers leave behind and residuals; K all-gathers, one more for another initial trace
    than h0, and no other collective: the states that the head asks for travel with the rest."""
    mesh, (chain, data) = make_mesh(MeshConfig(layer=num_devices)), scaled(num_layers)
    chain = posed(chain, correction)
    want = Wanted(taps=(num_layers - 1, 1), stats=True)

    @jax.jit
    def run(placed, placed_data, chain, data):
        sharded = solve_sharded(placed, correction, init, placed_data, mesh=mesh, num_iters=num_iters, want=want)
        return sharded, solve(chain, correction, init, data, num_iters=num_iters, want=want)

    arguments = spread(chain, mesh), data, chain, data
    compiled = run.lower(*arguments).compile()
    sharded, whole = compiled(*arguments)
    over_layers = NamedSharding(mesh, PartitionSpec("layer"))
    assert sharded.trace.sharding.is_equivalent_to(over_layers, 3) and sharded.value.sharding.is_fully_replicated
    assert_same_solution(jax.device_get(first_nodes(sharded, num_layers)), whole)
    collectives = count_collectives(compiled.as_text())
    if isinstance(correction, Exact | TrustRegion):
        # The delta and the state before it go round in every iteration, or the variance (once, where it is always one).
        moves = 2 * (num_devices - 1) * (2 if isinstance(correction, Exact) else 1)
        assert set(collectives) == {"all-gather", "collective-permute"}
        assert collectives["collective-permute"] <= moves and collectives["all-gather"] <= 3
    else:
        assert collectives == {"all-gather": num_iters + (not isinstance(init, PrefixState))}


def test_a_tolerance_means_the_same_when_sharded():
    """The same sequences stop after the same iterations: their residuals travel with the totals."""
    chain, data = scaled(6)
    chain = dataclasses.replace(chain, h_in=chain.h_in * jnp.asarray([100.0, 1000.0, 3000.0])[:, None])
    # The last sequence starts from its exact trace: one iteration, which the layers that fill up must not prolong.
    data = data._replace(warm_L=data.warm_L.at[:, -1].set(true_trace(chain)[:, -1]))
    mesh, correction, want = make_mesh(MeshConfig(layer=4)), ScaledIdentity(), Wanted((1,), stats=True)

    @jax.jit
    def run(placed, chain, data):
        sharded = solve_sharded(placed, correction, Warm(), data, mesh=mesh, num_iters=6, tolerance=1e-2, want=want)
        whole = solve_until(chain, correction, Warm(), data, tolerance=1e-2, max_iters=6, want=want)
        return first_nodes(sharded, 6), whole

    sharded, whole = run(spread(chain, mesh), chain, data)
    assert whole.stats["sequence_iters"][-1] == 1 and 1 < whole.stats["num_iters"] < 6
    for name in ("sequence_iters", "num_iters"):
        np.testing.assert_array_equal(sharded.stats[name], whole.stats[name])
    assert_same_solution(sharded, whole)


def test_sharded_residual_ends_at_exactly_zero():
    """Sharding keeps the exactness at N iterations bit for bit."""
    chain, mesh = nonlinear(4), make_mesh(MeshConfig(layer=4))

    @jax.jit
    def run():
        norms = []
        for correction in (Identity(), Diagonal(), HyperConnection(damping=0.5)):
            solution = solve_sharded(
                posed(chain, correction),
                correction,
                PrefixState(),
                MethodData(),
                mesh=mesh,
                num_iters=5,
                want=Wanted(stats=True),
            )
            norms.append(solution.stats["residual_norm"])
        return norms

    settled = np.tril(np.ones((5, 4), bool), -1)
    for residual_norm in map(np.asarray, run()):
        np.testing.assert_array_equal(residual_norm[settled], 0.0)
        assert residual_norm[2, -1] > 0


def test_gradients_through_sharded_chains():
    """Of value, trace, taps and residuals, with respect to all parameters and to the entering state."""
    mesh, correction, (chain, data) = make_mesh(MeshConfig(layer=2)), ScaledIdentity(), scaled(3)
    want = Wanted((1,), stats=True)

    def loss(mesh, params, h_in):
        part = dataclasses.replace(chain, params=params, h_in=h_in)
        if mesh is None:
            solution = solve(part, correction, Warm(), data, num_iters=2, want=want)
        else:
            solution = solve_sharded(part, correction, Warm(), data, mesh=mesh, num_iters=2, want=want)
        scalars = jnp.sum(jnp.cos(solution.tapped[0])) + jnp.sum(jnp.log(1.0 + solution.stats["residual_norm"]))
        return jnp.sum(jnp.sin(3.0 * solution.value)) + jnp.sum(jnp.cos(solution.trace)) + scalars

    gradient = lambda mesh: jax.grad(functools.partial(loss, mesh), argnums=(0, 1))  # noqa: E731
    both = jax.jit(lambda *point: (gradient(mesh)(*point), gradient(None)(*point)))
    assert_close(*both(chain.params, chain.h_in), 1e-4)  # sums of a hundred float32 terms that partly cancel


# ---------------------------------------------------------------- the sequential pass in a ring


def test_the_ring_is_the_sequential_pass():
    """n - 1 moves of the state, one more a further microbatch, and one all-reduce."""
    (chain, _), mesh, taps = scaled(8), make_mesh(MeshConfig(layer=4)), (7, 2)

    @jax.jit
    def run(placed, chain):
        ring = sequential_sharded(placed, mesh=mesh, with_trace=True, with_aux=True, taps=taps, num_microbatches=3)
        return ring, sequential(chain, with_trace=True, with_aux=True)

    arguments = spread(chain, mesh), chain
    compiled = run.lower(*arguments).compile()
    ring, oracle = compiled(*arguments)
    expected = (oracle.value, oracle.trace, oracle.aux, tuple(oracle.trace[tap] for tap in taps))
    assert_close((ring.value, ring.trace, ring.aux, ring.tapped), expected, 1e-6)  # other batch sizes
    assert count_collectives(compiled.as_text()) == {"collective-permute": 4 - 1 + 3 - 1, "all-reduce": 1}


def test_microbatches_take_their_rows_of_context_and_shared_inputs():
    """Rows j, j + M, ... of whatever has a batch axis go with microbatch j."""

    def block(params, h, ctx, shared):
        return jnp.tanh(h @ params["w"]) + ctx["bias"] + shared["anchor"] * ctx["scale"], ()

    chain = Chain.of(
        LayerFns(block, batch_axes=BatchAxes({"bias": 0, "scale": None}, {"anchor": 0}, 0)),
        nonlinear(4).params,
        jnp.linspace(-1, 1, 24).reshape(6, 4),
        ctx={"bias": jnp.sin(jnp.arange(4.0 * 6 * 4)).reshape(4, 6, 4), "scale": jnp.arange(4.0)},
        shared={"anchor": jnp.cos(jnp.arange(24.0)).reshape(6, 4)},
    )
    mesh = make_mesh(MeshConfig(layer=2))
    in_ring = lambda num: sequential_sharded(chain, mesh=mesh, num_microbatches=num).value  # noqa: E731
    assert_close(*jax.jit(lambda: (in_ring(3), sequential(chain).value))())
    with pytest.raises(ValueError, match="a batch of 6 does not divide into 4 microbatches"):
        jax.eval_shape(lambda: in_ring(4))
    with pytest.raises(ValueError, match="microbatches"):
        sequential(chain, num_microbatches=2)


def test_gradients_through_the_ring():
    """Of value, trace and taps; layers of zero weights take no part."""
    mesh, (chain, _) = make_mesh(MeshConfig(layer=4)), scaled(6)

    def loss(mesh, params, h_in):
        part = dataclasses.replace(chain, params=params, h_in=h_in)
        if mesh is None:
            solution = sequential(part, with_trace=True, taps=(1,))
        else:
            solution = sequential_sharded(part, mesh=mesh, with_trace=True, taps=(1,), num_microbatches=3)
        rest = jnp.sum(jnp.cos(solution.trace)) + jnp.sum(jnp.cos(solution.tapped[0]))
        return jnp.sum(jnp.sin(3.0 * solution.value)) + rest

    gradient = lambda mesh: jax.grad(functools.partial(loss, mesh), argnums=(0, 1))  # noqa: E731
    both = jax.jit(lambda *point: (gradient(mesh)(*point), gradient(None)(*point)))
    assert_close(*both(chain.params, chain.h_in), 1e-5)


def test_part_of_a_sharded_stack_is_that_part_alone():
    """Layers 3 to 6 of eight on four devices: the others pass the state on, and what is random is random alike."""
    (whole, data), mesh = scaled(8), make_mesh(MeshConfig(layer=4))
    cut = lambda tree: jax.tree.map(lambda leaf: leaf[3:7], tree)  # noqa: E731
    alone = Chain.of(whole.fns, cut(whole.params), whole.h_in)
    data_alone = MethodData(warm_L=cut(data.warm_L))
    part = dataclasses.replace(whole, place=Place(4, jnp.arange(8) - 3, is_padded=True))
    cases = ((Diagonal(stride=2), Warm()),)

    @jax.jit
    def run():
        pairs = []
        for correction, init in cases:
            sharded = solve_sharded(part, correction, init, data, mesh=mesh, num_iters=2, want=Wanted((4,)))
            pairs.append((sharded, solve(alone, correction, init, data_alone, num_iters=2, want=Wanted((1,)))))
        pairs.append((sequential_sharded(part, mesh=mesh, taps=(4,)), sequential(alone, taps=(1,))))
        return pairs

    for sharded, expected in run():
        assert_close((sharded.value, sharded.tapped), (expected.value, expected.tapped))


# ---------------------------------------------------------------- refusals, and the counter itself


def test_refusals():
    with pytest.raises(InputError, match="a mesh of 2 x 8 x 1 needs 16 devices, but there are"):
        make_mesh(MeshConfig(data=2, layer=8))
    with pytest.raises(InputError, match="8 devices do not divide by mesh.layer x mesh.tensor = 3; change one"):
        make_mesh(MeshConfig(data=0, layer=3))


def test_mesh_keeps_axes_of_size_one():
    mesh = make_mesh(MeshConfig(layer=2))
    assert dict(mesh.shape) == {"data": 1, "layer": 2, "tensor": 1}
    assert list(mesh.devices.flat) == jax.devices()[:2]
    assert dict(make_mesh(MeshConfig(data=0, tensor=2)).shape) == {"data": 4, "layer": 1, "tensor": 2}


def test_the_counter_multiplies_loops():
    """Two exchanges before a loop of five trips with three in it, and an inner loop of two trips with one."""
    mesh = make_mesh(MeshConfig(layer=2))

    def local(x):
        gather = lambda x: jax.lax.all_gather(jnp.sin(x), "layer").sum(0)  # noqa: E731
        inner = lambda x, _: (jax.lax.psum(jnp.cos(x), "layer"), None)  # noqa: E731
        outer = lambda x, _: (jax.lax.scan(inner, gather(gather(gather(x))), None, length=2)[0], None)  # noqa: E731
        return jax.lax.scan(outer, gather(gather(x)), None, length=5)[0]

    spec = PartitionSpec()
    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    text = run.lower(jnp.ones((4, 4))).compile().as_text()
    assert count_collectives(text) == {"all-gather": 2 + 5 * 3, "all-reduce": 5 * 2}
    assert count_collectives(jax.jit(jnp.sin).lower(1.0).compile().as_text()) == {}
    with pytest.raises(ValueError, match="no ENTRY computation"):
        count_collectives("not a program")
