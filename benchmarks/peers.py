"""Decoding beside what a user would pick instead: the same weights, prompts and machine, in turns.

    python benchmarks/peers.py runs/real/smollm2.gguf --run runs/real/smollm2

Needs ``pip install -e '.[gguf]' transformers torch accelerate``. The run is the file's import, made where it does not
exist. Of this library in float32 and with kernels of eight bits, and of transformers in float32 and with PyTorch's
dynamic quantization of linear layers to eight bits, on all cores:

    first token   seconds until every row has its first token, of a prompt of --context tokens
    tokens/s      of all rows together, greedy, without the first token
    ngram         one row, on a text that repeats itself and on one that does not: prompt lookup of both, --draft tokens
                  a round, over the same library without drafts

Ratios are of speeds, to the other arm of a pair in the same round, medians over rounds. Of transformers' prompt lookup
the whole alone counts, as it looks at logits before the first token too. Texts of one row are compared token for token.
Prints a table and writes benchmarks/results/peers_NAME_DEVICE_DATE.json.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Column, Table

from benchmarks.machine import header, out_path
from benchmarks.pretrained_methods import say
from snlp_jax.cli.convert import import_run
from snlp_jax.cli.entry import run_entry
from snlp_jax.infer import Drafting, Engine, Request
from snlp_jax.io.checkpoint import CONFIG_NAME
from snlp_jax.io.files import atomic_write
from snlp_jax.io.optional import optional
from snlp_jax.quantize import quantize
from snlp_jax.run import Run, load_run

PROSE = (
    "The Pacific Ocean is the largest and deepest of Earth's five oceanic divisions. It extends from the Arctic Ocean "
    "in the north to the Southern Ocean in the south, and is bounded by the continents of Asia and Australia in the "
    "west and the Americas in the east. At 165 million square kilometres in area, it makes up a third of the planet's "
    "surface. The centres of both the water hemisphere and the western hemisphere lie in it. Polynesian navigators "
    "crossed it long before any European saw it from the mountains of Panama, and settled nearly all of its islands. "
)
REPEATING = (
    "def area(width, height):\n    result = width * height\n    return result\n\n"
    "def volume(width, height, depth):\n    result = width * height * depth\n    return result\n\n"
) * 4 + "def area(width, height):\n"

Generate = Callable[[Sequence[Sequence[int]], int], tuple[float, float, list[list[int]]]]
"""``(prompts, new tokens)`` -> seconds to the first tokens, seconds of the others, the new tokens of each row."""


@dataclass(frozen=True)
class Args:
    """Time this library beside transformers."""

    gguf: tyro.conf.Positional[Path]
    run: Path = Path("runs/peers")
    rows: tuple[int, ...] = (1, 4, 8)
    context: int = 128
    """Tokens of a prompt."""
    prefill: int = 512
    """Tokens of the prompt whose first token alone is timed."""
    new_tokens: int = 48
    draft: int = 7
    """Drafts a round of prompt lookup."""
    repeats: int = 5
    out: str = ""


def main(args: Args) -> dict[str, Any]:
    """Measure everything and return what the JSON file holds."""
    torch = _needed("torch")
    torch.set_num_threads(os.cpu_count() or 1)
    if not (args.run / CONFIG_NAME).is_file():
        import_run(str(args.gguf), args.run)
    run = load_run(args.run)
    report = header(run.config.model, dataclasses.asdict(args) | {"gguf": args.gguf.name, "run": str(args.run)})
    report = {key: value for key, value in report.items() if key not in ("limits", "cells", "skipped", "failed")}
    report["versions"] |= {name: _needed(name).__version__ for name in ("torch", "transformers")}
    theirs, theirs_int8 = _their_models(args.gguf)
    arms = {
        "ours, float32": _ours(run, run.params),
        "transformers, float32": _theirs(theirs),
        "ours, int8": _ours(run, quantize(run.params, "int8")),
        "transformers, int8": _theirs(theirs_int8),
    }
    report["decode"] = [
        row for rows in args.rows for row in in_turns(arms, [_prompt(run, PROSE, args.context)] * rows, args)
    ]
    once = dataclasses.replace(args, new_tokens=1)
    report["prefill"] = in_turns(arms, [_prompt(run, PROSE, args.prefill)], once)
    report["ngram"] = []
    for name, text in (("repeating", REPEATING), ("prose", PROSE)):
        drafted = {
            "ours": _ours(run, run.params),
            "ours, ngram": _ours(run, run.params, Drafting("ngram")),
            "transformers": _theirs(theirs),
            "transformers, ngram": _theirs(theirs, prompt_lookup_num_tokens=args.draft),
        }
        prompt = [*run.tokenizer.special.prefix_ids, *map(int, run.tokenizer.encode(text))]
        report["ngram"] += [row | {"text": name} for row in in_turns(drafted, [prompt], args)]
    out = out_path(args.out, f"peers_{args.gguf.stem}", report)
    atomic_write(out, json.dumps(report, indent=1) + "\n")
    Console().print(*(table_of(part, report[part]) for part in ("decode", "prefill", "ngram")))
    print(f"wrote {out}")
    return report


def in_turns(arms: Mapping[str, Generate], prompts: Sequence[Sequence[int]], args: Args) -> list[dict[str, Any]]:
    """One row an arm: medians, and ratios to the arm before it in pairs, of the same rounds after a warm-up."""
    say(f"{len(prompts)} rows of {len(prompts[0])} tokens")
    found: dict[str, list[Any]] = {name: [] for name in arms}
    for index in range(args.repeats + 1):
        for name, generate in arms.items():
            reading = generate(prompts, args.new_tokens)
            if index:
                found[name].append(reading)
    rows, names = [], list(arms)
    for place, name in enumerate(names):
        other = names[place ^ 1]
        first, rest = (np.asarray([reading[i] for reading in found[name]]) for i in range(2))
        first_other, rest_other = (np.asarray([reading[i] for reading in found[other]]) for i in range(2))
        is_timed = args.new_tokens > 1
        rows.append(
            {
                "name": name,
                "rows": len(prompts),
                "prompt_tokens": len(prompts[0]),
                "first_token_ms": 1e3 * float(np.median(first)),
                "first_token_ratio": float(np.median(first_other / first)),
                "tokens_per_s": len(prompts) * (args.new_tokens - 1) / float(np.median(rest)) if is_timed else None,
                "ratio": float(np.median(rest_other / rest)) if is_timed else None,
                "whole_ratio": float(np.median((first_other + rest_other) / (first + rest))),
                "same_text": found[name][-1][2][0] == found[other][-1][2][0],
            }
        )
    return rows


def table_of(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Milliseconds and tokens a second; ratios are to the other arm of a pair."""
    names = ("first token ms", "ratio", "tokens/s", "ratio", "whole ratio", "same text")
    table = Table("what", "rows", *(Column(name, justify="right") for name in names), title=title)
    for row in rows:
        speed = ("--", "--") if row["ratio"] is None else (f"{row['tokens_per_s']:.1f}", f"{row['ratio']:.2f}x")
        first = (f"{row['first_token_ms']:.0f}", f"{row['first_token_ratio']:.2f}x")
        name = " ".join(filter(None, [row["name"], row.get("text", "")]))
        whole = f"{row['whole_ratio']:.2f}x"
        table.add_row(name, str(row["rows"]), *first, *speed, whole, "yes" if row["same_text"] else "no")
    return table


