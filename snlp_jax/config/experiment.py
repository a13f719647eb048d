"""One experiment: all of its knobs, and what has to fit between them."""

from dataclasses import dataclass, field
from pathlib import Path

from snlp_jax.config.check import Checked
from snlp_jax.config.data import DataConfig
from snlp_jax.config.evaluate import EvalConfig
from snlp_jax.config.lora import LoraConfig
from snlp_jax.config.loss import LossConfig
from snlp_jax.config.machine import MachineConfig
from snlp_jax.config.mesh import MeshConfig
from snlp_jax.config.model import Kind, ModelConfig
from snlp_jax.config.train import OptimConfig, TrainConfig
from snlp_jax.errors import InputError


@dataclass(frozen=True)
class Config(Checked, section="config"):
    """One experiment."""

    name: str = "run"
    run_dir: str = ""
    """Where the run writes; empty means runs/NAME."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Of training."""
    machine: MachineConfig = field(default_factory=MachineConfig)
    """Of training."""
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        model, mtp = self.model, self.loss.mtp
        for name, term in self.loss.terms.items():
            worst, correction = max(term.region_sizes), getattr(term, "correction", None)
            if worst > model.num_layers:
                raise InputError(
                    f"loss.{name}.region_sizes holds {worst}, but the model has {model.num_layers} layers."
                )
            if correction == ("sid" if model.num_streams else "hcn"):
                raise InputError(
                    f"loss.{name}.correction {correction!r} does not fit model.num_streams {model.num_streams}: hcn is "
                    "for models with residual streams, sid for those without."
                )
        if mtp.weight > 0 and model.num_mtp_heads == 0:
            raise InputError(f"loss.mtp.weight is {mtp.weight}, but model.num_mtp_heads is 0; give the model heads.")
        if self.machine.attention == "cudnn":
            if self.data.mask_documents:
                raise InputError("data.mask_documents does not run on machine.attention 'cudnn'; use 'auto'.")
            if model.attention_softcap:
                cap = model.attention_softcap
                raise InputError(
                    f"machine.attention 'cudnn' has no model.attention_softcap, which is {cap}; use 'auto'."
                )
        if self.lora.rank > 0:
            _check_lora(self)
        _check_mesh(self)

    @property
    def run_path(self) -> Path:
        return Path(self.run_dir or f"runs/{self.name}")


def _check_lora(config: Config) -> None:
    """Refuse adapters of nothing."""
    lora, model = config.lora, config.model
    if not config.train.init_from:
        raise InputError(f"lora.rank is {lora.rank}, but train.init_from is empty; name the run that they adapt.")
    if config.train.trainable:
        raise InputError("train.trainable is set, but adapters train what lora.targets names; leave one out.")
    if "gate" in lora.targets and model.mlp == "relu2":
        raise InputError("lora.targets holds 'gate', which an MLP with model.mlp 'relu2' lacks; leave it out.")
    linear = {"linear_attn", "linear_mlp"}
    if linear & set(lora.targets) and model.linear_rank > 0:
        raise InputError(
            f"lora.targets holds linear maps, but these have model.linear_rank {model.linear_rank}; leave them out."
        )
    found = {f"{name}_{kind[name]}" for kind in map(Kind._asdict, model.kinds) for name in kind}
    for target in lora.targets:
        branch = "attn" if target in ("query", "key", "value", "out", "linear_attn") else "mlp"
        if f"{branch}_{'linear' if target in linear else 'full'}" not in found:
            raise InputError(f"lora.targets holds {target!r}, which no layer of this model has; leave it out.")


def _check_mesh(config: Config) -> None:
    """Refuse a mesh that the training state and its batches cannot be divided over."""
    mesh, model, micro = config.mesh, config.model, config.train.batch_size // config.train.num_microbatches
    if model.num_layers % mesh.layer:
        raise InputError(f"model.num_layers {model.num_layers} is not a multiple of mesh.layer {mesh.layer}.")
    if mesh.layer > 1 and model.replaced_layers:
        raise InputError(
            f"mesh.layer is {mesh.layer}, but layers {model.replaced_layers} of the model have linear or dropped "
            "branches, and layers that differ cannot be spread; use mesh.data or mesh.tensor."
        )
    if mesh.layer == 1 and mesh.ring_microbatches > 1:
        raise InputError(
            f"mesh.ring_microbatches is {mesh.ring_microbatches}, but with mesh.layer 1 there is no ring; use "
            "train.num_microbatches."
        )
    parts = max(mesh.data, 1) * mesh.ring_microbatches
    if micro % parts:
        raise InputError(
            f"a batch of {micro} (train.batch_size / train.num_microbatches) is not a multiple of {parts} "
            "(mesh.data x mesh.ring_microbatches); change one."
        )
