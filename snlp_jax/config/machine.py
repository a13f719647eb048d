"""What the machine chooses, and not the run: precision and kernels."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from snlp_jax.config.check import Checked, Count


@dataclass(frozen=True)
class MachineConfig(Checked, section="machine"):
    """How a model is computed where it is opened. No parameter depends on it, so a run does not fix it: training,
    eval.py and ``python -m snlp_jax.infer`` take these as flags, ``--machine.attention xla``."""

    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products: auto is bfloat16 on GPU and TPU, float32 on CPU. Parameters, the residual stream, norms and
    the solver's deltas are float32 always."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """auto: cuDNN flash attention on GPU, Pallas splash attention on TPU, blockwise XLA elsewhere."""
    decode_attention: Literal["auto", "xla", "pallas"] = "auto"
    """Of tokens that follow on a cache. pallas: steps of up to 16 in one kernel for all layers of a region, on a GPU
    or TPU and over no tensor axis; longer ones by XLA. auto: XLA's, until a GPU has shown that the kernel is faster."""
    transposed_from: Count = 0
    """Width from which a CPU keeps kernels transposed where rows are few. 0: what python -m snlp_jax.infer --tune has
    measured on this machine, and reads there, or 512."""

    def for_run(self, trained_with: "MachineConfig") -> "MachineConfig":
        """This choice, for a run that was trained with another one. A dtype that the run was given stays where this
        one says auto, since it changes numbers; kernels do not, and the run's may not exist here."""
        dtype = trained_with.compute_dtype if self.compute_dtype == "auto" else self.compute_dtype
        return dataclasses.replace(self, compute_dtype=dtype)
