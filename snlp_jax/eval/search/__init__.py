"""The fastest setting within a limit of quality: candidates, what they cost, and a race of them on held-out text."""

from snlp_jax.eval.search.record import Found, print_found, write_found
from snlp_jax.eval.search.run import search_run

__all__ = ["Found", "print_found", "search_run", "write_found"]
