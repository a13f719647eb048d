"""Checkpoints of nanochat: a state dict ``model_STEP.pt`` with its ``meta_STEP.json``, as people have them.

Older ones lack parts that nanochat fills in when it loads them, and so does this.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from snlp_jax.config import ModelConfig
from snlp_jax.data.tokenizer import Tokenizer, check_vocab, load_tokenizer_json
from snlp_jax.errors import InputError
from snlp_jax.io.optional import optional
from snlp_jax.model.convert.nanochat import UNUSED_TENSORS, nanochat_config, nanochat_rows
from snlp_jax.model.convert.table import read_params
from snlp_jax.model.convert.tensor_files import StateDict
from snlp_jax.pretrained.source import read_json, read_tokenizer_file
from snlp_jax.run import TOKENIZER_NAME
from snlp_jax.types import Params, PyTree


def read_nanochat(
    path: Path, tokenizer: str, shardings: Callable[[ModelConfig], PyTree]
) -> tuple[ModelConfig, Params, Tokenizer]:
    """Config, parameters and tokenizer of a checkpoint.

    Args:
        tokenizer: path of a tokenizer.json; "" is the one beside the checkpoint.
        shardings: of the parameters of a model, see :func:`read_params`.

    Raises:
        InputError: a file is missing, holds more than tensors, or is of another model.
    """
    meta = path.with_name(path.name.replace("model_", "meta_", 1)).with_suffix(".json")
    fields = read_json(meta).get("model_config")
    if not isinstance(fields, dict):
        raise InputError(f"{str(meta)!r} holds no object 'model_config'; give a checkpoint that nanochat has written.")
    arrays = _read_arrays(path)
    config = complete(fields, arrays)
    content = read_tokenizer_file(Path(tokenizer) if tokenizer else path.with_name(TOKENIZER_NAME))
    read = load_tokenizer_json(content.decode("utf-8", errors="replace"))
    check_vocab(read, config.vocab_size)
    return config, read_params(StateDict(arrays), nanochat_rows(config), UNUSED_TENSORS, shardings(config)), read


def complete(fields: Mapping[str, Any], arrays: dict[str, np.ndarray]) -> ModelConfig:
    """The config of a checkpoint, and what its arrays lack: models from before windows attend to everything, and those
    from before the residual's scalars do as if they were 1 and 0."""
    config = nanochat_config({"window_pattern": "L", **fields})
    if config.use_x0_resid:
        arrays.setdefault("resid_lambdas", np.ones(config.num_layers, np.float32))
        arrays.setdefault("x0_lambdas", np.zeros(config.num_layers, np.float32))
    has_values = any(name.startswith("value_embeds.") for name in arrays)
    return dataclasses.replace(
        config,
        use_value_embeds=config.use_value_embeds and has_values,
        use_smear="smear_gate.weight" in arrays,
        use_mid_subtract="backout_lambda" in arrays,
    )


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    torch = optional("torch", "a nanochat checkpoint", "snlp-jax[hf]")
    try:  # tensors alone: whatever else a pickle would run is refused
        state: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{str(path)!r} is not a checkpoint of tensors alone ({reason}).") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise InputError(f"{str(path)!r} holds no state dict; give a checkpoint that nanochat has written.")
    return {name.removeprefix("_orig_mod."): tensor.to(torch.float32).numpy() for name, tensor in state.items()}
