"""Every knob of the project: frozen dataclasses, checked when made, saved as JSON, overridden from the command line.

A config file is a Python file that binds ``config = Config(...)``; ``python train.py FILE --field.sub value`` overrides
single fields. Fields are whole words; a count of zero or a weight of zero switches a feature off.
"""

import dataclasses
import json
import math
import runpy
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from snlp_jax.errors import InputError


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


@dataclass(frozen=True)
class ModelConfig:
    """The nanochat family of Transformers (docs/math.md, section 1). Lengths are in tokens."""

    vocab_size: int = 257
    """Entries of the tokenizer; embeddings are padded to a multiple of ``vocab_multiple`` and logits cropped."""
    num_layers: int = 12
    embed_dim: int = 128
    num_heads: int = 4
    num_kv_heads: int = 4
    mlp_ratio: int = 4
    seq_len: int = 256
    """Training context; sets the windows. The rotary embedding reaches ``rotary_multiple * seq_len``."""
    window_pattern: str = "L"
    """Tiled over the layers: L sees ``seq_len`` tokens to the left, S the ``short_window``; the last layer is an L."""
    short_window: int = 0
    """Left window of S layers: key s is visible from query t iff t - w <= s <= t. 0 means the published rule,
    a quarter of ``seq_len`` rounded up to a multiple of 128."""
    use_x0_resid: bool = True
    """Layer l reads ``resid_scale * h + x0_scale * x0`` instead of h."""
    use_value_embeds: bool = True
    """Every second layer, counted from the last, adds a gated per-token embedding to its values."""
    use_smear: bool = True
    """Mix a little of the previous token's embedding into each token's."""
    use_mid_subtract: bool = True
    """The head reads ``h_last - mid_scale * h_mid`` where h_mid is the output of layer ``num_layers // 2``."""
    num_streams: int = 0
    """Residual streams of hyper-connections (mHC), which need ``use_x0_resid=False``; 0 is one plain stream."""
    hyper_maps: Literal["static", "dynamic"] = "static"
    """Maps between streams: parameters, or functions of each token's streams."""
    sinkhorn_iters: int = 10
    """Row and column scalings that make a map between streams doubly stochastic."""
    sinkhorn_tau: float = 0.05
    """Temperature of static maps; dynamic ones have none."""
    use_qk_norm: bool = True
    logit_softcap: float = 15.0
    """Logits are ``cap * tanh(z / cap)``; 0 switches the cap off."""
    rope_base: float = 100_000.0
    rotary_multiple: int = 10
    vocab_multiple: int = 64
    remat: bool = False
    """Recompute each block in the backward pass: about one third more compute, activations of one block only."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products: auto is bfloat16 on GPU and TPU, float32 on CPU. Parameters, the residual stream, norms and
    the solver's deltas are float32 always."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """auto: cuDNN flash attention on GPU, Pallas splash attention on TPU, blockwise XLA elsewhere."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "embed_dim", "num_heads", "num_kv_heads", "mlp_ratio", "seq_len", "rotary_multiple"):
            _require(getattr(self, name) >= 1, f"model.{name} is {getattr(self, name)}; it must be at least 1.")
        _require(self.vocab_size >= 2, f"model.vocab_size is {self.vocab_size}; it must be at least 2.")
        _require(self.vocab_multiple >= 1, f"model.vocab_multiple is {self.vocab_multiple}; it must be at least 1.")
        _require(
            self.embed_dim % self.num_heads == 0,
            f"model.embed_dim {self.embed_dim} is not a multiple of model.num_heads {self.num_heads}; change one.",
        )
        _require(self.head_dim % 2 == 0, f"the head size {self.head_dim} is odd; rotary embedding needs an even one.")
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"model.num_heads {self.num_heads} is not a multiple of model.num_kv_heads {self.num_kv_heads}.",
        )
        _require(
            len(self.window_pattern) > 0 and set(self.window_pattern) <= {"S", "L"},
            f"model.window_pattern {self.window_pattern!r} may hold only the letters S and L.",
        )
        _require(self.short_window >= 0, f"model.short_window is {self.short_window}; it must be 0 or more.")
        _require(0 < self.rope_base < math.inf, f"model.rope_base is {self.rope_base}; it must be positive.")
        _require(self.logit_softcap >= 0, f"model.logit_softcap is {self.logit_softcap}; it must be 0 or more.")
        _require(self.num_streams >= 0, f"model.num_streams is {self.num_streams}; it must be 0 or more.")
        _require(
            self.num_streams == 0 or not self.use_x0_resid,
            f"model.num_streams is {self.num_streams}, but hyper-connections replace the residual scalars; "
            "set model.use_x0_resid to False.",
        )
        _require(self.sinkhorn_iters >= 1, f"model.sinkhorn_iters is {self.sinkhorn_iters}; it must be at least 1.")
        _require(0 < self.sinkhorn_tau < math.inf, f"model.sinkhorn_tau is {self.sinkhorn_tau}; it must be positive.")
        if self.use_value_embeds or self.use_smear:
            _require(self.embed_dim >= 24, f"model.embed_dim {self.embed_dim} is below 24, which the gates read.")

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def mid_layer(self) -> int:
        """Index, from 0, of the layer whose output the head subtracts."""
        return self.num_layers // 2

    @property
    def max_context(self) -> int:
        return self.rotary_multiple * self.seq_len

    @property
    def windows(self) -> tuple[int, ...]:
        """Left window of every layer, in tokens."""
        short = self.short_window or math.ceil(math.ceil(self.seq_len / 4) / 128) * 128
        pattern = [self.window_pattern[i % len(self.window_pattern)] for i in range(self.num_layers)]
        pattern[-1] = "L"
        return tuple(self.seq_len if letter == "L" else short for letter in pattern)

    @property
    def value_embed_layers(self) -> tuple[int, ...]:
        """Indices of the layers that own a value-embedding table."""
        if not self.use_value_embeds:
            return ()
        return tuple(i for i in range(self.num_layers) if i % 2 == (self.num_layers - 1) % 2)


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes tokens."""

    source: str = "builtin"
    """'builtin' (the standard-library sources of the running Python), or a file, folder or glob of .txt or .jsonl."""
    text_field: str = "text"
    """Field of a .jsonl record that holds the text."""
    tokenizer: str = "byte"
    """'byte', 'bpe' (trained on the corpus, cached by content) or the path of a tokenizer.json."""
    bpe_vocab_size: int = 4096
    val_fraction: float = 0.05
    """Share of the documents held out, chosen by a hash of each document's content."""
    cache_dir: str = ""
    """Token cache; empty means $XDG_CACHE_HOME/snlp_jax or ~/.cache/snlp_jax."""
    seed: int = 0
    """Of the shuffle."""

    def __post_init__(self) -> None:
        _require(self.source != "", "data.source is empty; give 'builtin' or a file, folder or glob.")
        _require(self.tokenizer != "", "data.tokenizer is empty; give 'byte', 'bpe' or the path of a tokenizer.json.")
        _require(0 < self.val_fraction < 1, f"data.val_fraction is {self.val_fraction}; it must lie between 0 and 1.")
        _require(self.bpe_vocab_size >= 260, f"data.bpe_vocab_size is {self.bpe_vocab_size}; it must be at least 260.")


