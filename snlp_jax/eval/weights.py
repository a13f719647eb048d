"""Weights of many schedules side by side, equal parts held once."""

from collections.abc import Mapping, Sequence

from jax.sharding import Mesh

from snlp_jax.checks import check_mesh
from snlp_jax.layout import Layout, Spread, canonical, prepare, with_schedule
from snlp_jax.model import Model
from snlp_jax.parts import Weights
from snlp_jax.solver import Calibration, ParallelSegment, Schedule, Segment
from snlp_jax.types import Params


def prepare_all(
    model: Model,
    params: Params,
    schedules: Sequence[Schedule],
    *,
    num_tokens: int,
    layout: Layout,
    mesh: Mesh | None = None,
    sequential: Spread = "tensor",
    fits: Mapping[str, Calibration] | None = None,
) -> list[Weights]:
    """``prepare`` for every schedule, every array held once; on a mesh by schedules that cut the layers alike."""
    if mesh is None:
        params = canonical(model, params)
        return [prepare(model, params, each, num_tokens=num_tokens, layout=layout, fits=fits) for each in schedules]
    params = model.cast(params)
    by_cut: dict[tuple, Weights] = {}
    all_weights = []
    for schedule in schedules:
        check_mesh(schedule, mesh)
        cut = tuple(map(_shape, schedule.segments))
        if cut not in by_cut:
            by_cut[cut] = prepare(model, params, schedule, mesh=mesh, sequential=sequential, fits=fits)
        all_weights.append(with_schedule(model, by_cut[cut], schedule, fits))
    return all_weights


def _shape(segment: Segment) -> tuple:
    """What decides how a segment's weights are laid out."""
    stage = segment.stage if isinstance(segment, ParallelSegment) else None
    grouping = (type(stage), stage.num_nodes(segment.num_layers)) if stage else None
    return type(segment), segment.start, segment.stop, grouping
