"""Planted keys stand where they should, at distances beyond the training context too; what cannot be is refused."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from benchmarks.pretrained import Args
from benchmarks.retrieval import planted_keys
from snlp_jax.config import ModelConfig
from snlp_jax.data.tokenizer import ByteTokenizer
from snlp_jax.errors import InputError

TOKENIZER = ByteTokenizer()
TEXT = np.frombuffer(b"some words " * 1000, np.uint8)
CONFIG = ModelConfig(seq_len=128)


def keys(distances=(8,), num_keys=5, text=TEXT, max_context=CONFIG.max_context):
    return planted_keys(TOKENIZER, text, distances, num_keys, max_context)


def test_a_key_stands_its_distance_before_the_question():
    distances = (0, 8, 2 * CONFIG.seq_len)
    probe = keys(distances)
    assert list(probe.spans) == [*distances, None] and len(probe.all_spans) == 5 * 4
    for distance in distances:
        for span, other in zip(probe.spans[distance], probe.spans[None], strict=True):
            assert CONFIG.seq_len * 2 < len(span.tokens) == len(other.tokens) <= CONFIG.max_context
            said = bytes(span.tokens[1:].astype(np.uint8))
            question = said[said.rindex(b"\nThe password") : -span.num_scored]
            line = question + said[-span.num_scored :] + b".\n"
            assert said.count(line) == 1
            between = said[said.index(line) + len(line) : said.rindex(question)]
            assert len(between) == distance and b"password" not in between
            assert bytes(other.tokens[1:].astype(np.uint8)).count(b"password") == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    (
        ({"distances": (8, 256), "max_context": 256}, "256 tokens away takes .* but the model reads 256; lower --dist"),
        ({"distances": ()}, r"--distances are \[\]; give one or more"),
        ({"distances": (8, -1)}, r"--distances are \[8, -1\]; give one or more of 0 tokens"),
        ({"num_keys": 145}, "--num-keys is 145, but there are 144 names for keys; lower it"),
        ({"text": TEXT[:150]}, "the held-out text has 150 tokens, but planted keys take .*; give more"),
    ),
)
def test_what_cannot_be_is_refused_in_one_sentence(wrong, message):
    with pytest.raises(InputError, match=message):
        keys(**wrong)


@pytest.mark.parametrize(("context", "farthest"), ((0, 256), (384, 256), (256, 128)))
def test_distances_that_nobody_gave_fit_the_model(context, farthest):
    config = dataclasses.replace(CONFIG, context=context)
    distances = Args(Path("runs/any")).sized(config).distances
    assert max(distances) == farthest
    keys(distances, max_context=config.max_context)
