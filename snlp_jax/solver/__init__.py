"""Layer-parallel solution of a chain of layers; knows nothing of Transformers, Flax or configs."""

from snlp_jax.solver.corrections import Correction, Exact, Identity, Jacobi, ScaledIdentity
from snlp_jax.solver.init import BatchForward, Init, PrefixState
from snlp_jax.solver.problem import LayerProblem
from snlp_jax.solver.schedule import ParallelSegment, Schedule, SequentialSegment
from snlp_jax.solver.solve import Solution, relative_norm, safe_norm, sequential, solve

__all__ = [
    "BatchForward",
    "Correction",
    "Exact",
    "Identity",
    "Init",
    "Jacobi",
    "LayerProblem",
    "ParallelSegment",
    "PrefixState",
    "ScaledIdentity",
    "Schedule",
    "SequentialSegment",
    "Solution",
    "relative_norm",
    "safe_norm",
    "sequential",
    "solve",
]
