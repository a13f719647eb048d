"""Runs made of other people's files, and files made of runs."""

import dataclasses
import json

import chex
import jax
import numpy as np
import pytest
from test_families import PROMPT_LEN, golden

from snlp_jax.cli.convert import export_run, import_run
from snlp_jax.config import MeshConfig
from snlp_jax.errors import InputError
from snlp_jax.infer.engine import Engine, Request
from snlp_jax.model import LanguageModel
from snlp_jax.model.convert import TensorFiles, family_config, to_nanochat
from snlp_jax.model.convert.tensor_files import INDEX_NAME, SINGLE_NAME
from snlp_jax.parallel.mesh import make_mesh
from snlp_jax.parallel.sharding import TRAINING, shardings_of
from snlp_jax.run import read_config, read_params, read_tokenizer

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
VOCAB = 39
"""Entries of the tokenizer: one less than the models have rows for."""


def write_source(folder, name="llama", dtype="float32", max_shard_bytes=2**30, vocab=VOCAB):
    """A folder as Hugging Face writes it."""
    import tokenizers

    folder.mkdir(parents=True)
    golden(name).write(folder, dtype, max_shard_bytes)
    (folder / "config.json").write_text(json.dumps(golden(name).config))
    words = {chr(ord("0") + i): i for i in range(vocab - 1)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.add_special_tokens(["<s>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "bos_token": "<s>"}))
    return folder


def read_run(folder):
    config = read_config(folder)
    model = LanguageModel(config.model)
    return model, read_params(folder, model, "last")[1]


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("name", ("llama_bias", "gemma3"))
def test_import_export_import_is_bit_equal(name, tmp_path):
    source = write_source(tmp_path / "hf", name, max_shard_bytes=4000)
    assert len(list(source.glob("*.safetensors"))) > 5
    import_run(str(source), tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out", "last", "float32", 2000 / 2**30)
    import_run(str(tmp_path / "out"), tmp_path / "again")
    (model, params), (_, again) = read_run(tmp_path / "run"), read_run(tmp_path / "again")
    chex.assert_trees_all_equal(params, again)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, model.abstract_params())
    # Every number of the source is there once.
    there = np.sort(np.concatenate([w.ravel() for w in golden(name).weights.values()]))
    np.testing.assert_array_equal(np.sort(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])), there)
    for run in ("run", "again"):
        assert (tmp_path / run / "chat_template.jinja").read_text() == TEMPLATE
        assert read_tokenizer(tmp_path / run).vocab_size == read_config(tmp_path / run).model.vocab_size == VOCAB
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == golden(name).config | {"dtype": "float32"}


def test_bfloat16_comes_back_bit_for_bit(tmp_path):
    source = write_source(tmp_path / "hf", "qwen2", dtype="bfloat16")
    import_run(str(source), tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out", "last", "bfloat16", 1.0)
    theirs, ours = TensorFiles(source), TensorFiles(tmp_path / "out")
    assert set(theirs) == set(ours)
    for name, weight in golden("qwen2").weights.items():
        back = np.empty(weight.shape, np.float32)
        ours.check(name, weight.shape)
        ours.read_into(name, (slice(None),) * weight.ndim, back)
        np.testing.assert_array_equal(back, weight)
    assert (tmp_path / "out" / SINGLE_NAME).stat().st_size < 1.2 * (source / SINGLE_NAME).stat().st_size


@pytest.mark.slow
def test_cached_decoding_of_an_imported_run_is_greedy_decoding_there(tmp_path):
    """Window of 6 on every layer, so that a text of 40 goes round each ring several times."""
    import_run(str(write_source(tmp_path / "hf", "mistral", vocab=40)), tmp_path / "run")
    model, params = read_run(tmp_path / "run")
    tokens = golden("mistral").tokens
    done = Engine(model, params).generate([Request(row[:PROMPT_LEN].tolist(), 32) for row in tokens])
    assert [list(each.tokens) for each in done] == tokens[:, PROMPT_LEN:].tolist()


def test_parameters_are_read_straight_onto_a_mesh(tmp_path):
    sizes = {"data": 2, "layer": 2, "tensor": 2}
    folder = golden("llama_bias").write(tmp_path, max_shard_bytes=4000)
    config, whole = golden("llama_bias").read(folder)
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[: np.prod(list(sizes.values()))])
    shardings = shardings_of(whole, config, mesh, TRAINING)
    _, params = golden("llama_bias").read(folder, shardings)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == shardings
    chex.assert_trees_all_equal(params, whole)


def test_added_tokens_without_a_row_are_left_out(tmp_path):
    """Gemma 3's text models come with a tokenizer that has one token for images too."""
    source = write_source(tmp_path / "hf")
    told = json.loads((source / "tokenizer.json").read_text())
    told["added_tokens"].append(told["added_tokens"][0] | {"id": 40, "content": "<image>"})
    (source / "tokenizer.json").write_text(json.dumps(told))
    import_run(str(source), tmp_path / "run")
    assert read_tokenizer(tmp_path / "run").vocab_size == VOCAB


# ---------------------------------------------------------------- refusals


def cut_off(source):
    path = next(iter(sorted(source.glob("*.safetensors"))))
    path.write_bytes(path.read_bytes()[:-10])


def change_type(source):
    path = next(iter(sorted(source.glob("*.safetensors"))))
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"', 1))


def change_header(source):
    path = next(iter(sorted(source.glob("*.safetensors"))))
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"F16"', 1))


def drop_tensor(source):
    index = json.loads((source / INDEX_NAME).read_text())
    gone = index["weight_map"]["model.layers.3.mlp.up_proj.weight"]
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != gone}
    (source / INDEX_NAME).write_text(json.dumps(index))


