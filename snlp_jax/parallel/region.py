"""Nodes that are spread over a mesh axis: solved in parallel with K exchanges, or run in order round the devices.

Every device holds ceil(N / n) consecutive nodes. A parallel region evaluates them all, scans its own affine maps and
exchanges one total an iteration (``snlp_jax/solver/linear.py``): K all_gathers instead of two all-reduces a layer. The
sequential pass sends the state round: n - 1 moves. Where n does not divide N, nodes of zero weights fill up the last
devices: they pass their input on and are left out of statistics, trace and aux. Other mesh axes stay automatic.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from snlp_jax.solver import (
    NO_DATA,
    VALUE,
    BatchAxes,
    Calibration,
    Chain,
    Correction,
    Init,
    MethodData,
    Place,
    Solution,
    Wanted,
    sequential,
    solve,
    solve_until,
)
from snlp_jax.solver.collectives import Axis
from snlp_jax.types import PyTree, is_list

LAYER = "layer"
"""Mesh axis over which nodes are spread."""
ROWS = "data"
"""Mesh axis over which the rows of a batch are spread."""


def num_padded(num_nodes: int, num_devices: int) -> int:
    """Nodes including those of zero weights that make the count a multiple of the devices."""
    return -(-num_nodes // num_devices) * num_devices


def pad_layers(tree: PyTree, num_layers: int) -> PyTree:
    """Zeros appended along the leading axis of every leaf, up to ``num_layers``."""

    def one(leaf: jax.Array) -> jax.Array:
        missing = num_layers - leaf.shape[0]
        return jnp.pad(leaf, [(0, missing)] + [(0, 0)] * (leaf.ndim - 1)) if missing else leaf

    return jax.tree.map(one, tree)


def solve_sharded(
    chain: Chain,
    correction: Correction,
    init: Init,
    data: MethodData = NO_DATA,
    *,
    mesh: Mesh | None,
    num_iters: int,
    tolerance: float = 0.0,
    want: Wanted = VALUE,
) -> Solution:
    """:func:`snlp_jax.solver.solve`, or with a tolerance ``solve_until``, see :func:`on_devices`.

    The program holds ``num_iters`` all_gathers, one more for an initial trace other than h0, and no other collective.
    Corrections that run down the depth (Exact, a trust region) go round the devices in every iteration besides.
    """

    def run(chains: Sequence[Chain], data: MethodData) -> Solution:
        if tolerance > 0:
            return solve_until(chains[0], correction, init, data, tolerance=tolerance, max_iters=num_iters, want=want)
        return solve(chains[0], correction, init, data, num_iters=num_iters, want=want)

    return on_devices(run, [chain], data, mesh, want, is_adaptive=tolerance > 0)


def sequential_sharded(
    chain: Chain,
    *,
    mesh: Mesh | None,
    with_trace: bool = False,
    with_aux: bool = False,
    taps: tuple[int, ...] = (),
    num_microbatches: int = 1,
) -> Solution:
    """:func:`snlp_jax.solver.sequential`, see :func:`on_devices`; without a mesh there are no microbatches.

    The program holds ``num_microbatches + n - 2`` collective-permutes of a microbatch's state and one all-reduce of the
    value and the taps, and no other collective.
    """
    parts = 1 if mesh is None else num_microbatches
    run = lambda chains, _: sequential(  # noqa: E731
        chains[0], with_trace=with_trace, with_aux=with_aux, taps=taps, num_microbatches=parts
    )
    return on_devices(run, [chain], NO_DATA, mesh, Wanted(taps))


def first_nodes(solution: Solution, num_nodes: int) -> Solution:
    """Trace, aux and residuals of the first ``num_nodes`` nodes alone."""
    pick = lambda tree: jax.tree.map(lambda leaf: leaf[:num_nodes], tree)  # noqa: E731
    stats = dict(solution.stats)
    if "residual_norm" in stats:
        stats["residual_norm"] = stats["residual_norm"][:, :num_nodes]
    return solution._replace(trace=pick(solution.trace), aux=pick(solution.aux), stats=stats)


def on_devices(
    run: Callable[[Sequence[Chain], MethodData], Solution],
    chains: Sequence[Chain],
    data: MethodData,
    mesh: Mesh | None,
    want: Wanted,
    *,
    is_adaptive: bool = False,
) -> Solution:
    """``run`` on the nodes, and the rows of the batch, of every device; without a mesh on those of one.

    Nodes lie over the mesh's ``layer`` axis, weights and contexts as stacks. A stack that the devices do not divide is
    filled up, and only its own nodes come back. A chain whose ``place`` has indices comes back whole, with the rows
    that do not count: to cut them off a spread trace would be an exchange. ``fns.sweep``, where there is one, is that
    of one device's nodes. Trace and aux of the solution stay spread; its value and tapped states are on every device.
    Other axes of the mesh stay automatic.
    """
    if mesh is None:
        return run(chains, data)
    chain, num_devices = chains[0], mesh.shape[LAYER]
    num_nodes, rows = num_padded(chain.num_nodes, num_devices), _rows_axis(chain, mesh)
    index_L = jnp.arange(num_nodes) if chain.place.index_L is None else chain.place.index_L
    is_padded = chain.place.is_padded or num_nodes > chain.place.size
    row_B = jnp.arange(jax.tree.leaves(chain.h_in)[0].shape[0]) if rows else None
    fit = data.fit and dataclasses.replace(data.fit, layers=pad_layers(data.fit.layers, num_nodes))
    data = data._replace(fit=fit, warm_L=pad_layers(data.warm_L, num_nodes))
    chains = [_padded(part, num_nodes) for part in chains]

    def local(chains: Sequence[Chain], data: MethodData, indices: tuple) -> Solution:
        index_L, device, row_B = indices
        place = Place(chain.place.size, index_L, row_B, Axis(LAYER, device[0], rows), is_padded)
        size = num_nodes // num_devices
        solution = run([dataclasses.replace(part, place=place, num_nodes=size) for part in chains], data)
        if rows and "residual_norm" in solution.stats:  # a mean over tokens
            mean = jax.lax.pmean(solution.stats["residual_norm"], rows)
            solution = solution._replace(stats=solution.stats | {"residual_norm": mean})
        return solution

    nodes = P(LAYER)
    fit_spec = None if fit is None else Calibration(nodes, P())  # type: ignore[arg-type]
    run_everywhere = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(
            [_chain_specs(part, rows) for part in chains],
            MethodData(fit_spec, P(LAYER, rows), P(rows), P()),  # type: ignore[arg-type]
            (nodes, nodes, P(rows)),
        ),
        out_specs=_solution_specs(chain, rows, want, is_adaptive),
        # Axes of one device are manual too: kernels that the compiler cannot split run where no axis is automatic.
        axis_names={LAYER, *filter(None, [rows]), *(name for name, size in mesh.shape.items() if size == 1)},
        check_vma=False,  # an all_gather's result is not tracked as replicated
    )
    solution = run_everywhere(chains, data, (index_L, jnp.arange(num_devices), row_B))
    is_whole = chain.place.index_L is not None or num_nodes == chain.num_nodes
    return solution if is_whole else first_nodes(solution, chain.num_nodes)


def _solution_specs(chain: Chain, rows: str | None, want: Wanted, is_adaptive: bool) -> Solution:
    """How the arrays of a solution lie."""
    stats = {"residual_norm": P(None, LAYER)} if want.stats else {}
    stats |= {"num_iters": P(), "sequence_iters": P(rows)} if is_adaptive else {}
    aux = _specs(chain.fns.batch_axes.aux if rows and chain.fns.batch_axes else None, rows, _before(chain.params))
    return Solution(P(rows), P(LAYER, rows), aux, stats, P(rows), P(rows))  # type: ignore[arg-type]


def _padded(chain: Chain, num_nodes: int) -> Chain:
    """A stack filled up to ``num_nodes``; the place is left to the devices."""
    params, ctx = (chain.params, chain.ctx) if chain.is_list else pad_layers((chain.params, chain.ctx), num_nodes)
    return dataclasses.replace(chain, params=params, ctx=ctx, place=Place(chain.place.size), num_nodes=num_nodes)


def _rows_axis(chain: Chain, mesh: Mesh) -> str | None:
    """The mesh axis over which the batch is spread, if it is and the chain says what has a batch axis."""
    if chain.fns.batch_axes is None or mesh.shape.get(ROWS, 1) == 1:
        return None
    rows = {leaf.shape[0] for leaf in jax.tree.leaves(chain.h_in)}
    return ROWS if all(count % mesh.shape[ROWS] == 0 for count in rows) else None


def _chain_specs(chain: Chain, rows: str | None) -> Chain:
    """How the arrays of a chain lie: a prefix of it with the spec of every leaf."""
    ctx_axes, shared_axes, _ = (rows and chain.fns.batch_axes) or BatchAxes(None, None, 0)
    if is_list(chain.ctx) and not is_list(ctx_axes):
        ctx_axes = [ctx_axes] * len(chain.ctx)
    return dataclasses.replace(
        chain,
        params=P(*_before(chain.params)),
        ctx=_specs(ctx_axes, rows, _before(chain.ctx)),
        shared=_specs(shared_axes, rows),
        h_in=P(rows),
        place=P(),  # type: ignore[arg-type]
    )


def _before(tree: PyTree) -> tuple[str, ...]:
    """Mesh axes of the leading dimension of a stack; the trees of a list have none."""
    return () if is_list(tree) else (LAYER,)


def _specs(axes: PyTree, rows: str | None, before: tuple[str, ...] = ()) -> PyTree:
    """Specs of leaves whose batch axes, behind those of ``before``, are ``axes``; None has no batch axis."""
    spec = lambda axis: P(*before) if axis is None else P(*before, *(None,) * axis, rows)  # noqa: E731
    return jax.tree.map(spec, axes, is_leaf=lambda axis: axis is None)
