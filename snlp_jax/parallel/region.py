"""Layers that are sharded over a mesh axis: solved in parallel with K exchanges, or run in order round the devices.

Every device holds ceil(N / n) consecutive nodes. A parallel region evaluates them all, scans its own affine maps and
exchanges one total an iteration (``snlp_jax/solver/linear.py``): K all_gathers instead of two all-reduces a layer. The
sequential pass sends the state round: n - 1 moves. Where n does not divide N, nodes of zero weights fill up the last
devices: they pass their input on and are left out of statistics, trace and aux. Other mesh axes stay automatic.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from snlp_jax.solver import BatchAxes, Correction, Init, Kept, LayerProblem, Solution, sequential, solve
from snlp_jax.solver.linear import Axis

PyTree = Any

ROWS = "data"
"""Mesh axis over which the rows of a batch are spread."""


def num_padded(num_layers: int, num_devices: int) -> int:
    """Layers including those of zero weights that make the count a multiple of the devices."""
    return -(-num_layers // num_devices) * num_devices


def pad_layers(tree: PyTree, num_layers: int) -> PyTree:
    """Zeros appended along the leading axis of every leaf, up to ``num_layers``."""

    def one(leaf: jax.Array) -> jax.Array:
        missing = num_layers - leaf.shape[0]
        return jnp.pad(leaf, [(0, missing)] + [(0, 0)] * (leaf.ndim - 1)) if missing else leaf

    return jax.tree.map(one, tree)


def solve_sharded(
    problem: LayerProblem,
    correction: Correction,
    *,
    mesh: Mesh,
    num_iters: int,
    init: Init,
    tolerance: float = 0.0,
    taps: tuple[int, ...] = (),
    with_stats: bool = False,
    kept: Kept = "last",
    axis_name: str = "layer",
) -> Solution:
    """:func:`snlp_jax.solver.solve` over a layer axis that is sharded over ``mesh`` axis ``axis_name``.

    ``problem.params`` and ``problem.ctx`` are stacks; a stack that the devices do not divide is filled up, and only its
    own layers come back. One that comes with ``problem.real`` comes back whole, the layers that do not count included:
    to cut them off a sharded trace is an exchange. ``problem.sweep_fn``, where there is one, is that of one device's
    layers. Trace and aux of the solution stay sharded; its value and tapped states are on every device.

    The program holds ``num_iters`` all_gathers, one more for an initial trace other than h0, and no other collective.
    Corrections that run down the depth (Exact, a trust region) go round the devices in every iteration besides.
    """
    settings: dict[str, Any] = {"num_iters": num_iters, "init": init, "tolerance": tolerance, "taps": taps}
    settings |= {"kept": kept}
    stats = {"residual_norm": PartitionSpec(None, axis_name)} if with_stats else {}
    if tolerance > 0:
        stats |= {"num_iters": PartitionSpec(), "sequence_iters": PartitionSpec(_rows_axis(problem, mesh))}
    solution = _on_each_device(
        problem,
        mesh,
        axis_name,
        lambda here: solve(here, correction, **settings, with_stats=with_stats),
        stats,
    )
    return solution if problem.real else real_part(solution, (0, problem.num_layers))


def sequential_sharded(
    problem: LayerProblem,
    *,
    mesh: Mesh,
    with_trace: bool = False,
    with_aux: bool = False,
    taps: tuple[int, ...] = (),
    num_microbatches: int = 1,
    axis_name: str = "layer",
) -> Solution:
    """:func:`snlp_jax.solver.sequential` over a sharded layer axis, as :func:`solve_sharded` reads and returns it.

    The program holds ``num_microbatches + n - 2`` collective-permutes of a microbatch's state and one all-reduce of the
    value and the taps, and no other collective.
    """
    settings: dict[str, Any] = {"with_trace": with_trace, "with_aux": with_aux, "taps": taps}
    solution = _on_each_device(
        problem,
        mesh,
        axis_name,
        lambda here: sequential(here, **settings, num_microbatches=num_microbatches),
        {},
    )
    return solution if problem.real else real_part(solution, (0, problem.num_layers))


def real_part(solution: Solution, real: tuple[int, int]) -> Solution:
    """Trace, aux and residuals of the layers ``real[0]`` to ``real[1] - 1`` alone."""
    pick = lambda tree: jax.tree.map(lambda leaf: leaf[slice(*real)], tree)  # noqa: E731
    stats = dict(solution.stats)
    if "residual_norm" in stats:
        stats["residual_norm"] = stats["residual_norm"][:, slice(*real)]
    return solution._replace(trace=pick(solution.trace), aux=pick(solution.aux), stats=stats)


def _rows_axis(problem: LayerProblem, mesh: Mesh) -> str | None:
    """The mesh axis over which the batch is spread, if it is and the problem says what has a batch axis."""
    if problem.batch_axes is None or mesh.shape.get(ROWS, 1) == 1:
        return None
    rows = {leaf.shape[0] for leaf in jax.tree.leaves(problem.h_in)}
    return ROWS if all(count % mesh.shape[ROWS] == 0 for count in rows) else None


def _on_each_device(
    problem: LayerProblem,
    mesh: Mesh,
    axis_name: str,
    run: Callable[[LayerProblem], Solution],
    stats: dict[str, PartitionSpec],
) -> Solution:
    """``run`` on the layers, and the rows of the batch, of every device. Other axes of the mesh stay automatic."""
    num_devices, calibration = mesh.shape[axis_name], problem.calibration
    num_layers = num_padded(problem.num_layers, num_devices)
    real = problem.real or ((0, problem.num_layers) if num_layers > problem.num_layers else None)
    rows = _rows_axis(problem, mesh)
    ctx_axes, shared_axes, aux_axis = (rows and problem.batch_axes) or BatchAxes(None, None, 0)
    by_layer, on_all = PartitionSpec(axis_name), PartitionSpec()
    state, trace = PartitionSpec(rows), PartitionSpec(axis_name, rows) if rows else by_layer
    aux = PartitionSpec(axis_name, *(None,) * aux_axis, rows) if rows else by_layer
    arrays = {
        "params": (problem.params, by_layer),
        "ctx": (problem.ctx, _specs(problem.ctx, ctx_axes, rows, axis_name)),
        "evaluations": (
            problem.evaluations,
            tuple(
                (_specs(ctx, ctx_axes, rows, axis_name), _specs(shared, shared_axes, rows))
                for ctx, shared in problem.evaluations
            ),
        ),
        "warm_L": (problem.warm_L, trace),
        "layers": (None if calibration is None else calibration.layers, by_layer),
        "place": (jnp.arange(num_devices), by_layer),
        "shared": (problem.shared, _specs(problem.shared, shared_axes, rows)),
        "h_in": (problem.h_in, state),
        "anchor": (problem.anchor, state),
        "key": (problem.key, on_all),
        "common": (None if calibration is None else calibration.common, on_all),
        "rows_place": (jnp.arange(mesh.shape[rows]) if rows else None, state),
    }
    for name in ("params", "ctx", "warm_L", "layers") if num_layers > problem.num_layers else ():
        arrays[name] = pad_layers(arrays[name][0], num_layers), arrays[name][1]

    def local(parts: dict[str, PyTree]) -> Solution:
        layers, common, place, rows_place = (parts.pop(name) for name in ("layers", "common", "place", "rows_place"))
        if calibration is not None:
            parts["calibration"] = dataclasses.replace(calibration, layers=layers, common=common)
        axis = Axis(axis_name, place[0], rows, rows_place[0] if rows else None)
        size = num_layers // num_devices
        solution = run(dataclasses.replace(problem, **parts, num_layers=size, real=real, axis=axis))
        if rows and "residual_norm" in solution.stats:  # a mean over tokens
            mean = jax.lax.pmean(solution.stats["residual_norm"], rows)
            solution = solution._replace(stats=solution.stats | {"residual_norm": mean})
        return solution

    run_everywhere = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=({name: spec for name, (_, spec) in arrays.items()},),
        out_specs=Solution(state, trace, aux, stats, state),  # type: ignore[arg-type]
        # Axes of one device are manual too: kernels that the compiler cannot split run where no axis is automatic.
        axis_names={axis_name, *filter(None, [rows]), *(name for name, size in mesh.shape.items() if size == 1)},
        check_vma=False,  # an all_gather's result is not tracked as replicated
    )
    return run_everywhere({name: tree for name, (tree, _) in arrays.items()})


def _specs(tree: PyTree, axes: PyTree, rows: str | None, *before: str) -> PyTree:
    """Specs of leaves whose batch axes are ``axes`` (after the axes ``before``), as ``LayerProblem.batch_axes`` has
    them."""

    def one(axis: int | None, part: PyTree) -> PyTree:
        spec = PartitionSpec(*before) if axis is None else PartitionSpec(*before, *(None,) * axis, rows)
        return jax.tree.map(lambda _: spec, part)

    return jax.tree.map(one, axes, tree, is_leaf=lambda axis: axis is None)
