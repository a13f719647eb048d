"""The config files: they load, describe the published models to the last parameter, and survive JSON."""

import re
from pathlib import Path

import pytest

from snlp_jax.config import Config, ModelConfig, from_json, load_config, to_json
from snlp_jax.model import LanguageModel, num_params
from snlp_jax.notation import parse_schedule

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FILES = [path for path in sorted(CONFIGS.glob("*.py")) if not re.search("^(study|dial) = ", path.read_text(), re.M)]
GATE_INPUT, SMEAR_INPUT = 12, 24


def load(name: str) -> Config:
    return load_config(CONFIGS / f"{name}.py")


def expected_counts(
    depth: int, width: int, vocab: int, heads: int, *, has_extras: bool, streams: int = 0
) -> dict[str, int]:
    """Parameters by kind, from the text of the paper's recipe alone: no code of the project is asked."""
    num_tables = depth // 2 if has_extras else 0
    # Smear gate and scale, mid scale; of a layer its resid and x0 scales, or three maps for each of two branches.
    of_layer = 2 * (streams * streams + 2 * streams) if streams else (2 if has_extras else 0)
    scalars = SMEAR_INPUT + 2 + depth * of_layer
    counts = {
        "matrices": depth * (4 * width * width + 2 * 4 * width * width),  # q, k, v, out; MLP of width 4 D
        "value_embeds": num_tables * vocab * width,
        "embed_and_head": 2 * vocab * width,
        "gates_and_scalars": num_tables * GATE_INPUT * heads + scalars,
    }
    return counts | {"total": sum(counts.values())}


def actual_counts(config: ModelConfig) -> dict[str, int]:
    params = LanguageModel(config).abstract_params()
    embed, blocks, head = params["embed"], params["blocks"], params["head"]
    counts = {
        "matrices": num_params(blocks["attn"]) + num_params(blocks["mlp"]),
        "value_embeds": num_params(embed.get("value", {})),
        "embed_and_head": embed["token"].size + head["kernel"].size,
    }
    total = num_params(params)
    return counts | {"gates_and_scalars": total - sum(counts.values()), "total": total}


def test_every_file_loads_and_survives_json():
    """And its settings can be read, and its vocabulary is that of its tokenizer."""
    assert {"tiny", "d32s_base", "d32s_idn", "d32_base", "d32_idn"} <= {path.stem for path in FILES}
    for path in FILES:
        config = load_config(path)
        assert config.name == path.stem
        assert from_json(to_json(config)) == config
        for setting in config.eval.solvers:
            parse_schedule(setting, config.model.num_layers)
        entries = {"byte": 257, "bpe": config.data.bpe_vocab_size}
        assert config.model.vocab_size == entries.get(config.data.tokenizer, config.model.vocab_size), path


# Integers worked out by hand, so that the formula above is checked as well.
D32S = dict(total=534_774_810, matrices=157_286_400, value_embeds=335_544_320)
D32S_PLAIN = dict(total=199_229_466, matrices=157_286_400, value_embeds=0)
D32S_MHC = dict(total=534_776_282, matrices=157_286_400, value_embeds=335_544_320)  # 32 * (48 - 2) more than d32s
WITH, WITHOUT = dict(has_extras=True), dict(has_extras=False)
STREAMS = dict(has_extras=True, streams=4)
D32 = dict(total=2_818_575_450, matrices=1_610_612_736, value_embeds=1_073_741_824)


@pytest.mark.parametrize(
    "name, width, heads, extras, by_hand, published",
    [
        ("d32s_base", 640, 5, WITH, D32S, dict(total=534.8, matrices=157.3, value_embeds=335.5)),
        ("d32s_nox0ve_base", 640, 5, WITHOUT, D32S_PLAIN, dict(matrices=157.3)),
        ("d32s_mhc_base", 640, 5, STREAMS, D32S_MHC, dict(matrices=157.3, value_embeds=335.5)),
        ("d32_base", 2048, 16, WITH, D32, dict(total=2818.6, matrices=1610.6, value_embeds=1073.7)),
    ],
)
def test_parameter_counts_are_the_published_ones(name, width, heads, extras, by_hand, published):
    expected = expected_counts(32, width, 32_768, heads, **extras)
    actual = actual_counts(load(name).model)
    assert actual == expected
    assert {kind: actual[kind] for kind in by_hand} == by_hand
    # Millions, as published, to one decimal.
    assert {kind: round(actual[kind] / 1e6, 1) for kind in published} == published


@pytest.mark.parametrize("name, method", [("d32s", "idn"), ("d32s_nox0ve", "idn"), ("d32s_mhc", "hcn"), ("d32", "idn")])
def test_a_recipe_and_its_control_differ_only_in_the_loss(name, method):
    base, regularized = load(f"{name}_base"), load(f"{name}_{method}")
    assert not base.loss.terms and list(regularized.loss.terms) == ["hidden_norm"]
    assert (base.model, base.data, base.optim, base.train) == (
        regularized.model,
        regularized.data,
        regularized.optim,
        regularized.train,
    )


@pytest.mark.parametrize(
    "name, weight, region_sizes, stride",
    [
        ("d32s_idn", 0.0625, (8, 16, 24), 3),
        ("d32s_nox0ve_idn", 0.5, (8, 16, 24), 6),
        ("d32s_mhc_hcn", 0.5, (8, 16, 24), 3),
        ("d32_idn", 0.5, (8,), 3),
    ],
)
def test_published_recipe(name, weight, region_sizes, stride):
    config = load(name)
    term = config.loss.hidden_norm
    assert (term.weight, term.region_sizes, term.stride) == (weight, region_sizes, stride)
    assert term.correction == name.rsplit("_", 1)[1]
    assert term.detach_target == (term.correction == "hcn")
    assert config.train.num_steps == 4800
    assert config.train.batch_size * config.model.seq_len == 1_048_576 == 2 * config.optim.batch_reference
    assert config.model.windows == (512, 512, 512, 2048) * 8
