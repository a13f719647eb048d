"""Knobs of the training loss."""

from dataclasses import dataclass, field
from typing import Literal

from snlp_jax.config.check import Checked, NonNegative, Share, Size
from snlp_jax.errors import InputError


@dataclass(frozen=True)
class LossTerm(Checked):
    """What every auxiliary loss shares: ``weight * ramp(step) * sum over region sizes of R_n``."""

    weight: NonNegative = 0.0
    """0 switches the term off."""
    region_sizes: tuple[Size, ...] = ()
    """Sizes n of the region, the last n layers. Required when the weight is positive."""
    sample_region: bool = False
    """One size a step, drawn from (seed, step), and R multiplied by the number of sizes, instead of the sum."""
    start_fraction: Share = 0.0
    """Share of the steps before the term begins; until then it is not computed at all."""
    ramp_fraction: Share = 0.2
    """Share of the steps over which the weight rises linearly from 0, counted from the start."""

    def __post_init__(self) -> None:
        super().__post_init__()
        name, sizes = self.section, self.region_sizes
        if len(set(sizes)) < len(sizes):
            raise InputError(f"{name}.region_sizes {sizes} names a size twice.")
        if self.weight > 0 and not sizes:
            raise InputError(f"{name}.region_sizes is empty; name at least one region size, or set the weight to 0.")


InitName = Literal["h0", "batch_forward"]


@dataclass(frozen=True)
class SolverTerm(LossTerm):
    """A loss term that runs the solver: which correction it trains for."""

    correction: str = "idn"
    """jac, idn, sid, hcn, diag or exact, or one that ``snlp_jax.register_correction`` named. jac makes the layers
    contract: each is to give the same output on the region's input as on its own."""
    diagonal_mode: Literal["jvp", "vjp", "finite_difference"] = "vjp"
    """How diag estimates a layer's diagonal, with a new random vector every step."""
    diagonal_stride: Size = 1
    """diag estimates every so many layers and takes the others for the identity."""


@dataclass(frozen=True)
class HiddenNormConfig(SolverTerm, section="loss.hidden_norm"):
    """Distance of one solver iteration from the sequential trace, mean over tokens of ||h' - h|| / ||h||."""

    stride: Size = 3
    """Compare at every stride-th layer of the region and at its last."""
    detach_target: bool = False
    """Stop the gradient into the sequential trace."""


@dataclass(frozen=True)
class SolverCEConfig(SolverTerm, section="loss.solver_ce"):
    """Cross entropy of the logits that ``num_iters`` solver iterations give."""

    num_iters: Size = 1
    init: InitName = "h0"


@dataclass(frozen=True)
class LayerSkipConfig(LossTerm, section="loss.layer_skip"):
    """The control published as a stride-0 solver loss: only the last layer, run on the region's input."""

    detach_target: bool = False


@dataclass(frozen=True)
class MTPConfig(Checked, section="loss.mtp"):
    """Multi-token prediction: ``weight`` times the sum of the cross entropies of the ``model.num_mtp_heads`` heads that
    look further ahead, from the first step on."""

    weight: NonNegative = 0.0
    """0 computes none of it and leaves heads as they are; nanochat's default is 0.3."""


@dataclass(frozen=True)
class LossConfig(Checked, section="loss"):
    """Cross entropy of the sequential pass plus any of the auxiliary terms."""

    sequential_weight: NonNegative = 1.0
    hidden_norm: HiddenNormConfig = field(default_factory=HiddenNormConfig)
    solver_ce: SolverCEConfig = field(default_factory=SolverCEConfig)
    layer_skip: LayerSkipConfig = field(default_factory=LayerSkipConfig)
    mtp: MTPConfig = field(default_factory=MTPConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sequential_weight == self.mtp.weight == 0 and not self.terms:
            raise InputError("loss.sequential_weight is 0 and no other term is switched on.")

    @property
    def terms(self) -> dict[str, LossTerm]:
        """The terms on regions that are switched on, by field name."""
        named = {"hidden_norm": self.hidden_norm, "solver_ce": self.solver_ce, "layer_skip": self.layer_skip}
        return {name: term for name, term in named.items() if term.weight > 0}
