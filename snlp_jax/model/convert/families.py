"""Hugging Face's Llama, Mistral, Qwen and Gemma: what their configs mean, and where their tensors go.

A family is one entry of ``FAMILIES``: the defaults of its config class, which saved configs leave out, and what it has
that others lack. Rotary embedding turns forward there and backward in nanochat; channels keep their order.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from snlp_jax.config import ModelConfig, NormConfig
from snlp_jax.errors import InputError
from snlp_jax.model.convert.fields import REQUIRED, read_fields
from snlp_jax.model.convert.rotary import read_rotary
from snlp_jax.model.convert.table import Row, Table, rows_of

TRAINING_LEN = 2048
"""``seq_len`` of an imported model, unless its context is shorter; fine-tuning may choose another."""
UNUSED_TENSORS = r".*rotary_emb\.inv_freq"
UNUSED_TIED = UNUSED_TENSORS + r"|lm_head\.weight"
"""A tied head is sometimes saved twice."""

LINEAR = {
    "attn/query": "self_attn.q_proj",
    "attn/key": "self_attn.k_proj",
    "attn/value": "self_attn.v_proj",
    "attn/out": "self_attn.o_proj",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}
"""Matrices of a layer, ours and theirs; those of some families have biases."""
NORMS = {
    "norms/attn": "input_layernorm",
    "norms/mlp": "post_attention_layernorm",
    "attn/query_norm": "self_attn.q_norm",
    "attn/key_norm": "self_attn.k_norm",
}
GEMMA_NORMS = NORMS | {
    "norms/attn_post": "post_attention_layernorm",
    "norms/mlp": "pre_feedforward_layernorm",
    "norms/mlp_post": "post_feedforward_layernorm",
}
ACTIVATIONS: Mapping[str, Literal["swiglu", "geglu"]] = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu_pytorch_tanh": "geglu",
    "gelu_new": "geglu",
    "gelu_fast": "geglu",
}
KINDS_OF_LAYERS = {"full_attention": "L", "sliding_attention": "S", "attention": "L"}
"""Names in ``layer_types``, the last of them an older one -> our letters."""


@dataclass(frozen=True)
class Family:
    """What the models of one architecture have in common."""

    model_type: str
    """As configs name it."""
    defaults: Mapping[str, Any]
    """The fields that the architecture reads, and the config class's defaults, which saved configs may leave out."""
    is_gemma: bool = False
    """Factors 1 + w, norms behind the branches, embeddings times sqrt(D)."""
    has_qk_norm: bool = False
    windows: Literal["none", "all", "last", "pattern"] = "none"
    """Which layers have one: none, all, those from ``max_window_layers`` on, or all but every so many; the last two
    unless ``layer_types`` says it."""
    biases: tuple[str, ...] | None = None
    """Projections of the attention that always have a bias, "qkv" and "out"; None: as ``attention_bias`` says."""


