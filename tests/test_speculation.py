"""Drafts change the speed, never the text: greedy ones token for token, sampled ones in law."""

import dataclasses
import functools
import math

import numpy as np
import pytest
from decoding import (
    ALIKE,
    NEW,
    SIMPLE,
    TINY,
    assert_is_the_whole_pass,
    assert_log_probs,
    calm_params,
    engine_of,
    logits_after,
    model_of,
    requests_of,
)
from test_sampling import assert_law, reference

from snlp_jax.config import MachineConfig
from snlp_jax.errors import InputError
from snlp_jax.infer import Drafting, Engine, Placement, Request, Sampling
from snlp_jax.infer.engine import CHUNK
from snlp_jax.infer.switch import FIRST_PAUSE, LONGEST_PAUSE, DraftSwitch
from snlp_jax.layout import split
from snlp_jax.model import LanguageModel
from snlp_jax.notation import parse_schedule


def drafting_engine(drafter, length=None, most=None, config=ALIKE, machine=MachineConfig()):
    return engine_of(config, draft=Drafting(drafter, length, most), params=calm_params(config=config), machine=machine)


# ---------------------------------------------------------------- greedy text


@pytest.mark.slow
@pytest.mark.parametrize("drafter, most", (("idn:n=3,k=2,init=warm", 3), ("skip:1-2", 8)), ids=lambda value: str(value))
def test_greedy_speculation_is_greedy_decoding(drafter, most):
    """Of many prompts, with drafts of every length up to the most, over rings of several lengths."""
    engine, lengths = drafting_engine(drafter, 1, most, TINY), np.random.default_rng(0).integers(2, 15, 32)
    requests = requests_of(TINY, NEW, lengths)
    for draft_len in range(1, most + 1):
        engine.draft_len = draft_len
        completions = engine.generate(requests)
        assert_is_the_whole_pass(TINY, "seq", requests, completions, params=calm_params())
        assert 0.02 < engine.statistics.acceptance < 0.98  # else nothing is accepted, or nothing rejected
    assert [key[0] for key in engine._programs] == ["prefill", "speculate"]


def test_speculation_gives_the_sequential_text_and_counts_its_drafts():
    """Rows that end at different times; blocks go round the ends of all rings."""
    engine, requests = drafting_engine("exit:2", 5), requests_of(ALIKE)
    completions = engine.generate(requests)
    assert_is_the_whole_pass(ALIKE, "seq", requests, completions, params=calm_params(config=ALIKE))
    found = engine.statistics
    assert 0 < found.accepted < found.tested and found.new_tokens == 4 * NEW
    programs = len(engine._programs)

    # Four drafts make blocks of five, which the program for blocks of six evaluates.
    engine.draft_len = 4
    new_of = (1, NEW, 2, 17)
    shorter = [dataclasses.replace(request, max_new_tokens=new) for request, new in zip(requests, new_of, strict=True)]
    for done, short, new in zip(completions, engine.generate(shorter), new_of, strict=True):
        assert short.tokens == done.tokens[:new] and short.finish == "length"
        np.testing.assert_allclose(short.log_probs, done.log_probs[:new], atol=3e-5)

    # A stop token inside an accepted block ends its row there, and no other.
    stop = completions[1].tokens[20]
    first = completions[1].tokens.index(stop)
    stopping = [requests[0], dataclasses.replace(requests[1], stop_tokens=(stop,)), *requests[2:]]
    stopped = engine.generate(stopping)
    assert stopped[1].tokens == completions[1].tokens[:first] and stopped[1].finish == "stop"
    assert [stopped[row].tokens for row in (0, 2, 3)] == [completions[row].tokens for row in (0, 2, 3)]
    assert len(engine._programs) == programs

    # Plain steps and rounds of drafts over one cache, and a switch for every number of rows.
    engine.may_switch = True
    longer = [dataclasses.replace(request, max_new_tokens=2 * CHUNK) for request in requests]
    switched = engine.generate(longer)
    assert [done.tokens[:NEW] for done in switched] == [done.tokens for done in completions]
    if engine.statistics.steps > CHUNK:
        assert {key[0] for key in engine._programs} == {"prefill", "speculate", "decode"}
    assert set(engine._switches) == {4}


@pytest.mark.slow
def test_a_fused_drafter_over_lists_gives_the_sequential_text():
    """Its nodes are pairs of layers, the verifier's are layers."""
    config = dataclasses.replace(TINY, num_layers=4)
    draft, requests = Drafting("idn:n=4,k=1,stage=2xF2", 2), requests_of(config)
    engine = engine_of(config, draft=draft, placement=Placement(layout="list"))
    assert_is_the_whole_pass(config, "seq", requests, engine.generate(requests))


@pytest.mark.slow
def test_speculation_in_bfloat16_gives_what_its_whole_pass_says():
    machine = MachineConfig(compute_dtype="bfloat16")
    engine, requests = drafting_engine("exit:2", 3, machine=machine), requests_of(ALIKE)
    completions = engine.generate(requests)
    assert 0 < engine.statistics.acceptance < 1
    all_logits = logits_after(ALIKE, "seq", requests, completions, params=calm_params(config=ALIKE), machine=machine)
    assert_log_probs(all_logits, completions, atol=0.15)  # both programs round to 2**-9, in another order
    for logits, done in zip(all_logits, completions, strict=True):
        assert (logits.max(-1) - logits[np.arange(NEW), done.tokens] < 0.15).all()


# ---------------------------------------------------------------- the switch


