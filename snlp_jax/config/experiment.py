"""One experiment: all of its knobs, and what has to fit between them."""

from dataclasses import dataclass, field
from pathlib import Path

from snlp_jax.config.check import Checked, require
from snlp_jax.config.data import DataConfig
from snlp_jax.config.evaluate import EvalConfig
from snlp_jax.config.lora import LoraConfig
from snlp_jax.config.loss import LossConfig
from snlp_jax.config.machine import MachineConfig
from snlp_jax.config.mesh import MeshConfig
from snlp_jax.config.model import Kind, ModelConfig
from snlp_jax.config.train import OptimConfig, TrainConfig


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
        for name, term in self.loss.terms.items():
            worst = max(term.region_sizes)
            require(
                worst <= self.model.num_layers,
                f"loss.{name}.region_sizes holds {worst}, but the model has {self.model.num_layers} layers.",
            )
            correction, has_streams = getattr(term, "correction", None), self.model.num_streams > 0
            require(
                correction not in (("sid",) if has_streams else ("hcn",)),
                f"loss.{name}.correction {correction!r} does not fit model.num_streams {self.model.num_streams}: "
                "hcn is for models with residual streams, sid for those without.",
            )

        require(
            self.loss.mtp.weight == 0 or self.model.num_mtp_heads > 0,
            f"loss.mtp.weight is {self.loss.mtp.weight}, but model.num_mtp_heads is 0; give the model heads, or leave "
            "the weight 0.",
        )
        is_cudnn = self.machine.attention == "cudnn"
        require(
            not (self.data.mask_documents and is_cudnn),
            "data.mask_documents does not run on machine.attention 'cudnn'; use 'auto', 'xla' or 'splash'.",
        )
        softcap = self.model.attention_softcap
        require(
            not (softcap and is_cudnn),
            f"machine.attention 'cudnn' has no model.attention_softcap, which is {softcap}; use 'auto'.",
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
    require(
        config.train.init_from != "",
        f"lora.rank is {lora.rank}, but train.init_from is empty; name the run that they adapt.",
    )
    require(
        config.train.trainable == "",
        f"train.trainable is {config.train.trainable!r}, but adapters choose what they train by lora.targets; leave "
        "one out.",
    )
    require(
        "gate" not in lora.targets or model.mlp != "relu2",
        "lora.targets holds 'gate', which an MLP with model.mlp 'relu2' lacks; leave it out.",
    )
    linear = {"linear_attn", "linear_mlp"}
    require(
        not linear & set(lora.targets) or model.linear_rank == 0,
        f"lora.targets holds linear maps, but these have model.linear_rank {model.linear_rank}; leave them out.",
    )
    found = {f"{name}_{kind[name]}" for kind in map(Kind._asdict, model.kinds) for name in kind}
    for target in lora.targets:
        branch = "attn" if target in ("query", "key", "value", "out", "linear_attn") else "mlp"
        require(
            f"{branch}_{'linear' if target in linear else 'full'}" in found,
            f"lora.targets holds {target!r}, which no layer of this model has; leave it out.",
        )


def _check_mesh(config: Config) -> None:
    """Refuse a mesh that the training state and its batches cannot be divided over."""
    mesh, micro = config.mesh, config.train.batch_size // config.train.num_microbatches
    require(
        config.model.num_layers % mesh.layer == 0,
        f"model.num_layers {config.model.num_layers} is not a multiple of mesh.layer {mesh.layer}; change one.",
    )
    require(
        mesh.layer == 1 or not config.model.replaced_layers,
        f"mesh.layer is {mesh.layer}, but layers {config.model.replaced_layers} of the model have linear or dropped "
        "branches, and layers that differ cannot be spread; use mesh.data or mesh.tensor.",
    )
    ring = mesh.ring_microbatches
    require(
        mesh.layer > 1 or ring == 1,
        f"mesh.ring_microbatches is {ring}, but with mesh.layer 1 there is no ring; use train.num_microbatches.",
    )
    parts = max(mesh.data, 1) * ring
    require(
        micro % parts == 0,
        f"a batch of {micro} (train.batch_size / train.num_microbatches) is not a multiple of {parts} "
        "(mesh.data x mesh.ring_microbatches); change one.",
    )
