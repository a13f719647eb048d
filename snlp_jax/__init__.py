"""Layer-parallel training and inference of Transformers in JAX."""

from snlp_jax.config import Config, ModelConfig
from snlp_jax.errors import InputError
from snlp_jax.forward import forward
from snlp_jax.layout import prepare
from snlp_jax.model import LanguageModel
from snlp_jax.notation import parse_schedule
from snlp_jax.solver import LayerProblem, Schedule, sequential, solve

__all__ = [
    "Config",
    "InputError",
    "LanguageModel",
    "LayerProblem",
    "ModelConfig",
    "Schedule",
    "forward",
    "parse_schedule",
    "prepare",
    "sequential",
    "solve",
]
