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

from snlp_jax.config import MeshConfig
from snlp_jax.errors import InputError
from snlp_jax.parallel import make_mesh, sequential_sharded, solve_sharded
from snlp_jax.parallel.hlo import count_collectives
from snlp_jax.parallel.region import num_padded, pad_layers, real_part
from snlp_jax.solver import (
    BatchAxes,
    BatchForward,
    Diagonal,
    Exact,
    HyperConnection,
    Identity,
    Jacobi,
    PrefixState,
    ScaledIdentity,
    Warm,
    sequential,
    solve,
)

ROUNDING = 2e-5
"""Relative to the largest entry: float32 rounding (6e-8 an operation) of sums in another order, of layers batched by
twos and fours instead of by eight, grown by eight layers."""


def assert_close(actual, desired, tolerance=ROUNDING):
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        assert relative_error(one, other) < tolerance


def name_of(value):
    """Names of classes: whole reprs would fill the line."""
    return str(value) if isinstance(value, int) else type(value).__name__


# ---------------------------------------------------------------- small chains


def chain(num_layers):
    """``h -> s_l h + tanh(h W_l + c_l)``, a state of three sequences (or streams, for HyperConnection)."""
    bent = nonlinear(num_layers)

    def block(params, h, ctx, shared):
        branch = jnp.tanh(h @ params["w"] + params["c"][None])
        return params["s"] * h + branch, {"branch": branch}

    params = bent.params | {"s": jnp.linspace(0.5, 1.3, num_layers)}
    warm_L = 0.1 * jnp.arange(1.0, 1.0 + num_layers)[:, None, None] + bent.h_in[None]
    skip = lambda params, ctx, aux: params["s"]  # noqa: E731
    return dataclasses.replace(bent, block_fn=block, params=params, residual_map=skip, warm_L=warm_L)


def spread(problem, mesh):
    """The problem laid out as ``prepare`` does it: filled up to a multiple of the devices and spread over them."""
    over_layers, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("layer",), ()))
    num_real, num_layers = problem.num_layers, num_padded(problem.num_layers, mesh.shape["layer"])
    by_layer = pad_layers({"params": problem.params, "warm_L": problem.warm_L}, num_layers)
    placed = jax.device_put(by_layer, over_layers) | jax.device_put({"h_in": problem.h_in}, everywhere)
    is_even = num_layers == num_real
    return placed, {"num_layers": num_layers, "real": None if is_even else (0, num_real)}


def solutions(problem, correction, mesh, **settings):
    """Of the sharded and of the plain solver, and the collectives of the sharded one."""
    problem = posed(problem, correction)
    placed, counts = spread(problem, mesh)

    def sharded(placed):
        here = dataclasses.replace(problem, **placed, **counts)
        solution = solve_sharded(here, correction, mesh=mesh, **settings)
        return real_part(solution, (0, problem.num_layers))

    def plain(parts):
        return solve(dataclasses.replace(problem, **parts), correction, **settings)

    compiled = jax.jit(sharded).lower(placed).compile()
    parts = {name: getattr(problem, name) for name in placed}
    return compiled(placed), jax.jit(plain)(parts), count_collectives(compiled.as_text())


@pytest.mark.parametrize(
    "num_devices, num_layers, correction, init, num_iters",
    (
        pytest.param(2, 8, Jacobi(), PrefixState(), 1, marks=pytest.mark.slow),
        pytest.param(4, 8, Identity(), PrefixState(), 2, marks=pytest.mark.slow),
        (8, 8, Identity(damping=0.5), BatchForward(), 1),
        (4, 8, ScaledIdentity(), BatchForward(), 6),
        (2, 8, ScaledIdentity(damping=0.25), Warm(), 2),
        (8, 8, Diagonal(), PrefixState(), 2),
        pytest.param(4, 8, Diagonal(mode="vjp", reuse=True, damping=0.5), Warm(), 2, marks=pytest.mark.slow),
        (2, 8, HyperConnection(), PrefixState(), 2),
        pytest.param(4, 8, HyperConnection(damping=0.25), BatchForward(), 1, marks=pytest.mark.slow),
    ),
    ids=name_of,
)
def test_sharded_chains_are_unsharded_chains(num_devices, num_layers, correction, init, num_iters):
    """Value, trace, what the layers leave behind and residuals; K all-gathers, one more for another initial trace than
    h0, and no other collective: the states that the head asks for travel with the rest."""
    mesh = make_mesh(MeshConfig(layer=num_devices))
    settings = {"num_iters": num_iters, "init": init, "with_stats": True, "taps": (5, 0)}
    sharded, whole, collectives = solutions(chain(num_layers), correction, mesh, **settings)
    assert_close((sharded.value, sharded.trace, sharded.aux), (whole.value, whole.trace, whole.aux))
    chex.assert_trees_all_close(sharded.stats, whole.stats, rtol=1e-4, atol=1e-6)  # rounding of differences y - h
    assert_close(sharded.tapped, whole.tapped)
    over_layers = NamedSharding(mesh, PartitionSpec("layer"))
    assert sharded.trace.sharding.is_equivalent_to(over_layers, 3) and sharded.value.sharding.is_fully_replicated
    assert collectives == {"all-gather": num_iters + (not isinstance(init, PrefixState))}


