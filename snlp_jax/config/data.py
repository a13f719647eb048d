"""Knobs of the text."""

import math
from dataclasses import dataclass
from typing import Literal

from snlp_jax.config.check import Checked, require


@dataclass(frozen=True)
class DataConfig(Checked, section="data"):
    """Where text comes from and how it becomes tokens."""

    source: str = "builtin"
    """'builtin' (the standard-library sources of the running Python), or a file, folder or glob of .txt, .jsonl,
    .jsonl.gz, .parquet or .arrayrecord (snlp_jax/data/formats.py)."""
    mixture: tuple[str, ...] = ()
    """Several sources instead of one, each as PATH@WEIGHT: windows are drawn from them in these proportions, to train
    and to validate. They share one tokenizer; 'bpe' learns from at most its weight's share of each."""
    format: Literal["text", "chat"] = "text"
    """chat: .jsonl of conversations, learned from their responses alone (snlp_jax/data/chat.py). A record has either
    ``messages``, a list of {role, content}, or the three fields named below."""
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
    bpe_vocab_size: int = 4096
    val_fraction: float = 0.05
    """Share of the documents held out, chosen by a hash of each document's content."""
    mask_documents: bool = False
    """Tokens attend to their own document alone, instead of to all that a window packs together. Runs on XLA's own
    attention or Pallas splash attention. The separator that ends a document stays a target either way."""
    num_workers: int = -1
    """Processes that read and tokenize the corpus; 0 is none but this one, -1 one for each core but one, at most 8,
    where there is more than one shard (64 MB of text). The tokens are the same."""
    cache_dir: str = ""
    """Token cache; empty means $XDG_CACHE_HOME/snlp_jax or ~/.cache/snlp_jax."""
    seed: int = 0
    """Of the shuffle."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.source != "", "data.source is empty; give 'builtin' or a file, folder or glob.")
        require(
            not self.mixture or self.source == "builtin",
            f"data.source is {self.source!r} and data.mixture holds {len(self.mixture)} sources; give one of the two.",
        )
        require(
            not self.mixture or self.format == "text",
            "data.mixture is for text, but data.format is 'chat'; set data.source to a folder or glob of all files.",
        )
        names = [_parse_source(entry)[0] for entry in self.mixture]
        require(len(set(names)) == len(names), f"data.mixture {names} names one twice; give it the sum of the weights.")
        require(self.num_workers >= -1, f"data.num_workers is {self.num_workers}; give -1, 0 or a number of processes.")
        require(
            self.format == "text" or self.source != "builtin",
            "data.format is 'chat', but the builtin corpus holds no conversations; set data.source to a .jsonl file.",
        )
        require(self.tokenizer != "", "data.tokenizer is empty; give 'byte', 'bpe' or the path of a tokenizer.json.")
        require(0 < self.val_fraction < 1, f"data.val_fraction is {self.val_fraction}; it must lie between 0 and 1.")
        require(self.bpe_vocab_size >= 260, f"data.bpe_vocab_size is {self.bpe_vocab_size}; it must be at least 260.")

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
    require(
        name != "" and 0 < weight < math.inf,
        f"data.mixture holds {entry!r}; give PATH@WEIGHT with a positive weight, such as 'books/*.txt@0.7'.",
    )
    return name, weight
