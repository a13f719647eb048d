"""Evaluation on text that is named on the command line: what is read of it, and what is kept apart."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from tiny_run import MODEL, random_run, tiny

from snlp_jax.config import Config, DataConfig, EvalConfig, to_json
from snlp_jax.data.chat import ChatData
from snlp_jax.data.corpus import corpus_files
from snlp_jax.errors import InputError
from snlp_jax.eval.evaluate import parse_settings
from snlp_jax.eval.run import held_out, read_evaluation_text
from snlp_jax.run import read_given_text, with_sources


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """With three files of text beside it: two records, one document, and the run's own corpus."""
    folder = tmp_path_factory.mktemp("given")
    random_run(folder / "run")
    (folder / "two.jsonl").write_text("".join(json.dumps({"text": f"record {i} " * 9}) + "\n" for i in range(8)))
    (folder / "one.txt").write_text("a single short document. " * 20)
    return tiny(folder / "run")


def given(run: Config, *names: str, **fields) -> Config:
    files = tuple(str(run.run_path.parent / name) for name in names)
    return dataclasses.replace(run, eval=EvalConfig(data=files, **fields))


def text_of(config: Config, has_fits: bool = False):
    return read_evaluation_text(config.run_path, config, has_fits=has_fits)


def test_all_of_the_given_text_is_measured_on(run: Config) -> None:
    """Files of several formats are one corpus; every document is there once, a separator before it."""
    data = text_of(given(run, "two.jsonl", "one.txt"))
    documents = [f"record {i} " * 9 for i in range(8)] + ["a single short document. " * 20]
    found = bytes(np.asarray(data.val)[np.asarray(data.val) < 256].astype(np.uint8)).decode()
    assert len(data.train) == 0 and sorted(found) == sorted("".join(documents))
    assert all(document in found for document in documents)
    assert int((np.asarray(data.val) == data.tokenizer.bos_id).sum()) == 9
    assert len(text_of(run).train) > 0  # the run's own text


def test_one_document_is_text_too_but_cannot_be_shared(run: Config) -> None:
    config = given(run, "one.txt", num_windows=3, batch_size=2)
    data = text_of(config)
    assert len(data.val) == 1 + 25 * 20 and len(data.train) == 0
    assert data.content_hash != text_of(given(run, "two.jsonl")).content_hash
    assert [batch["tokens"].shape for batch in held_out(data, config)] == [(2, 17)]
    with pytest.raises(InputError, match="only one document"):
        text_of(config, has_fits=True)


FITS = {
    "fits": {"calibrations": ("c:n=2,k=1",)},
    "reads a fit": {"solvers": ("cal:n=2,k=1,fit=c",)},
    "clips": {"weights": "int8", "weight_calibration": 9},
}


@pytest.mark.parametrize("fields", FITS.values(), ids=FITS)
def test_what_is_fitted_and_what_is_measured_share_no_document(run: Config, fields) -> None:
    """The same halves whichever of them is asked for, now or later."""
    data, again = text_of(given(run, "two.jsonl", **fields)), text_of(given(run, "two.jsonl"), has_fits=True)
    np.testing.assert_array_equal(data.val, again.val)
    halves = [
        bytes(tokens[tokens < 256].astype(np.uint8)).decode() for tokens in map(np.asarray, (data.train, data.val))
    ]
    assert halves[0] and halves[1]
    assert all((f"record {i} " in halves[0]) != (f"record {i} " in halves[1]) for i in range(8))


def test_windows_are_as_long_as_was_asked_for(run: Config) -> None:
    config = given(run, "two.jsonl", seq_len=40, num_windows=4, batch_size=4)
    assert held_out(text_of(config), config)[0]["tokens"].shape == (4, 41)  # the model's own are 16
    parse_settings(MODEL, config.eval)
    with pytest.raises(InputError, match=f"eval.seq_len takes 4000 tokens, but the model reads {MODEL.max_context}"):
        parse_settings(MODEL, EvalConfig(seq_len=4000))


def test_conversations_stay_conversations(run: Config, tmp_path: Path) -> None:
    """Of a run on them; files of text are read as text."""
    turns = lambda i: {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "yes"}]}  # noqa: E731
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(turns(i)) + "\n" for i in range(6)))
    data = DataConfig(source=str(tmp_path / "talk.jsonl"), format="chat")
    chat = dataclasses.replace(run, data=data)
    (run.run_path / "config.json").write_text(to_json(run))
    found = read_given_text(run.run_path, chat, [str(tmp_path / "talk.jsonl")], has_fits=False)
    assert isinstance(found, ChatData) and len(found.splits["val"]) == 6 and not found.splits["train"]
    window = found.windows("val", 64)[0]
    assert 0 < window["weight"].mean() < 1
    text = str(run.run_path.parent / "one.txt")
    assert with_sources(run.run_path, chat, [text]).data.format == "text"


def test_names_that_lead_nowhere_are_told(run: Config) -> None:
    both = DataConfig(source=f"{run.run_path.parent / 'one.txt'}\n{run.run_path.parent}/t*.jsonl")
    assert [path.name for path in corpus_files(both)] == ["one.txt", "two.jsonl"]
    with pytest.raises(InputError, match="none.txt"):
        text_of(given(run, "one.txt", "none.txt"))
