"""Every knob of the project: frozen dataclasses, checked when made, saved as JSON, overridden from the command line.

A config file is a Python file that binds ``config = Config(...)``; ``python train.py FILE --field.sub value`` overrides
single fields. Fields are whole words; a count of zero or a weight of zero switches a feature off.
"""

from snlp_jax.config.data import DataConfig
from snlp_jax.config.dial import Dial
from snlp_jax.config.evaluate import EvalConfig, TaskConfig, WeightPrecision, check_weights
from snlp_jax.config.experiment import Config
from snlp_jax.config.family import NormConfig, RopeConfig, RopeScaling
from snlp_jax.config.linearize import LinearizeConfig
from snlp_jax.config.lora import LoraConfig
from snlp_jax.config.loss import (
    HiddenNormConfig,
    InitName,
    LayerSkipConfig,
    LossConfig,
    LossTerm,
    MTPConfig,
    SolverCEConfig,
    SolverTerm,
)
from snlp_jax.config.machine import MachineConfig
from snlp_jax.config.mesh import MeshConfig
from snlp_jax.config.model import Branch, Kind, ModelConfig
from snlp_jax.config.search import SearchConfig, parse_share
from snlp_jax.config.serialize import from_json, load_binding, load_config, load_dial, to_json, upgraded
from snlp_jax.config.train import OptimConfig, TrainConfig