def _prompt(run: Run, text: str, length: int) -> list[int]:
    ids = [*run.tokenizer.special.prefix_ids, *map(int, run.tokenizer.encode(text))]
    return np.resize(np.asarray(ids), length).tolist()


def _ours(run: Run, params: Any, draft: Drafting | None = None) -> Generate:
    engine = Engine(run.model, params, draft=draft)

    def generate(prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[float, float, list[list[int]]]:
        done = engine.generate([Request(prompt, new_tokens) for prompt in prompts])
        assert engine.statistics is not None
        return engine.statistics.prefill_seconds, engine.statistics.decode_seconds, [each.tokens for each in done]

    return generate


def _theirs(model: Any, **how: Any) -> Generate:
    """Their generate, watched by a processor of logits that changes none: its first call comes after the prefill."""
    torch, transformers = _needed("torch"), _needed("transformers")

    class Watch(transformers.LogitsProcessor):
        first = 0.0

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            self.first = self.first or time.perf_counter()
            return scores

    def generate(prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[float, float, list[list[int]]]:
        ids, watch = torch.tensor([list(prompt) for prompt in prompts]), Watch()
        processors = transformers.LogitsProcessorList([watch])
        end = {"max_new_tokens": new_tokens, "eos_token_id": -1, "pad_token_id": 0}  # no text ends early
        began = time.perf_counter()
        with torch.inference_mode():
            mask = torch.ones_like(ids)
            made = model.generate(ids, attention_mask=mask, do_sample=False, logits_processor=processors, **end, **how)
        first = watch.first - began
        return first, time.perf_counter() - began - first, made[:, ids.shape[1] :].tolist()

    return generate


def _needed(name: str) -> Any:
    return optional(name, "benchmarks/peers.py", name)


def _their_models(file: Path) -> tuple[Any, Any]:
    """The file's weights in float32, and with linear layers of eight bits."""
    torch, transformers = _needed("torch"), _needed("transformers")
    load = transformers.AutoModelForCausalLM.from_pretrained
    plain = load(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    other = load(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    return plain, torch.ao.quantization.quantize_dynamic(other, {torch.nn.Linear}, dtype=torch.qint8)


if __name__ == "__main__":
    run_entry(lambda: main(tyro.cli(Args, description=__doc__)))
