"""Damage to every format and to every file of a run or of an imported model: one sentence, or the right answer."""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from corpora import iter_documents
from fuzzing import attack
from test_data_formats import KINDS, PACK, TALKS, TEXTS, content
from test_import import write_source
from test_solver_file import FOUND
from tiny_run import MODEL, random_run, tiny

from snlp_jax.cli.convert import export_run, import_run
from snlp_jax.config import DataConfig, to_json
from snlp_jax.data.chat import read_conversations
from snlp_jax.data.tokenizer import train_bpe
from snlp_jax.eval.solver_file import read_solver_file, write_solver_file
from snlp_jax.eval.task_data import read_examples
from snlp_jax.io.moved import read_saved
from snlp_jax.io.written import write_run_files
from snlp_jax.linearize import About, save_calibration
from snlp_jax.linearize.store import load_calibration
from snlp_jax.model import LanguageModel
from snlp_jax.notation import parse_schedule
from snlp_jax.pretrained.load import import_model
from snlp_jax.run import read_params, read_tokenizer
from snlp_jax.solver import Calibration
from snlp_jax.train.report import write_html

Case = tuple[Path, Callable[[], Any], bool]
"""A folder of files, what reads it, and whether checksums tell of every change."""
RECORDS = [{"text": text[:200], "id": i} for i, text in enumerate(TEXTS)]


def formats(folder: Path) -> Iterator[Case]:
    for kind in (*KINDS, ".txt"):
        for pack, press in PACK.items():
            inside = folder / f"{kind}{pack}"
            texts, talks = inside / "texts" / f"a{kind}{pack}", inside / "talks" / f"a{kind}{pack}"
            for path, records in ((texts, RECORDS), (talks, TALKS)):
                path.parent.mkdir(parents=True)
                if kind == ".txt":
                    path.write_bytes(press("\n\n".join(TEXTS).encode()))
                else:
                    path.write_bytes(press(content(kind, records, folder)))
            config, chat = DataConfig(source=str(texts)), DataConfig(source=str(talks), format="chat")
            yield texts.parent, lambda config=config: list(iter_documents(config)), bool(pack)
            if kind != ".txt":
                yield talks.parent, lambda chat=chat: list(read_conversations(chat)), bool(pack)


def files_of_a_run(folder: Path) -> Iterator[Case]:
    """But for checkpoints: its config, tokenizer, records, calibrations, solver file, and a file of tasks."""
    run, mine = folder / "run", train_bpe(["word wordy words " * 9], 300)
    (run / "eval").mkdir(parents=True)
    (run / "config.json").write_text(to_json(tiny(run)))
    yield run, lambda: read_saved(run), False
    metrics = [{"step": i, "loss": 1 / i, "val_loss": "nan"} for i in range(1, 9)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in metrics))
    session = {"date": "today", "commit": None, "first_step": 0, "last_step": 8, "seconds": 1.5}
    (run / "run.json").write_text(json.dumps({"num_params": 3, "flops_per_token": 3, "sessions": [session]}))
    result = {"setting": "seq", "depth": 4, "ppl": 9.5, "ppl_interval": [0.0, 0.5], "timing": {"median_ms": 1.5}}
    (run / "eval" / "eval.json").write_text(json.dumps({"results": [result], "info": {"step": 8}}))
    yield run, lambda: write_html(run) and None, False
    for name in ("tokens", "solver", "fits", "tasks"):
        (folder / name).mkdir()
    (folder / "tokens" / "tokenizer.json").write_text(mine.to_json())
    yield folder / "tokens", lambda: read_tokenizer(folder / "tokens").encode("words word").shape and None, False
    write_solver_file(folder / "solver" / "solver.json", FOUND)
    yield folder / "solver", lambda: read_solver_file("auto", 4, folder / "solver"), False
    region = parse_schedule("cal:n=3,k=2,init=h0,fit=a", 4).regions[0]
    about = About("scalar", 1, 4, 2, 64, 0, "mine", init="h0")
    save_calibration(folder / "fits", "a", Calibration({"scale": np.ones(3)}, {"shift": np.ones(1)}), about)
    yield folder / "fits", lambda: jax.tree.map(repr, load_calibration(folder / "fits", region, "mine")), True
    example = {"question": "q", "choices": ["a", "b"], "answer": 1}
    (folder / "tasks" / "a.jsonl").write_text((json.dumps(example) + "\n") * 2)
    yield folder / "tasks", lambda: read_examples(folder / "tasks" / "a.jsonl"), False


def imported(folder: Path) -> Iterator[Case]:
    """A Hugging Face folder, a GGUF file, and what a run keeps of them."""
    source = write_source(folder / "hf", "llama_bias")
    import_run(str(source), folder / "run")
    yield source, lambda: import_model(str(source)).config and None, False

    def export() -> None:
        shutil.rmtree(folder / "out", ignore_errors=True)
        export_run(folder / "run", folder / "out", "last", "float32", 1.0)

    yield folder / "run" / "source", export, False
    pytest.importorskip("gguf")
    from gguf_files import VOCABULARY, fields_of, tensors_of, write_gguf

    (folder / "gguf").mkdir()
    write_gguf(folder / "gguf" / "a.gguf", fields_of("llama") | VOCABULARY, tensors_of("llama"))
    yield folder / "gguf", lambda: import_model(str(folder / "gguf" / "a.gguf")).config and None, False


def checkpoints(folder: Path) -> Iterator[Case]:
    run, model = random_run(folder / "run"), LanguageModel(MODEL)
    total = lambda: [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(read_params(run, model, "last")[1])]  # noqa: E731
    yield run / "checkpoints", total, True


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawings take most of a report's time."""
    monkeypatch.setattr("snlp_jax.train.report._plot", lambda *_, **__: "")


@pytest.mark.parametrize(("cases", "count"), [(formats, 3), (files_of_a_run, 12), (imported, 1)])
def test_damaged_files_give_one_sentence(cases: Callable, count: int, tmp_path: Path) -> None:
    wrong = [attack(folder, read, seed=0, count=count, is_checked=checked) for folder, read, checked in cases(tmp_path)]
    assert sum(wrong, []) == []


@pytest.mark.slow
@pytest.mark.parametrize("cases", [formats, files_of_a_run, imported, checkpoints])
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_much_damage(cases: Callable, tmp_path: Path) -> None:
    """Of other damage, FUZZ_SEED=n FUZZ_ROUNDS=m in the environment; the seed is in the message."""
    first, rounds = int(os.environ.get("FUZZ_SEED", 1)), int(os.environ.get("FUZZ_ROUNDS", 10))
    logging.getLogger("snlp_jax").setLevel(logging.ERROR)
    found = list(cases(tmp_path))
    for seed in range(first, first + rounds):
        for folder, read, checked in found:
            wrong = attack(folder, read, seed=seed, count=2, is_checked=checked)
            assert wrong == [], f"seed {seed}: {wrong}"


def test_a_file_that_changed_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two letters of a vocabulary in each other's place give other tokens, and no fault."""
    write_run_files(tmp_path, {"tokenizer.json": train_bpe(["word words " * 9], 300).to_json(), "source/a": b"\xff"})
    assert read_tokenizer(tmp_path) and not caplog.records
    text = json.loads((tmp_path / "tokenizer.json").read_text())
    ids = text["model"]["vocab"]
    ids["w"], ids["x"] = ids["x"], ids["w"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(text))
    for _ in range(2):
        assert read_tokenizer(tmp_path).decode([ids["w"]]) == "w"
    (record,) = caplog.records
    assert "tokenizer.json is not what was written with its run; restore it" in record.getMessage()
