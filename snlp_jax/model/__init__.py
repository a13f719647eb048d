"""Flax modules: one layer's maths, embeddings, logits. Never imports the solver."""

from snlp_jax.model.lm import LanguageModel, num_params
from snlp_jax.model.protocol import Model

__all__ = ["LanguageModel", "Model", "num_params"]
