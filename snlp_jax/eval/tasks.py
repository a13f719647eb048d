"""Downstream tasks of a model: every solver setting against the sequential pass, on the same examples."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from snlp_jax.config import Config, EvalConfig, TaskConfig
from snlp_jax.data.tokenizer import Tokenizer
from snlp_jax.eval.evaluate import mesh_of, parse_settings
from snlp_jax.eval.intervals import exact_p_value, paired_ratio_interval, paired_share_interval, wilson_interval
from snlp_jax.eval.run import OpenRun, held_out, open_run
from snlp_jax.eval.task_data import SEPARATOR, Task, answer_of, load_tasks
from snlp_jax.eval.task_report import Accuracy, Bits, HeldOutResult, TaskReport, TaskResult
from snlp_jax.eval.text_model import Prompt, Score, Span, TextModel, needs_solitude
from snlp_jax.infer.rules import Placement, check_settings
from snlp_jax.io.progress import Progress
from snlp_jax.io.provenance import circumstances
from snlp_jax.layout import canonical
from snlp_jax.run import Which

LogLikelihoods = Callable[[Sequence[tuple[str, str]]], list[Score]]
"""(context, continuation) -> score: all that multiple choice asks of a model."""
Complete = Callable[[Sequence[Prompt]], list[str]]


@dataclass(frozen=True)
class Outcome:
    """Answers of one setting to the examples E of a task."""

    answers: dict[str, np.ndarray]
    """[E] by rule: the index of the choice, or the final answer of the text."""
    right: dict[str, np.ndarray]
    """[E] by rule."""
    bits_E: np.ndarray | None = None
    """Of the right answer's text after its question."""
    bytes_E: np.ndarray | None = None


def score_choices(log_likelihoods: LogLikelihoods, task: Task) -> Outcome:
    """The likeliest choice by ``log p(delimiter + choice | prompt)``: by its ``sum`` and ``per_byte`` of the choice.

    Bytes are those of the choice's UTF-8 text without the delimiter, so that no tokenizer changes what is divided by.
    The first of equals wins.
    """
    examples, delimiter = task.examples, task.delimiter
    pairs = [(task.prompt(each), delimiter + choice) for each in examples for choice in each.choices]
    scores = iter(log_likelihoods(pairs))
    sums = [np.asarray([next(scores).log_prob for _ in each.choices]) for each in examples]
    sizes = [np.asarray([len(choice.encode(errors="replace")) for choice in each.choices]) for each in examples]
    per_byte = [row / size for row, size in zip(sums, sizes, strict=True)]
    answers = {"per_byte": np.asarray([*map(np.argmax, per_byte)]), "sum": np.asarray([*map(np.argmax, sums)])}
    answer_E = np.asarray([each.answer for each in examples], np.int64)
    bits_E = np.asarray([-row[answer] / math.log(2) for row, answer in zip(sums, answer_E, strict=True)])
    bytes_E = np.asarray([size[answer] for size, answer in zip(sizes, answer_E, strict=True)])
    return Outcome(answers, {rule: given == answer_E for rule, given in answers.items()}, bits_E, bytes_E)


def match_answers(complete: Complete, task: Task, max_new_tokens: int) -> Outcome:
    """``exact_match`` of the final answers of greedy texts, which end at a blank line or the document's end."""
    prompts = [Prompt(task.prompt(each), max_new_tokens, (SEPARATOR,)) for each in task.examples]
    references = [str(each.answer) for each in task.examples]
    texts = complete(prompts)
    given = np.asarray([answer_of(text, answer) for text, answer in zip(texts, references, strict=True)])
    wanted = np.asarray([answer_of(answer, answer) for answer in references])
    return Outcome({"exact_match": given}, {"exact_match": given == wanted})


def compare_outcomes(
    outcome: Outcome, reference: Outcome, num_bootstrap: int
) -> tuple[dict[str, Accuracy], Bits | None]:
    """What an outcome says beside that of the sequential pass."""
    accuracy = {}
    for rule, right_E in outcome.right.items():
        reference_E, num_examples = reference.right[rule], len(right_E)
        gained, lost = int((right_E & ~reference_E).sum()), int((reference_E & ~right_E).sum())
        accuracy[rule] = Accuracy(
            share=float(right_E.mean()),
            interval=wilson_interval(int(right_E.sum()), num_examples),
            change=(gained - lost) / num_examples,
            change_interval=(0.0, 0.0) if outcome is reference else paired_share_interval(gained, lost, num_examples),
            num_gained=gained,
            num_lost=lost,
            p_value=exact_p_value(gained, lost),
            agreement=float((outcome.answers[rule] == reference.answers[rule]).mean()),
        )
    if outcome.bits_E is None or outcome.bytes_E is None or reference.bits_E is None:
        return accuracy, None
    return accuracy, compare_bits(outcome.bits_E, reference.bits_E, outcome.bytes_E, num_bootstrap)


