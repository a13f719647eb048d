"""Golden files of ``tests/test_families.py``: tiny random models of every family, computed by PyTorch.

    pip install 'torch>=2.6' 'transformers>=5'
    python tests/data/make_families.py

Each FAMILY.npz holds the config as saved with the model, the weights as multiples of 1/64 (exact in bfloat16), a batch
of prompts with the 32 tokens that greedy decoding adds, and the float32 logits of all of it. Made with torch 2.13.0 and
transformers 5.23.0.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers

FOLDER = Path(__file__).parent
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 500.0,
}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0}
GEMMA3_ROPE = {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}
ALTERNATE = ["sliding_attention", "full_attention"] * 2
MOST_SLIDE = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
CASES = {
    "llama": ("Llama", {}),
    "llama_bias": ("Llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": LINEAR}),
    "llama3": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "mistral": ("Mistral", {"sliding_window": 6}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "gemma2": (
        "Gemma2",
        {"sliding_window": 6, "layer_types": ALTERNATE, "query_pre_attn_scalar": 12}
        | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    ),
    "gemma3": (
        "Gemma3Text",
        {"sliding_window": 6, "layer_types": MOST_SLIDE, "query_pre_attn_scalar": 12, "rope_parameters": GEMMA3_ROPE},
    ),
}
NEW = 32


def make(name: str, family: str, fields: dict, seed: int) -> float:
    """Write one file; the smallest lead of a greedy token over the next best."""
    sizes = {key: value for key, value in SIZES.items() if not (family == "Qwen2" and key == "head_dim")}
    config = getattr(transformers, f"{family}Config")(**sizes, **fields)
    model_class = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")
    model = model_class(config).to(torch.float32).eval()
    rng = np.random.default_rng(seed)
    weights = {}
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        centre = 1.0 if "norm" in key and "Gemma" not in family else 0.0
        drawn = np.round(64 * (centre + 0.2 * rng.normal(size=tensor.shape))).clip(-127, 127)
        weights[key] = drawn.astype(np.int8)
    model.load_state_dict({key: torch.tensor(w / 64, dtype=torch.float32) for key, w in weights.items()}, strict=False)
    model.tie_weights()
    tokens = torch.tensor(rng.integers(0, config.vocab_size, (2, 8)))
    with torch.no_grad():
        for _ in range(NEW):
            tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        logits = model(tokens, use_cache=False).logits.numpy()
    best = np.sort(logits[:, 7:-1], axis=-1)
    told = json.loads(config.to_json_string(use_diff=True)) | {"architectures": [model_class.__name__]}
    arrays = {f"w/{key}": w for key, w in weights.items()}
    np.savez_compressed(FOLDER / f"{name}.npz", config=json.dumps(told), tokens=tokens.numpy(), logits=logits, **arrays)
    return float((best[..., -1] - best[..., -2]).min())


def main() -> None:
    for name, (family, fields) in CASES.items():
        # Two float32 programs must not disagree on a token: another draw where two logits are nearly equal.
        lead = next(lead for seed in range(50) if (lead := make(name, family, fields, seed)) > 1e-3)
        print(f"{name}: {(FOLDER / f'{name}.npz').stat().st_size} bytes, smallest lead {lead:.4f}")


if __name__ == "__main__":
    main()
