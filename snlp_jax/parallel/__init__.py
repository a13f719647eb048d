"""Layers over devices: the mesh, what lies where on it, and layers sharded over it."""

from snlp_jax.parallel.mesh import data_shard, make_mesh, over_data, put_batch
from snlp_jax.parallel.region import sequential_sharded, solve_sharded

__all__ = ["data_shard", "make_mesh", "over_data", "put_batch", "sequential_sharded", "solve_sharded"]
