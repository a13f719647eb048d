"""Downstream tasks: likelihoods are those of the text alone, files say what is wrong with them, intervals are what they
are called."""

import dataclasses
import json
import math
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from problems import random_params
from tiny_run import MODEL, random_run

from snlp_jax.config import EvalConfig, MeshConfig, TaskConfig
from snlp_jax.data.tokenizer import ByteTokenizer
from snlp_jax.errors import InputError
from snlp_jax.eval.intervals import Z, exact_p_value, paired_ratio_interval, paired_share_interval, wilson_interval
from snlp_jax.eval.task_data import Example, Task, answer_of, final_answer, load_tasks
from snlp_jax.eval.tasks import compare_outcomes, match_answers, score_choices, tasks_of_run, window_bytes
from snlp_jax.eval.text_model import Prompt, Score, Span, TextModel, needs_solitude
from snlp_jax.forward import forward
from snlp_jax.infer import Placement
from snlp_jax.infer.engine import Request
from snlp_jax.layout import split
from snlp_jax.model import LanguageModel
from snlp_jax.notation import parse_schedule
from snlp_jax.run import read_config

ROOT = Path(__file__).parent.parent
CONTEXT = "Which?\nA:"
PAIRS = [(CONTEXT, " last"), (CONTEXT[:4], CONTEXT[4:] + " last"), ("", "token"), ("trace", "")]
ROUNDING = 1e-5
"""Nats a token: float32 logits of up to 15, added up in the order of another program."""


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(MODEL)


@pytest.fixture(scope="module")
def params(model: LanguageModel) -> dict:
    return random_params(model)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_run(tmp_path_factory.mktemp("tasks") / "run")


def text_model(model: LanguageModel, params: dict, setting: str, **settings) -> TextModel:
    return TextModel(model, params, ByteTokenizer(), parse_schedule(setting, MODEL.num_layers), **settings)


@pytest.mark.parametrize("setting", ("seq", pytest.param("idn:n=2,tol=0.3", marks=pytest.mark.slow)))
def test_log_likelihoods_are_those_of_each_text_alone(model: LanguageModel, params: dict, setting: str) -> None:
    """Of ``seq`` the reference reads texts padded to one length, which changes nothing, see below."""
    found = text_model(model, params, setting, batch_size=2).log_likelihoods(PAIRS)
    longest = max(len("".join(pair)) for pair in PAIRS)
    weights = split(model, params, parse_schedule(setting, MODEL.num_layers))
    run = jax.jit(lambda weights, tokens: forward(model, weights, tokens).logits_BTV)
    for (context, continuation), score in zip(PAIRS, found, strict=True):
        tokens = np.asarray([ByteTokenizer.bos_id, *(context + continuation).encode()])
        padded = tokens[:-1] if needs_solitude(parse_schedule(setting, 4)) else np.resize(tokens[:-1], longest)
        log_p = np.asarray(jax.nn.log_softmax(run(weights, padded[None])[0, : len(tokens) - 1]), np.float64)
        positions = np.arange(len(context), len(tokens) - 1)
        expected = log_p[positions, tokens[1:][positions]]
        assert score.num_tokens == len(continuation)
        assert score.log_prob == pytest.approx(expected.sum(), abs=ROUNDING * max(len(expected), 1))
        assert score.is_greedy == (log_p.argmax(-1) == tokens[1:])[positions].all()


def test_padding_and_batches_change_nothing() -> None:
    model = LanguageModel(dataclasses.replace(MODEL, num_layers=2, rotary_multiple=2))  # reads 32
    schedule = parse_schedule("sid:n=2,k=1,init=batch_forward", 2)
    assert not needs_solitude(schedule)
    ours = TextModel(model, random_params(model), ByteTokenizer(), schedule, batch_size=4)
    token_fn = ours.token_fn
    rng = np.random.default_rng(0)
    spans = [Span(rng.integers(1, 257, n).astype(np.int32), min(n - 1, 4)) for n in (3, 9, 12, 5)]

    def with_noise(windows: np.ndarray, places: np.ndarray) -> tuple:
        return token_fn(np.where(windows == 0, rng.integers(1, 257, windows.shape), windows).astype(np.int32), places)

    def with_more(windows: np.ndarray, places: np.ndarray) -> tuple:
        return token_fn(np.pad(windows, ((0, 0), (0, 7))), places)

    together, backwards = ours.score(spans), ours.score(spans[::-1])[::-1]
    ours.__dict__["token_fn"] = with_noise
    noisy = ours.score(spans)
    ours.__dict__["token_fn"], ours.batch_size = with_more, 1
    others = {"noise": noisy, "more, alone": ours.score(spans), "reversed": backwards}
    for name, scores in others.items():
        for score, expected, span in zip(scores, together, spans, strict=True):
            assert score.log_prob == pytest.approx(expected.log_prob, abs=ROUNDING * span.num_scored), name
            assert score[1:] == expected[1:], name


