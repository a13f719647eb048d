"""One call that reads a model, and what an export tells other readers."""

import dataclasses
import json

import chex
import jax
import numpy as np
import pytest
from gguf_files import write_model
from test_convert import BASE, NANOCHAT
from test_import import write_source

import snlp_jax
from snlp_jax.cli.convert import export_run, import_run
from snlp_jax.cli.made import write_run
from snlp_jax.config import MachineConfig, MeshConfig
from snlp_jax.data.template import named_templates
from snlp_jax.errors import InputError
from snlp_jax.parallel.mesh import make_mesh
from snlp_jax.pretrained.nanochat import complete
from snlp_jax.pretrained.source import find, read_tokenizer_file
from snlp_jax.run import read_config, read_tokenizer


def test_folder_file_and_run_are_one_model(tmp_path):
    source = write_source(tmp_path / "hf", vocab=40)
    import_run(str(source), tmp_path / "run")
    machine = MachineConfig(compute_dtype="bfloat16")
    model, params, tokenizer = snlp_jax.from_pretrained(source, machine=machine)
    assert model.machine.compute_dtype == "bfloat16"
    for path in (tmp_path / "run", write_model(tmp_path / "m.gguf")):
        other = snlp_jax.from_pretrained(str(path))
        assert other.model.config == model.config
        chex.assert_trees_all_equal(other.params, params)
    assert snlp_jax.from_pretrained(tmp_path / "run").tokenizer.to_json() == tokenizer.to_json()
    mesh = make_mesh(MeshConfig(data=2, layer=2, tensor=2), jax.devices()[:8])
    spread = snlp_jax.from_pretrained(tmp_path / "run", mesh=mesh).params
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(spread)} == {mesh}
    chex.assert_trees_all_equal(spread, params)
    with pytest.raises(InputError, match="is a run, which has a tokenizer"):
        snlp_jax.from_pretrained(tmp_path / "run", tokenizer="tokenizer.json")


def test_a_repository_and_its_revision(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    source, asked = write_source(tmp_path / "hf", vocab=40), []
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **kwargs: asked.append((args, kwargs)) or source)
    assert find("org/model") == find("org/model@v1.0") == source
    assert [(args, kwargs["revision"]) for args, kwargs in asked] == [(("org/model",), None), (("org/model",), "v1.0")]
    for name in ("org/model@a b", "org", "a/b/c", "org/../model"):
        with pytest.raises(InputError, match="name a folder, a file or a hub id such as 'org/model'"):
            find(name)


def test_templates_in_a_folder_of_their_own(tmp_path):
    """As transformers 5 saves several."""
    source = write_source(tmp_path / "hf", vocab=40)
    (source / "chat_template.jinja").write_text("one")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("two")
    import_run(str(source), tmp_path / "run")
    assert named_templates(read_tokenizer(tmp_path / "run").special.chat_template) == {"default": "one", "rag": "two"}
    assert (tmp_path / "run" / "chat_template.jinja").read_text() == "one"


def test_a_folder_of_gguf_files(tmp_path):
    path = write_model(tmp_path / "a.gguf")
    assert find(tmp_path) == path
    write_model(tmp_path / "b.gguf")
    with pytest.raises(InputError, match=r"holds 2 GGUF files; name one, such as .*a\.gguf"):
        find(tmp_path)


def test_a_gguf_file_is_exported_as_a_folder(tmp_path):
    """Configs and a tokenizer.json that everybody reads; imported again it is the same model."""
    import_run(str(write_model(tmp_path / "m.gguf", "gemma3")), tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out", "last", "float32", 1.0)
    first, again = (snlp_jax.from_pretrained(tmp_path / name) for name in ("run", "out"))
    assert first.model.config == again.model.config and first.tokenizer.to_json() == again.tokenizer.to_json()
    chex.assert_trees_all_equal(first.params, again.params)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["architectures"], config["eos_token_id"]) == (["Gemma3ForCausalLM"], 0)
    assert "model" in json.loads((tmp_path / "out" / "tokenizer.json").read_text())


def test_the_export_of_a_tuned_run_names_the_end_that_it_was_taught(tmp_path):
    """The end of the files is of a turn; a conversation in the plain-text template ends at the separator."""
    source = write_source(tmp_path / "hf", vocab=40)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 7, "temperature": 0.6}))
    (source / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "add_bos_token": True}))
    import_run(str(source), tmp_path / "run")
    _, params, tokenizer = snlp_jax.from_pretrained(tmp_path / "run")
    config = read_config(tmp_path / "run")
    tuned = dataclasses.replace(config, train=dataclasses.replace(config.train, init_from=str(tmp_path / "run")))
    write_run(tmp_path / "tuned", tuned, params, {"tokenizer.json": tokenizer.to_json()}, {})
    for name, ends in (("run", 7), ("tuned", [7, 39])):
        export_run(tmp_path / name, tmp_path / f"{name}-out", "last", "float32", 1.0)
        out = json.loads((tmp_path / f"{name}-out" / "generation_config.json").read_text())
        assert out == {"eos_token_id": ends, "temperature": 0.6}
    assert not (tmp_path / "tuned-out" / "chat_template.jinja").exists()
    talk = dataclasses.replace(tuned, data=dataclasses.replace(tuned.data, source="talk.jsonl", format="chat"))
    write_run(tmp_path / "chat", talk, params, {"tokenizer.json": tokenizer.to_json()}, {})
    export_run(tmp_path / "chat", tmp_path / "chat-out", "last", "float32", 1.0)
    assert "Assistant:" in (tmp_path / "chat-out" / "chat_template.jinja").read_text()
    plain = json.loads((tmp_path / "tuned-out" / "tokenizer.json").read_text())
    assert "special" not in plain and "model" in plain
    assert read_tokenizer(tmp_path / "tuned").special.end_ids == (7, 39)


# ---------------------------------------------------------------- nanochat as people have it


def test_older_nanochat_models_are_completed():
    """No windows, no scalars of the residual, no value embeddings, no smear."""
    arrays: dict = {}
    config = complete(NANOCHAT, arrays)
    assert config == dataclasses.replace(
        BASE, num_kv_heads=2, window_pattern="L", use_value_embeds=False, use_smear=False, use_mid_subtract=False
    )
    assert sorted(arrays) == ["resid_lambdas", "x0_lambdas"]
    np.testing.assert_array_equal(arrays["resid_lambdas"], np.ones(3))
    np.testing.assert_array_equal(arrays["x0_lambdas"], np.zeros(3))
    arrays = {"value_embeds.0.weight": np.zeros(1), "smear_gate.weight": np.zeros(1), "x0_lambdas": np.ones(3)}
    config = complete(NANOCHAT | {"window_pattern": "ssl"}, arrays)
    assert (config.window_pattern, config.use_value_embeds, config.use_smear) == ("SSL", True, True)
    assert arrays["x0_lambdas"].tolist() == [1, 1, 1]


def test_a_pickled_tokenizer_is_not_opened(tmp_path):
    folder = tmp_path / "base_checkpoints" / "d20"
    folder.mkdir(parents=True)
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(InputError, match=r"there is no tokenizer .*; give --tokenizer"):
        read_tokenizer_file(folder / "tokenizer.json")
    (tmp_path / "tokenizer" / "tokenizer.pkl").write_bytes(b"cos\nsystem\n")
    with pytest.raises(InputError, match=r"is a pickle, which is never opened here; write a tokenizer\.json from it"):
        read_tokenizer_file(folder / "tokenizer.json")
