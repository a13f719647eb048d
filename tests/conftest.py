"""Settings of the whole suite. The environment must be set before jax is imported, hence the order below."""

import os
from importlib.metadata import version

FLAGS = os.environ.get("XLA_FLAGS", "")
XLA_FLAGS = {"xla_force_host_platform_device_count": 8}  # enough for an 8-way layer axis and for a 2 x 4 mesh
if "xla_backend_optimization_level" not in FLAGS:
    # Nearly all of the suite's time is compilation: this halves it, and the older emitters halve the rest (jaxlib 0.12
    # has them no more).
    XLA_FLAGS |= {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
    XLA_FLAGS |= {"xla_cpu_use_fusion_emitters": "false"} if version("jaxlib").startswith("0.10.") else {}
os.environ["XLA_FLAGS"] = " ".join(
    [FLAGS, *(f"--{name}={value}" for name, value in XLA_FLAGS.items() if name not in FLAGS)]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis  # noqa: E402
import jax  # noqa: E402

# A silent broadcast [D] + [L, D] hides a forgotten axis; here it raises.
jax.config.update("jax_numpy_rank_promotion", "raise")
# Tests state exactness; TF32 or bfloat16 products on an accelerator would blur them.
jax.config.update("jax_default_matmul_precision", "float32")

# The first example compiles, so its time means nothing: no deadline. The same examples on every run.
hypothesis.settings.register_profile("suite", deadline=None, max_examples=20, derandomize=True)
hypothesis.settings.load_profile("suite")