def test_settings_that_see_other_tokens_are_scored_alone() -> None:
    for setting, expected in (("idn:n=4,tol=0.1", True), ("diag:n=4,k=1", True), ("exact:n=4,k=1,init=warm", False)):
        assert needs_solitude(parse_schedule(setting, 4)) == expected, setting
    shapes = []

    def token_fn(windows: np.ndarray, places: np.ndarray) -> tuple:
        shapes.append(windows.shape)
        return np.zeros(places.shape), np.ones(places.shape, bool)

    spans = [Span(np.ones(n, np.int32), 1) for n in (5, 9, 5, 40)]

    def score(setting: str, batch_size: int, placement: Placement, **fields) -> None:
        config = dataclasses.replace(MODEL, **fields)
        ours = text_model(LanguageModel(config), {}, setting, batch_size=batch_size, placement=placement)
        ours.__dict__["token_fn"] = token_fn
        ours.score(spans)

    score("idn:n=4,tol=0.1", 4, Placement(), rotary_multiple=2)  # reads 32
    assert sorted(shapes) == [(1, 5), (1, 5), (1, 9), (1, 33)]
    shapes.clear()
    mesh = SimpleNamespace(shape={"data": 2})
    score("seq", 8, Placement(mesh), seq_len=8, rotary_multiple=3)
    assert sorted(shapes) == [(2, 25), (4, 17)], "few lengths; the longest is what the model reads"


def test_long_contexts_lose_their_beginning(model: LanguageModel, params: dict) -> None:
    longest = MODEL.max_context
    ours, windows_seen = text_model(model, params, "seq"), []

    def token_fn(windows: np.ndarray, places: np.ndarray) -> tuple:
        windows_seen.extend(windows)
        targets = np.take_along_axis(windows[:, 1:], places, axis=1)
        return targets.astype(np.float32), np.ones(targets.shape, bool)

    ours.__dict__["token_fn"] = token_fn
    text = "".join(np.random.default_rng(0).choice(list("abcd "), longest + 40)) + "."
    (score,) = ours.log_likelihoods([(text, " end")])
    assert ours.num_cut == 1 and score.log_prob == -sum(b" end")
    (window,) = windows_seen
    assert window[0] == 256 and bytes(window[1:].astype(np.uint8)) == (text + " end").encode()[-longest:]
    assert ours.log_likelihoods([(text[: longest - 4], " end")]) and ours.num_cut == 1, "the separator still fits"
    with pytest.raises(InputError, match=f"a continuation of {longest + 1} tokens is longer than the {longest}"):
        ours.log_likelihoods([("", "x" * (longest + 1))])
    with pytest.raises(InputError, match=f"160 new tokens leave no room for a prompt, as the model reads {longest}"):
        ours.complete([Prompt("x", 160)])


PROMPTS = [Prompt("layer", 5), Prompt("the depth of", 6), Prompt("a trace", 6)]


def test_completions_are_asked_for_in_batches_of_one_size(model: LanguageModel, params: dict) -> None:
    ours, batches = text_model(model, params, "seq", batch_size=2), []

    def generate(requests: list[Request]) -> list[SimpleNamespace]:
        batches.append([len(request.tokens) for request in requests])
        return [SimpleNamespace(text=bytes(request.tokens[1:]).decode()) for request in requests]

    ours.__dict__["engine"] = SimpleNamespace(generate=generate)
    assert ours.complete(PROMPTS) == [prompt.text for prompt in PROMPTS]
    assert batches == [[6, 8], [13, 13]]
    long = "".join(np.random.default_rng(0).choice(list("abcd "), MODEL.max_context))
    assert ours.complete([Prompt(long, 6)]) == [long[-MODEL.max_context + 7 :]] and ours.num_cut == 1


def test_completions_stop_where_the_model_ends_a_text(model: LanguageModel, params: dict) -> None:
    ours, seen = text_model(model, params, "seq"), []

    def generate(requests: list[Request]) -> list[SimpleNamespace]:
        seen.extend(requests)
        return [SimpleNamespace(text="") for _ in requests]

    ours.__dict__["engine"] = SimpleNamespace(generate=generate)
    ours.complete([Prompt("layer", 5, ("\n",))])
    assert (seen[0].stop_tokens, seen[0].stop_strings) == (ByteTokenizer.special.end_ids, ("\n",))


