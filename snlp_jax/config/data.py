"""Knobs of the text."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from snlp_jax.config.check import Between, Checked, Rule
from snlp_jax.errors import InputError

SEVERAL = "\n"
"""Between several files, folders or globs that are one corpus."""


@dataclass(frozen=True)
class DataConfig(Checked, section="data"):
    """Where text comes from and how it becomes tokens."""

    source: str = "builtin"
    """'builtin' (the standard-library sources of the running Python), or a file, folder or glob of .txt, .json,
    .jsonl, .ndjson, .parquet or .arrayrecord, each plain, .gz or .zst (snlp_jax/data/formats.py)."""
    mixture: tuple[str, ...] = ()
    """Several sources instead of one, each as PATH@WEIGHT: windows are drawn from them in these proportions, to train
    and to validate. They share one tokenizer; 'bpe' learns from at most its weight's share of each."""
    format: Literal["text", "chat"] = "text"
    """chat: conversations in any of these formats but text, in the model's chat template or plain text
    (snlp_jax/data/turns.py), learned from their responses alone. A record has either ``messages``, a list of
    {role, content}, or the three fields named below."""
    text_field: str = "text"
    """Field of a record, or column, that holds the text."""
    prompt_field: str = "prompt"
    """Of a chat record: what the user says."""
    input_field: str = "input"
    """Of a chat record, where it is there and not empty: what follows the prompt after an empty line."""
    response_field: str = "response"
    """Of a chat record: what the assistant answers."""
    tokenizer: str = "byte"
    """'byte', 'bpe' (trained on the corpus, cached by content) or the path of a tokenizer.json."""
    bpe_vocab_size: Annotated[int, Rule(lambda value: value >= 260, "it must be at least 260")] = 4096
    val_fraction: Between = 0.05
    """Share of the documents held out, chosen by a hash of each document's content."""
    mask_documents: bool = False
    """Tokens attend to their own document alone, instead of to all that a window packs together. Runs on XLA's own
    attention or Pallas splash attention. The separator that ends a document stays a target either way."""
    num_workers: Annotated[int, Rule(lambda value: value >= -1, "give -1, 0 or a number of processes")] = -1
    """Processes that read and tokenize the corpus; 0 is none but this one, -1 one for each core but one, at most 8,
    where there is more than one shard (64 MB of text). The tokens are the same."""
    cache_dir: str = ""
    """Token cache; empty means $XDG_CACHE_HOME/snlp_jax or ~/.cache/snlp_jax."""
    seed: int = 0
    """Of the shuffle."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.source:
            raise InputError("data.source is empty; give 'builtin' or a file, folder or glob.")
        if not self.tokenizer:
            raise InputError("data.tokenizer is empty; give 'byte', 'bpe' or the path of a tokenizer.json.")
        if self.mixture and self.source != "builtin":
            raise InputError(f"data.source is {self.source!r}, but data.mixture names others; give one of the two.")
        if self.mixture and self.format == "chat":
            raise InputError("data.mixture is for text; with data.format 'chat' set data.source to a folder or glob.")
        names = [_parse_source(entry)[0] for entry in self.mixture]
        if len(set(names)) < len(names):
            raise InputError(f"data.mixture {names} names one twice; give it the sum of the weights.")
        if self.format == "chat" and self.source == "builtin":
            raise InputError(
                "the builtin corpus holds no conversations; set data.source to a file of them, such as .jsonl."
            )

    @property
    def sources(self) -> dict[str, float]:
        """Names of the sources and their weights, which add up to 1."""
        if not self.mixture:
            return {self.source: 1.0}
        weights = dict(map(_parse_source, self.mixture))
        total = sum(weights.values())
        return {name: weight / total for name, weight in weights.items()}


def _parse_source(entry: str) -> tuple[str, float]:
    """``PATH@WEIGHT``."""
    name, _, text = entry.rpartition("@")
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not name or not 0 < weight < math.inf:
        raise InputError(f"data.mixture holds {entry!r}; give PATH@WEIGHT, a positive weight, as in 'books/*.txt@0.7'.")
    return name, weight
