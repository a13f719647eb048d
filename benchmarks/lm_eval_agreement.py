"""lm_eval's scores of a run beside those of lm_eval's own model "hf" on the same weights and questions.

    python benchmarks/lm_eval_agreement.py HF_FOLDER --run runs/smollm2 --questions easy_test.jsonl --texts test.jsonl

Needs ``pip install -e '.[lm_eval,hf]'``. The run is the folder's import (python -m snlp_jax.model.convert); it is made
where it does not exist. Records of ``--questions`` have question, choices and answer (an index), those of ``--texts``
question and answer. Both models see zero-shot multiple choice, scored by sum and by byte, and write greedy texts up to
a blank line, without and with the model's chat template. Prints the largest difference of log-likelihoods, the
accuracies and how many texts are the same, and ends with status 1 where they do not agree: log-likelihoods within 0.001
nats, accuracies exactly.
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from snlp_jax.cli.convert import import_run
from snlp_jax.cli.entry import run_entry
from snlp_jax.errors import InputError
from snlp_jax.io.optional import optional

TOLERANCE = 1e-3
"""Nats of a whole continuation."""
CHOICES = """
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
TEXTS = """
task: texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}, cache_dir: {cache}}}
test_split: test
output_type: generate_until
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: answer
generation_kwargs: {{until: ["\\n\\n"], do_sample: false, temperature: 0.0, max_gen_toks: {length}}}
metric_list: [{{metric: exact_match}}]
"""


@dataclass(frozen=True)
class Args:
    folder: tyro.conf.Positional[Path]
    """As Hugging Face writes it."""
    run: Path
    """The folder's import."""
    questions: Path
    texts: Path
    num_questions: int = 40
    num_texts: int = 8
    text_len: int = 48
    """Tokens."""
    batch_size: int = 4
    """Of both models. Padding and batches change the sums of floats, not what is added up."""


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    lm_eval = optional("lm_eval", "comparing with lm_eval", "snlp-jax[lm_eval,hf]")
    if not args.run.exists():
        import_run(str(args.folder), args.run)
    agrees = True
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(Path(folder), args)
        for chat in (False, True):
            theirs, ours = (results_of(lm_eval, name, Path(folder), args, chat=chat) for name in ("hf", "snlp_jax"))
            agrees &= compare(theirs, ours, "with the chat template" if chat else "plain")
    sys.exit(0 if agrees else 1)


def write_tasks(folder: Path, args: Args) -> None:
    """Both tasks and their data."""
    for name, text, source, count in (
        ("choices", CHOICES, args.questions, args.num_questions),
        ("texts", TEXTS, args.texts, args.num_texts),
    ):
        lines = source.read_text(encoding="utf-8").splitlines()[:count]
        if len(lines) < count or not all("question" in json.loads(line) for line in lines):
            raise InputError(f"{str(source)!r} holds no {count} records with a question; give another file or fewer.")
        data = folder / f"{name}.jsonl"
        data.write_text("\n".join(lines), encoding="utf-8")
        (folder / f"{name}.yaml").write_text(text.format(path=data, cache=folder / "cache", length=args.text_len))


def results_of(lm_eval: Any, name: str, folder: Path, args: Args, *, chat: bool) -> dict[str, Any]:
    """What lm_eval says of one of the models."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from snlp_jax.eval.lm_eval_adapter import SolverLM

    model = (
        HFLM(str(args.folder), dtype="float32", device="cpu", batch_size=args.batch_size)
        if name == "hf"
        else SolverLM(str(args.run), batch_size=args.batch_size)
    )
    return lm_eval.simple_evaluate(
        model=model,
        tasks=["choices", "texts"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=chat,
    )


def compare(theirs: dict[str, Any], ours: dict[str, Any], title: str) -> bool:
    """Print how far results agree; whether they do."""
    scores = [
        [float(answer[0]) for sample in by_id(found, "choices") for answer in sample["filtered_resps"]]
        for found in (theirs, ours)
    ]
    largest = max(abs(a - b) for a, b in zip(*scores, strict=True))
    texts = [[sample["resps"][0][0] for sample in by_id(found, "texts")] for found in (theirs, ours)]
    num_same = sum(a == b for a, b in zip(*texts, strict=True))
    print(f"{title}: {len(scores[0])} continuations, largest difference {largest:.1e} nats")
    agrees = largest <= TOLERANCE
    for metric in ("acc,none", "acc_norm,none"):
        pair = [found["results"]["choices"][metric] for found in (theirs, ours)]
        print(f"  {metric.split(',')[0]}: hf {pair[0]:.4f}, snlp_jax {pair[1]:.4f}")
        agrees &= pair[0] == pair[1]
    print(f"  greedy texts that are the same: {num_same} of {len(texts[0])}")
    for a, b in zip(*texts, strict=True):
        if a != b:
            print(f"    hf       {a!r}\n    snlp_jax {b!r}")
    return agrees


def by_id(found: dict[str, Any], task: str) -> list[dict[str, Any]]:
    return sorted(found["samples"][task], key=lambda sample: sample["doc_id"])


if __name__ == "__main__":
    run_entry(main)