TASK = Task("t", (Example("q1", 0, ("aa", "b")), Example("q2", 2, ("c", "dd", "éé"))), 2)


def test_choices_are_compared_by_sum_and_by_byte() -> None:
    asked = {}
    nats = {" aa": -3.0, " b": -2.0, " c": -2.0, " dd": -4.0, " éé": -6.0}

    def log_likelihoods(pairs):
        asked.update(pairs)
        return [Score(nats[continuation], 1, False) for _, continuation in pairs]

    outcome = score_choices(log_likelihoods, TASK)
    assert set(asked) == {"Question: q1\nAnswer:", "Question: q2\nAnswer:"}
    assert outcome.answers["sum"].tolist() == [1, 0]
    assert outcome.answers["per_byte"].tolist() == [0, 2], "-1.5 and -2 a byte; -2, -2 and -1.5, é having two"
    assert outcome.right["per_byte"].tolist() == [True, True] and outcome.right["sum"].tolist() == [False, False]
    np.testing.assert_allclose(outcome.bits_E, np.asarray([3.0, 6.0]) / math.log(2))
    assert outcome.bytes_E.tolist() == [2, 4] and TASK.chance == pytest.approx((1 / 2 + 1 / 3) / 2)

    nats[" aa"] = -5.0
    other = score_choices(log_likelihoods, TASK)
    accuracy, bits = compare_outcomes(other, outcome, 100)
    assert accuracy["per_byte"].share == 0.5 and accuracy["per_byte"].change == -0.5
    assert accuracy["per_byte"].agreement == 0.5 and accuracy["sum"].agreement == 1
    assert bits.change == pytest.approx(2 / math.log(2) / 6)


def test_generated_answers_match_exactly() -> None:
    shots = (Example("1+1?", "two #### 2"),)
    task = Task(
        "t", (Example("a", "so #### 1,018"), Example("b", "x #### 2"), Example("c", "#### New  Delhi")), 4, shots
    )
    seen = []

    def complete(prompts):
        seen.extend(prompts)
        return [" 3 + 4 #### 1018.00 and 7", " it is 3", " thinking #### new delhi\n"]

    outcome = match_answers(complete, task, 5)
    assert outcome.right["exact_match"].tolist() == [True, False, True]
    assert seen[0] == Prompt("Question: 1+1?\nAnswer: two #### 2\n\nQuestion: a\nAnswer:", 5, ("\n\n",))


def test_final_answers() -> None:
    for text, expected in (
        ("He makes 9 * 2 = $18\n#### 18", "18"),
        ("#### 5 and later 7", "5"),
        ("#### 5\n#### $1,234.50", "1234.5"),
        ("first 3, then -4.0.", "-4"),
        ("10-3", "3"),
        ("a loss of -$7", "-7"),
        ("1,000, I think", "1000"),
        ("#### none, but 12", "12"),
        ("nothing", ""),
    ):
        assert final_answer(text) == answer_of(text, "#### 1") == expected


GOOD = '{"question": "q", "choices": ["a", "b"], "answer": 1}\n'


def test_bad_lines_are_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    for lines, keyword in (
        ("{]\n", "bad.jsonl:2 is not valid JSON"),
        ("[1]\n", "bad.jsonl:2: [1]"),
        ('{"choices": ["a", "b"], "answer": 1}\n', "'question'"),
        ('{"question": 3, "choices": ["a", "b"], "answer": 1}\n', "question is 3"),
        ('{"question": "q", "choices": ["a", ""], "answer": 1}\n', "choices are ['a', '']"),
        ('{"question": "q", "choices": ["a"], "answer": 0}\n', "choices are ['a']"),
        ('\n{"question": "q", "choices": ["a", "b"], "answer": 2}\n', "bad.jsonl:3: answer is 2"),
        ('{"question": "q", "choices": ["a", "b"], "answer": true}\n', "answer is True"),
        ('{"question": "q", "answer": 4}\n', "answer is 4"),
        ('{"question": "q", "answer": "#### 4"}\n', "some have none"),
    ):
        path.write_text(GOOD + lines)
        with pytest.raises(InputError, match=re.escape(keyword)) as raised:
            load_tasks(TaskConfig((str(path),)))
        assert "bad.jsonl" in str(raised.value) and "\n" not in str(raised.value)


