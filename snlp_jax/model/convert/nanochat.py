"""Weights of the authors' nanochat models, to and from this library's parameters.

One table pairs every tensor name of a nanochat state dict with a path in ``params``. A gradient is a tree like the
parameters, so :func:`to_nanochat` also brings gradients back to the names and layouts of the authors' code.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from snlp_jax.config import ModelConfig
from snlp_jax.errors import InputError
from snlp_jax.model.convert.table import Row, Table, read_params, rows_of, tensors_of
from snlp_jax.model.convert.tensor_files import StateDict
from snlp_jax.types import Params

REQUIRED_FIELDS = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
HYPER_DEFAULTS = {"mhc_num_streams": 4, "mhc_sinkhorn_iters": 10, "mhc_sinkhorn_tau": 0.05}
"""Details of hyper-connections, which have no meaning unless ``use_mhc``."""
OPTIONAL_FIELDS = ("no_x0_resid", "no_ve", "use_mhc", "window_pattern", "num_mtp_steps", "mtp_loss_weight")
"""The last is of the training loss (``loss.mtp.weight``), not of the model."""
UNUSED_TENSORS = r"value_embeds\.\d+\.weight|resid_lambdas|x0_lambdas"
"""nanochat saves these even for models that do not read them."""
TENSORS: Table = {
    "same": {
        "embed/token": "transformer.wte.weight",
        "embed/value": "value_embeds.{}.weight",
        "blocks/resid_scale": "resid_lambdas",
        "blocks/x0_scale": "x0_lambdas",
        **{
            f"blocks/hyper/{branch}/{name}_logits": f"transformer.h.{{}}.hc_{branch}.H_{name}_logits"
            for branch in ("attn", "mlp")
            for name in ("res", "pre", "post")
        },
    },
    "transposed": {
        "embed/value_gate": "transformer.h.{}.attn.ve_gate.weight",
        "blocks/attn/query": "transformer.h.{}.attn.c_q.weight",
        "blocks/attn/key": "transformer.h.{}.attn.c_k.weight",
        "blocks/attn/value": "transformer.h.{}.attn.c_v.weight",
        "blocks/attn/out": "transformer.h.{}.attn.c_proj.weight",
        "blocks/mlp/up": "transformer.h.{}.mlp.c_fc.weight",
        "blocks/mlp/down": "transformer.h.{}.mlp.c_proj.weight",
        "head/kernel": "lm_head.weight",
        "head/mtp": "mtp_projs.{}.weight",
    },
    "unit": {
        "embed/smear_gate": "smear_gate.weight",
        "embed/smear_scale": "smear_lambda",
        "head/mid_scale": "backout_lambda",
    },
}


def nanochat_config(config: Mapping[str, Any]) -> ModelConfig:
    """The :class:`ModelConfig` of a nanochat config, given as a mapping of its fields.

    Raises:
        InputError: a field is missing or unknown.
    """
    for name in config:
        if name not in (*REQUIRED_FIELDS, *HYPER_DEFAULTS, *OPTIONAL_FIELDS):
            raise InputError(f"the nanochat config has a field {name!r} that this converter does not know.")
    for name in REQUIRED_FIELDS:
        if name not in config:
            raise InputError(f"the nanochat config lacks the field {name!r}.")
    use_mhc, hyper = bool(config.get("use_mhc")), {**HYPER_DEFAULTS, **config}
    return ModelConfig(
        seq_len=config["sequence_len"],
        vocab_size=config["vocab_size"],
        num_layers=config["n_layer"],
        num_heads=config["n_head"],
        num_kv_heads=config["n_kv_head"],
        embed_dim=config["n_embd"],
        window_pattern=str(config.get("window_pattern", "SSSL")).upper(),
        use_x0_resid=not (config.get("no_x0_resid") or use_mhc),
        use_value_embeds=not config.get("no_ve"),
        num_mtp_heads=config.get("num_mtp_steps", 0),
        num_streams=hyper["mhc_num_streams"] if use_mhc else 0,
        sinkhorn_iters=hyper["mhc_sinkhorn_iters"] if use_mhc else ModelConfig.sinkhorn_iters,
        sinkhorn_tau=hyper["mhc_sinkhorn_tau"] if use_mhc else ModelConfig.sinkhorn_tau,
    )


def from_nanochat(state_dict: Mapping[str, np.ndarray], config: ModelConfig) -> Params:
    """Float32 parameters from a nanochat state dict of numpy arrays.

    Value embeddings and residual scalars that ``config`` does not use are ignored.

    Raises:
        InputError: names a tensor that is missing, has the wrong shape, or has no place in the model.
    """
    return read_params(StateDict(state_dict), nanochat_rows(config), UNUSED_TENSORS)


def to_nanochat(params: Params, config: ModelConfig) -> dict[str, np.ndarray]:
    """Inverse of :func:`from_nanochat`, for parameters or for gradients with respect to them. Dtypes are kept."""
    return {tensor.name: tensor.make() for tensor in tensors_of(params, nanochat_rows(config))}


def nanochat_rows(config: ModelConfig) -> list[Row]:
    """Where every tensor of a state dict goes; see :func:`rows_of`."""
    return rows_of(config, TENSORS)
