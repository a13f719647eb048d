"""Layers over devices: the mesh and regions sharded over it."""

from snlp_jax.parallel.mesh import make_mesh
from snlp_jax.parallel.region import solve_sharded

__all__ = ["make_mesh", "solve_sharded"]
