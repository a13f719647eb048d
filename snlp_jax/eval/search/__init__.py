"""The fastest setting within a limit of quality: lines of settings, bisected on held-out text and timed."""

from snlp_jax.eval.search.record import Found, print_found, write_found
from snlp_jax.eval.search.search import search_run

__all__ = ["Found", "print_found", "search_run", "write_found"]
