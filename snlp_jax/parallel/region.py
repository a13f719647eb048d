"""A parallel region whose layers are sharded over a mesh axis: K all_gathers instead of two all-reduces a layer.

Every device holds ceil(N / n) consecutive nodes, evaluates them, scans its own affine maps and exchanges one total an
iteration (``snlp_jax/solver/linear.py``). Where n does not divide N, nodes of zero weights fill up the last devices:
they pass their input on (A = I) and are left out of statistics, trace and aux. Other mesh axes stay automatic.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from snlp_jax.errors import InputError
from snlp_jax.solver import Correction, Init, LayerProblem, Solution, solve

PyTree = Any


def check_sharding(correction: Correction) -> None:
    """Refuse a region that cannot be sharded.

    Raises:
        InputError: its correction runs down the depth by itself.
    """
    if not correction.is_local:
        what = "with a trust region" if getattr(correction, "trust", 0) else "layer after layer"
        raise InputError(f"{type(correction).__name__} runs {what} and cannot be sharded; choose another.")


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

    ``problem.params`` and ``problem.ctx`` are stacks, padded already where ``problem.num_real`` says so; ``sweep_fn``
    is not used, since the devices hold different layers. Trace and aux of the solution stay sharded; its value and
    tapped states are on every device. The program holds ``num_iters`` all_gathers, one more for an initial
    trace other than h0, and no other collective; but where nodes of zero weights are cut off the trace, aux or
    residuals, which only happens if these are used, XLA exchanges them as well.

    Raises:
        InputError: see :func:`check_sharding`.
    """
    check_sharding(correction)
    num_real, num_devices = problem.num_real or problem.num_layers, mesh.shape[axis_name]
    num_layers = num_padded(num_real, num_devices)
    calibration = problem.calibration
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

    def local(by_layer: dict[str, PyTree], everywhere: dict[str, PyTree]) -> Solution:
        parts = by_layer | everywhere
        if calibration is not None:
            both = {"layers": by_layer["calibration"], "common": everywhere["calibration"]}
            parts["calibration"] = dataclasses.replace(calibration, **both)
        here = dataclasses.replace(
            problem,
            **parts,
            num_layers=num_layers // num_devices,
            num_real=num_real if num_layers > num_real else None,
            sweep_fn=None,
            axis_name=axis_name,
        )
        settings: dict[str, Any] = {"num_iters": num_iters, "init": init, "tolerance": tolerance, "taps": taps}
        return solve(here, correction, **settings, with_stats=with_stats)

    over_layers, on_all = PartitionSpec(axis_name), PartitionSpec()
    stats: dict[str, PartitionSpec] = {"residual_norm": PartitionSpec(None, axis_name)} if with_stats else {}
    if tolerance > 0:
        stats |= {"num_iters": on_all, "sequence_iters": on_all}
    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(over_layers, on_all),
        out_specs=Solution(on_all, over_layers, over_layers, stats, on_all),  # type: ignore[arg-type]
        axis_names={axis_name},
        check_vma=False,  # an all_gather's result is not tracked as replicated
    )
    solution = run(pad_layers(by_layer, num_layers), everywhere)
    if num_layers == num_real:
        return solution
    trace, aux = jax.tree.map(lambda leaf: leaf[:num_real], (solution.trace, solution.aux))
    stats_real = dict(solution.stats)
    if with_stats:
        stats_real["residual_norm"] = solution.stats["residual_norm"][:, :num_real]
    return solution._replace(trace=trace, aux=aux, stats=stats_real)