@dataclass(frozen=True)
class OptimConfig:
    """Muon on matrices, AdamW elsewhere; the published rates of each group (docs/math.md, section 6)."""

    matrix_lr: float = 0.02
    embed_lr: float = 0.3
    value_embed_lr: float = 0.15
    head_lr: float = 0.008
    resid_scale_lr: float = 0.005
    x0_scale_lr: float = 0.5
    scalar_lr: float = 0.2
    """Of the smear scalar and gate and the mid-layer scalar."""
    hyper_lr: float = 0.01
    """Of the maps between residual streams."""
    matrix_weight_decay: float = 0.28
    lr_scale: float = 1.0
    """Multiplies every learning rate."""
    batch_reference: int = 0
    """Tokens per step at which the rates hold; others scale with the square root. 0 switches the scaling off."""
    warmup_steps: int = 40
    warmdown_fraction: float = 0.65
    """The last part of training, in which the rates fall linearly to ``final_lr_fraction``."""
    final_lr_fraction: float = 0.05
    max_grad_norm: float = 0.0
    """Clip the global gradient norm; 0 switches clipping off."""

    def __post_init__(self) -> None:
        _require(self.warmup_steps >= 0, f"optim.warmup_steps is {self.warmup_steps}; it must be 0 or more.")
        _require(0 <= self.warmdown_fraction <= 1, f"optim.warmdown_fraction is {self.warmdown_fraction}; give 0 to 1.")
        _require(0 <= self.final_lr_fraction <= 1, f"optim.final_lr_fraction is {self.final_lr_fraction}; give 0 to 1.")
        _require(0 < self.lr_scale < math.inf, f"optim.lr_scale is {self.lr_scale}; it must be positive.")
        rates = [f.name for f in dataclasses.fields(self) if f.name.endswith("_lr")]
        for name in (*rates, "matrix_weight_decay", "batch_reference", "max_grad_norm"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, f"optim.{name} is {value}; it must be 0 or more.")


