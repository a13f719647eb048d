"""Models in GGUF files: their fields as a Hugging Face config, and their tensors by Hugging Face's names and layouts.

llama.cpp stores the rows of queries and keys of Llama so that channels i and i + H/2 of a head lie side by side, and
Gemma's norm weights plus one; both are undone here. What it knows of an architecture without a field stands here too.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from snlp_jax.errors import InputError
from snlp_jax.io.optional import optional
from snlp_jax.model.convert.tensor_files import BLOCK_BYTES, Index, TensorFiles
from snlp_jax.pretrained.gguf_header import GgufHeader, GgufTensor

ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "gemma2": ("Gemma2ForCausalLM", "gemma2"),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
}
"""``general.architecture`` -> architecture and model type in a config. Mistral and SmolLM2 are called llama there."""
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
"""Types of tensors that are read."""
CONFIG_FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
}
"""Fields of an architecture, without its name -> fields of a config."""
SCALING_FIELDS = {
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
NEUTRAL: dict[str, Any] = {
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
    "use_parallel_residual": False,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
}
"""Fields that change nothing with this value, and are refused with another."""
SAME_AS_HEAD = ("rope.dimension_count", "attention.value_length")
"""Fields that must be the size of a head."""
REQUIRED = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")
WHOLE = (
    *REQUIRED,
    "attention.head_count_kv",
    "attention.key_length",
    "attention.sliding_window",
    "rope.scaling.original_context_length",
)
"""Fields that are whole numbers."""
IGNORED = ("vocab_size", "rope.scaling.finetuned", "tensor_data_layout")
UNUSUAL_SCALE = {"gemma2": 46, "gemma3": 62}
"""Layers of the Gemma of 27 billion parameters, whose scores are divided by sqrt(D/N) and not by sqrt(H)."""

TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_TENSORS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA_LAYER_TENSORS = LAYER_TENSORS | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
ROPE_FACTORS = "rope_freqs.weight"
LOW, HIGH = 1.0, 4.0
"""Of all models with Llama 3's scaling: turns over the original context, see :func:`llama3_scaling`."""


def gguf_config(path: Path, header: GgufHeader) -> dict[str, Any]:
    """The config that a Hugging Face folder of the model would have, without ids of tokens.

    Raises:
        InputError: names an architecture, a field or a value that is not known, or what is missing.
    """
    name = header.fields.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise InputError(
            f"{str(path)!r} holds a model of the architecture {name!r}; known are {', '.join(ARCHITECTURES)}."
        )
    if header.fields.get("split.count", 1) not in (0, 1):
        raise InputError(f"{str(path)!r} is one part of several; join them first with llama-gguf-split --merge.")
    if len(header.tensors.get("token_embd.weight", GgufTensor((), None, 0, ())).shape) != 2:
        raise InputError(f"{str(path)!r} lacks the tensor 'token_embd.weight'; give a file with the model's weights.")
    fields = {key[len(name) + 1 :]: value for key, value in header.fields.items() if key.startswith(f"{name}.")}
    fields = {key: _single(f"{name}.{key}", value) for key, value in fields.items()}
    for key in REQUIRED:
        if key not in fields:
            raise InputError(f"{str(path)!r} lacks the field '{name}.{key}'; download it again.")
    for key, value in fields.items():
        if (wanted := _wanted(key, value)) is not None:
            raise InputError(f"{str(path)!r}: the field '{name}.{key}' is {value!r}; it must be {wanted}.")
    config: dict[str, Any] = dict(zip(("architectures", "model_type"), ARCHITECTURES[name], strict=True))
    config["architectures"] = [config["architectures"]]
    config |= {theirs: fields.pop(key) for key, theirs in CONFIG_FIELDS.items() if key in fields}
    config["vocab_size"] = header.tensors["token_embd.weight"].shape[0]
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    if name == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
        config["mlp_bias"] = "blk.0.ffn_down.bias" in header.tensors
    _set_windows(name, config, fields)
    _set_scale(name, config, fields)
    if scaling := _scaling(path, header, fields, config):
        config["rope_scaling"] = scaling
    for key, value in fields.items():
        usual = {**NEUTRAL, **dict.fromkeys(SAME_AS_HEAD, head_size(config))}.get(key)
        if key not in IGNORED and value != usual:
            raise InputError(f"{str(path)!r}: the field '{name}.{key}' is {value!r}, which is not known.")
    return config


