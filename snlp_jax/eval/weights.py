"""Weights of many schedules side by side, equal parts held once."""

from collections.abc import Mapping, Sequence

from jax.sharding import Mesh

from snlp_jax.layout import Layout, Spread, canonical, prepare, with_schedule
from snlp_jax.model import Model
from snlp_jax.parts import Weights, nodes_of
from snlp_jax.solver import Calibration, Schedule
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
        params = canonical(model, params, num_tokens)
        return [prepare(model, params, each, num_tokens=num_tokens, layout=layout, fits=fits) for each in schedules]
    params = model.cast(params)
    by_cut: dict[tuple, Weights] = {}
    all_weights = []
    for schedule in schedules:
        cut = tuple((type(each), each.start, each.stop, nodes_of(each)) for each in schedule.segments)
        if cut not in by_cut:
            by_cut[cut] = prepare(model, params, schedule, mesh=mesh, sequential=sequential, fits=fits)
        all_weights.append(with_schedule(model, by_cut[cut], schedule, fits))
    return all_weights
