"""The grid of devices."""

from dataclasses import dataclass

from snlp_jax.config.check import Checked


@dataclass(frozen=True)
class MeshConfig(Checked, section="mesh"):
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
        super().__post_init__()
        self.at_least(0, "data")
        self.at_least(1, "layer", "tensor", "ring_microbatches")
