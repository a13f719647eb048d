"""Planted keys: whether a model recalls a value that stood once, some distance before, in real text.

    ... text ... The password of Alder Creek is 48213. ... distance tokens of text ... The password of Alder Creek is

and then `` 48213``: its log-probability in nats, and whether each of its tokens is the likeliest. Every sequence has
the same length, whatever the distance; without a planted line (``absent``) another piece of text stands there. A model
that was trained on little recalls little: what counts is the difference between distances and ``absent``, and between
methods. A distance may exceed ``seq_len``, up to what the model's positions reach; beyond the longest window a key is
seen through several layers alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from snlp_jax.data.tokenizer import Tokenizer
from snlp_jax.errors import InputError
from snlp_jax.eval.intervals import paired_ratio_interval, wilson_interval
from snlp_jax.eval.text_model import Score, Span

FIRST = (
    "Alder",
    "Birch",
    "Cedar",
    "Dover",
    "Elm",
    "Falcon",
    "Granite",
    "Hazel",
    "Iron",
    "Juniper",
    "Kestrel",
    "Laurel",
)
SECOND = ("Creek", "Hill", "Bridge", "Harbor", "Lane", "Meadow", "Point", "Ridge", "Station", "Valley", "Wharf", "Yard")
LEAD = 16
"""Tokens of text before the earliest key."""
SEED = 0


@dataclass(frozen=True)
class Probe:
    """The sequences of every distance, one a key; the same keys and values at each."""

    spans: Mapping[int | None, Sequence[Span]]
    """Tokens between the planted line and the question -> sequences; None: without a line."""

    def report(self, scores: Sequence[Score], reference: Sequence[Score], num_bootstrap: int) -> dict[str, Any]:
        """Of each distance: share of values that are recalled to the last token, mean log-probability, and its change
        from the reference's over the same keys. Scores are in the order of :attr:`all_spans`."""
        found, start = {}, 0
        for distance, spans in self.spans.items():
            mine, theirs = (list(each[start : start + len(spans)]) for each in (scores, reference))
            start += len(spans)
            log_prob_E, its_E = (np.asarray([score.log_prob for score in each]) for each in (mine, theirs))
            right = sum(score.is_greedy for score in mine)
            found["absent" if distance is None else str(distance)] = {
                "exact": right / len(mine),
                "exact_interval": wilson_interval(right, len(mine)),
                "log_prob": float(log_prob_E.mean()),
                "change": float((log_prob_E - its_E).mean()),
                "change_interval": paired_ratio_interval(
                    log_prob_E - its_E, np.ones(len(mine)), num_bootstrap=num_bootstrap
                ),
            }
        return found

    @property
    def all_spans(self) -> list[Span]:
        return [span for spans in self.spans.values() for span in spans]


def planted_keys(
    tokenizer: Tokenizer, text: np.ndarray, distances: Sequence[int], num_keys: int, max_context: int
) -> Probe:
    """Sequences for ``num_keys`` names and numbers of five digits, in pieces of ``text``.

    Raises:
        InputError: a distance that the model's context cannot hold or none at all, too many keys, or too little text.
    """
    rng = np.random.default_rng(SEED)
    names = [f"{first} {second}" for first in FIRST for second in SECOND]
    if num_keys > len(names):
        raise InputError(f"--num-keys is {num_keys}, but there are {len(names)} names for keys; lower it.")
    if min(distances, default=-1) < 0:
        raise InputError(f"--distances are {list(distances)}; give one or more of 0 tokens or more.")
    names = [names[int(i)] for i in rng.permutation(len(names))[:num_keys]]
    lines, questions, values = [], [], []
    for name in names:
        value = f" {rng.integers(10_000, 100_000)}"
        question = f"\nThe password of {name} is"
        lines.append(tokenizer.encode(f"{question}{value}.\n"))
        questions.append(tokenizer.encode(question))
        values.append(tokenizer.encode(question + value)[len(questions[-1]) :])
    longest = max(map(len, lines)) + max(map(len, questions)) + max(map(len, values))
    length = LEAD + max(distances) + longest
    if length > max_context:
        raise InputError(
            f"a key {max(distances)} tokens away takes {length} tokens, but the model reads {max_context}; lower "
            "--distances."
        )
    if len(text) < length * 2:
        raise InputError(f"the held-out text has {len(text)} tokens, but planted keys take {2 * length}; give more.")
    starts = rng.integers(0, len(text) - length, size=len(names))
    spans: dict[int | None, list[Span]] = {}
    for distance in (*distances, None):
        spans[distance] = []
        for start, line, question, value in zip(starts, lines, questions, values, strict=True):
            piece = np.asarray(text[int(start) : int(start) + length - len(question) - len(value)], np.int32)
            if distance is not None:
                end = len(piece) - distance
                piece = np.concatenate([piece[: end - len(line)], line, piece[end:]])
            prefix = tokenizer.special.prefix_ids
            tokens = np.concatenate([prefix, piece[len(prefix) :], question, value]).astype(np.int32)
            spans[distance].append(Span(tokens, len(value)))
    return Probe(spans)
