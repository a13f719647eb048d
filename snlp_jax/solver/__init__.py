"""Layer-parallel solution of a chain of layers; knows nothing of Transformers, Flax or configs."""

from snlp_jax.solver.adaptive import solve_until
from snlp_jax.solver.affine import WithAffine, with_affine
from snlp_jax.solver.calibrated import Calibrated, CalibratedInit, Calibration, Preheat
from snlp_jax.solver.chain import BatchAxes, Chain, LayerFns, MethodData, Place
from snlp_jax.solver.corrections import (
    Correction,
    Diagonal,
    Exact,
    HyperConnection,
    Identity,
    Iteration,
    Jacobi,
    ScaledIdentity,
)
from snlp_jax.solver.each import solve_each
from snlp_jax.solver.init import NO_DATA, BatchForward, Guess, Init, PrefixState, Warm
from snlp_jax.solver.schedule import ParallelSegment, Schedule, Segment, SequentialSegment, SkippedSegment
from snlp_jax.solver.sequential import sequential
from snlp_jax.solver.solve import (
    VALUE,
    Kept,
    Result,
    Solution,
    Step,
    Wanted,
    relative_norm,
    safe_norm,
    solve,
    start,
    step,
)
from snlp_jax.solver.stages import Chunkwise, FusedSplit, PerLayer, Stage
from snlp_jax.solver.trust import TrustRegion
