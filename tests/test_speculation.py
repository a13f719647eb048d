"""Drafts change the speed, never the text: greedy ones token for token, sampled ones in law."""

import dataclasses
import functools
import math

import numpy as np
import pytest
from decoding import (
    TIE,
    TINY,
    assert_is_the_whole_pass,
    assert_log_probs,
    calm_params,
    logits_after,
    model_of,
    requests_of,
)
from test_sampling import assert_law, reference

from snlp_jax.errors import InputError
from snlp_jax.infer.engine import Engine, Request
from snlp_jax.infer.pace import Pace
from snlp_jax.infer.sampling import Sampling
from snlp_jax.layout import split
from snlp_jax.model import LanguageModel
from snlp_jax.notation import parse_schedule

MAX_DRAFT = 8
DRAFTERS = ("idn:n=4,k=1", "idn:n=3,k=2,init=warm", "exit:3", "skip:1-2", "pairs:n=4")


def engine_of(drafter=None, **settings):
    draft = parse_schedule(drafter, TINY.num_layers) if drafter else None
    return Engine(model_of(TINY)[0], calm_params(), draft=draft, **settings)


def set_draft_len(engine, draft_len):
    """Another length for an engine whose programs are compiled."""
    engine.draft_len, engine.pace = draft_len, Pace(engine.max_draft, draft_len)


# ---------------------------------------------------------------- greedy text

ROWS, BATCHES, NEW = 50, 4, 64


@functools.cache
def sequential_texts():
    """Requests, the sequential engine's tokens [new], and where in each text the first tie of the whole pass is."""
    lengths = np.random.default_rng(0).integers(2, 15, ROWS * BATCHES)
    requests = requests_of(TINY, NEW, lengths)
    completions = [done for part in parts_of(requests) for done in engine_of().generate(part)]
    assert_is_the_whole_pass(TINY, "seq", requests, completions, params=calm_params(), length=80)
    first_ties = []
    for logits in logits_after(TINY, "seq", requests, completions, params=calm_params(), length=80):
        best = np.sort(logits, axis=-1)[:, -2:]
        first_ties.append(int(np.argmax(np.append(best[:, 1] - best[:, 0] <= TIE, True))))
    assert np.mean(np.asarray(first_ties) < NEW) < 0.1
    return requests, [done.tokens for done in completions], first_ties


def parts_of(requests):
    return [requests[start : start + ROWS] for start in range(0, len(requests), ROWS)]


@pytest.mark.slow
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_greedy_speculation_is_greedy_decoding(drafter):
    """200 prompts, drafts of every length: the same tokens up to the first tie of logits. Lengths whose blocks fit into
    one power of two share their program."""
    requests, texts, first_ties = sequential_texts()
    engine = engine_of(drafter, draft_len=1, max_draft=MAX_DRAFT)
    for draft_len in range(1, MAX_DRAFT + 1):
        set_draft_len(engine, draft_len)
        accepted = tested = row = 0
        for part in parts_of(requests):
            for done in engine.generate(part):
                assert len(done.tokens) == NEW
                assert done.tokens[: first_ties[row]] == texts[row][: first_ties[row]], (draft_len, row)
                row += 1
            accepted, tested = accepted + engine.statistics.accepted, tested + engine.statistics.tested
        assert 0.02 < accepted / tested < 0.98  # else nothing is accepted, or nothing rejected
    widths = [dict(settings)["max_draft"] for name, _, settings, _ in engine._programs if name == "speculate"]
    assert sorted(widths) == [1, 3, 7, 8]


def test_speculation_gives_the_sequential_text_and_counts_its_drafts():
    """Rows that end at different times; blocks go round the ends of all rings."""
    engine = engine_of("exit:3", draft_len=5, max_draft=5)
    requests = requests_of(TINY, 34)
    completions = engine.generate(requests)
    assert_is_the_whole_pass(TINY, "seq", requests, completions, params=calm_params())
    found = engine.statistics
    assert 0 < found.accepted < found.tested and found.new_tokens == 4 * 34
    programs = len(engine._programs)

    # Four drafts make blocks of five, which the program for blocks of six evaluates.
    set_draft_len(engine, 4)
    shorter = [
        dataclasses.replace(request, max_new_tokens=new) for request, new in zip(requests, (1, 34, 2, 17), strict=True)
    ]
    again = engine.generate(shorter)
    assert len(engine._programs) == programs
    for done, short, request in zip(completions, again, shorter, strict=True):
        assert short.tokens == done.tokens[: request.max_new_tokens] and short.finish == "length"
        np.testing.assert_allclose(short.log_probs, done.log_probs[: request.max_new_tokens], atol=3e-5)

    # A stop token inside an accepted block ends its row there, and no other.
    stop = completions[1].tokens[20]
    first = completions[1].tokens.index(stop)
    stopping = [requests[0], dataclasses.replace(requests[1], stop_tokens=(stop,)), *requests[2:]]
    stopped = engine.generate(stopping)
    assert stopped[1].tokens == completions[1].tokens[:first] and stopped[1].finish == "stop"
    assert [stopped[row].tokens for row in (0, 2, 3)] == [completions[row].tokens for row in (0, 2, 3)]
    assert len(engine._programs) == programs