def compare_bits(bits_E: np.ndarray, reference_E: np.ndarray, bytes_E: np.ndarray, num_bootstrap: int) -> Bits:
    """Bits per byte over all examples, and their change from those of the sequential pass."""
    difference_E, num_bytes = bits_E - reference_E, bytes_E.sum()
    interval = paired_ratio_interval(difference_E, bytes_E, num_bootstrap=num_bootstrap)
    return Bits(float(bits_E.sum() / num_bytes), float(difference_E.sum() / num_bytes), interval)


def window_bytes(windows: Sequence[np.ndarray], tokenizer: Tokenizer) -> np.ndarray:
    """[W]: bytes of UTF-8 text of the targets of windows [W, T + 1]. Separators have none; what is left of a character
    that a window's border cuts counts as one byte, or a byte each."""
    texts = [tokenizer.decode(window[1:]) for window in windows]
    return np.asarray([len(text.encode()) - 2 * text.count("\ufffd") for text in texts])


def tasks_of_run(run_dir: Path, config: Config, task_config: TaskConfig, which: Which = "best") -> TaskReport:
    """:func:`evaluate_tasks` of a run's checkpoint under the settings of ``config.eval``.

    Raises:
        InputError: see :func:`snlp_jax.eval.run.open_run`, :func:`snlp_jax.eval.task_data.load_tasks` and
            :func:`snlp_jax.infer.rules.check_settings`; nothing has been compiled then.
    """
    tasks = load_tasks(task_config)
    schedules = parse_settings(config.model, config.eval).values()
    if not all(task.is_choice for task in tasks):
        for schedule in schedules:
            check_settings(schedule, task_config.rule)
    mesh = mesh_of(config.eval, schedules, {"eval.batch_size": config.eval.batch_size})
    run = open_run(run_dir, config, which)
    batches = held_out(run.data, config)
    # Of conversations only the responses count, which are no text of their own.
    windows = [] if "weight" in batches[0] else [window for batch in batches for window in batch["tokens"]]
    return evaluate_tasks(run, tasks, windows, config.eval, task_config, mesh)


def evaluate_tasks(
    run: OpenRun,
    tasks: Sequence[Task],
    windows: Sequence[np.ndarray],
    config: EvalConfig,
    task_config: TaskConfig,
    mesh: Mesh | None,
) -> TaskReport:
    """Every task under every setting of the run.

    Args:
        windows: held-out text [W, T + 1], for its bits per byte; none leaves them out.
    """
    params = canonical(run.model, run.params) if mesh is None else run.params
    spans = [Span(window, len(window) - 1) for window in windows]
    bytes_W = window_bytes(windows, run.data.tokenizer)
    references: dict[str, Outcome] = {}  # those of the sequential pass, which is the first setting
    bits: list[np.ndarray] = []  # of every window, by setting
    results, held_out = [], []
    with Progress("asking", len(run.settings) * (len(tasks) + bool(spans))) as progress:
        for setting, schedule in run.settings.items():
            text_model = TextModel(
                run.model,
                params,
                run.data.tokenizer,
                schedule,
                rule=task_config.rule,
                batch_size=config.batch_size,
                placement=Placement(mesh, config.sequential),
                fits=run.fits,
                on_share=progress.advance,
            )
            if needs_solitude(schedule):
                progress.note(f"note: {setting} scores every text alone, with a program for every length.")
            for task in tasks:
                progress.step = f"{setting}, {task.name}"
                text_model.num_cut = 0
                outcome = _answer(text_model, task, task_config.max_new_tokens)
                reference = references.setdefault(task.name, outcome)
                compared = compare_outcomes(outcome, reference, config.num_bootstrap)
                size, chance, num_cut = len(task.examples), task.chance, text_model.num_cut
                results.append(TaskResult(task.name, setting, size, chance, *compared, num_cut))
            if spans:
                bits.append(np.asarray([-score.log_prob / math.log(2) for score in text_model.score(spans)]))
                found = compare_bits(bits[-1], bits[0], bytes_W, config.num_bootstrap)
                held_out.append(HeldOutResult(setting, found))
    results.sort(key=lambda result: list(references).index(result.task))
    info = {
        "config": {"model": vars(run.model.config)},
        "held_out": {"num_windows": len(windows), "window_len": len(windows[0]) - 1} if spans else None,
        "tasks": {task.name: task.about() for task in tasks},
        "rule": task_config.rule,
        "max_new_tokens": task_config.max_new_tokens,
    }
    return TaskReport(tuple(results), tuple(held_out), run.about | circumstances() | info)


def _answer(text_model: TextModel, task: Task, max_new_tokens: int) -> Outcome:
    if task.is_choice:
        return score_choices(text_model.log_likelihoods, task)
    return match_answers(text_model.complete, task, max_new_tokens)
