"""A parallel region whose layers are sharded over a mesh axis: K all_gathers instead of two all-reduces a layer.

Every device holds N / n consecutive layers, evaluates them, scans its own affine maps and exchanges one total an
iteration (``snlp_jax/solver/linear.py``). Other mesh axes stay automatic.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from snlp_jax.errors import InputError
from snlp_jax.solver import Correction, Init, LayerProblem, Solution, solve

PyTree = Any


def check_sharding(num_layers: int, correction: Correction, num_devices: int) -> None:
    """Refuse a region that cannot be sharded.

    Raises:
        InputError: its layers do not divide evenly among the devices, or its correction is sequential.
    """
    if num_layers % num_devices:
        raise InputError(
            f"a region of {num_layers} layers cannot be spread evenly over {num_devices} devices; choose a multiple."
        )
    if correction.serial_evals(num_layers):
        raise InputError(f"{type(correction).__name__} runs layer after layer and cannot be sharded; choose another.")


def solve_sharded(
    problem: LayerProblem,
    correction: Correction,
    *,
    mesh: Mesh,
    num_iters: int,
    init: Init,
    tap: int | None = None,
    with_stats: bool = False,
    axis_name: str = "layer",
) -> tuple[Solution, PyTree | None]:
    """:func:`snlp_jax.solver.solve` over a layer axis that is sharded over ``mesh`` axis ``axis_name``.

    ``problem.params`` and ``problem.ctx`` are stacks; ``sweep_fn`` is not used, since the devices hold different
    layers. Trace and aux of the solution stay sharded; its value is on every device.

    Args:
        tap: layer whose output is also returned, on every device (one more exchange).

    Raises:
        InputError: see :func:`check_sharding`.
    """
    check_sharding(problem.num_layers, correction, mesh.shape[axis_name])
    layers_here = problem.num_layers // mesh.shape[axis_name]

    def local(params: PyTree, ctx: PyTree, shared: PyTree, h_in: PyTree) -> tuple[Solution, PyTree | None]:
        here = dataclasses.replace(
            problem,
            params=params,
            ctx=ctx,
            shared=shared,
            h_in=h_in,
            num_layers=layers_here,
            sweep_fn=None,
            axis_name=axis_name,
        )
        solution = solve(here, correction, num_iters=num_iters, init=init, with_stats=with_stats)
        if tap is None:
            return solution, None
        is_owner = jax.lax.axis_index(axis_name) == tap // layers_here
        mine = jax.tree.map(lambda leaf: jnp.where(is_owner, leaf[tap % layers_here], 0), solution.trace)
        return solution, jax.lax.psum(mine, axis_name)

    over_layers, everywhere = PartitionSpec(axis_name), PartitionSpec()
    stats_spec: Any = PartitionSpec(None, axis_name)
    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(over_layers, over_layers, everywhere, everywhere),
        out_specs=(Solution(everywhere, over_layers, over_layers, stats_spec), everywhere),
        axis_names={axis_name},
        check_vma=False,  # an all_gather's result is not tracked as replicated
    )
    return run(problem.params, problem.ctx, problem.shared, problem.h_in)
