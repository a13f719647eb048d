"""Runs, their origins and their text go elsewhere, are opened from elsewhere, and may not be written to."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_import import TEMPLATE, write_source
from tiny_run import MODEL, random_run

from snlp_jax.cli.convert import export_run, import_run
from snlp_jax.config import Config, DataConfig, TrainConfig, to_json
from snlp_jax.data.tokenizer import ByteTokenizer, train_bpe
from snlp_jax.errors import InputError
from snlp_jax.io.checkpoint import CONFIG_NAME
from snlp_jax.io.moved import SOURCE_NAME, kept_files, lost_origin, read_saved, source_folder
from snlp_jax.io.run_dir import check_run_dir
from snlp_jax.model.convert import TensorFiles
from snlp_jax.run import TOKENIZER_NAME, load_run, read_config, read_data
from snlp_jax.train.setup import keep_files
from snlp_jax.train.start import data_config


def write_run(folder: Path, config: Config, tokenizer_json: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / CONFIG_NAME).write_text(to_json(config))
    (folder / TOKENIZER_NAME).write_text(tokenizer_json or ByteTokenizer().to_json())
    return folder


def test_text_is_found_again_beside_a_moved_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the working directory; and in the run's own tokens, though its config names a file that is gone."""
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    (project / "texts").mkdir(parents=True)
    elsewhere.mkdir()
    for name in "ab":
        (project / "texts" / f"{name}.txt").write_text(f"{name} word")
    mine = train_bpe(["word " * 9], 300)
    cache, gone = str(tmp_path / "cache"), str(tmp_path / "gone.json")
    for root in ("", f"{project}/"):  # as relative paths, and as absolute ones
        data = DataConfig(source=f"{root}texts/*.txt", tokenizer=gone, cache_dir=cache)
        config = Config(run_dir=f"{root}runs/one", data=data)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=mine.vocab_size))
        write_run(project / "runs" / "one", config, mine.to_json())
        mixed = dataclasses.replace(data, source="builtin", mixture=(f"{root}texts/a.txt@2", "nowhere/b.txt@1"))
        write_run(project / "runs" / "two", dataclasses.replace(config, run_dir=f"{root}runs/two", data=mixed))
        for cwd, place in ((project, project), (elsewhere, project), (elsewhere, tmp_path / "moved")):
            monkeypatch.chdir(cwd)
            if place != project:
                project.rename(place)
            found = read_config(place / "runs" / "one")
            assert os.path.realpath(found.data.source) == str(place / "texts" / "*.txt")
            tokens = read_data(place / "runs" / "one", found)
            assert tokens.tokenizer.to_json() == mine.to_json() and len(tokens.train) + len(tokens.val) > 2
            first, second = read_saved(place / "runs" / "two").data.mixture
            assert os.path.realpath(first) == str(place / "texts" / "a.txt@2") and second == "nowhere/b.txt@1"
        place.rename(project)
        shutil.rmtree(project / "runs")


def test_text_of_another_place_is_not_taken_for_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("project", "other"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "a.txt").write_text(place)
    run = write_run(tmp_path / "project" / "runs" / "one", Config(name="one", data=DataConfig(source="a.txt")))
    monkeypatch.chdir(tmp_path / "other")
    assert Path(read_saved(run).data.source).read_text() == "project"
    monkeypatch.chdir(tmp_path / "project")
    assert read_saved(run).data.source == "a.txt"
    (tmp_path / "project" / "a.txt").unlink()
    assert read_saved(run).data.source == "a.txt"  # for the sentence that says so