def head_size(config: Mapping[str, Any]) -> int:
    """Channels of a head."""
    size: int = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    return size


def _single(name: str, value: Any) -> Any:
    """A field's value; of one for every layer, the one that all have. Numbers of float32 as they were written."""
    if isinstance(value, list) and not name.endswith("sliding_window_pattern"):
        if len(set(value)) != 1:
            raise InputError(f"the field {name!r} differs between layers, which is not known.")
        value = value[0]
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _wanted(key: str, value: Any) -> str | None:
    """What a field should be, if it is something else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if key in WHOLE:
        least = key != "attention.sliding_window"
        return None if isinstance(value, int) and is_number and least <= value < 2**31 else "a whole number, 1 or more"
    if key in (*CONFIG_FIELDS, *SCALING_FIELDS, "attention.scale", "rope.scale_linear"):
        return None if is_number and 0 <= value < math.inf else "a number, 0 or more"
    return None


def _set_windows(name: str, config: dict[str, Any], fields: dict[str, Any]) -> None:
    window = config.get("sliding_window", 0)
    pattern = fields.pop("attention.sliding_window_pattern", None)
    num_layers = config["num_hidden_layers"]
    if isinstance(pattern, list):
        if len(pattern) != num_layers:
            raise InputError(
                f"the field '{name}.attention.sliding_window_pattern' names {len(pattern)} layers of {num_layers}."
            )
        config["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in pattern]
    elif pattern is not None:
        config["sliding_window_pattern"] = pattern
    if name == "gemma3" or (window >= config["max_position_embeddings"] and not name.startswith("gemma")):
        config["sliding_window"] = window if name == "gemma3" and window else None
    elif window and name == "llama":
        config["architectures"], config["model_type"] = ["MistralForCausalLM"], "mistral"
    elif window and name.startswith("qwen"):
        raise InputError(f"the field '{name}.attention.sliding_window' is {window}, which is not known.")


def _set_scale(name: str, config: dict[str, Any], fields: dict[str, Any]) -> None:
    if not name.startswith("gemma"):
        return
    size = config.setdefault("head_dim", 256)
    if scale := fields.pop("attention.scale", 0):
        size = round(scale**-2)
    elif config["num_hidden_layers"] == UNUSUAL_SCALE[name]:
        size = config["hidden_size"] // config["num_attention_heads"]
    config["query_pre_attn_scalar"] = size


def _scaling(
    path: Path, header: GgufHeader, fields: dict[str, Any], config: Mapping[str, Any]
) -> dict[str, Any] | None:
    """``rope_scaling`` of a config, from fields or from the tensor of Llama 3's factors."""
    scaling = {theirs: fields.pop(key) for key, theirs in SCALING_FIELDS.items() if key in fields}
    scaling.setdefault("factor", fields.pop("rope.scale_linear", 1.0))
    kind = fields.pop("rope.scaling.type", "linear")
    if ROPE_FACTORS in header.tensors:
        tensors = GgufTensors(path, header, config)
        tensors.check(ROPE_FACTORS, (head_size(config) // 2,))
        factors = np.empty(head_size(config) // 2, np.float32)
        tensors.read_into(ROPE_FACTORS, (slice(None),), factors)
        return llama3_scaling(factors, config.get("rope_theta", 10_000.0))
    if kind == "none" or (kind == "linear" and scaling["factor"] in (0.0, 1.0)):
        return None
    return {"rope_type": kind, **scaling}


def llama3_scaling(factors: np.ndarray, base: float) -> dict[str, Any] | None:
    """The ``rope_scaling`` that gives these factors [H/2], by which wavelengths are stretched.

    A channel that turns t times over the original context keeps the part (t - LOW) / (HIGH - LOW) of its frequency, and
    of the rest the ``factor``-th part.

    Raises:
        InputError: they are of another kind.
    """
    factors = factors.astype(np.float64)
    factor = float(str(np.float32(factors.max())))
    if not np.isfinite(factors).all() or factors.min() < 1 or base <= 1:
        raise InputError(f"the tensor {ROPE_FACTORS!r} holds factors below 1, which are not known.")
    if factor == 1:
        return None
    turns = base ** (-np.arange(len(factors)) / len(factors)) / (2 * math.pi)  # over one token
    kept = (1 / factors - 1 / factor) / (1 - 1 / factor)
    between = (kept > 1e-3) & (kept < 1 - 1e-3)
    if between.any():
        context = round(float(np.mean((kept[between] * (HIGH - LOW) + LOW) / turns[between])))
        if np.abs(np.clip((turns * context - LOW) / (HIGH - LOW), 0, 1) - kept).max() < 1e-4:
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": LOW,
                "high_freq_factor": HIGH,
                "original_max_position_embeddings": context,
            }
    raise InputError(f"the tensor {ROPE_FACTORS!r} holds factors of another kind than Llama 3's, which are not known.")


class GgufTensors(TensorFiles):
    """The tensors of a GGUF file under Hugging Face's names, in their layouts. Those without a name there keep theirs.

    Args:
        config: of :func:`gguf_config`, or a part of it.
    """

    def __init__(self, path: Path, header: GgufHeader, config: Mapping[str, Any]):
        self._source = path
        self._is_gemma = str(config["model_type"]).startswith("gemma")
        self._half = head_size(config) // 2 if config["model_type"] in ("llama", "mistral") else 0
        names = GEMMA_LAYER_TENSORS if self._is_gemma else LAYER_TENSORS
        self._entries = {_rename(name, names): tensor for name, tensor in header.tensors.items()}
        self._tensors = {}
        self._dequantize = optional("gguf", f"the GGUF file {str(path)!r}", "snlp-jax[gguf]").dequantize

    def __iter__(self) -> Any:
        return (name for name in self._entries if name != ROPE_FACTORS)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self._entries:
            raise InputError(f"{self} lacks the tensor {name!r}.")
        tensor = self._entries[name]
        if tensor.kind.name not in KINDS:
            raise InputError(
                f"the tensor {name!r} in {self} is of type {tensor.kind.name}; only {', '.join(KINDS)} can be read, "
                "so take another file of the model."
            )
        if tensor.shape != shape:
            raise InputError(f"the tensor {name!r} has the shape {tensor.shape}; the model needs {shape}.")

    def read_into(self, name: str, index: Index, target: np.ndarray) -> None:
        tensor = self._entries[name]
        stored = np.memmap(self._source, np.uint8, "r", tensor.offset, (math.prod(tensor.row_shape),))
        if len(tensor.shape) == 1:
            target[...] = self._values(name, stored, tensor)[self._order(name, tensor)][index]
            return
        rows = self._order(name, tensor)[index[0]]
        step = max(1, BLOCK_BYTES // (4 * tensor.shape[1]))
        for row in range(0, len(rows), step):
            block = stored.reshape(tensor.row_shape)[rows[row : row + step]]
            target[row : row + step] = self._values(name, block, tensor)[:, *index[1:]]

    def _values(self, name: str, stored: np.ndarray, tensor: GgufTensor) -> np.ndarray:
        """Float32 numbers of rows of bytes."""
        values = self._dequantize(np.array(stored), tensor.kind)
        return values - 1 if self._is_gemma and name.endswith("norm.weight") else values

    def _order(self, name: str, tensor: GgufTensor) -> np.ndarray:
        """Where the rows of a tensor lie in the file."""
        rows = np.arange(tensor.shape[0])
        if self._half and re.search(r"\.[qk]_proj\.", name):
            return rows.reshape(-1, self._half, 2).swapaxes(1, 2).reshape(-1)
        return rows


def _rename(name: str, layer_tensors: Mapping[str, str]) -> str:
    stem, _, kind = name.rpartition(".")
    if found := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem):
        theirs = layer_tensors.get(found[2])
        return f"model.layers.{found[1]}.{theirs}.{kind}" if theirs else name
    return f"{TENSORS[stem]}.{kind}" if stem in TENSORS else name
