"""Weights of the authors' nanochat models, to and from this library's parameters.

One table pairs every tensor name of a nanochat state dict with a path in ``params``. A gradient is a tree like the
parameters, so :func:`to_nanochat` also brings gradients back to the names and layouts of the authors' code.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from snlp_jax.config import ModelConfig
from snlp_jax.errors import InputError
from snlp_jax.model.convert.table import Row, check_whole, get_leaf, read_params
from snlp_jax.model.convert.tensor_files import StateDict
from snlp_jax.types import Params

REQUIRED_FIELDS = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
HYPER_DEFAULTS = {"mhc_num_streams": 4, "mhc_sinkhorn_iters": 10, "mhc_sinkhorn_tau": 0.05}
"""Details of hyper-connections, which have no meaning unless ``use_mhc``."""
OPTIONAL_FIELDS = ("no_x0_resid", "no_ve", "use_mhc", "window_pattern", "num_mtp_steps", "mtp_loss_weight")
"""The last is of the training loss (``loss.mtp.weight``), not of the model."""
UNUSED_TENSORS = r"value_embeds\.\d+\.weight|resid_lambdas|x0_lambdas"
"""nanochat saves these even for models that do not read them."""
MATRICES = {
    "attn/query": "attn.c_q",
    "attn/key": "attn.c_k",
    "attn/value": "attn.c_v",
    "attn/out": "attn.c_proj",
    "mlp/up": "mlp.c_fc",
    "mlp/down": "mlp.c_proj",
}
"""Of a layer, ours and theirs."""


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
        window_pattern=config.get("window_pattern", "SSSL"),
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
    return read_params(StateDict(state_dict), config, nanochat_rows(config), UNUSED_TENSORS)


def to_nanochat(params: Params, config: ModelConfig) -> dict[str, np.ndarray]:
    """Inverse of :func:`from_nanochat`, for parameters or for gradients with respect to them. Dtypes are kept."""
    state_dict: dict[str, np.ndarray] = {}
    for row in nanochat_rows(config):
        leaf = np.asarray(get_leaf(params, row.path))
        tensors = leaf if row.is_stacked else leaf[None]
        state_dict.update((name, row.to_torch(tensor)) for name, tensor in zip(row.names, tensors, strict=True))
    return state_dict


def nanochat_rows(config: ModelConfig) -> list[Row]:
    """Where every tensor of a state dict goes."""
    check_whole(config)
    layers, with_values = tuple(range(config.num_layers)), config.value_embed_layers
    of_layer = "transformer.h.{}."
    rows = [Row("embed/token", "transformer.wte.weight", "same"), Row("head/kernel", "lm_head.weight", "transposed")]
    rows += [Row(f"blocks/{leaf}", f"{of_layer}{name}.weight", "transposed", layers) for leaf, name in MATRICES.items()]
    if config.use_x0_resid:
        rows += [Row("blocks/resid_scale", "resid_lambdas", "same"), Row("blocks/x0_scale", "x0_lambdas", "same")]
    if config.num_streams:
        if config.hyper_maps == "dynamic":
            raise InputError("nanochat has no hyper-connections with dynamic maps; set model.hyper_maps to 'static'.")
        for branch in ("attn", "mlp"):
            for name in ("res_logits", "pre_logits", "post_logits"):
                rows.append(Row(f"blocks/hyper/{branch}/{name}", f"{of_layer}hc_{branch}.H_{name}", "same", layers))
    if config.use_smear:
        rows += [Row("embed/smear_gate", "smear_gate.weight", "unit"), Row("embed/smear_scale", "smear_lambda", "unit")]
    if with_values:
        rows.append(Row("embed/value", "value_embeds.{}.weight", "same", with_values))
        rows.append(Row("embed/value_gate", f"{of_layer}attn.ve_gate.weight", "transposed", with_values))
    if config.use_mid_subtract:
        rows.append(Row("head/mid_scale", "backout_lambda", "unit"))
    if config.num_mtp_heads:
        rows.append(Row("head/mtp", "mtp_projs.{}.weight", "transposed", tuple(range(config.num_mtp_heads))))
    return rows