@pytest.mark.slow
@pytest.mark.parametrize("new", (1, 2, 3, 4, 5, 6, 7, 8))
def test_a_perfect_drafter_is_always_right_and_ends_inside_its_block(new):
    """A region of as many iterations as layers drafts what the exact pass says: each round gives three tokens, the last
    what is left; a stop token at any place of a block ends the text before it."""
    engine = perfect_engine()
    requests = requests_of(TINY, 12, (5, 5))
    whole = engine.generate(requests)
    done = engine.generate([dataclasses.replace(request, max_new_tokens=new) for request in requests])
    assert [one.tokens for one in done] == [one.tokens[:new] for one in whole]
    # The prefill gives the first token, each round three more.
    assert engine.statistics.steps == math.ceil((new - 1) / 3)
    assert engine.statistics.acceptance in (1.0, None)
    stop = whole[0].tokens[new]
    stopped = engine.generate([dataclasses.replace(requests[0], stop_tokens=(50, stop)), requests[1]])
    assert stopped[0].tokens == whole[0].tokens[: whole[0].tokens.index(stop)] and stopped[0].finish == "stop"
    assert stopped[1] == whole[1]


@functools.cache
def perfect_engine():
    return engine_of("idn:n=4,k=4", draft_len=2, max_draft=2)


@pytest.mark.slow
@pytest.mark.parametrize("drafter", ("exit:3", "idn:n=4,k=4"))
def test_an_adaptive_length_gives_the_same_text(drafter):
    """Plain steps and rounds of changing lengths, over one cache."""
    engine = engine_of(drafter, max_draft=4)
    requests = requests_of(TINY, 66, (3, 7, 14, 5))
    completions = engine.generate(requests)
    assert_is_the_whole_pass(TINY, "seq", requests, completions, params=calm_params(), length=80)
    assert {"decode", "speculate"} <= {key[0] for key in engine._programs}


@pytest.mark.slow
def test_speculation_in_bfloat16_gives_what_its_whole_pass_says():
    config = dataclasses.replace(TINY, compute_dtype="bfloat16")
    model, _, _ = model_of(config)
    engine = Engine(model, calm_params(), draft=parse_schedule("exit:3", 4), draft_len=3, max_draft=3)
    requests = requests_of(config, 34)
    completions = engine.generate(requests)
    assert 0 < engine.statistics.acceptance < 1
    all_logits = logits_after(config, "seq", requests, completions, params=calm_params())
    assert_log_probs(all_logits, completions, atol=0.15)  # both programs round to 2**-9, in another order
    for logits, done in zip(all_logits, completions, strict=True):
        assert (logits.max(-1) - logits[np.arange(34), done.tokens] < 0.15).all()


# ---------------------------------------------------------------- sampled text

WORDS = dataclasses.replace(TINY, vocab_size=8)
SEEDS = 8192
PROMPT = [3, 1, 4, 1, 5]
LAWS = {
    "plain": Sampling(temperature=1.0),
    "filtered": Sampling(temperature=0.8, top_k=5, repetition_penalty=1.5),
}


def table(setting, sampling, config=WORDS):
    """Laws of the first new token [V], of the second after each first [V, V] and of the third [V, V, V]."""
    model, params, run = model_of(config)
    weights = split(model, params, parse_schedule(setting, config.num_layers))
    V = config.vocab_size
    texts = np.asarray([[*PROMPT, first, second] for first in range(V) for second in range(V)], np.int32)
    logits = np.asarray(run(weights, texts))[:, len(PROMPT) - 1 :].reshape(V, V, 3, V)
    seen = np.isin(np.arange(V), PROMPT)
    one = np.eye(V, dtype=bool)
    first_V = reference(logits[0, 0, 0], seen, sampling)
    second_VV = np.stack([reference(logits[a, 0, 1], seen | one[a], sampling) for a in range(V)])
    third_VVV = np.stack(
        [[reference(logits[a, b, 2], seen | one[a] | one[b], sampling) for b in range(V)] for a in range(V)]
    )
    return first_V, second_VV, third_VVV


