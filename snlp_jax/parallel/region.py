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

from snlp_jax.solver import Correction, Init, LayerProblem, Solution, sequential, solve
from snlp_jax.solver.linear import count_rows

PyTree = Any

ROW_AXIS = "data"
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
    over_layers, on_all = PartitionSpec(axis_name), PartitionSpec()
    stats = {"residual_norm": PartitionSpec(None, axis_name)} if with_stats else {}
    if tolerance > 0:
        stats |= {"num_iters": on_all, "sequence_iters": on_all}
    solution = _on_each_device(
        problem,
        mesh,
        axis_name,
        lambda here: solve(here, correction, **settings, with_stats=with_stats),
        Solution(on_all, over_layers, over_layers, stats, on_all),  # type: ignore[arg-type]
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
    over_layers, on_all = PartitionSpec(axis_name), PartitionSpec()
    settings: dict[str, Any] = {"with_trace": with_trace, "with_aux": with_aux, "taps": taps}
    solution = _on_each_device(
        problem,
        mesh,
        axis_name,
        lambda here: sequential(here, **settings, num_microbatches=num_microbatches),
        Solution(on_all, over_layers, over_layers, {}, on_all),  # type: ignore[arg-type]
    )
    return solution if problem.real else real_part(solution, (0, problem.num_layers))


def real_part(solution: Solution, real: tuple[int, int]) -> Solution:
    """Trace, aux and residuals of the layers ``real[0]`` to ``real[1] - 1`` alone."""
    pick = lambda tree: jax.tree.map(lambda leaf: leaf[slice(*real)], tree)  # noqa: E731
    stats = dict(solution.stats)
    if "residual_norm" in stats:
        stats["residual_norm"] = stats["residual_norm"][:, slice(*real)]
    return solution._replace(trace=pick(solution.trace), aux=pick(solution.aux), stats=stats)


def _on_each_device(
    problem: LayerProblem,
    mesh: Mesh,
    axis_name: str,
    run: Callable[[LayerProblem], Solution],
    out_specs: Solution,
) -> Solution:
    """``run`` on the layers of every device of the axis."""
    num_devices, calibration = mesh.shape[axis_name], problem.calibration
    num_layers = num_padded(problem.num_layers, num_devices)
    real = problem.real or ((0, problem.num_layers) if num_layers > problem.num_layers else None)
    by_layer = {
        "params": problem.params,
        "ctx": problem.ctx,
        "warm_L": problem.warm_L,
        "calibration": None if calibration is None else calibration.layers,
    }
    everywhere = {
        "shared": problem.shared,
        "h_in": problem.h_in,
        "anchor": problem.anchor,
        "key": problem.key,
        "calibration": None if calibration is None else calibration.common,
    }

    are_rows_spread = mesh.shape.get(ROW_AXIS, 1) > 1 and count_rows(problem.h_in) % mesh.shape[ROW_AXIS] == 0

    def local(by_layer: dict[str, PyTree], everywhere: dict[str, PyTree]) -> Solution:
        parts = by_layer | everywhere
        if calibration is not None:
            both = {"layers": by_layer["calibration"], "common": everywhere["calibration"]}
            parts["calibration"] = dataclasses.replace(calibration, **both)
        here = dataclasses.replace(
            problem,
            **parts,
            num_layers=num_layers // num_devices,
            real=real,
            axis_name=axis_name,
            row_axis=ROW_AXIS if are_rows_spread else None,
        )
        return run(here)

    run_everywhere = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(PartitionSpec(axis_name), PartitionSpec()),
        out_specs=out_specs,
        axis_names={axis_name},
        check_vma=False,  # an all_gather's result is not tracked as replicated
    )
    return run_everywhere(pad_layers(by_layer, num_layers), everywhere)
