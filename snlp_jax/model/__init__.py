"""Flax modules: one layer's maths, embeddings, logits. Never imports the solver."""

from snlp_jax.model.lm import LanguageModel, num_params

__all__ = ["LanguageModel", "num_params"]