@dataclass(frozen=True)
class LossTerm:
    """What every auxiliary loss shares: ``weight * ramp(step) * sum over region sizes of R_n``."""

    weight: float = 0.0
    """0 switches the term off."""
    region_sizes: tuple[int, ...] = ()
    """Sizes n of the region, the last n layers. Required when the weight is positive."""
    sample_region: bool = False
    """One size a step, drawn from (seed, step), and R multiplied by the number of sizes, instead of the sum."""
    start_fraction: float = 0.0
    """Share of the steps before the term begins; until then it is not computed at all."""
    ramp_fraction: float = 0.2
    """Share of the steps over which the weight rises linearly from 0, counted from the start."""

    def __post_init__(self) -> None:
        name = type(self).__name__
        _require(0 <= self.weight < math.inf, f"{name}.weight is {self.weight}; it must be 0 or more.")
        _require(
            len(set(self.region_sizes)) == len(self.region_sizes),
            f"{name}.region_sizes {self.region_sizes} names a size twice.",
        )
        _require(
            self.weight == 0 or len(self.region_sizes) > 0,
            f"{name}.region_sizes is empty; name at least one region size, or set the weight to 0.",
        )
        _require(all(n >= 1 for n in self.region_sizes), f"{name}.region_sizes {self.region_sizes} must all be >= 1.")
        for field_name in ("start_fraction", "ramp_fraction"):
            value = getattr(self, field_name)
            _require(0 <= value <= 1, f"{name}.{field_name} is {value}; give 0 to 1.")


CorrectionName = Literal["jac", "idn", "sid", "hcn", "diag", "exact"]
InitName = Literal["h0", "batch_forward"]


@dataclass(frozen=True)
class SolverTerm(LossTerm):
    """A loss term that runs the solver: which correction it trains for."""

    correction: CorrectionName = "idn"
    """jac makes the layers contract: each is to give the same output on the region's input as on its own."""
    diagonal_mode: Literal["jvp", "vjp", "finite_difference"] = "vjp"
    """How diag estimates a layer's diagonal, with a new random vector every step."""
    diagonal_stride: int = 1
    """diag estimates every so many layers and takes the others for the identity."""

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        _require(self.diagonal_stride >= 1, f"{name}.diagonal_stride is {self.diagonal_stride}; it must be at least 1.")


@dataclass(frozen=True)
class HiddenNormConfig(SolverTerm):
    """Distance of one solver iteration from the sequential trace, mean over tokens of ||h' - h|| / ||h||."""

    stride: int = 3
    """Compare at every stride-th layer of the region and at its last."""
    detach_target: bool = False
    """Stop the gradient into the sequential trace."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.stride >= 1, f"HiddenNormConfig.stride is {self.stride}; it must be at least 1.")


@dataclass(frozen=True)
class SolverCEConfig(SolverTerm):
    """Cross entropy of the logits that ``num_iters`` solver iterations give."""

    num_iters: int = 1
    init: InitName = "h0"

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.num_iters >= 1, f"SolverCEConfig.num_iters is {self.num_iters}; it must be at least 1.")


@dataclass(frozen=True)
class LayerSkipConfig(LossTerm):
    """The control published as a stride-0 solver loss: only the last layer, run on the region's input."""

    detach_target: bool = False


