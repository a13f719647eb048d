"""The fastest setting within a limit of quality: lines of settings, bisected on held-out text and timed."""

from snlp_jax.eval.search.search import Search as Search
