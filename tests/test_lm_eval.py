"""The lm_eval adapter: what the harness is told is what our own evaluation finds."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from problems import random_params
from tiny_run import MODEL, tiny

lm_eval = pytest.importorskip("lm_eval", reason='needs lm_eval: pip install "snlp-jax[lm_eval]"')

from lm_eval.__main__ import cli_evaluate  # noqa: E402
from lm_eval.api.model import TemplateLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from snlp_jax.cli.entry import run_entry  # noqa: E402
from snlp_jax.config import TaskConfig, to_json  # noqa: E402
from snlp_jax.data.prompts import prompt_ids  # noqa: E402
from snlp_jax.data.tokenizer import ByteTokenizer, SpecialTokens, train_bpe  # noqa: E402
from snlp_jax.errors import InputError  # noqa: E402
from snlp_jax.eval.lm_eval_adapter import SolverLM, prompt_of  # noqa: E402
from snlp_jax.eval.task_data import load_tasks  # noqa: E402
from snlp_jax.eval.tasks import match_answers, score_choices  # noqa: E402
from snlp_jax.eval.text_model import Prompt, TextModel, encode_pairs  # noqa: E402
from snlp_jax.infer.sampling import Sampling  # noqa: E402
from snlp_jax.io.checkpoint import Checkpointer  # noqa: E402
from snlp_jax.model import LanguageModel  # noqa: E402
from snlp_jax.notation import parse_schedule  # noqa: E402

SETTING = "idn:n=3,k=1"
TOLERANCE = 1e-4
"""Nats of a whole continuation: float32 logits, added up in batches of another make-up."""

CHOICE_YAML = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{{metric: acc}}]
"""
NUMBER_YAML = """
task: local_number
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}, cache_dir: {cache}}}
test_split: test
output_type: generate_until
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: answer
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 4}}
metric_list: [{{metric: exact_match}}]
"""
TEXT_YAML = """
task: local_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}, cache_dir: {cache}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: question
metric_list: [{{metric: bits_per_byte}}]
"""


