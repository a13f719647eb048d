"""Schedules: how regions cover the layers, and what they cost."""

from dataclasses import replace

import pytest

from snlp_jax.solver import (
    BatchForward,
    Chunkwise,
    Diagonal,
    Exact,
    FusedSplit,
    Identity,
    Jacobi,
    ParallelSegment,
    PerLayer,
    PrefixState,
    ScaledIdentity,
    Schedule,
    SequentialSegment,
    SkippedSegment,
    TrustRegion,
    Warm,
)

JACOBI, IDENTITY, SCALED, EXACT = Jacobi(), Identity(), ScaledIdentity(), Exact()


def last(num_layers, n, num_iters, correction=IDENTITY, init=None):
    return ParallelSegment(num_layers - n, num_layers, num_iters, correction, init or PrefixState())


def test_schedule_counts_dependent_and_total_evaluations():
    """The published setting: 24 of 32 layers in two iterations has a critical path of ten blocks."""
    assert Schedule.of(32).depth == Schedule.of(32).num_block_evals == 32 and Schedule.of(32).is_sequential
    schedule = Schedule.of(32, last(32, 24, 2))
    assert (schedule.depth, schedule.num_block_evals, schedule.is_sequential) == (10, 8 + 2 * 24, False)
    schedule = Schedule.of(32, last(32, 24, 2, init=BatchForward()))
    assert (schedule.depth, schedule.num_block_evals) == (11, 8 + 3 * 24)
    # Exact substitutes forward through N JVPs in every iteration.
    schedule = Schedule.of(32, last(32, 8, 2, EXACT))
    assert (schedule.depth, schedule.num_block_evals) == (24 + 2 * (1 + 8), 24 + 2 * (8 + 8))
    pairs = Schedule.of(6, *(ParallelSegment(i, i + 2, 1, IDENTITY) for i in (4, 0, 2)))
    assert (pairs.depth, pairs.num_block_evals) == (3, 6)


def test_schedule_fills_the_gaps_in_order():
    late, early = ParallelSegment(6, 8, 2, IDENTITY), ParallelSegment(1, 4, 1, SCALED)
    schedule = Schedule.of(10, late, early)
    expected = (SequentialSegment(0, 1), early, SequentialSegment(4, 6), late, SequentialSegment(8, 10))
    assert schedule.segments == expected
    assert Schedule.of(3, ParallelSegment(0, 3, 1, JACOBI)).segments == (ParallelSegment(0, 3, 1, JACOBI),)


def test_schedule_refuses():
    for spans, message in (
        ([(2, 2)], "region 2-2 is empty"),
        ([(5, 3)], "region 5-3 is empty"),
        ([(-1, 3)], "region -1-3 is empty or outside"),
        ([(4, 9)], "region 4-9 is empty or outside"),
        ([(0, 4), (3, 6)], "region 3-6 overlaps"),
    ):
        with pytest.raises(ValueError, match=message):
            Schedule.of(8, *(ParallelSegment(start, stop, 1, IDENTITY) for start, stop in spans))


# ---------------------------------------------------------------- segments


def test_layers_left_out_cost_nothing():
    schedule = Schedule.of(10, SkippedSegment(4, 7), ParallelSegment(7, 10, 2, IDENTITY))
    assert schedule.segments == (SequentialSegment(0, 4), SkippedSegment(4, 7), ParallelSegment(7, 10, 2, IDENTITY))
    assert (schedule.depth, schedule.num_block_evals, schedule.is_sequential) == (4 + 2, 4 + 6, False)
    assert schedule.regions == schedule.segments[2:] and SkippedSegment(4, 7).num_layers == 3
    with pytest.raises(ValueError, match="region 3-5 overlaps"):
        Schedule.of(8, SkippedSegment(3, 5), ParallelSegment(2, 4, 1, IDENTITY))


def test_two_iterations_over_eight_layers_cost():
    for correction, depth, num_block_evals in (
        (JACOBI, 2, 16),
        (TrustRegion(0.0, Identity(), 1.0), 2, 16),  # its filter evaluates no block
        (TrustRegion(0.0, Diagonal(num_probes=3), 1.0), 2, 16 + 2 * 8 * 3),
        (Diagonal(num_probes=3, mode="finite_difference"), 2, 16 + 2 * 8 * 3),
        (Diagonal(num_probes=3, mode="vjp"), 4, 16 + 2 * 8 * 3 * 2),  # a backward pass after the forward pass
        (EXACT, 2 * (1 + 8), 16 + 2 * 8),
    ):
        region = ParallelSegment(0, 8, 2, correction)
        assert (region.depth, region.num_block_evals, region.num_nodes) == (depth, num_block_evals, 8), correction


def test_a_fused_chunk_is_one_block_of_depth():
    """Depth counts chunks, evaluations count layers."""
    one = ParallelSegment(0, 8, 1, IDENTITY, stage=Chunkwise(1))
    assert (one.depth, one.num_block_evals, one.num_nodes) == (1, 8, 1)
    four = ParallelSegment(0, 8, 3, IDENTITY, BatchForward(), Chunkwise(4))
    assert (four.depth, four.num_block_evals, four.num_nodes) == (1 + 3, 4 * 8, 4)
    # Exact substitutes forward through chunks.
    assert ParallelSegment(0, 8, 2, EXACT, stage=Chunkwise(4)).depth == 2 * (1 + 4)
    fused = ParallelSegment(0, 8, 1, IDENTITY, stage=FusedSplit())
    assert (fused.depth, fused.num_block_evals, fused.num_nodes) == (1, 8, 8)
    assert Chunkwise(8).num_nodes(8) == PerLayer().num_nodes(8) == 8


def test_only_a_warm_trace_is_an_oracle():
    for init in (PrefixState(), BatchForward(), Warm()):
        region = ParallelSegment(2, 4, 1, IDENTITY, init)
        assert Schedule.of(4, region).is_oracle == isinstance(init, Warm)
        assert region.depth == 1 + isinstance(init, BatchForward)


def test_a_region_and_a_stage_refuse():
    region = ParallelSegment(0, 8, 1, IDENTITY)
    for message, make in {
        "k=0": lambda: replace(region, num_iters=0),
        "tol=-0.1": lambda: replace(region, tolerance=-0.1),
        "tol=1.0": lambda: replace(region, tolerance=1.0),
        "tol=nan": lambda: replace(region, tolerance=float("nan")),
        "3 equal chunks": lambda: replace(region, stage=Chunkwise(3)),
        "16 equal chunks": lambda: replace(region, stage=Chunkwise(16)),
        "use k=1": lambda: replace(region, stage=Chunkwise(1), num_iters=2),
        "split stage": lambda: replace(region, stage=FusedSplit(), num_iters=2),
        "init=h0": lambda: replace(region, stage=FusedSplit(), init=BatchForward()),
        "init=warm": lambda: replace(region, stage=Chunkwise(2), init=Warm()),
        "0 chunks": lambda: Chunkwise(0),
        "scales=min": lambda: Chunkwise(2, scales="min"),
        "branches=product": lambda: Chunkwise(2, branches="product"),
        "mid=middle": lambda: Chunkwise(2, mid="middle"),
    }.items():
        with pytest.raises(ValueError, match=message):
            make()