def test_broken_sources_are_refused_in_one_sentence(tmp_path):
    for number, (spoil, word) in enumerate((
        (lambda s: sorted(s.glob("*.safetensors"))[1].unlink(), "model-00002-of-"),
        (cut_off, "cut off|broken"),
        (change_type, "is of type I32"),
        (change_header, "broken"),
        (drop_tensor, "lacks the tensor"),
        (lambda s: [p.unlink() for p in s.glob("*.safetensors*")], "holds neither"),
        (lambda s: (s / "tokenizer.json").unlink(), "--tokenizer"),
        (lambda s: (s / "config.json").write_text("{"), "not valid JSON"),
    )):  # fmt: skip
        source = write_source(tmp_path / f"hf{number}", max_shard_bytes=6000)
        spoil(source)
        with pytest.raises(InputError, match=word) as caught:
            import_run(str(source), tmp_path / "run")
        assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_configs_that_are_not_understood_are_refused():
    for change, word in (
        ({"architectures": None, "model_type": None}, "architectures"),
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_act": "relu"}, "relu"),
        ({"quantization_config": {"bits": 4}}, "quantization"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "factor"),
    ):
        with pytest.raises(InputError, match=word) as caught:
            family_config(golden("llama").config | change)
        assert "\n" not in str(caught.value)


def test_shapes_and_tensors_that_do_not_fit_are_named(tmp_path):
    told = golden("llama")
    folder = told.write(tmp_path)
    config = family_config(told.config | {"intermediate_size": 24})
    from snlp_jax.model.convert import family_rows, read_params

    rows = family_rows(config)
    with pytest.raises(InputError, match=r"'model.layers.0.mlp.down_proj.weight' has the shape \(16, 20\)"):
        read_params(TensorFiles(folder), rows)
    tied = family_config(told.config | {"tie_word_embeddings": True})
    with pytest.raises(InputError, match="holds the tensor 'lm_head.weight', which the model has no place for"):
        read_params(TensorFiles(folder), family_rows(tied))
    odd = dataclasses.replace(config, use_mid_subtract=True)
    with pytest.raises(InputError, match="no tensor for 'head/mid_scale', which the model has"):
        family_rows(odd)


def test_a_directory_with_something_in_it_is_left_alone(tmp_path):
    source = write_source(tmp_path / "hf")
    with pytest.raises(InputError, match="exists and is not empty; name another directory"):
        import_run(str(source), source)
    with pytest.raises(InputError, match="does not exist; name a folder, a file or a hub id such as 'org/model'"):
        import_run(str(tmp_path / "nowhere"), tmp_path / "run")


# ---------------------------------------------------------------- configs as the two generations write them


def test_older_configs_mean_the_same():
    """``rope_theta`` and ``rope_scaling``, and no ``layer_types``."""
    for name, older in (
        ("llama3", {"rope_theta": 500.0, "rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0, "original_max_position_embeddings": 32}}),
        ("qwen2", {"rope_theta": 10000.0}),
    ):  # fmt: skip
        told = golden(name).config
        old = {key: value for key, value in told.items() if key not in ("rope_parameters", "layer_types")} | older
        assert family_config(old) == family_config(told)


def test_patterns_of_gemma_without_layer_types():
    told = {
        key: value for key, value in golden("gemma3").config.items() if key not in ("layer_types", "rope_parameters")
    }
    config = family_config(told | {"num_hidden_layers": 13, "rope_scaling": {"rope_type": "linear", "factor": 8.0}})
    assert config.letters == "SSSSSLSSSSSLS" and config.window_pattern == "SSSSSL"
    assert (config.rope_base, config.rope.local_base, config.rope.scaling.factor) == (1e6, 1e4, 8.0)
    assert config.windows[0] == 5 and config.windows[5] == config.context == 64  # theirs counts the token itself
    told = {key: value for key, value in golden("gemma2").config.items() if key != "layer_types"}
    assert family_config(told).letters == "SLSL"


# ---------------------------------------------------------------- nanochat


def test_nanochat_checkpoints_are_read_without_running_what_they_hold(tmp_path):
    torch = pytest.importorskip("torch")
    from test_convert import BASE, NANOCHAT, random_params

    config = dataclasses.replace(BASE, num_kv_heads=2)
    params = random_params(config)
    folder = tmp_path / "d3"
    write_source(folder)
    (folder / "config.json").unlink()
    state = {f"_orig_mod.{key}": torch.tensor(w) for key, w in to_nanochat(params, config).items()}
    torch.save(state, folder / "model_000010.pt")
    fields = NANOCHAT | {"vocab_size": VOCAB, "window_pattern": "L"}
    (folder / "meta_000010.json").write_text(json.dumps({"model_config": NANOCHAT}))
    with pytest.raises(InputError, match="set model.vocab_size to 39 or change the tokenizer"):
        import_run(str(folder), tmp_path / "run")
    small = dataclasses.replace(config, vocab_size=VOCAB)
    params = random_params(small)
    torch.save({key: torch.tensor(w) for key, w in to_nanochat(params, small).items()}, folder / "model_000020.pt")
    (folder / "meta_000020.json").write_text(json.dumps({"model_config": fields}))
    import_run(str(folder), tmp_path / "run")
    chex.assert_trees_all_equal(read_run(tmp_path / "run")[1], params)
    export_run(tmp_path / "run", tmp_path / "out", "last", "float32", 1.0)
    assert set(TensorFiles(tmp_path / "out")) == set(to_nanochat(params, small))
    torch.save({"model": Unwelcome()}, folder / "model_000020.pt")
    with pytest.raises(InputError, match="is not a checkpoint of tensors alone"):
        import_run(str(folder), tmp_path / "other")


class Unwelcome:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))
