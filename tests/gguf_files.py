"""Tiny GGUF files of the models in tests/data, as llama.cpp's converter lays them out, by the writer of ``gguf``."""

import gguf
import numpy as np
from test_families import golden

from snlp_jax.pretrained import gguf_model

TOKENS = ["<s>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", *"0123456789", "th", "the"]
"""As many as the models have rows."""
VOCABULARY = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3] + [1] * 39,
    "tokenizer.ggml.merges": ["t h", "th e"],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.chat_template": "{{ messages }}",
}
FLOATS = ("layer_norm_rms_epsilon", "freq_base", "freq_base_swa", "softcapping", "factor", "scale", "scores")


def fields_of(name):
    """The fields of a golden model's config."""
    config = golden(name).config
    arch = {"llama_bias": "llama", "llama3": "llama", "mistral": "llama"}.get(name, name)
    theirs = {ours: key for key, ours in gguf_model.CONFIG_FIELDS.items()}
    fields = {f"{arch}.{theirs[key]}": value for key, value in config.items() if key in theirs and value is not None}
    rope = config["rope_parameters"]
    if name == "gemma3":
        fields["gemma3.rope.freq_base_swa"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    fields[f"{arch}.rope.freq_base"] = rope["rope_theta"]
    if rope["rope_type"] in ("linear", "yarn"):
        fields[f"{arch}.rope.scaling.type"] = rope["rope_type"]
        fields[f"{arch}.rope.scaling.factor"] = rope["factor"]
    if rope["rope_type"] == "yarn":
        fields[f"{arch}.rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    if arch.startswith("gemma"):
        slides = [kind == "sliding_attention" for kind in config["layer_types"]]
        fields[f"{arch}.attention.sliding_window_pattern"] = slides
        fields[f"{arch}.attention.scale"] = config["query_pre_attn_scalar"] ** -0.5
    if name == "qwen2":
        del fields["qwen2.attention.sliding_window"]
    size = config.get("head_dim", 4)
    fields |= {f"{arch}.rope.dimension_count": size, f"{arch}.attention.value_length": size}
    return {"general.architecture": arch} | fields


def tensors_of(name):
    """The tensors of a golden model, permuted and shifted as llama.cpp does."""
    layer = gguf_model.GEMMA_LAYER_TENSORS if name.startswith("gemma") else gguf_model.LAYER_TENSORS
    stems = {ours: stem for stem, ours in gguf_model.TENSORS.items()}
    stems |= {f"model.layers.{i}.{ours}": f"blk.{i}.{stem}" for i in range(4) for stem, ours in layer.items()}
    tensors = {}
    for key, weight in golden(name).weights.items():
        stem, kind = key.rsplit(".", 1)
        if name in ("llama", "llama_bias", "llama3", "mistral") and ("q_proj" in stem or "k_proj" in stem):
            heads = weight.shape[0] // 8
            weight = weight.reshape(heads, 2, 4, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
        if name.startswith("gemma") and stem.endswith("norm"):
            weight = weight + 1
        tensors[f"{stems[stem]}.{kind}"] = weight
    if name == "llama3":
        tensors["rope_freqs.weight"] = llama3_factors(golden(name).config["rope_parameters"], 8)
    return tensors


def llama3_factors(rope, size):
    """As the models' authors write them: by wavelengths."""
    waves = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, size, 2) / size)
    context, low, high = rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = (context / waves - low) / (high - low)
    between = 1 / ((1 - smooth) / rope["factor"] + smooth)
    return np.where(waves < context / high, 1, np.where(waves > context / low, rope["factor"], between)).astype("f")


def write_gguf(path, fields, tensors, kind="F32"):
    """A file of these fields and float arrays; matrices are of the type."""
    writer = gguf.GGUFWriter(path, fields["general.architecture"])
    for key, value in fields.items():
        if key == "general.architecture":
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float) or key.endswith(FLOATS):
            writer.add_float32(key, float(value))
        else:
            writer.add_uint32(key, value)
    for key, value in tensors.items():
        quantized = gguf.GGMLQuantizationType[kind if value.ndim > 1 else "F32"]
        writer.add_tensor(key, gguf.quantize(value.astype(np.float32), quantized), raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model(path, name="llama", change=None, kind="F32"):
    """The GGUF file of a golden model; ``change`` are fields that differ, None for those that are left out."""
    fields = fields_of(name) | VOCABULARY | (change or {})
    return write_gguf(path, {key: value for key, value in fields.items() if value is not None}, tensors_of(name), kind)
