"""Decoding: requests in, tokens out."""

from snlp_jax.infer.engine import Engine
from snlp_jax.infer.requests import Completion, Request, Statistics
from snlp_jax.infer.rules import CacheRule, Drafting, Placement
from snlp_jax.infer.sampling import Sampling

__all__ = ["CacheRule", "Completion", "Drafting", "Engine", "Placement", "Request", "Sampling", "Statistics"]
