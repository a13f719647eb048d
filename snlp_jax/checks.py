"""What a model and the devices of a mesh can run: schedules refused before anything is compiled."""

from jax.sharding import Mesh

from snlp_jax.config import ModelConfig
from snlp_jax.errors import InputError
from snlp_jax.solver import Chunkwise, FusedSplit, HyperConnection, PerLayer, ScaledIdentity, Schedule


def check_mesh(schedule: Schedule, mesh: Mesh) -> None:
    """Refuse a schedule that the devices of a mesh cannot share.

    Raises:
        InputError: a stage that needs all layers of its region in one place.
    """
    for region in schedule.regions if mesh.shape["layer"] > 1 else ():
        if isinstance(region.stage, FusedSplit):
            raise InputError("a split stage shares one product among all layers and cannot be sharded.")


def check_alike(config: ModelConfig, mesh: Mesh) -> None:
    """Refuse to spread layers that differ.

    Raises:
        InputError: names them.
    """
    if config.replaced_layers and mesh.shape["layer"] > 1:
        raise InputError(
            f"layers {config.replaced_layers} have linear or dropped branches, and layers that differ cannot be spread "
            f"over a mesh with layer={mesh.shape['layer']}; use its data or tensor axis."
        )


def check_schedule(config: ModelConfig, schedule: Schedule) -> None:
    """Refuse a schedule that a model cannot run.

    Raises:
        InputError: a correction, initial trace or stage that is made for another kind of residual path.
    """
    for region in schedule.regions:
        if isinstance(region.correction.innermost, HyperConnection) and not config.num_streams:
            raise InputError("hcn needs residual streams, but model.num_streams is 0; use idn or sid.")
        if isinstance(region.correction.innermost, ScaledIdentity) and config.num_streams:
            raise InputError("sid scales a single residual stream, but this model mixes several; use hcn.")
        if isinstance(region.stage, Chunkwise) and config.num_streams and config.hyper_maps == "dynamic":
            raise InputError("layers whose maps depend on the token cannot be fused; leave out stage=.")
        if isinstance(region.stage, Chunkwise) and config.num_streams and region.stage.scales == "own":
            raise InputError("scales=own is for residual scalars, and this model mixes streams; leave it out.")
        if isinstance(region.stage, FusedSplit) and config.num_streams:
            raise InputError("a split stage is for a single residual stream; use chunks such as stage=4xF2.")
        replaced = [i for i in config.replaced_layers if region.start <= i < region.stop]
        if replaced and not isinstance(region.stage, PerLayer):
            raise InputError(f"a stage fuses layers as trained, but layers {replaced} are replaced; leave out stage=.")
