"""A region whose layers are sharded over devices is the region on one device, at K exchanges and no more."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import count_collectives
from jax.sharding import NamedSharding, PartitionSpec
from problems import SMALL, nonlinear, random_params, random_tokens, relative_error

from snlp_jax.errors import InputError
from snlp_jax.forward import forward, prepare, split
from snlp_jax.model import LanguageModel
from snlp_jax.notation import parse_schedule
from snlp_jax.parallel import make_mesh, solve_sharded
from snlp_jax.solver import BatchForward, Exact, Identity, Jacobi, PrefixState, ScaledIdentity, SequentialSegment, solve

CONFIG = dataclasses.replace(SMALL, num_layers=8)
ROUNDING = 2e-5
"""Relative to the largest entry: float32 rounding (6e-8 an operation) of sums in another order, of layers batched by
twos and fours instead of by eight, grown by eight layers."""


def assert_close(actual, desired, tolerance=ROUNDING):
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        assert relative_error(one, other) < tolerance


# ---------------------------------------------------------------- small chains


def chain_problem(params, h_in, correction):
    scales = (lambda params, ctx: params["s"]) if isinstance(correction, ScaledIdentity) else None
    return dataclasses.replace(nonlinear(8), params=params, h_in=h_in, residual_map=scales)


@pytest.mark.parametrize(
    "num_devices, correction, init, num_iters",
    (
        (2, Jacobi(), PrefixState(), 1),
        (4, Identity(), PrefixState(), 2),
        (8, Identity(), PrefixState(), 6),
        (8, Identity(damping=0.5), BatchForward(), 1),
        (4, ScaledIdentity(), BatchForward(), 6),
        (2, ScaledIdentity(damping=0.25), BatchForward(), 2),
    ),
)
def test_sharded_chains_are_unsharded_chains(num_devices, correction, init, num_iters):
    """Value, trace, what the layers leave behind and residuals; K all-gathers, one more for a batched forward."""
    h_in, params = nonlinear(8).h_in, nonlinear(8).params | {"s": jnp.linspace(0.5, 1.3, 8)}
    settings = {"num_iters": num_iters, "init": init, "with_stats": True}
    mesh = make_mesh(layer=num_devices)
    over_layers, everywhere = NamedSharding(mesh, PartitionSpec("layer")), NamedSharding(mesh, PartitionSpec())

    def run(params, h_in):
        return solve_sharded(chain_problem(params, h_in, correction), correction, mesh=mesh, tap=5, **settings)

    arguments = jax.device_put(params, over_layers), jax.device_put(h_in, everywhere)
    compiled = jax.jit(run).lower(*arguments).compile()
    sharded, tapped = compiled(*arguments)
    whole = solve(chain_problem(params, h_in, correction), correction, **settings)
    assert_close((sharded.value, sharded.trace, sharded.aux), (whole.value, whole.trace, whole.aux))
    chex.assert_trees_all_close(sharded.stats, whole.stats, rtol=1e-4, atol=1e-6)  # rounding of differences y - h
    np.testing.assert_array_equal(tapped, sharded.trace[5])
    assert sharded.trace.sharding.is_equivalent_to(over_layers, 3) and sharded.value.sharding.is_fully_replicated
    num_gathers = num_iters + isinstance(init, BatchForward)
    assert count_collectives(compiled.as_text()) == {"all-gather": num_gathers, "all-reduce": 1}  # one sum for the tap


def test_sharded_residual_ends_at_exactly_zero():
    """Sharding keeps the exactness at N iterations bit for bit."""
    problem, mesh = nonlinear(8), make_mesh(layer=4)
    settings = {"num_iters": 9, "init": PrefixState(), "with_stats": True}
    solution, _ = jax.jit(lambda: solve_sharded(problem, Identity(), mesh=mesh, **settings))()
    settled = np.tril(np.ones((9, 8), bool), -1)
    np.testing.assert_array_equal(np.asarray(solution.stats["residual_norm"])[settled], 0.0)
    assert solution.stats["residual_norm"][6, -1] > 0


def test_gradients_through_sharded_chains():
    params = nonlinear(8).params | {"s": jnp.linspace(0.5, 1.3, 8)}
    mesh, settings = make_mesh(layer=8), {"num_iters": 2, "init": BatchForward()}

    def loss(mesh, params, h_in):
        problem = chain_problem(params, h_in, ScaledIdentity())
        if mesh is None:
            solution = solve(problem, ScaledIdentity(), **settings)
        else:
            solution, _ = solve_sharded(problem, ScaledIdentity(), mesh=mesh, **settings)
        return jnp.sum(jnp.sin(3.0 * solution.value)) + jnp.sum(jnp.cos(solution.trace))

    gradient = lambda mesh: jax.jit(jax.grad(functools.partial(loss, mesh), argnums=(0, 1)))(params, nonlinear(8).h_in)  # noqa: E731
    assert_close(gradient(mesh), gradient(None), 1e-4)  # sums of a hundred float32 terms that partly cancel


# ---------------------------------------------------------------- the Transformer


@pytest.fixture(scope="module")
def model():
    return LanguageModel(CONFIG)


@pytest.mark.parametrize(
    "num_devices, setting, all_gathers, all_reduces",
    (
        (8, "sid:n=8,k=2,init=batch_forward", 3, 1),
        (4, "idn:n=8,k=6", 6, 1),
        (2, "sid:n=2,k=1", 1, 0),  # the mid-layer state comes from the sequential prefix
        pytest.param(8, "idn:n=8,k=1", 1, 1, marks=pytest.mark.slow),
        pytest.param(4, "idn:n=8,k=2,init=batch_forward", 3, 1, marks=pytest.mark.slow),
        pytest.param(2, "sid:n=8,k=6,init=batch_forward", 7, 1, marks=pytest.mark.slow),
    ),
)
def test_sharded_forward_is_unsharded(model, num_devices, setting, all_gathers, all_reduces):
    """K all-gathers, one more for a batched forward, at most one sum for the mid-layer state, nothing else."""
    params, tokens = random_params(model), random_tokens(CONFIG)
    schedule = parse_schedule(setting, CONFIG.num_layers)
    run = lambda mesh: jax.jit(lambda w, t: forward(model, w, t, mesh=mesh))  # noqa: E731
    whole = prepare(model, params, schedule, num_tokens=tokens.size, layout="stack")
    expected = run(None)(whole, tokens)
    mesh = make_mesh(layer=num_devices)
    weights = prepare(model, params, schedule, num_tokens=tokens.size, mesh=mesh)
    for segment, blocks in zip(weights.segments, weights.blocks, strict=True):
        for leaf in jax.tree.leaves(blocks):
            # A region's weights are spread over the devices; everything else is on every one.
            assert leaf.sharding.is_fully_replicated == isinstance(segment, SequentialSegment)
    tokens = jax.device_put(tokens, NamedSharding(mesh, PartitionSpec()))
    compiled = run(mesh).lower(weights, tokens).compile()
    actual = compiled(weights, tokens)
    assert_close(actual[:3], expected[:3])
    assert_close([s.trace for s in actual.solutions], [s.trace for s in expected.solutions])
    counted = {"all-gather": all_gathers} | ({"all-reduce": all_reduces} if all_reduces else {})
    assert count_collectives(compiled.as_text()) == counted


@pytest.mark.parametrize(
    "axes, setting",
    (
        ({"data": 2, "layer": 4}, "idn:n=4,k=1,init=batch_forward"),
        pytest.param({"layer": 4}, "sid:n=4,k=2", marks=pytest.mark.slow),
    ),
)
def test_sharded_gradients_are_unsharded(axes, setting):
    """With respect to every parameter; on a mesh with a data axis the batch is spread over that as well."""
    config = dataclasses.replace(SMALL, num_layers=4)
    model = LanguageModel(config)
    params, tokens = random_params(model), random_tokens(config, length=8)

    def loss(mesh, params, tokens):
        weights = split(model, params, parse_schedule(setting, config.num_layers))
        logits = forward(model, weights, tokens, mesh=mesh).logits_BTV
        return jnp.sum(jnp.sin(logits)), logits

    gradient = lambda mesh, tokens: jax.jit(jax.grad(functools.partial(loss, mesh), has_aux=True))(params, tokens)  # noqa: E731
    mesh = make_mesh(**axes)
    expected = gradient(None, tokens)
    actual = gradient(mesh, jax.device_put(tokens, NamedSharding(mesh, PartitionSpec("data"))))
    assert_close(actual, expected, 1e-4)  # sums over tokens that partly cancel, in another order
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected[0]):
        assert np.abs(leaf).max() > 1e-3, path


# ---------------------------------------------------------------- refusals, and the counter itself


def test_refusals(model):
    mesh = make_mesh(layer=4)
    settings = {"mesh": mesh, "num_iters": 1, "init": PrefixState()}
    with pytest.raises(InputError, match="a region of 6 layers cannot be spread evenly over 4 devices"):
        solve_sharded(nonlinear(6), Identity(), **settings)
    with pytest.raises(InputError, match="Exact runs layer after layer and cannot be sharded; choose another"):
        solve_sharded(nonlinear(8), Exact(), **settings)
    with pytest.raises(InputError, match="a mesh of 2 x 8 x 1 needs 16 devices, but there are"):
        make_mesh(data=2, layer=8)


def test_prepare_refuses_an_uneven_region(model):
    schedule = parse_schedule("idn:n=6,k=1", CONFIG.num_layers)
    with pytest.raises(InputError, match="a region of 6 layers cannot be spread evenly over 4 devices"):
        prepare(model, random_params(model), schedule, num_tokens=8, mesh=make_mesh(layer=4))


def test_mesh_keeps_axes_of_size_one():
    mesh = make_mesh(layer=2)
    assert dict(mesh.shape) == {"data": 1, "layer": 2, "tensor": 1}
    assert list(mesh.devices.flat) == jax.devices()[:2]


def test_the_counter_multiplies_loops():
    """Two exchanges before a loop of five trips with three in it, and an inner loop of two trips with one."""
    mesh = make_mesh(layer=2)

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
