"""Knobs of the text."""

from dataclasses import dataclass

from snlp_jax.config.check import require


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes tokens."""

    source: str = "builtin"
    """'builtin' (the standard-library sources of the running Python), or a file, folder or glob of .txt or .jsonl."""
    text_field: str = "text"
    """Field of a .jsonl record that holds the text."""
    tokenizer: str = "byte"
    """'byte', 'bpe' (trained on the corpus, cached by content) or the path of a tokenizer.json."""
    bpe_vocab_size: int = 4096
    val_fraction: float = 0.05
    """Share of the documents held out, chosen by a hash of each document's content."""
    cache_dir: str = ""
    """Token cache; empty means $XDG_CACHE_HOME/snlp_jax or ~/.cache/snlp_jax."""
    seed: int = 0
    """Of the shuffle."""

    def __post_init__(self) -> None:
        require(self.source != "", "data.source is empty; give 'builtin' or a file, folder or glob.")
        require(self.tokenizer != "", "data.tokenizer is empty; give 'byte', 'bpe' or the path of a tokenizer.json.")
        require(0 < self.val_fraction < 1, f"data.val_fraction is {self.val_fraction}; it must lie between 0 and 1.")
        require(self.bpe_vocab_size >= 260, f"data.bpe_vocab_size is {self.bpe_vocab_size}; it must be at least 260.")
