"""Layer-parallel training and inference of Transformers in JAX.

Every name below is imported when it is first used, so that ``import snlp_jax`` takes no time and no jax.
"""

import importlib
import sys
from types import ModuleType

from etils import epy

if sys.argv[:1] == ["-m"]:  # a command of this package, python -m snlp_jax.infer, whose parents come first
    importlib.import_module("snlp_jax.errors").hush_interrupts()

with epy.lazy_api_imports(globals()):
    from snlp_jax.config import Config, ModelConfig
    from snlp_jax.errors import InputError
    from snlp_jax.eval.evaluate import evaluate
    from snlp_jax.eval.run import evaluate_run
    from snlp_jax.forward import forward
    from snlp_jax.infer import Engine, Request, Sampling
    from snlp_jax.layout import prepare
    from snlp_jax.model import LanguageModel
    from snlp_jax.notation import parse_schedule, register_correction
    from snlp_jax.pretrained import from_pretrained
    from snlp_jax.run import Run, load_run
    from snlp_jax.solver import (
        BatchForward,
        Calibrated,
        CalibratedInit,
        Calibration,
        Chain,
        Correction,
        Diagonal,
        Exact,
        HyperConnection,
        Identity,
        Init,
        Jacobi,
        LayerFns,
        MethodData,
        ParallelSegment,
        PrefixState,
        Preheat,
        Result,
        ScaledIdentity,
        Schedule,
        Solution,
        TrustRegion,
        Wanted,
        Warm,
        sequential,
        solve,
        solve_until,
        step,
    )
    from snlp_jax.train.loop import train as train_run

__all__ = sorted(set(dir(sys.modules[__name__])) - set(globals()))


class _Package(ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        """``snlp_jax.forward`` is the function: importing the module of that name does not put it in its place."""
        if not (name == "forward" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