@pytest.mark.parametrize(
    "num_devices, num_layers, correction, init",
    (
        (4, 5, Identity(damping=0.25), BatchForward()),  # the last device holds none of its own
        pytest.param(4, 6, HyperConnection(), Warm(), marks=pytest.mark.slow),
        (2, 7, Diagonal(), PrefixState()),
        (8, 3, ScaledIdentity(), PrefixState()),  # more devices than layers
        pytest.param(2, 3, Jacobi(), PrefixState(), marks=pytest.mark.slow),
    ),
    ids=name_of,
)
def test_regions_that_do_not_divide_the_axis_are_unsharded_chains(num_devices, num_layers, correction, init):
    """Layers of zero weights fill up the devices; nothing that comes back shows them."""
    settings = {"num_iters": 2, "init": init, "with_stats": True, "taps": (num_layers - 1, 1)}
    sharded, whole, _ = solutions(chain(num_layers), correction, make_mesh(MeshConfig(layer=num_devices)), **settings)
    assert_close((sharded.value, sharded.trace, sharded.aux), (whole.value, whole.trace, whole.aux))
    chex.assert_trees_all_close(sharded.stats, whole.stats, rtol=1e-4, atol=1e-6)  # rounding of differences y - h
    assert_close(sharded.tapped, whole.tapped)


def test_an_uneven_region_costs_no_more_exchanges():
    """As long as nobody cuts the filling off a trace that is spread over the devices."""
    mesh = make_mesh(MeshConfig(layer=4))
    placed, counts = spread(chain(6), mesh)

    def run(placed):
        problem = dataclasses.replace(chain(6), **placed, **counts)
        solution = solve_sharded(problem, ScaledIdentity(), mesh=mesh, num_iters=3, init=Warm(), taps=(2,))
        return solution.value, solution.tapped

    assert count_collectives(jax.jit(run).lower(placed).compile().as_text()) == {"all-gather": 3 + 1}


def test_weights_that_are_not_filled_up_are_filled_up():
    """``solve_sharded`` on a problem as it is, with a key of its own for the probes."""
    problem = dataclasses.replace(chain(5), key=jax.random.key(7))
    settings = {"num_iters": 2, "init": Warm()}

    @jax.jit
    def run(problem_key):
        here = dataclasses.replace(problem, key=problem_key)
        sharded = solve_sharded(here, Diagonal(), mesh=make_mesh(MeshConfig(layer=2)), **settings)
        return sharded.trace, solve(here, Diagonal(), **settings).trace

    sharded, whole = run(problem.key)
    assert_close(sharded, whole)
    assert relative_error(run(jax.random.key(8))[0], sharded) > 1e-3


@pytest.mark.parametrize("num_layers", (8, 6))
def test_a_tolerance_means_the_same_when_sharded(num_layers):
    """The same sequences stop after the same iterations: their residuals travel with the totals."""
    problem = chain(num_layers)
    problem = dataclasses.replace(problem, h_in=problem.h_in * jnp.asarray([100.0, 1000.0, 3000.0])[:, None])
    # The last sequence starts from its exact trace: one iteration, which the layers that fill up must not prolong.
    warm_L = problem.warm_L.at[:, -1].set(true_trace(problem)[:, -1])
    problem = dataclasses.replace(problem, warm_L=warm_L)
    settings = {"num_iters": num_layers, "init": Warm(), "tolerance": 1e-2, "with_stats": True, "taps": (1,)}
    mesh, correction = make_mesh(MeshConfig(layer=4)), ScaledIdentity()
    placed, counts = spread(problem, mesh)

    @jax.jit
    def run(placed, parts):
        filled = dataclasses.replace(problem, **placed, **counts)
        sharded = real_part(solve_sharded(filled, correction, mesh=mesh, **settings), (0, num_layers))
        return sharded, solve(dataclasses.replace(problem, **parts), correction, **settings)

    sharded, whole = run(placed, {name: getattr(problem, name) for name in placed})
    assert whole.stats["sequence_iters"][-1] == 1 and 1 < whole.stats["num_iters"] < num_layers
    for name in ("sequence_iters", "num_iters"):
        np.testing.assert_array_equal(sharded.stats[name], whole.stats[name])
    residuals = (solution.stats["residual_norm"] for solution in (sharded, whole))
    np.testing.assert_allclose(*residuals, rtol=1e-4, atol=1e-6)  # rounding of differences y - h; NaN where not made
    parts = lambda solution: (solution.value, solution.trace, solution.aux, solution.tapped)  # noqa: E731
    assert_close(parts(sharded), parts(whole))