@pytest.fixture(scope="module")
def params() -> dict:
    return random_params(LanguageModel(MODEL))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, params: dict) -> Path:
    """What training leaves behind, of random weights."""
    path = tmp_path_factory.mktemp("lm_eval") / "run"
    config = tiny(path)
    path.mkdir()
    (path / "config.json").write_text(to_json(config))
    (path / "tokenizer.json").write_text(ByteTokenizer().to_json())
    with Checkpointer(path / "checkpoints", config_json=to_json(config)) as checkpointer:
        checkpointer.save(3, {"params": params}, None, {"val_loss": 1.0})
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files as the harness reads them, and their data."""
    path = tmp_path_factory.mktemp("harness")
    rng = np.random.default_rng(0)
    choices = ["a layer", "the depth of it", "trâce"]
    choice = [{"question": f"Which of {i}?", "choices": choices, "answer": int(rng.integers(3))} for i in range(6)]
    number = [{"question": f"How many {i}?", "answer": f"#### {i}"} for i in range(3)]
    text = [{"question": "".join(rng.choice(list("abc de"), length))} for length in (40, 161, 350)]
    files = (("choice", CHOICE_YAML, choice), ("number", NUMBER_YAML, number), ("text", TEXT_YAML, text))
    for name, yaml, records in files:
        data = path / f"{name}.jsonl"
        data.write_text("\n".join(map(json.dumps, records)))
        (path / f"{name}.yaml").write_text(yaml.format(path=data, cache=path / "cache"))
    return path


@pytest.fixture(scope="module")
def text_model(params: dict) -> TextModel:
    """Our own evaluation."""
    schedule = parse_schedule(SETTING, MODEL.num_layers)
    return TextModel(LanguageModel(MODEL), params, ByteTokenizer(), schedule, batch_size=3)


@pytest.fixture(scope="module")
def found(run_dir: Path, folder: Path) -> dict:
    """What the harness makes of the run, which it opens by name."""
    return lm_eval.simple_evaluate(
        model="snlp_jax",
        model_args=f"run_dir={run_dir},setting={SETTING.replace(',', ';')}",
        tasks=["local_choice", "local_number", "local_text"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )


def test_choices_have_the_log_likelihoods_of_our_own_evaluation(
    found: dict, folder: Path, text_model: TextModel
) -> None:
    (task,) = load_tasks(TaskConfig((str(folder / "choice.jsonl"),)))
    pairs = [(task.prompt(each), " " + choice) for each in task.examples for choice in each.choices]
    ours = text_model.log_likelihoods(pairs)
    samples = sorted(found["samples"]["local_choice"], key=lambda sample: sample["doc_id"])
    theirs = [answer for sample in samples for answer in sample["filtered_resps"]]
    assert len(theirs) == len(ours) == 18
    for score, (log_prob, is_greedy) in zip(ours, theirs, strict=True):
        assert float(log_prob) == pytest.approx(score.log_prob, abs=TOLERANCE)
        assert str(is_greedy) == str(score.is_greedy)
    outcome = score_choices(text_model.log_likelihoods, task)
    assert found["results"]["local_choice"]["acc,none"] == pytest.approx(outcome.right["sum"].mean())


def test_texts_are_generated_as_in_our_own_evaluation(found: dict, folder: Path, text_model: TextModel) -> None:
    (task,) = load_tasks(TaskConfig((str(folder / "number.jsonl"),)))
    ours: list[str] = []

    def complete(prompts: list[Prompt]) -> list[str]:
        ours.extend(text_model.complete(prompts))
        return ours

    match_answers(complete, task, 4)
    samples = sorted(found["samples"]["local_number"], key=lambda sample: sample["doc_id"])
    assert [sample["resps"][0][0] for sample in samples] == ours


def test_long_texts_have_our_bits_per_byte(found: dict, folder: Path, text_model: TextModel) -> None:
    texts = [json.loads(line)["question"] for line in (folder / "text.jsonl").read_text().splitlines()]
    nats = text_model.rolling(texts)
    expected = -sum(nats) / sum(map(len, texts)) / math.log(2)
    assert found["results"]["local_text"]["bits_per_byte,none"] == pytest.approx(expected, abs=TOLERANCE)
    (whole,) = text_model.log_likelihoods([("", texts[0])])
    assert nats[0] == pytest.approx(whole.log_prob, abs=TOLERANCE)


@pytest.mark.parametrize("prefix", ((), (0,)))
def test_continuations_begin_where_lm_eval_has_them(prefix: tuple[int, ...]) -> None:
    text = "the layers of the layered trace are  layers\n\n of a  trace "
    tokenizer = train_bpe([text * 20], 300)
    tokenizer.special = SpecialTokens(0, prefix, (0,))
    theirs = SimpleNamespace(backend="causal", tok_encode=lambda text: prompt_ids(tokenizer, text) if text else [])
    pairs = [(text[:border], text[border:stop]) for border in range(1, 40) for stop in range(border + 1, len(text), 3)]
    num_compared = 0
    for (context, continuation), span in zip(pairs, encode_pairs(tokenizer, pairs), strict=True):
        before, scored = TemplateLM._encode_pair(theirs, context, continuation)  # type: ignore[arg-type]
        if before and scored:
            num_compared += 1
            assert (span.tokens.tolist(), span.num_scored) == ([*before, *scored], len(scored))
    assert num_compared > 400


def test_generation_settings() -> None:
    assert prompt_of("x", {"until": "\n", "max_gen_toks": 3}) == Prompt("x", 3, ("\n",))
    assert prompt_of("x", {"until": ["\n", ""], "do_sample": False, "temperature": 0.7}) == Prompt("x", 256, ("\n",))
    sampled = prompt_of("x", {"do_sample": True, "top_p": 0.9, "max_new_tokens": 5, "top_k": None})
    assert sampled == Prompt("x", 5, (), Sampling(temperature=1.0, top_p=0.9))
    assert prompt_of("x", {"temperature": 0.5}).sampling == Sampling(temperature=0.5)
    everyday = {"until": [], "do_sample": True, "temperature": 1, "top_k": -1, "max_gen_toks": 32, "num_beams": 1}
    assert prompt_of("x", everyday) == Prompt("x", 32, (), Sampling(temperature=1))
    assert prompt_of("x", {"do_sample": True, "temperature": 0.0, "use_cache": True}).sampling == Sampling()
    for settings, sentence in (
        ({"num_beams": 4}, "generation_kwargs num_beams=4 mean nothing to snlp_jax"),
        ({"max_gen_toks": "many"}, "generation_kwargs max_gen_toks is 'many'; it must be of type int"),
        ({"until": [1]}, r"generation_kwargs until.0. is 1; it must be of type str"),
    ):
        with pytest.raises(InputError, match=sentence):
            prompt_of("x", settings)


def test_chat_templates_and_cut_contexts(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = SolverLM(str(run_dir))
    assert model.chat_template(False) is None and model.chat_template(True) == "" and model.tokenizer_name == "byte"
    history = [{"role": "user", "content": "Why?"}]
    assert model.apply_chat_template(history) == "User: Why?\nAssistant:"
    answer = [*history, {"role": "assistant", "content": "So"}]
    assert model.apply_chat_template(answer, add_generation_prompt=False) == "User: Why?\nAssistant: So"
    asked = [("a" * 40, " b"), ("a" * 400, " b")]
    scores = model.loglikelihood([SimpleNamespace(args=args) for args in asked])
    assert len(scores) == 2 and "1 of 2 contexts are longer than the 160 tokens" in caplog.text


@pytest.mark.parametrize(
    "arguments, sentence",
    (
        ("", "snlp_jax needs model_args run_dir=RUN_DIR"),
        ("run_dir={run},setting=idn:n=3,k=1", "model_args k mean nothing to snlp_jax; .* as in setting=idn:n=8;k=2"),
        ("run_dir={run},setting=idn:n=9", "n=9 is outside the model"),
        ("run_dir={run},setting=hcn:n=2", "hcn needs residual streams"),
        ("run_dir={run},checkpoint=newest", "checkpoint is 'newest'; choose one of 'best', 'last'"),
        ("run_dir={run}/none", "does not exist"),
    ),
)
def test_bad_arguments(run_dir: Path, arguments: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        SolverLM.create_from_arg_string(arguments.format(run=run_dir), {"batch_size": 1, "device": None})


@pytest.mark.slow
def test_command_line(
    run_dir: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("snlp_jax.cli.entry.enable_compilation_cache", lambda: None)

    def command(arguments: str) -> None:
        flags = ["--model", "snlp_jax", "--model_args", arguments, "--tasks", str(folder / "choice.yaml")]
        monkeypatch.setattr(sys, "argv", ["lm_eval", *flags, "--batch_size", "4", "--limit", "2"])
        run_entry(cli_evaluate)

    command(f"run_dir={run_dir},setting={SETTING.replace(',', ';')}")
    assert "|local_choice|" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        command(f"run_dir={run_dir},setting=idn:n=9")
    assert stopped.value.code == 2 and "n=9 is outside the model" in capsys.readouterr().err
