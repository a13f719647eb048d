"""Weights of many schedules side by side, equal parts held once."""

import dataclasses
from collections.abc import Sequence

from jax.sharding import Mesh

from snlp_jax.forward import Layout, Weights, prepare
from snlp_jax.model import LanguageModel
from snlp_jax.solver import ParallelSegment, Schedule, SequentialSegment
from snlp_jax.types import Params


def prepare_all(
    model: LanguageModel,
    params: Params,
    schedules: Sequence[Schedule],
    *,
    num_tokens: int,
    layout: Layout,
    mesh: Mesh | None = None,
) -> list[Weights]:
    """``prepare`` for every schedule; those that cut the layers at the same places share their arrays."""
    params = model.cast(params)  # once, so that prepare finds nothing left to cast
    by_cut: dict[tuple[tuple[type, int, int], ...], Weights] = {}
    all_weights = []
    for schedule in schedules:
        cut = tuple((type(segment), segment.start, segment.stop) for segment in schedule.segments)
        if cut not in by_cut:
            by_cut[cut] = prepare(model, params, schedule, num_tokens=num_tokens, layout=layout, mesh=mesh)
        all_weights.append(_for_schedule(by_cut[cut], schedule))
    return all_weights


def _for_schedule(weights: Weights, schedule: Schedule) -> Weights:
    """The same arrays under the iterations, corrections and guesses of ``schedule``."""
    regions = {segment.start: segment for segment in schedule.segments if isinstance(segment, ParallelSegment)}
    segments: tuple[SequentialSegment | ParallelSegment, ...] = tuple(
        regions[segment.start] if isinstance(segment, ParallelSegment) else segment for segment in weights.segments
    )
    return dataclasses.replace(weights, segments=segments)