_COMMON = {
    "vocab_size": REQUIRED,
    "hidden_size": REQUIRED,
    "intermediate_size": REQUIRED,
    "num_hidden_layers": REQUIRED,
    "num_attention_heads": REQUIRED,
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
    "quantization_config": None,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "rope_parameters": None,
    "partial_rotary_factor": 1.0,
    "original_max_position_embeddings": None,
}
_LLAMA = _COMMON | {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
_MISTRAL = _COMMON | {
    "hidden_act": "silu",
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
    "layer_types": None,
}
_QWEN2 = _COMMON | {
    "hidden_act": "silu",
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "max_window_layers": 28,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "layer_types": None,
}
_QWEN3 = _QWEN2 | {"head_dim": 128, "attention_bias": False}
_GEMMA2 = _COMMON | {
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "tie_word_embeddings": True,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "use_bidirectional_attention": None,
}
_GEMMA3 = {name: value for name, value in _GEMMA2.items() if name != "attn_logit_softcapping"} | {
    "max_position_embeddings": 131_072,
    "final_logit_softcapping": None,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "sliding_window_pattern": 6,
}
FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family("llama", _LLAMA),
    "MistralForCausalLM": Family("mistral", _MISTRAL, windows="all", biases=()),
    "Qwen2ForCausalLM": Family("qwen2", _QWEN2, windows="last", biases=("qkv",)),
    "Qwen3ForCausalLM": Family("qwen3", _QWEN3, has_qk_norm=True, windows="last"),
    "Gemma2ForCausalLM": Family("gemma2", _GEMMA2, is_gemma=True, windows="pattern"),
    "Gemma3ForCausalLM": Family("gemma3_text", _GEMMA3, is_gemma=True, has_qk_norm=True, windows="pattern"),
}
"""Architecture, as ``config.json`` names it -> what it is."""


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a Hugging Face config, given as a mapping of its fields.

    Raises:
        InputError: the config names no architecture, one that is not known, or two.
    """
    fields = read_fields(config, {"architectures": None, "model_type": None})
    kind, names = fields["model_type"], fields["architectures"]
    if not names:
        names = [name for name, family in FAMILIES.items() if family.model_type == kind] or [f"none ({kind!r})"]
    if names[0] not in FAMILIES:
        remedy = f"known are {', '.join(FAMILIES)}"
        if "text_config" in config:
            remedy = "save the text model in it alone, with a config and tensor names of its own"
        raise InputError(f"the config's field 'architectures' names {names[0][:80]}; {remedy}.")
    family = FAMILIES[names[0]]
    if kind not in (None, family.model_type):
        raise InputError(
            f"the config's field 'model_type' is {kind[:80]!r}, but 'architectures' names {names[0]}, which is "
            f"{family.model_type!r}; correct one of them."
        )
    return family


def family_config(config: Mapping[str, Any], vocab_size: int | None = None) -> ModelConfig:
    """The :class:`ModelConfig` of a Hugging Face config.

    Args:
        vocab_size: entries of the tokenizer, where the model has more, which are kept and whose logits are cut off.

    Raises:
        InputError: see :func:`family_of`; or a field is missing, wrong, or says what this library does not have.
    """
    family = family_of(config)
    values = read_fields(config, family.defaults)
    _refuse_unknown(values)
    num_heads, num_kv_heads, head_dim = _heads(values)
    weight: Literal["plain", "plus_one"] = "plus_one" if family.is_gemma else "plain"
    biases = family.biases
    if biases is None:
        biases = ("qkv", "out") if values["attention_bias"] else ()
    letters, window = _windows(family, values)
    base, rope, context = read_rotary(values, has_sliding="S" in letters)
    return ModelConfig(
        vocab_size=vocab_size or values["vocab_size"],
        vocab_multiple=values["vocab_size"],
        num_layers=values["num_hidden_layers"],
        embed_dim=values["hidden_size"],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_dim,
        mlp=_activation(values),
        mlp_dim=values["intermediate_size"],
        seq_len=min(values["max_position_embeddings"], TRAINING_LEN),
        context=context,
        window_pattern=_shortest_period(letters),
        short_window=window,
        ends_long=False,
        use_x0_resid=False,
        use_value_embeds=False,
        use_smear=False,
        use_mid_subtract=False,
        norm=NormConfig(weight=weight, eps=float(values["rms_norm_eps"]), use_post=family.is_gemma, use_embed=False),
        use_qkv_bias="qkv" in biases,
        use_out_bias="out" in biases,
        use_mlp_bias=values.get("mlp_bias", False),
        use_tied_head=values["tie_word_embeddings"],
        embed_scale=math.sqrt(values["hidden_size"]) if family.is_gemma else 1.0,
        use_qk_norm=family.has_qk_norm,
        attention_scale=float(values["query_pre_attn_scalar"]) ** -0.5 if family.is_gemma else 0.0,
        attention_softcap=float(values.get("attn_logit_softcapping") or 0.0),
        logit_softcap=float(values.get("final_logit_softcapping") or 0.0),
        rope_base=base,
        rope=rope,
    )


def _refuse_unknown(values: Mapping[str, Any]) -> None:
    if values["quantization_config"]:
        raise InputError("the config has a 'quantization_config'; give the weights before quantization.")
    if values.get("use_bidirectional_attention"):
        raise InputError("the config's 'use_bidirectional_attention' is on; only causal models can be imported.")


def _heads(values: Mapping[str, Any]) -> tuple[int, int, int]:
    """Query heads, heads of keys and values, and channels of a head."""
    width, num_heads = values["hidden_size"], values["num_attention_heads"]
    num_kv_heads, head_dim = values["num_key_value_heads"] or num_heads, values["head_dim"]
    if head_dim is None and width % num_heads:
        raise InputError(
            f"the config's hidden_size {width} is not a multiple of its num_attention_heads {num_heads}; give head_dim."
        )
    head_dim = head_dim or width // num_heads
    if head_dim % 2:
        raise InputError(f"the config's heads have {head_dim} channels; rotary embedding needs an even 'head_dim'.")
    if num_heads % num_kv_heads:
        raise InputError(
            f"the config's num_attention_heads {num_heads} is not a multiple of its num_key_value_heads "
            f"{num_kv_heads}; correct one of them."
        )
    return num_heads, num_kv_heads, head_dim


def _activation(values: Mapping[str, Any]) -> Literal["swiglu", "geglu"]:
    name = "hidden_activation" if "hidden_activation" in values else "hidden_act"
    if values[name] not in ACTIVATIONS:
        raise InputError(f"the config's field {name!r} is {values[name][:80]!r}; known are {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[values[name]]


def family_rows(config: ModelConfig) -> list[Row]:
    """Where every tensor of a model goes; see :func:`rows_of`."""
    vectors = {leaf: f"{name}.weight" for leaf, name in (GEMMA_NORMS if config.norm.use_post else NORMS).items()}
    vectors |= {f"{leaf}_bias": f"{name}.bias" for leaf, name in LINEAR.items()}
    same = {f"blocks/{leaf}": f"model.layers.{{}}.{name}" for leaf, name in vectors.items()}
    transposed = {f"blocks/{leaf}": f"model.layers.{{}}.{name}.weight" for leaf, name in LINEAR.items()}
    table: Table = {
        "same": same | {"embed/token": "model.embed_tokens.weight", "head/norm": "model.norm.weight"},
        "transposed": transposed | {"head/kernel": "lm_head.weight"},
    }
    return rows_of(config, table)


def _windows(family: Family, values: Mapping[str, Any]) -> tuple[str, int]:
    """A letter for every layer, and the window of S: theirs counts the token itself, ours those before it."""
    window = values.get("sliding_window")
    if not values.get("use_sliding_window", True):  # Qwen
        window = None
    letters = _letters(family, values, has_window=window is not None)
    if "S" not in letters:
        return letters, 0
    if window is None:
        raise InputError("the config's layer_types name sliding layers, but no sliding_window is on; give one.")
    if window < 2:
        raise InputError(f"the config's sliding_window is {window}; it must be at least 2.")
    return letters, window - 1


def _letters(family: Family, values: Mapping[str, Any], has_window: bool) -> str:
    num_layers, types = values["num_hidden_layers"], values.get("layer_types")
    if types is not None:
        known = KINDS_OF_LAYERS if family.windows != "all" else {}
        if set(types) - set(known) or len(types) != num_layers:
            raise InputError(
                f"the config's layer_types name {len(types)} layers of {num_layers}, of kinds "
                f"{', '.join(sorted(set(types)))[:80]}; known for this architecture are {', '.join(known) or 'none'}."
            )
        return "".join(known[kind] for kind in types)
    if family.windows == "pattern":
        pattern = values.get("sliding_window_pattern", 2)
        return "".join("SL"[(i + 1) % pattern == 0] for i in range(num_layers))
    first = {"all": 0, "last": values.get("max_window_layers"), "none": num_layers}[family.windows]
    return "".join("LS"[has_window and i >= first] for i in range(num_layers))


def _shortest_period(letters: str) -> str:
    """The shortest pattern that, tiled over the layers, gives these letters."""
    n = len(letters)
    return next(letters[:k] for k in range(1, n + 1) if (letters[:k] * -(-n // k))[:n] == letters)