@dataclass(frozen=True)
class LossConfig:
    """Cross entropy of the sequential pass plus any of the auxiliary terms."""

    sequential_weight: float = 1.0
    hidden_norm: HiddenNormConfig = field(default_factory=HiddenNormConfig)
    solver_ce: SolverCEConfig = field(default_factory=SolverCEConfig)
    layer_skip: LayerSkipConfig = field(default_factory=LayerSkipConfig)

    def __post_init__(self) -> None:
        weight = self.sequential_weight
        _require(0 <= weight < math.inf, f"loss.sequential_weight is {weight}; it must be 0 or more.")
        _require(weight > 0 or len(self.terms) > 0, "loss.sequential_weight is 0 and no other term is switched on.")

    @property
    def terms(self) -> dict[str, LossTerm]:
        """The terms that are switched on, by field name."""
        named = {"hidden_norm": self.hidden_norm, "solver_ce": self.solver_ce, "layer_skip": self.layer_skip}
        return {name: term for name, term in named.items() if term.weight > 0}


@dataclass(frozen=True)
class TrainConfig:
    num_steps: int = 500
    batch_size: int = 16
    """Sequences per step, over all processes."""
    num_microbatches: int = 1
    """Split each batch and add up the gradients: less memory, same result."""
    seed: int = 0
    """Of the parameters and of the sampled region sizes."""
    log_every: int = 10
    eval_every: int = 100
    eval_batches: int = 8
    checkpoint_every: int = 100
    keep_last: int = 2
    """Checkpoints kept besides the best one."""
    sample_every: int = 0
    """Print a text sample every so many steps; 0 switches it off."""
    sample_tokens: int = 64
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "num_microbatches", "log_every", "keep_last", "eval_batches"):
            _require(getattr(self, name) >= 1, f"train.{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("eval_every", "checkpoint_every", "sample_every", "sample_tokens"):
            _require(getattr(self, name) >= 0, f"train.{name} is {getattr(self, name)}; it must be 0 or more.")
        _require(
            self.batch_size % self.num_microbatches == 0,
            f"train.batch_size {self.batch_size} is not a multiple of train.num_microbatches {self.num_microbatches}.",
        )


@dataclass(frozen=True)
class MeshConfig:
    """Devices as a grid ``data x layer x tensor`` (docs/scaling.md). Not part of what a run learns: a checkpoint is
    restored onto any other mesh."""

    data: int = 1
    """Parts of the batch; in training parameters and optimizer state are spread over them too. 0 takes all devices that
    the other two leave."""
    layer: int = 1
    """Parts of the depth: a region's layers are evaluated on all of them at once."""
    tensor: int = 1
    """Parts of heads, MLP features and vocabulary."""
    ring_microbatches: int = 1
    """Where the sequential pass goes round the layer axis, the batch follows in so many parts, so that a device need
    not wait for the others; as many as ``layer`` or more keep them busy."""

    def __post_init__(self) -> None:
        _require(self.data >= 0, f"mesh.data is {self.data}; it must be 0 or more.")
        for name in ("layer", "tensor", "ring_microbatches"):
            _require(getattr(self, name) >= 1, f"mesh.{name} is {getattr(self, name)}; it must be at least 1.")


@dataclass(frozen=True)
class EvalConfig:
    """What eval.py measures; each field is also a flag of eval.py."""

    solvers: tuple[str, ...] = ()
    """Solver settings beside the sequential pass, in the notation of snlp_jax/notation.py."""
    calibrations: tuple[str, ...] = ()
    """Calibrations to fit on training text before the evaluation, which settings then name by ``fit=``; written as in
    snlp_jax/eval/calibrations.py. They are saved beside the checkpoint, where later evaluations find them."""
    num_windows: int = 64
    """Held-out windows of ``seq_len`` tokens."""
    batch_size: int = 8
    num_bootstrap: int = 2000
    greedy_prompts: int = 8
    greedy_prompt_len: int = 64
    greedy_tokens: int = 64
    """0 leaves out the free-running comparison."""
    timing_batch: int = 1
    timing_len: int = 0
    """Tokens of the timed forward; 0 means the model's ``seq_len``."""
    timing_repeats: int = 20
    """0 leaves out the timing."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Devices over which the batch and the layers of each parallel region are spread."""
    sequential: Literal["tensor", "ring"] = "tensor"
    """How layers outside of the regions lie on the devices of the layer axis: split by heads and features, two
    exchanges a layer; or whole, the state going round, one exchange a device."""

    def __post_init__(self) -> None:
        for name in ("num_windows", "batch_size", "num_bootstrap", "timing_batch"):
            _require(getattr(self, name) >= 1, f"eval.{name} is {getattr(self, name)}; it must be at least 1.")
        _require(
            self.mesh.ring_microbatches == 1,
            f"eval.mesh.ring_microbatches is {self.mesh.ring_microbatches}, but only training cuts its batches; set 1.",
        )
        for name in ("greedy_prompts", "greedy_prompt_len", "greedy_tokens", "timing_len", "timing_repeats"):
            _require(getattr(self, name) >= 0, f"eval.{name} is {getattr(self, name)}; it must be 0 or more.")


@dataclass(frozen=True)
class Config:
    """One experiment."""

    name: str = "run"
    run_dir: str = ""
    """Where the run writes; empty means runs/NAME."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Of training."""
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        for name, term in self.loss.terms.items():
            worst = max(term.region_sizes)
            _require(
                worst <= self.model.num_layers,
                f"loss.{name}.region_sizes holds {worst}, but the model has {self.model.num_layers} layers.",
            )
            correction, has_streams = getattr(term, "correction", None), self.model.num_streams > 0
            _require(
                correction not in (("sid",) if has_streams else ("hcn",)),
                f"loss.{name}.correction {correction!r} does not fit model.num_streams {self.model.num_streams}: "
                "hcn is for models with residual streams, sid for those without.",
            )

        _check_mesh(self)

    @property
    def run_path(self) -> Path:
        return Path(self.run_dir or f"runs/{self.name}")


def _check_mesh(config: Config) -> None:
    """Refuse a mesh that the training state and its batches cannot be divided over."""
    mesh, micro = config.mesh, config.train.batch_size // config.train.num_microbatches
    _require(
        config.model.num_layers % mesh.layer == 0,
        f"model.num_layers {config.model.num_layers} is not a multiple of mesh.layer {mesh.layer}; change one.",
    )
    ring = mesh.ring_microbatches
    _require(
        mesh.layer > 1 or ring == 1,
        f"mesh.ring_microbatches is {ring}, but with mesh.layer 1 there is no ring; use train.num_microbatches.",
    )
    parts = max(mesh.data, 1) * ring
    _require(
        micro % parts == 0,
        f"a batch of {micro} (train.batch_size / train.num_microbatches) is not a multiple of {parts} "
        "(mesh.data x mesh.ring_microbatches); change one.",
    )


def to_json(config: Any) -> str:
    """The config as indented JSON; ``from_json(to_json(c)) == c``."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str, cls: type = Config) -> Any:
    """Inverse of ``to_json``. Raises InputError for unknown fields and wrong types."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"the saved config is not valid JSON ({error}).") from error
    return _build(cls, values, cls.__name__.lower())


def load_config(path: str | Path) -> Config:
    """Run a config file and return its ``config``."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"config file {str(path)!r} does not exist.")
    try:
        config = runpy.run_path(str(path)).get("config")
    except SyntaxError as error:
        raise InputError(
            f"config file {str(path)!r} is not valid Python (line {error.lineno}: {error.msg})."
        ) from error
    if not isinstance(config, Config):
        raise InputError(f"config file {str(path)!r} does not bind `config = Config(...)`.")
    return config


def _build(kind: Any, value: Any, where: str) -> Any:
    """Check a JSON value against a type annotation and turn it into that type."""
    origin = typing.get_origin(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        _require(isinstance(value, dict), f"{where} must be an object, not {value!r}.")
        hints = typing.get_type_hints(kind)
        unknown = sorted(set(value) - {f.name for f in dataclasses.fields(kind)})
        _require(not unknown, f"{where} has no field {unknown[0] if unknown else ''!r}.")
        return kind(**{name: _build(hints[name], item, f"{where}.{name}") for name, item in value.items()})
    if origin is tuple:
        _require(isinstance(value, list | tuple), f"{where} must be a list, not {value!r}.")
        return tuple(_build(typing.get_args(kind)[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is Literal:
        choices = typing.get_args(kind)
        _require(value in choices, f"{where} is {value!r}; choose one of {', '.join(map(repr, choices))}.")
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _build(next(arg for arg in typing.get_args(kind) if arg is not type(None)), value, where)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    is_right = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
    _require(is_right, f"{where} is {value!r}; it must be of type {kind.__name__}.")
    return value