def simulate(switch, seconds_of, num_chunks):
    """Which chunks drafted, where a token costs ``seconds_of(chunk, is_drafting)``."""
    drafted = []
    for chunk in range(num_chunks):
        drafted.append(switch.next())
        switch.report(drafted[-1], seconds_of(chunk, drafted[-1]))
    return drafted


def test_drafting_stays_where_it_wins_and_stops_where_it_loses():
    wins = simulate(DraftSwitch(), lambda _, is_drafting: 0.8 if is_drafting else 1.0, 400)
    loses = simulate(DraftSwitch(), lambda _, is_drafting: 1.3 if is_drafting else 1.0, 400)
    assert wins[:2] == loses[:2] == [True, False]
    # The first measurement, and trials after 8, 16, 32, 64, 128 and 128 chunks.
    assert wins.count(False) == loses.count(True) == 7
    assert loses[2 : 2 + FIRST_PAUSE + 1] == [False] * FIRST_PAUSE + [True]


def test_a_slow_chunk_or_another_text_switches_and_comes_back():
    """One timing that is ten times too slow costs a pause; where drafts become bad and good again, the switch follows
    within the longest pause."""
    noise = np.random.default_rng(0).lognormal(0, 0.05, 1000)

    def seconds(chunk, is_drafting):
        accident = 10.0 if chunk in (0, 100) else 1.0
        bad_text = is_drafting and 200 <= chunk < 500
        return (1.5 if bad_text else 0.8 if is_drafting else 1.0) * accident * noise[chunk]

    drafted = simulate(DraftSwitch(), seconds, 1000)
    assert np.mean(drafted[20:100]) > 0.9 and np.mean(drafted[120:200]) > 0.9
    assert np.mean(drafted[215:500]) < 0.1
    assert np.mean(drafted[500 + LONGEST_PAUSE + 5 :]) > 0.9


# ---------------------------------------------------------------- sampled text

WORDS = dataclasses.replace(SIMPLE, vocab_size=8)
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


@functools.cache
def words_engine():
    return engine_of(WORDS, draft=Drafting("exit:1", 1, 3))


@pytest.mark.slow
@pytest.mark.parametrize("law, draft_len", (("filtered", 3),))
def test_speculated_samples_have_the_law_of_the_model(law, draft_len):
    """The second and third new token jointly, which come out of one block, or of two where a draft was rejected, with a
    drafter that reads another model's mind: the head after the first layer."""
    engine, sampling = words_engine(), LAWS[law]
    engine.draft_len = draft_len
    tokens = sample(engine, sampling, 3)
    first_V, second_VV, third_VVV = table("seq", sampling)
    law_VV = (first_V[:, None, None] * second_VV[:, :, None] * third_VVV).sum(0)
    drafted_VVV = table("exit:1", sampling)
    assert np.abs(second_VV - drafted_VVV[1]).sum(-1).mean() > 0.2, "the drafter has another law"
    V = WORDS.vocab_size
    assert_law(np.bincount(tokens[:, 1] * V + tokens[:, 2], minlength=V * V), law_VV)
    assert_law(np.bincount(tokens[:, 0], minlength=V), first_V)
    # The chi-square would see it if drafts were taken untested.
    with pytest.raises(AssertionError):
        assert_law(np.bincount(tokens[:, 1], minlength=V), first_V @ drafted_VVV[1])


@pytest.mark.slow
def test_drafts_are_accepted_as_often_as_two_laws_agree():
    """``sum_v min(p_v, q_v)``: one draft a row, after a first token from the prefill."""
    engine, sampling = words_engine(), LAWS["plain"]
    engine.draft_len = 1
    sample(engine, sampling, 2)
    first_V, p_VV, _ = table("seq", sampling)
    q_VV = table("exit:1", sampling)[1]
    rate = float(first_V @ np.minimum(p_VV, q_VV).sum(-1))
    found = engine.statistics
    assert found.tested == SEEDS and found.steps == 1
    assert abs(found.acceptance - rate) < 4 * math.sqrt(rate * (1 - rate) / SEEDS)


@pytest.mark.slow
def test_sampled_drafts_depend_on_the_request_alone():
    """With drafts of one length: not on the batch."""
    engine = drafting_engine("exit:1", 2, config=SIMPLE)
    one = Request([1, 2, 3], 20, Sampling(temperature=0.8, top_k=20, repetition_penalty=1.2, seed=5))
    others = requests_of(SIMPLE, 15, (3, 11, 7), sampling=Sampling(temperature=1.0, seed=1))
    alone, among = engine.generate([one])[0], engine.generate([*others, one])[-1]
    assert alone.tokens == among.tokens
    assert_log_probs(logits_after(SIMPLE, "seq", [one], [among], params=calm_params(config=SIMPLE)), [among])


# ---------------------------------------------------------------- refusals


def test_drafters_without_a_meaning_are_refused():
    for how, named in (
        ({"schedule": "idn:n=2", "draft": "exit:2"}, "not both"),
        ({"draft": "seq"}, "saves nothing"),
        ({"draft": "exit:2", "rule": "refreshed"}, "leave it out"),
        ({"draft": Drafting("exit:2", 9, 8)}, "9 exceeds max_draft 8"),
        ({"draft": Drafting("exit:2", 0)}, "draft length is 0"),
        ({"draft": Drafting("exit:2", most=0)}, "max_draft is 0"),
    ):
        with pytest.raises(InputError, match=named):
            Engine(LanguageModel(TINY), {}, **how)