def test_bad_files_are_named(tmp_path: Path) -> None:
    path, empty, binary = tmp_path / "two.jsonl", tmp_path / "empty.jsonl", tmp_path / "binary.jsonl"
    path.write_text(GOOD * 2)
    empty.write_text("\n")
    binary.write_bytes(b"\xff\xfe\x00")
    for arguments, sentence in (
        ((tmp_path / "none.jsonl",), "cannot be read"),
        ((empty,), "holds no examples"),
        ((binary,), "is not UTF-8 text"),
        ((path, 0, 2), "show fewer"),
        ((path, 0, 0, ("{question}", "{question}")), "2 prompt templates"),
        ((path, 0, 0, ("Q:",)), "{question}"),
    ):
        with pytest.raises(InputError, match=re.escape(sentence)):
            load_tasks(TaskConfig((str(arguments[0]),), *arguments[1:]))


def test_examples_are_spread_evenly_and_shots_are_not_asked(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        records = [{"question": str(i), "choices": ["x", "y"], "answer": 0, "id": i} for i in range(12)]
        (tmp_path / folder / "test.jsonl").write_text("\n".join(map(json.dumps, records)))
    paths = tuple(str(tmp_path / folder / "test.jsonl") for folder in ("a", "b"))
    first, second = load_tasks(TaskConfig(paths, 5, 2, ("{question}", "Q {question}\\nA: ")))
    assert [each.question for each in first.examples] == ["2", "4", "6", "8", "10"]
    assert first.prompt(first.examples[0]) == "0 x\n\n1 x\n\n2" and first.delimiter == " "
    assert second.prompt(second.examples[0]) == "Q 0\nA: x\n\nQ 1\nA: x\n\nQ 2\nA: " and second.delimiter == ""
    assert (first.name, second.name, first.num_in_file) == ("a/test", "b/test", 12)


def test_wilson_interval() -> None:
    # Newcombe (1998), Statistics in Medicine 17:857, table I, method 3.
    for (right, num), expected in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
    }.items():
        assert wilson_interval(right, num) == pytest.approx(expected, abs=1e-4)
    low, high = wilson_interval(20, 20)
    assert (low, high) == pytest.approx((1 - 0.1611, 1.0), abs=1e-4)


@pytest.mark.parametrize("gained, lost, num", ((12, 2, 54), (3, 9, 40), (1, 0, 30), (5, 5, 20)))
def test_paired_interval_ends_where_the_score_test_rejects(gained: int, lost: int, num: int) -> None:
    low, high = paired_share_interval(gained, lost, num)
    assert low < (gained - lost) / num < high
    for d in (low, high):
        q = np.linspace(max(0.0, -d), (1 - d) / 2, 200_001)[1:-1]  # of a lost example; a gained one has q + d
        log_likelihood = gained * np.log(q + d) + lost * np.log(q) + (num - gained - lost) * np.log1p(-2 * q - d)
        best = q[log_likelihood.argmax()]
        distance = abs(gained - lost - num * d) / math.sqrt(num * (2 * best + d - d * d))
        assert distance == pytest.approx(Z, rel=1e-3)  # the grid's


def test_paired_interval_has_a_width_without_differences() -> None:
    bound = Z * Z / (50 + Z * Z)
    assert paired_share_interval(0, 0, 50) == pytest.approx((-bound, bound))
    assert paired_share_interval(50, 0, 50)[1] == pytest.approx(1.0)


@pytest.mark.parametrize("gain, loss", ((0.1, 0.1), (0.2, 0.1), (0.02, 0.02), (0.3, 0.3)))
def test_paired_interval_covers_the_truth(gain: float, loss: float) -> None:
    num, covered = 30, 0.0
    for b in range(num + 1):
        for c in range(num + 1 - b):
            low, high = paired_share_interval(b, c, num)
            if low <= gain - loss <= high:
                ways = math.comb(num, b) * math.comb(num - b, c)
                covered += ways * gain**b * loss**c * (1 - gain - loss) ** (num - b - c)
    assert covered > 0.94  # counts are whole, so exactly 0.95 cannot be had


def test_exact_p_value() -> None:
    for gained, lost, expected in ((0, 0, 1.0), (0, 4, 2 / 16), (5, 1, 14 / 64), (3, 3, 1.0), (0, 10, 2 / 1024)):
        assert exact_p_value(gained, lost) == exact_p_value(lost, gained) == pytest.approx(expected)


def test_ratio_interval() -> None:
    rng = np.random.default_rng(1)
    sizes = rng.integers(5, 15, 400)
    assert paired_ratio_interval(0.25 * sizes, sizes, num_bootstrap=50) == pytest.approx((0.25, 0.25))
    noise = rng.normal(size=400)
    low, high = paired_ratio_interval(noise, np.ones(400, int), num_bootstrap=1000)
    # 1.96 standard errors of a mean; a quantile of 1000 draws is uncertain by a few per cent.
    assert high - low == pytest.approx(2 * Z * noise.std() / 20, rel=0.1)
    assert paired_ratio_interval(noise[:1], sizes[:1], num_bootstrap=10) is None