def test_sharded_residual_ends_at_exactly_zero():
    """Sharding keeps the exactness at N iterations bit for bit."""
    problem, mesh = nonlinear(8), make_mesh(MeshConfig(layer=4))
    settings = {"num_iters": 9, "init": PrefixState(), "with_stats": True}

    @jax.jit
    def run():
        corrections = (Identity(), Diagonal(), HyperConnection(damping=0.5))
        return [solve_sharded(posed(problem, c), c, mesh=mesh, **settings).stats["residual_norm"] for c in corrections]

    settled = np.tril(np.ones((9, 8), bool), -1)
    for residual_norm in map(np.asarray, run()):
        np.testing.assert_array_equal(residual_norm[settled], 0.0)
        assert residual_norm[6, -1] > 0


@pytest.mark.parametrize(
    "num_devices, num_layers, correction, init",
    (
        (8, 8, ScaledIdentity(), BatchForward()),
        pytest.param(2, 4, Diagonal(), PrefixState(), marks=pytest.mark.slow),
        (2, 3, HyperConnection(), Warm()),
    ),
    ids=name_of,
)
def test_gradients_through_sharded_chains(num_devices, num_layers, correction, init):
    """Of value, trace, taps and residuals, with respect to all parameters and to the entering state."""
    mesh, problem = make_mesh(MeshConfig(layer=num_devices)), posed(chain(num_layers), correction)
    settings = {"num_iters": 2, "init": init, "taps": (1,), "with_stats": True}

    def loss(mesh, params, h_in):
        here = dataclasses.replace(problem, params=params, h_in=h_in)
        if mesh is None:
            solution = solve(here, correction, **settings)
        else:
            solution = solve_sharded(here, correction, mesh=mesh, **settings)
        scalars = jnp.sum(jnp.cos(solution.tapped[0])) + jnp.sum(jnp.log(1.0 + solution.stats["residual_norm"]))
        return jnp.sum(jnp.sin(3.0 * solution.value)) + jnp.sum(jnp.cos(solution.trace)) + scalars

    gradient = lambda mesh: jax.jit(jax.grad(functools.partial(loss, mesh), argnums=(0, 1)))(*point)  # noqa: E731
    point = (problem.params, problem.h_in)
    assert_close(gradient(mesh), gradient(None), 1e-4)  # sums of a hundred float32 terms that partly cancel


# ---------------------------------------------------------------- corrections that run down the depth, in a ring


@pytest.mark.parametrize(
    "num_devices, num_layers, correction, init",
    (
        (4, 8, Exact(), PrefixState()),
        (4, 6, Exact(damping=0.25), BatchForward()),
        (2, 8, ScaledIdentity(trust=0.5), PrefixState()),
        (4, 6, Diagonal(trust=2.0), Warm()),
        pytest.param(8, 8, Identity(trust=1.0), BatchForward(), marks=pytest.mark.slow),
    ),
    ids=name_of,
)
def test_corrections_that_run_down_the_depth_go_round_the_devices(num_devices, num_layers, correction, init):
    mesh = make_mesh(MeshConfig(layer=num_devices))
    settings = {"num_iters": 2, "init": init, "with_stats": True, "taps": (num_layers - 1, 1)}
    sharded, whole, collectives = solutions(chain(num_layers), correction, mesh, **settings)
    assert_close((sharded.value, sharded.trace, sharded.aux), (whole.value, whole.trace, whole.aux))
    assert_close(sharded.tapped, whole.tapped)
    chex.assert_trees_all_close(sharded.stats, whole.stats, rtol=1e-4, atol=1e-5)  # rounding of differences y - h
    if num_layers % num_devices == 0:
        # The delta and the state before it go round in every iteration, or the variance (once, where it is always one).
        moves = 2 * (num_devices - 1) * (2 if isinstance(correction, Exact) else 1)
        assert set(collectives) == {"all-gather", "collective-permute"}
        assert collectives["collective-permute"] <= moves and collectives["all-gather"] <= 3


# ---------------------------------------------------------------- the sequential pass in a ring


def in_ring(problem, mesh, parts, **settings):
    def run(parts):
        solution = sequential_sharded(dataclasses.replace(problem, **parts), mesh=mesh, **settings)
        return solution._replace(trace=None, aux=None) if not settings.get("with_trace") else solution

    return jax.jit(run).lower(parts).compile()