def sample(engine, sampling, new):
    seeded = [dataclasses.replace(sampling, seed=seed) for seed in range(SEEDS)]
    return np.asarray([done.tokens for done in engine.generate([Request(PROMPT, new, own) for own in seeded])])


@pytest.mark.slow
@pytest.mark.parametrize("draft_len", (1, 2, 3))
@pytest.mark.parametrize("law", LAWS)
def test_speculated_samples_have_the_law_of_the_model(law, draft_len):
    """The second and third new token jointly, which come out of one block, or of two where a draft was rejected, with a
    drafter that reads another model's mind: the head after the first layer."""
    engine, sampling = drafting_engine(), LAWS[law]
    set_draft_len(engine, draft_len)
    tokens = sample(engine, sampling, 3)
    first_V, second_VV, third_VVV = table("seq", sampling)
    law_VV = (first_V[:, None, None] * second_VV[:, :, None] * third_VVV).sum(0)
    drafted_VVV = table("exit:1", sampling)
    assert np.abs(second_VV - drafted_VVV[1]).sum(-1).mean() > 0.5, "the drafter has another law"
    V = WORDS.vocab_size
    assert_law(np.bincount(tokens[:, 1] * V + tokens[:, 2], minlength=V * V), law_VV)
    assert_law(np.bincount(tokens[:, 0], minlength=V), first_V)
    # The chi-square would see it if drafts were taken untested.
    with pytest.raises(AssertionError):
        assert_law(np.bincount(tokens[:, 1], minlength=V), first_V @ drafted_VVV[1])


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
def test_drafts_are_accepted_as_often_as_two_laws_agree(law):
    """``sum_v min(p_v, q_v)``: one draft a row, after a first token from the prefill."""
    engine, sampling = drafting_engine(), LAWS[law]
    set_draft_len(engine, 1)
    sample(engine, sampling, 2)
    first_V, p_VV, _ = table("seq", sampling)
    q_VV = table("exit:1", sampling)[1]
    rate = float(first_V @ np.minimum(p_VV, q_VV).sum(-1))
    found = engine.statistics
    assert found.tested == SEEDS and found.steps == 1
    assert abs(found.acceptance - rate) < 4 * math.sqrt(rate * (1 - rate) / SEEDS)


@functools.cache
def drafting_engine():
    model, params, _ = model_of(WORDS)
    return Engine(model, params, draft=parse_schedule("exit:1", WORDS.num_layers), draft_len=1, max_draft=3)


@pytest.mark.slow
def test_sampled_drafts_depend_on_the_request_alone():
    """With drafts of one length: not on the batch."""
    engine = engine_of("exit:3", draft_len=2, max_draft=2)
    one = Request([1, 2, 3], 20, Sampling(temperature=0.8, top_k=20, repetition_penalty=1.2, seed=5))
    others = requests_of(TINY, 15, (3, 11, 7), sampling=Sampling(temperature=1.0, seed=1))
    alone, among = engine.generate([one])[0], engine.generate([*others, one])[-1]
    assert alone.tokens == among.tokens
    assert_log_probs(logits_after(TINY, "seq", [one], [among], params=calm_params()), [among])


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"schedule": "idn:n=2", "draft": "exit:3"}, "not both"),
        ({"draft": "seq"}, "saves nothing"),
        ({"draft": "exit:3", "rule": "refreshed"}, "leave it out"),
        ({"draft": "exit:3", "draft_len": 9, "max_draft": 8}, "draft length of 9 exceeds max_draft 8"),
        ({"draft": "exit:3", "draft_len": 0}, "draft length is 0"),
        ({"draft": "exit:3", "max_draft": 0}, "max_draft is 0"),
    ],
)
def test_drafters_without_a_meaning_are_refused(settings, named):
    settings = {k: parse_schedule(v, 4) if k in ("schedule", "draft") else v for k, v in settings.items()}
    with pytest.raises(InputError, match=named):
        Engine(LanguageModel(TINY), {}, **settings)
