"""The grid of devices."""

from dataclasses import dataclass

from snlp_jax.config.check import Checked, Count, Size


@dataclass(frozen=True)
class MeshConfig(Checked, section="mesh"):
    """Devices as a grid ``data x layer x tensor`` (docs/scaling.md). Not part of what a run learns: a checkpoint is
    restored onto any other mesh."""

    data: Count = 1
    """Parts of the batch; in training parameters and optimizer state are spread over them too. 0 takes all devices that
    the other two leave."""
    layer: Size = 1
    """Parts of the depth: a region's layers are evaluated on all of them at once."""
    tensor: Size = 1
    """Parts of heads, MLP features and vocabulary."""
    ring_microbatches: Size = 1
    """Where the sequential pass goes round the layer axis, the batch follows in so many parts, so that a device need
    not wait for the others; as many as ``layer`` or more keep them busy."""