@pytest.mark.parametrize(
    "num_devices, num_layers, num_microbatches",
    ((8, 8, 1), (4, 8, 3), (2, 8, 3), (4, 6, 1), pytest.param(4, 5, 3, marks=pytest.mark.slow)),
)
def test_the_ring_is_the_sequential_pass(num_devices, num_layers, num_microbatches):
    """n - 1 moves of the state, one more a further microbatch, and one all-reduce."""
    problem, mesh = chain(num_layers), make_mesh(MeshConfig(layer=num_devices))
    settings = {"with_trace": True, "with_aux": True, "taps": (num_layers - 1, 2), "num_microbatches": num_microbatches}
    parts = {"params": problem.params, "h_in": problem.h_in}
    compiled = in_ring(problem, mesh, parts, **settings)
    ring, oracle = compiled(parts), jax.jit(lambda: sequential(problem, with_trace=True, with_aux=True))()
    assert_close(
        (ring.value, ring.trace, ring.aux), (oracle.value, oracle.trace, oracle.aux), 1e-6
    )  # other batch sizes
    assert_close(ring.tapped, (oracle.trace[-1], oracle.trace[2]), 1e-6)
    if num_layers % num_devices == 0:
        moves = {"collective-permute": num_devices - 1 + num_microbatches - 1, "all-reduce": 1}
        assert count_collectives(compiled.as_text()) == moves


def test_microbatches_take_their_rows_of_context_and_shared_inputs():
    """Rows j, j + M, ... of whatever has a batch axis go with microbatch j."""
    bent = nonlinear(4)

    def block(params, h, ctx, shared):
        return jnp.tanh(h @ params["w"]) + ctx["bias"] + shared["anchor"] * ctx["scale"], ()

    problem = dataclasses.replace(
        bent,
        block_fn=block,
        ctx={"bias": jnp.sin(jnp.arange(4.0 * 6 * 4)).reshape(4, 6, 4), "scale": jnp.arange(4.0)},
        shared={"anchor": jnp.cos(jnp.arange(24.0)).reshape(6, 4)},
        h_in=jnp.linspace(-1, 1, 24).reshape(6, 4),
        batch_axes=BatchAxes({"bias": 0, "scale": None}, {"anchor": 0}, 0),
    )
    mesh = make_mesh(MeshConfig(layer=2))
    ring = jax.jit(lambda: sequential_sharded(problem, mesh=mesh, num_microbatches=3).value)()
    assert_close(ring, sequential(problem).value)
    with pytest.raises(ValueError, match="a batch of 6 does not divide into 4 microbatches"):
        jax.jit(lambda: sequential_sharded(problem, mesh=mesh, num_microbatches=4).value)()
    with pytest.raises(ValueError, match="microbatches are for a sequential pass over sharded layers"):
        sequential(problem, num_microbatches=2)


@pytest.mark.parametrize("num_microbatches", (1, 3))
def test_gradients_through_the_ring(num_microbatches):
    """Of value, trace and taps; layers of zero weights take no part."""
    mesh, problem = make_mesh(MeshConfig(layer=4)), chain(6)

    def loss(mesh, params, h_in):
        here = dataclasses.replace(problem, params=params, h_in=h_in)
        if mesh is None:
            solution = sequential(here, with_trace=True, taps=(1,))
        else:
            settings = {"with_trace": True, "taps": (1,), "num_microbatches": num_microbatches}
            solution = sequential_sharded(here, mesh=mesh, **settings)
        rest = jnp.sum(jnp.cos(solution.trace)) + jnp.sum(jnp.cos(solution.tapped[0]))
        return jnp.sum(jnp.sin(3.0 * solution.value)) + rest

    gradient = lambda mesh: jax.jit(jax.grad(functools.partial(loss, mesh), argnums=(0, 1)))(*point)  # noqa: E731
    point = (problem.params, problem.h_in)
    assert_close(gradient(mesh), gradient(None), 1e-5)


def test_part_of_a_sharded_stack_is_that_part_alone():
    """Layers 3 to 6 of eight on four devices: the others pass the state on, and what is random is random alike."""
    whole, mesh = chain(8), make_mesh(MeshConfig(layer=4))
    cut = lambda tree: jax.tree.map(lambda leaf: leaf[3:7], tree)  # noqa: E731
    alone = dataclasses.replace(whole, params=cut(whole.params), warm_L=cut(whole.warm_L), num_layers=4)
    part = dataclasses.replace(whole, real=(3, 7))
    corrections = (Jacobi(), Identity(damping=0.5), Diagonal(stride=2), Exact(), ScaledIdentity(trust=1.0))

    @jax.jit
    def run():
        pairs = []
        for correction, init in zip(corrections, (PrefixState(), Warm(), BatchForward(), Warm(), Warm()), strict=True):
            settings = {"num_iters": 2, "init": init}
            sharded = solve_sharded(part, correction, mesh=mesh, taps=(4,), **settings)
            pairs.append((sharded, solve(alone, correction, taps=(1,), **settings)))
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