def test_bytes_of_windows() -> None:
    tokenizer = ByteTokenizer()
    tokens = np.concatenate([[256], tokenizer.encode("né"), [256], tokenizer.encode("abcd")])
    assert window_bytes(np.stack([tokens, tokens]), tokenizer).tolist() == [7, 7]
    cut = np.asarray(
        [tokens[2:6], tokens[:4][[0, 1, 2, 0]]]
    )  # a character without its first byte, and without its last
    assert window_bytes(cut, tokenizer).tolist() == [2, 2]


CHOICES = ["layer", "the depth", "trace"]


@pytest.fixture(scope="module")
def task_paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    choice = [{"question": f"Q{i}?", "choices": CHOICES, "answer": int(rng.integers(3))} for i in range(8)]
    number = [{"question": f"How many {i}?", "answer": f"#### {i}"} for i in range(3)]
    paths = []
    for name, records in (("choice", choice), ("number", number)):
        paths.append(str(folder / f"{name}.jsonl"))
        Path(paths[-1]).write_text("\n".join(map(json.dumps, records)))
    return paths


def test_script_writes_every_setting_beside_the_sequential_pass(
    run_dir: Path,
    task_paths: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    flags = "--solvers idn:n=2,k=2 --num-windows 4 --batch-size 4 --num-examples 6 --max-new-tokens 4"
    flags += " --prompt-template {question} --num-bootstrap 50 --tasks"
    monkeypatch.setattr("snlp_jax.cli.entry.enable_compilation_cache", lambda: None)

    def script(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["eval.py", str(run_dir), *arguments])
        runpy.run_path(str(ROOT / "eval.py"), run_name="__main__")

    script(*flags.split(), task_paths[0])
    output = capsys.readouterr().out
    assert "choice: 6 examples, chance 33.3 %" in output and "tasks.json" in output
    saved = json.loads((run_dir / "eval" / "tasks.json").read_text())
    assert saved["info"]["step"] == 3 and saved["info"]["tokenizer"] == "byte"
    results = {(result["task"].split("/")[1], result["setting"]): result for result in saved["results"]}
    assert len(results) == 2
    for (task, setting), result in results.items():  # K = N is the sequential pass, up to rounding
        for rule, found in result["accuracy"].items():
            assert found["agreement"] == 1 and found["change"] == 0, (task, setting, rule)
            assert found["share"] == results[task, "seq"]["accuracy"][rule]["share"]
    reference, exact = saved["held_out"]
    assert abs(exact["bits"]["change"]) < ROUNDING < reference["bits"]["per_byte"]
    assert (run_dir / "eval" / "tasks.csv").read_text().count("\n") == 1 + 4 + 2
    for arguments, sentence in (
        (["--diagnose", "--tasks", *task_paths], "different evaluations"),
        (["--tasks", *task_paths, "--num-shots", "-1"], "num_shots is -1"),
        (["--tasks", *task_paths, "--solvers", "idn:n=4,k=1,stage=2xF2"], "fused"),
    ):
        with pytest.raises(SystemExit) as stopped:
            script(*arguments)
        assert stopped.value.code == 2 and sentence in capsys.readouterr().err


@pytest.mark.slow
def test_a_mesh_changes_nothing(run_dir: Path, task_paths: list[str]) -> None:
    config = dataclasses.replace(
        read_config(run_dir), eval=EvalConfig(solvers=("idn:n=2,k=1",), num_windows=4, batch_size=2)
    )
    tasks = TaskConfig(tasks=tuple(task_paths[:1]), prompt_template=("{question}",))
    alone = tasks_of_run(run_dir, config, tasks)
    spread = dataclasses.replace(config, eval=dataclasses.replace(config.eval, mesh=MeshConfig(data=2, layer=2)))
    for ours, theirs in zip(tasks_of_run(run_dir, spread, tasks).results, alone.results, strict=True):
        assert ours.accuracy == theirs.accuracy
        if theirs.answer_bits:
            assert ours.answer_bits.per_byte == pytest.approx(theirs.answer_bits.per_byte, abs=ROUNDING)
    spread = dataclasses.replace(config, eval=dataclasses.replace(spread.eval, batch_size=3))
    with pytest.raises(InputError, match="eval.batch_size 3 is not a multiple of mesh.data 2; change one"):
        tasks_of_run(run_dir, spread, tasks)