def test_training_goes_on_when_text_and_tokenizer_have_moved(tmp_path: Path) -> None:
    run = tmp_path / "run"
    before = Config(run_dir=str(run), data=DataConfig(source="old/a.txt", tokenizer="gone.json"))
    check_run_dir(run, before, resume=False, corpus_hash="text")
    (run / TOKENIZER_NAME).write_text(ByteTokenizer().to_json())
    after = dataclasses.replace(before, data=dataclasses.replace(before.data, source="new/a.txt"))
    with pytest.raises(InputError, match="the corpus has changed since"):
        check_run_dir(run, after, resume=True, corpus_hash="other text")
    assert read_saved(run).data.source == "old/a.txt"
    check_run_dir(run, after, resume=True, corpus_hash="text")
    assert read_saved(run).data.source == "new/a.txt"
    assert data_config(after, resume=True).tokenizer == str(run / TOKENIZER_NAME)
    assert data_config(after, resume=False).tokenizer == "gone.json"


def test_a_run_needs_its_origin_no_more(tmp_path: Path) -> None:
    """It keeps what an export gives back; one from before it did so says what is missing, unless nothing is."""
    import_run(str(write_source(tmp_path / "hf")), tmp_path / "base")
    shutil.rmtree(tmp_path / "hf")
    base = read_saved(tmp_path / "base")
    for name in ("tuned", "old"):
        shutil.copytree(tmp_path / "base" / "checkpoints", tmp_path / name / "checkpoints")
        shutil.copy(tmp_path / "base" / TOKENIZER_NAME, tmp_path / name)
        train = TrainConfig(init_from=str(tmp_path / "base"))
        config = dataclasses.replace(base, run_dir=str(tmp_path / name), train=train)
        (tmp_path / name / CONFIG_NAME).write_text(to_json(config))
    keep_files(read_saved(tmp_path / "tuned"))
    assert kept_files(tmp_path / "tuned") == kept_files(tmp_path / "base") == kept_files(tmp_path / "old")
    assert (tmp_path / "tuned" / "chat_template.jinja").read_text() == TEMPLATE
    shutil.move(tmp_path / "base", tmp_path / "away")
    assert lost_origin(tmp_path / "old") == tmp_path / "base"
    assert source_folder(tmp_path / "tuned") == tmp_path / "tuned" / SOURCE_NAME
    for name in ("tuned", "away"):
        export_run(tmp_path / name, tmp_path / f"{name}-out", "last", "float32", 1.0)
    tuned, away = (TensorFiles(tmp_path / f"{name}-out") for name in ("tuned", "away"))
    assert set(tuned) == set(away)
    assert json.loads((tmp_path / "tuned-out" / CONFIG_NAME).read_text())["architectures"] == ["LlamaForCausalLM"]
    with pytest.raises(InputError, match="base', which is not there.*copy its folder 'source' into .*old'"):
        export_run(tmp_path / "old", tmp_path / "old-out", "last", "float32", 1.0)
    assert not (tmp_path / "old-out").exists()


def test_a_run_is_opened_where_nothing_may_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere, so that the calls are watched that would."""
    run = random_run(tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.rglob("*")]}
    written = [getattr(os, name) for name in ("mkdir", "rename", "replace", "unlink", "rmdir")]
    for call in written:

        def refuse(path, *rest, call=call, **options):
            if str(tmp_path) in str(path):
                raise PermissionError(13, "Permission denied", str(path))
            return call(path, *rest, **options)

        monkeypatch.setattr(os, call.__name__, refuse)
    loaded = load_run(run, "last")
    assert loaded.model.config == MODEL and np.isfinite(np.asarray(loaded.params["embed"]["token"])).all()
    assert {path: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.rglob("*")]} == before


def test_tokens_are_kept_elsewhere_where_their_folder_may_not_be_written(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a.txt").write_text("one two three " * 9000)
    data = DataConfig(source=str(tmp_path / "a.txt"), cache_dir=str(tmp_path / "cache"))
    run = write_run(tmp_path / "run", Config(data=data))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path))
    assert len(read_data(run, read_config(run)).train) > 1
    assert (tmp_path / "home" / "snlp_jax" / "tokens").is_dir() and not (tmp_path / "cache").exists()
