"""Weights of other people's models, to and from this library's parameters; the command is in ``__main__.py``."""

from snlp_jax.model.convert.families import FAMILIES, family_config, family_of, family_rows
from snlp_jax.model.convert.nanochat import from_nanochat, nanochat_config, nanochat_rows, to_nanochat
from snlp_jax.model.convert.table import Row, read_params, write_params
from snlp_jax.model.convert.tensor_files import TensorFiles
