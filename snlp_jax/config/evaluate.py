"""Knobs of an evaluation."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from snlp_jax.config.check import Checked, Count, Size, require
from snlp_jax.config.mesh import MeshConfig
from snlp_jax.config.model import ModelConfig

WeightPrecision = Literal["compute", "int8", "float8"]


def check_weights(weights: str, calibration: int) -> None:
    """Refuse a precision that there is none of, or a calibration without one.

    Raises:
        InputError: names the value.
    """
    choices = get_args(WeightPrecision)
    require(weights in choices, f"weights is {weights!r}; it must be one of {', '.join(choices)}.")
    require(calibration >= 0, f"weight_calibration is {calibration}; it must be 0 or more.")
    require(
        calibration == 0 or weights != "compute",
        f"weight_calibration is {calibration}, but weights 'compute' have no scales to calibrate; set weights to int8 "
        "or float8.",
    )


@dataclass(frozen=True)
class EvalConfig(Checked, section="eval"):
    """What eval.py measures; each field is also a flag of eval.py."""

    solvers: tuple[str, ...] = ()
    """Solver settings beside the sequential pass, in the notation of snlp_jax/notation.py."""
    calibrations: tuple[str, ...] = ()
    """Calibrations to fit on training text before the evaluation, which settings then name by ``fit=``; written as in
    snlp_jax/eval/calibrations.py. They are saved beside the checkpoint, where later evaluations find them."""
    data: tuple[str, ...] = ()
    """Files, folders or globs of text to evaluate on in place of the run's own corpus, in the tokens of the run. All of
    it is held out; where something is fitted or read that was fitted (calibrations, clipped kernels), one half of its
    documents, chosen by their content, is for fits and the other is measured on."""
    seq_len: Count = 0
    """Tokens of a window, up to the model's context; 0 means the model's ``seq_len``."""
    num_windows: Size = 64
    """Held-out windows."""
    batch_size: Size = 8
    """Windows that are drawn together; fewer are evaluated at once where their states are large."""
    num_bootstrap: Size = 2000
    greedy_prompts: Count = 8
    greedy_prompt_len: Count = 64
    greedy_tokens: Count = 64
    """0 leaves out the free-running comparison."""
    timing_batch: Size = 1
    timing_len: Count = 0
    """Tokens of the timed forward; 0 means those of a window."""
    timing_repeats: Count = 20
    """0 leaves out the timing."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Devices over which the batch and the layers of each parallel region are spread."""
    sequential: Literal["tensor", "ring"] = "tensor"
    """How layers outside of the regions lie on the devices of the layer axis: split by heads and features, two
    exchanges a layer; or whole, the state going round, one exchange a device."""
    weights: WeightPrecision = "compute"
    """Kernels in the compute dtype, or of eight bits with a scale an output channel (snlp_jax/quantize.py)."""
    weight_calibration: int = 0
    """Tokens of training text on which the channels of such kernels are clipped to the least error; 0 clips none."""

    def window_len(self, model: ModelConfig) -> int:
        """Tokens of a window."""
        return self.seq_len or model.seq_len

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weights(self.weights, self.weight_calibration)
        require(
            self.mesh.ring_microbatches == 1,
            f"eval.mesh.ring_microbatches is {self.mesh.ring_microbatches}, but only training cuts its batches; set 1.",
        )


@dataclass(frozen=True)
class TaskConfig(Checked):
    """Downstream tasks of eval.py; each field is also a flag of it. No part of a run's config."""

    tasks: tuple[str, ...] = ()
    """Files of questions, one JSON object a line, {"question", "choices", "answer"} or {"question", "answer"}; then
    these are measured instead of quality and cost. See snlp_jax/eval/task_data.py."""
    num_examples: Count = 0
    """Asked of each file, spread evenly over it; 0 asks all."""
    num_shots: Count = 0
    """Examples of the beginning of each file that stand solved before every question, and are not asked."""
    prompt_template: tuple[str, ...] = ()
    """What stands before an answer, {question} in it; one for all tasks or one for each. By default
    'Question: {question}\\nAnswer:'; for text to be continued, such as HellaSwag's, give '{question}'."""
    max_new_tokens: Size = 256
    """Of a generated answer, which also ends at a blank line."""
    rule: Literal["last_eval", "refreshed", "per_iteration"] = "last_eval"
    """What the cache keeps of a parallel region while an answer is generated, as in python -m snlp_jax.infer."""
