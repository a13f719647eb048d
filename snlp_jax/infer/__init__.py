"""Decoding: requests in, tokens out."""

from snlp_jax.infer.engine import Completion, Engine, Request, Statistics
from snlp_jax.infer.rules import CacheRule
from snlp_jax.infer.sampling import Sampling

__all__ = ["CacheRule", "Completion", "Engine", "Request", "Sampling", "Statistics"]
