"""Knobs of the training loss."""

import math
from dataclasses import dataclass, field
from typing import Literal

from snlp_jax.config.check import Checked, require


@dataclass(frozen=True)
class LossTerm(Checked):
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
        super().__post_init__()
        name = self.section
        self.at_least(0, "weight")
        require(
            len(set(self.region_sizes)) == len(self.region_sizes),
            f"{name}.region_sizes {self.region_sizes} names a size twice.",
        )
        require(
            self.weight == 0 or len(self.region_sizes) > 0,
            f"{name}.region_sizes is empty; name at least one region size, or set the weight to 0.",
        )
        require(all(n >= 1 for n in self.region_sizes), f"{name}.region_sizes {self.region_sizes} must all be >= 1.")
        for field_name in ("start_fraction", "ramp_fraction"):
            value = getattr(self, field_name)
            require(0 <= value <= 1, f"{name}.{field_name} is {value}; give 0 to 1.")


InitName = Literal["h0", "batch_forward"]


@dataclass(frozen=True)
class SolverTerm(LossTerm):
    """A loss term that runs the solver: which correction it trains for."""

    correction: str = "idn"
    """jac, idn, sid, hcn, diag or exact, or one that ``snlp_jax.register_correction`` named. jac makes the layers
    contract: each is to give the same output on the region's input as on its own."""
    diagonal_mode: Literal["jvp", "vjp", "finite_difference"] = "vjp"
    """How diag estimates a layer's diagonal, with a new random vector every step."""
    diagonal_stride: int = 1
    """diag estimates every so many layers and takes the others for the identity."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "diagonal_stride")


@dataclass(frozen=True)
class HiddenNormConfig(SolverTerm, section="loss.hidden_norm"):
    """Distance of one solver iteration from the sequential trace, mean over tokens of ||h' - h|| / ||h||."""

    stride: int = 3
    """Compare at every stride-th layer of the region and at its last."""
    detach_target: bool = False
    """Stop the gradient into the sequential trace."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "stride")


@dataclass(frozen=True)
class SolverCEConfig(SolverTerm, section="loss.solver_ce"):
    """Cross entropy of the logits that ``num_iters`` solver iterations give."""

    num_iters: int = 1
    init: InitName = "h0"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "num_iters")


@dataclass(frozen=True)
class LayerSkipConfig(LossTerm, section="loss.layer_skip"):
    """The control published as a stride-0 solver loss: only the last layer, run on the region's input."""

    detach_target: bool = False


@dataclass(frozen=True)
class MTPConfig(Checked, section="loss.mtp"):
    """Multi-token prediction: ``weight`` times the sum of the cross entropies of the ``model.num_mtp_heads`` heads that
    look further ahead, from the first step on."""

    weight: float = 0.0
    """0 computes none of it and leaves heads as they are; nanochat's default is 0.3."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(0, "weight")


@dataclass(frozen=True)
class LossConfig(Checked, section="loss"):
    """Cross entropy of the sequential pass plus any of the auxiliary terms."""

    sequential_weight: float = 1.0
    hidden_norm: HiddenNormConfig = field(default_factory=HiddenNormConfig)
    solver_ce: SolverCEConfig = field(default_factory=SolverCEConfig)
    layer_skip: LayerSkipConfig = field(default_factory=LayerSkipConfig)
    mtp: MTPConfig = field(default_factory=MTPConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        weight = self.sequential_weight
        require(0 <= weight < math.inf, f"loss.sequential_weight is {weight}; it must be 0 or more.")
        is_any = weight > 0 or self.mtp.weight > 0 or len(self.terms) > 0
        require(is_any, "loss.sequential_weight is 0 and no other term is switched on.")

    @property
    def terms(self) -> dict[str, LossTerm]:
        """The terms on regions that are switched on, by field name."""
        named = {"hidden_norm": self.hidden_norm, "solver_ce": self.solver_ce, "layer_skip": self.layer_skip}
        return {name: term for name, term in named.items() if term.weight > 0}
