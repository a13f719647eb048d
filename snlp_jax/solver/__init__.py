"""Layer-parallel solution of a chain of layers; knows nothing of Transformers, Flax or configs."""

from snlp_jax.solver.calibrated import Calibrated, CalibratedInit, Calibration, Preheat
from snlp_jax.solver.corrections import (
    Correction,
    Diagonal,
    Exact,
    HyperConnection,
    Identity,
    Jacobi,
    ScaledIdentity,
)
from snlp_jax.solver.init import BatchForward, Guess, Init, PrefixState, Warm
from snlp_jax.solver.problem import BatchAxes, Iteration, LayerProblem
from snlp_jax.solver.schedule import ParallelSegment, Schedule, Segment, SequentialSegment, SkippedSegment
from snlp_jax.solver.solve import Kept, Solution, relative_norm, safe_norm, sequential, solve
from snlp_jax.solver.stages import Chunkwise, FusedSplit, PerLayer, Stage

__all__ = [
    "BatchAxes",
    "BatchForward",
    "Calibrated",
    "CalibratedInit",
    "Calibration",
    "Chunkwise",
    "Correction",
    "Diagonal",
    "Exact",
    "FusedSplit",
    "Guess",
    "HyperConnection",
    "Identity",
    "Init",
    "Iteration",
    "Jacobi",
    "Kept",
    "LayerProblem",
    "ParallelSegment",
    "PerLayer",
    "PrefixState",
    "Preheat",
    "ScaledIdentity",
    "Schedule",
    "Segment",
    "SequentialSegment",
    "SkippedSegment",
    "Solution",
    "Stage",
    "Warm",
    "relative_norm",
    "safe_norm",
    "sequential",
    "solve",
]
