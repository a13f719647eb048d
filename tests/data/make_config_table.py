"""Golden table of ``tests/test_config_table.py``: what transformers makes of variations of config.json.

    pip install 'torch>=2.6' 'transformers>=5'
    PYTHONPATH=tests python tests/data/make_config_table.py

Every case of ``config_cases.py`` is written as a config.json, read by transformers, and made into a model of three
layers whose weights are :func:`config_cases.weights_of` of their names. The file holds the config and what the model
is: inverse frequencies and factor of the rotary embedding by kind of layer, the window that each layer's attention
weights show, sizes, scale, caps, ties, biases, and eight logits of the last token; or the error. Made with torch 2.13.0
and transformers 5.24.0.
"""

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from config_cases import CASES, SHOWN_LEN, TOKENS, weights_of

FILE = Path(__file__).parent / "config_table.json"


def shortened(values: Any) -> list[float]:
    return [float(f"{value:.8g}") for value in np.asarray(values, np.float64).ravel()]


def read(folder: Path, config: dict[str, Any]) -> Any:
    """The config's object; files without a model_type are read by the class that the architecture names."""
    if "model_type" in config:
        return transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, config["architectures"][0]).config_class.from_pretrained(folder)


def rotary(module: Any) -> dict[str, Any]:
    """Kind of layer ("" where all are alike) -> inverse frequencies and the factor of cosines and sines."""
    if hasattr(module, "inv_freq"):
        return {"": [shortened(module.inv_freq), float(module.attention_scaling)]}
    return {
        kind: [shortened(getattr(module, f"{kind}_inv_freq")), float(getattr(module, f"{kind}_attention_scaling"))]
        for kind in module.rope_type
    }


def windows(attentions: Any) -> list[int]:
    """How many tokens to its left the last query of every layer sees."""
    return [int((weights[0, 0, -1] == 0).logical_not().sum()) - 1 for weights in attentions]


def facts(config: Any) -> dict[str, Any]:
    """What the model of a config is."""
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.float32).eval()
    for name, parameter in model.named_parameters():
        parameter.data = torch.tensor(weights_of(name, tuple(parameter.shape), "Gemma" in type(model).__name__))
    model.tie_weights()
    with torch.no_grad():
        out = model(torch.tensor(TOKENS)[None], use_cache=False, output_attentions=True)
    layer = model.model.layers[0]
    head_dim = layer.self_attn.head_dim
    names = {name for name, _ in model.named_parameters()}
    norm = layer.input_layernorm
    return {
        "rotary": rotary(model.model.rotary_emb),
        "windows": windows(out.attentions),
        "sizes": [len(model.model.layers), *layer.mlp.up_proj.weight.shape, *model.model.embed_tokens.weight.shape[:1]],
        "heads": [layer.self_attn.q_proj.out_features // head_dim, layer.self_attn.k_proj.out_features // head_dim],
        "head_dim": head_dim,
        "scale": float(f"{layer.self_attn.scaling:.8g}"),
        "eps": float(getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", 0.0)),
        "is_tied": model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr(),
        "biases": sorted({name.split(".")[-2] for name in names if name.endswith(".bias")}),
        "activation": shortened(layer.mlp.act_fn(torch.tensor([-1.0, 0.5, 2.0]))),
        "context": config.max_position_embeddings,
        "logits": [round(float(z), 5) for z in out.logits[0, -1, :8]]
        if torch.isfinite(out.logits).all()
        else "not finite",
    }


def result(config: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.json").write_text(json.dumps(config))
        try:
            return facts(read(Path(name), config))
        except Exception as error:
            return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"}


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    assert len(TOKENS) == SHOWN_LEN
    rows = []
    for name, config in CASES.items():
        rows.append(json.dumps({"name": name, "config": config, "theirs": result(config)}))
        print(rows[-1][:400])
    FILE.write_text("[\n" + ",\n".join(rows) + "\n]\n")
    print(f"{len(rows)} cases, {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
