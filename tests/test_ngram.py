"""Drafts out of the text itself: a reference in plain Python, and texts that stay those of plain decoding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from decoding import ALIKE, NEW, TINY, assert_is_the_whole_pass, engine_of, requests_of
from hypothesis import given
from hypothesis import strategies as st

from snlp_jax.infer import Drafting, Placement, Request, Sampling
from snlp_jax.infer.ngram import DRAFT_LEN, LONGEST, look_up

NUM_DRAFTS = 5


def reference(text: list[int]) -> list[int]:
    """The drafts behind a text; none where its last token stands nowhere before."""
    newest = len(text) - 1

    def run(place: int) -> int:
        back = 0
        while back < LONGEST and place - back >= 0 and text[place - back] == text[newest - back]:
            back += 1
        return back

    best = max(range(newest), key=lambda place: (run(place), place), default=-1)
    if best < 0 or not run(best):
        return []
    grown = list(text)
    for index in range(NUM_DRAFTS):
        grown.append(grown[best + 1 + index])
    return grown[len(text) :]


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=14), min_size=2, max_size=2))
def test_drafts_are_what_followed_the_longest_latest_run(texts):
    tokens_BS = np.full((2, 20), 3, np.int32)  # scratch, which must not be read
    for row, text in enumerate(texts):
        tokens_BS[row, : len(text)] = text
    newest_B = np.asarray([len(text) - 1 for text in texts], np.int32)
    drafts_BG, count_B = jax.jit(look_up, static_argnums=2)(tokens_BS, newest_B, NUM_DRAFTS)
    for text, drafts, count in zip(texts, np.asarray(drafts_BG), np.asarray(count_B), strict=True):
        expected = reference(text)
        assert count == len(expected) and drafts[:count].tolist() == expected


def test_a_text_without_repetition_has_no_drafts():
    _, count_B = look_up(jnp.arange(12)[None], jnp.asarray([9]), NUM_DRAFTS)
    assert count_B.tolist() == [0]


def repeating(config, new, sampling=Sampling()):  # noqa: B008  # frozen
    """Prompts that repeat themselves, and one that does not."""
    requests = requests_of(config, new)
    prompts = [list(request.tokens) for request in requests]
    prompts[0], prompts[1] = [7, 3, 9, 4] * 3 + [7, 3], [5, 5, 5, 5]
    return [
        Request(prompt, new, dataclasses.replace(sampling, seed=sampling.seed + row))
        for row, prompt in enumerate(prompts)
    ]


def test_greedy_text_is_that_of_the_whole_pass():
    """Random models fall into loops, which is what is drafted. Over rings of several lengths."""
    requests = repeating(TINY, NEW)
    engine = engine_of(TINY, draft=Drafting("ngram", 3))
    assert_is_the_whole_pass(TINY, "seq", requests, engine.generate(requests))
    found = engine.statistics
    assert 0 < found.accepted <= found.tested and found.steps < NEW - 1


def test_sampled_text_is_that_of_plain_decoding():
    """Token for token and with the same seeds, which other drafters do not promise; greedy rows beside others, and a
    penalty that the drafts before a token enter."""
    sampling = Sampling(temperature=0.7, top_k=3, seed=11, repetition_penalty=1.1)
    requests = repeating(ALIKE, NEW, sampling)
    requests[0] = dataclasses.replace(requests[0], sampling=Sampling())
    plain, engine = engine_of(ALIKE), engine_of(ALIKE, draft=Drafting("ngram", 4))
    for one, other in zip(plain.generate(requests), engine.generate(requests), strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=3e-5)
    assert engine.statistics.accepted > 0


def test_any_model_drafts_seven_tokens_by_default_and_may_stop_drafting():
    assert Drafting("ngram").lengths(0) == (DRAFT_LEN, DRAFT_LEN) == (7, 7)
    engine = engine_of(ALIKE, draft="ngram", placement=Placement(layout="list"))
    assert engine.may_switch and engine.draft == "ngram"
    requests = repeating(ALIKE, 24)
    assert_is_the_whole_pass(ALIKE, "seq", requests, engine.generate(requests))
