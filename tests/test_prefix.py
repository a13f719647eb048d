"""A text that goes on from its cache: the tokens are those of a fresh prefill, whatever was kept of it."""

import dataclasses

import numpy as np
import pytest
from decoding import ALIKE, ROUNDING, SIMPLE, TINY, assert_is_the_whole_pass, engine_of

from snlp_jax.config import MeshConfig
from snlp_jax.errors import InputError
from snlp_jax.infer import Placement, Request
from snlp_jax.infer import prefix as prefix_module
from snlp_jax.infer.prefix import PrefixCache
from snlp_jax.parallel import make_mesh

LONG = dataclasses.replace(SIMPLE, seq_len=64)
"""Windows that no text of the test fills."""
SIMPLE, TINY, ALIKE = (dataclasses.replace(config, rotary_multiple=20) for config in (SIMPLE, TINY, ALIKE))
TURNS = ((5, 6), (3, 9), (40, 30), (2, 5))
"""New tokens of a prompt, and of the answer: within a block, beyond it, and beyond what rings were made for."""


@pytest.fixture(scope="module")
def engine():
    return engine_of(LONG)


def speak(engine, prompt, new, kept):
    return engine.generate([Request(prompt, new)], kept=kept)[0]


def test_going_on_is_the_whole_pass(engine):
    """Of prompts that grow, in rings that grow with them."""
    rng, kept, requests, completions, prompt = np.random.default_rng(5), PrefixCache(), [], [], []
    for (said, new), expected in zip(TURNS[::2], (0, 10), strict=True):
        prompt = [*prompt, *rng.integers(0, LONG.vocab_size, said).tolist()]
        requests.append(Request(prompt, new))
        completions += engine.generate(requests[-1:], kept=kept)
        assert kept.num_reused == expected
        prompt = [*prompt, *completions[-1].tokens]
    assert_is_the_whole_pass(LONG, "seq", requests, completions, length=128)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, settings, reused",
    (
        (TINY, {}, (0, 10, 22, 92)),  # gone round every ring several times
        (ALIKE, {"draft": "exit:1"}, (0, 10, 22, 92)),
        (dataclasses.replace(TINY, num_mtp_heads=2), {"draft": "mtp"}, (0, 10, 22, 92)),
        # What a solver has left of its answers is evaluated again, and with them all that came before where the
        # window has forgotten it.
        (dataclasses.replace(TINY, seq_len=64), {"setting": "idn:n=2,k=1"}, (0, 5, 14, 63)),
        (ALIKE, {"setting": "idn:n=2,k=1", "rule": "per_iteration"}, (0, 10, 22, 92)),
        (ALIKE, {"setting": "idn:n=2,k=1,init=warm"}, (0, 5, 14, 63)),
    ),
)
def test_going_on_is_reading_all_of_it(config, settings, reused):
    settings = dict(settings)
    engine = engine_of(config, settings.pop("setting", "seq"), **settings)
    rng, kept, prompt = np.random.default_rng(5), PrefixCache(), []
    for (said, new), expected in zip(TURNS, reused, strict=True):
        prompt = [*prompt, *rng.integers(0, config.vocab_size, said).tolist()]
        going_on, fresh = speak(engine, prompt, new, kept), speak(engine, prompt, new, None)
        assert going_on.tokens == fresh.tokens
        np.testing.assert_allclose(going_on.log_probs, fresh.log_probs, atol=ROUNDING)
        assert kept.num_reused == expected
        prompt += fresh.tokens


@pytest.mark.slow
def test_another_text_is_read_from_where_it_differs(engine):
    kept = PrefixCache()
    first = speak(engine, list(range(20)), 8, kept)
    for prompt, reused in (
        (
            [*range(20), *first.tokens[:3], (first.tokens[3] + 1) % 50, 7],
            23,
        ),  # the answer, but for three tokens, is taken back
        ([*range(12), 1, 2, 3], 12),
        ([*range(12)], 11),  # the last token is evaluated for what follows on it
        ([9, *range(12)], 0),
    ):
        assert speak(engine, prompt, 5, kept).tokens == speak(engine, prompt, 5, None).tokens
        assert kept.num_reused == reused
    with pytest.raises(InputError, match="2 requests cannot go on from one text"):
        engine.generate([Request([1]), Request([2])], kept=kept)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ({"layer": 2}, {"tensor": 2}), ids=str)
def test_going_on_over_devices(engine, sizes):
    over = engine_of(LONG, placement=Placement(make_mesh(MeshConfig(**sizes))))
    kept, prompt = PrefixCache(), [1, 2, 3]
    for new in (5, 20):
        done = speak(over, prompt, new, kept)
        assert done.tokens == speak(engine, prompt, new, None).tokens
        prompt = [*prompt, *done.tokens, 4, 5]
    assert kept.num_reused == 7


@pytest.mark.slow
def test_windows_forget_and_then_all_is_read_again():
    engine, kept = engine_of(SIMPLE), PrefixCache()
    text = [token % 50 for token in range(60)]
    speak(engine, text, 40, kept)
    near, far = text + [9] * 3, text[:20] + [9] * 3
    assert prefix_module.BLOCK < 40
    for prompt in (far, near):
        assert speak(engine, prompt, 5, kept).tokens == speak(engine, prompt, 5, None).tokens
        assert kept.num_reused == (0 if prompt is far else 20)


def test_a_listener_ends_the_text_and_an_error_empties_the_cache(engine):
    kept = PrefixCache()

    def listen(_row, tokens, _text):
        seen.extend(tokens)
        return len(seen) > 20

    seen = []
    (done,) = engine.generate([Request([1, 2, 3], 99)], listen, kept)
    assert done.tokens == seen and 20 < len(seen) < 60 and done.finish == "stop"
    prompt = [1, 2, 3, *done.tokens, 4]
    assert speak(engine, prompt, 4, kept).tokens == speak(engine, prompt, 4, None).tokens and kept.num_reused > 20

    def fail(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate([Request(prompt, 4)], fail, kept)
    assert speak(engine, prompt, 4, kept).tokens == speak(engine, prompt, 4, None).tokens and kept.num_reused == 0
