"""Logits to tokens: each filter against numpy, each draw against its law, rows that know nothing of each other."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snlp_jax.errors import InputError
from snlp_jax.infer.sampling import (
    Features,
    Sampling,
    accept,
    distribution,
    draw,
    rows_of,
    seen_in,
    seen_with_drafts,
)

VOCAB, DRAFTS, NUM_ROWS, FEW_ROWS = 8, 3, 10_000, 16
ALL = Features(samples=True, filters=True, penalizes=True)
"""One compiled program for all settings: a setting that is off must change nothing in it."""
ROUNDING = 1e-5
"""Probabilities in float32, after a division by a temperature of at least 0.5 of logits of order one."""

SETTINGS = {
    "greedy": Sampling(),
    "plain": Sampling(temperature=1.0),
    "temperature": Sampling(temperature=0.5),
    "top_k": Sampling(temperature=1.0, top_k=3),
    "top_k_of_more_than_all": Sampling(temperature=1.0, top_k=10 * VOCAB),
    "top_p": Sampling(temperature=1.0, top_p=0.7),
    "min_p": Sampling(temperature=1.0, min_p=0.2),
    "reward": Sampling(temperature=1.0, repetition_penalty=0.7),
    "greedy_with_penalty": Sampling(repetition_penalty=3.0),
    "top_p_of_top_k": Sampling(temperature=1.5, top_k=5, top_p=0.8),
    "everything": Sampling(temperature=2.0, top_k=6, top_p=0.9, min_p=0.25, repetition_penalty=1.8, seed=2**32 - 1),
}
EXTREMES = {
    "top_k": Sampling(temperature=1.0, top_k=1),
    "top_p": Sampling(temperature=1.0, top_p=1e-300),
    "min_p": Sampling(temperature=1.0, min_p=1.0),
    "cold": Sampling(temperature=1e-4, top_p=0.5),
    "hot": Sampling(temperature=1e4, top_k=2, top_p=0.999999, min_p=0.999999),
    "tiny": Sampling(temperature=1.0, min_p=1e-300),
}

distributions = jax.jit(distribution, static_argnums=3)
draws = jax.jit(draw, static_argnums=3)
accepts = jax.jit(accept, static_argnums=6)
sets_of = jax.jit(seen_in, static_argnums=2)
grown = jax.jit(seen_with_drafts)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def reference(logits, seen, sampling):
    """Probabilities over one vocabulary, by sorting."""
    x = np.asarray(logits, np.float64)
    penalized = np.where(x > 0, x / sampling.repetition_penalty, x * sampling.repetition_penalty)
    x = np.where(seen, penalized, x)
    if sampling.temperature == 0:
        return np.eye(len(x))[x.argmax()]
    x = x / sampling.temperature
    if sampling.top_k:
        x = np.where(x >= np.sort(x)[::-1][: sampling.top_k][-1], x, -np.inf)
    p = np.exp(x - x.max())
    p /= p.sum()
    if sampling.top_p < 1:
        likeliest_first = np.argsort(-p, kind="stable")
        before = np.cumsum(p[likeliest_first]) - p[likeliest_first]
        p[likeliest_first[before >= sampling.top_p]] = 0
    p = np.where(p >= sampling.min_p * p.max(), p, 0)
    return p / p.sum()


def table(logits_TV, seen_TV, sampling):
    """The law ``distribution`` gives to each of T places, for equal rows."""
    rows, _ = rows_of([sampling])
    return np.exp(distributions(logits_TV[None], seen_TV[None], rows, ALL))[0]


def seeded(sampling, num_rows=NUM_ROWS):
    """``num_rows`` requests that differ in the seed."""
    rows, _ = rows_of([sampling])
    spread = jax.tree.map(lambda field: jnp.broadcast_to(field, (num_rows,)), rows)
    return spread._replace(seed=jnp.arange(num_rows, dtype=jnp.uint32))


def assert_law(counts, law):
    """Pearson's chi-square at p > 0.001, cells that expect fewer than five draws in one; none where the law is 0."""
    counts, expected = np.ravel(counts), np.ravel(law) * counts.sum()
    assert not counts[expected == 0].any()
    is_rare = expected < 5
    counts, expected = (np.append(cells[~is_rare], cells[is_rare].sum()) for cells in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert jax.scipy.special.gammaincc((len(counts) - 1) / 2, statistic / 2) > 0.001


# One distribution


def test_distribution_is_the_reference_row_by_row():
    logits_BTV, seen_BTV = normal(0, len(SETTINGS), 2, VOCAB) * 1.5, normal(1, len(SETTINGS), 2, VOCAB) > 0
    rows, features = rows_of(list(SETTINGS.values()))
    assert features == ALL
    got_BTV = np.exp(distributions(logits_BTV, seen_BTV, rows, features))
    for row, sampling in enumerate(SETTINGS.values()):
        for place in range(2):
            want_V = reference(logits_BTV[row, place], seen_BTV[row, place], sampling)
            np.testing.assert_allclose(got_BTV[row, place], want_V, atol=ROUNDING)
            assert ((got_BTV[row, place] == 0) == (want_V == 0)).all()


def test_what_is_off_changes_nothing():
    """Bit for bit: a row that filters nothing has the same law where its batch filters and penalizes."""
    logits_BTV, rows = normal(2, 1, 2, VOCAB), rows_of([SETTINGS["temperature"]])[0]
    without = distributions(logits_BTV, None, rows, Features(samples=True, filters=False, penalizes=False))
    np.testing.assert_array_equal(distributions(logits_BTV, logits_BTV > 0, rows, ALL), without)


@pytest.mark.parametrize("logits_V", [[0.0] * 8, [5.0, -np.inf] * 4, [-1e30, 1e30] * 4, [-3e-30, 3e-30] * 4], ids=str)
def test_no_filter_excludes_everything(logits_V):
    logits_BTV = np.tile(np.asarray(logits_V, np.float32), (len(EXTREMES), 1, 1))
    rows, _ = rows_of(list(EXTREMES.values()))
    p_BV = np.exp(distributions(logits_BTV, np.zeros(logits_BTV.shape, bool), rows, ALL))[:, 0]
    np.testing.assert_allclose(p_BV.sum(-1), 1, atol=ROUNDING)
    np.testing.assert_array_equal(p_BV[:, np.argmax(logits_V)], p_BV.max(-1))


def test_ties_stay_together_and_greedy_takes_the_first():
    logits_V = np.asarray([1.0, 3.0, 2.0, 3.0, 2.0, 0.0, 2.0, -1.0], np.float32)
    unseen_TV, tied_T = np.zeros((2, VOCAB), bool), np.stack([logits_V, logits_V[::-1]])
    kept = lambda sampling: (table(tied_T, unseen_TV, sampling)[0] > 0).nonzero()[0].tolist()  # noqa: E731
    assert kept(Sampling()) == [1]
    assert kept(Sampling(temperature=1.0, top_k=1)) == [1, 3]
    assert kept(Sampling(temperature=1.0, top_k=3)) == [1, 2, 3, 4, 6]
    # The two likeliest hold 0.61 of everything.
    assert kept(Sampling(temperature=1.0, top_p=0.01)) == kept(Sampling(temperature=1.0, top_p=0.6)) == [1, 3]
    assert kept(Sampling(temperature=1.0, top_p=0.63)) == [1, 2, 3, 4, 6]
    assert kept(Sampling(temperature=1.0, min_p=1.0)) == [1, 3]


def test_penalty_lowers_positive_and_negative_logits_of_what_was_seen():
    logits_TV = np.asarray([[2.0, 2.0, -2.0, -2.0, 0.0, 0.0, 1.0, 1.0]] * 2, np.float32)
    seen_TV = np.asarray([[True, False] * 4] * 2)
    p_TV = table(logits_TV, seen_TV, Sampling(temperature=1.0, repetition_penalty=2.0))
    ratios = np.log(p_TV[0, 0::2] / p_TV[0, 1::2])
    np.testing.assert_allclose(ratios, [-1.0, -2.0, 0.0, -0.5], atol=ROUNDING)


def test_a_batch_asks_for_what_its_rows_need():
    penalty, greedy_filter = Sampling(repetition_penalty=1.1), Sampling(top_k=3)
    assert rows_of([Sampling()])[1] == Features(samples=False, filters=False, penalizes=False)
    assert rows_of([greedy_filter])[1] == Features(samples=False, filters=False, penalizes=False)
    assert rows_of([SETTINGS["plain"], greedy_filter])[1] == Features(samples=True, filters=False, penalizes=False)
    assert rows_of([SETTINGS["min_p"], penalty])[1] == ALL
    assert int(rows_of([SETTINGS["everything"]])[0].seed[0]) == 2**32 - 1


# Draws


def test_draws_have_their_law_over_seeds_and_over_positions():
    sampling = SETTINGS["everything"]
    logits_TV, seen_TV = normal(3, 2, VOCAB), np.arange(2 * VOCAB).reshape(2, VOCAB) % 3 == 0
    law_V = reference(logits_TV[0], seen_TV[0], sampling)
    log_probs_BV = jnp.broadcast_to(jnp.log(table(logits_TV, seen_TV, sampling)[0]), (NUM_ROWS, VOCAB))
    rows, counter = seeded(sampling), jnp.arange(NUM_ROWS)
    one_seed = rows._replace(seed=jnp.full_like(rows.seed, 7))
    for varied, position_B in ((rows, jnp.full_like(counter, 5)), (one_seed, counter)):
        assert_law(np.bincount(draws(log_probs_BV, varied, position_B, ALL), minlength=VOCAB), law_V)


def test_a_token_depends_on_its_request_and_not_on_the_batch():
    """The same rows alone, and elsewhere in a batch of others."""
    rows, features = rows_of([dataclasses.replace(sampling, seed=5) for sampling in SETTINGS.values()])
    num_rows = len(SETTINGS)
    logits_BTV, seen_BTV = normal(4, num_rows, 1, VOCAB), normal(5, num_rows, 1, VOCAB) > 0
    position_B = jnp.arange(num_rows) % 4

    def tokens(index):
        part = jax.tree.map(lambda field: field[index], rows)
        log_probs_BTV = distributions(logits_BTV[index], seen_BTV[index], part, features)
        return np.asarray(draws(log_probs_BTV[:, 0], part, position_B[index], features))

    whole, order = tokens(np.arange(num_rows)), np.arange(num_rows)[::-1]
    np.testing.assert_array_equal(tokens(order), whole[order])
    alone = [int(tokens(np.asarray([row]))[0]) for row in range(num_rows)]
    np.testing.assert_array_equal(alone, whole)


def test_where_no_row_samples_nothing_random_and_no_search_is_compiled():
    rows, features = rows_of([Sampling(top_k=2, seed=1)] * 2)
    logits_BXV, drafts_BG = jnp.zeros((2, DRAFTS + 1, VOCAB)), jnp.zeros((2, DRAFTS), jnp.int32)

    def step(logits_BXV, rows, features):
        log_probs_BXV = distribution(logits_BXV, jnp.zeros(logits_BXV.shape, bool), rows, features)
        drawn_B = draw(log_probs_BXV[:, 0], rows, jnp.zeros(2, jnp.int32), features)
        return drawn_B, accept(drafts_BG, 2, log_probs_BXV, log_probs_BXV, rows, jnp.zeros(2, jnp.int32), features)

    traced = {case: str(jax.make_jaxpr(step, static_argnums=2)(logits_BXV, rows, case)) for case in (features, ALL)}
    for primitive in ("random_bits[", "= sort[", "while[", "scan[", "= exp "):
        assert primitive not in traced[features]
    assert "random_bits[" in traced[ALL] and "= sort[" not in traced[ALL]


# Speculation


@functools.cache
def markov_logits():
    """Logits of a target that looks at the token before, and of drafters that know it badly and not at all."""
    target_VV = normal(6, VOCAB, VOCAB) * 1.5
    halves = np.where(np.arange(VOCAB) < VOCAB // 2, 0.0, -np.inf).astype(np.float32)[None]
    return {
        "different": (target_VV, normal(7, VOCAB, VOCAB) * 1.5),
        "disjoint": (target_VV + halves, target_VV + halves[:, ::-1]),
        "filtered": (target_VV, target_VV + normal(8, VOCAB, VOCAB)),
    }


LAWS = {
    "different": SETTINGS["plain"],
    "disjoint": SETTINGS["plain"],
    "filtered": Sampling(temperature=0.8, top_k=4, repetition_penalty=1.6),
}


@jax.jit
def speculate(target_VV, drafter_VV, draft_len, rows):
    """Two blocks after token 0: the tokens they give and how many, and the first block's accepted drafts."""
    num_rows = rows.seed.shape[0]
    row_B, slot_X = jnp.arange(num_rows), jnp.arange(DRAFTS + 1)[None]

    def law(logits_VV, current_B, seen_BV):
        return distribution(logits_VV[current_B][:, None], seen_BV[:, None], rows, ALL)[:, 0]

    def block(current_B, seen_BV, position_B):
        inputs, log_q, drafted_BV = [current_B], [], seen_BV
        for index in range(DRAFTS):
            drafted_BV = seen_with_drafts(drafted_BV, inputs[-1][:, None])[:, 0]
            log_q.append(law(drafter_VV, inputs[-1], drafted_BV))
            inputs.append(draw(log_q[-1], rows, position_B + index, ALL))
        inputs_BX = jnp.stack(inputs, axis=1)
        seen_BXV = seen_with_drafts(seen_BV, inputs_BX)
        log_p_BXV = distribution(target_VV[inputs_BX], seen_BXV, rows, ALL)
        drafts_BG = inputs_BX[:, 1:]
        count_B, next_B = accept(drafts_BG, draft_len, jnp.stack(log_q, 1), log_p_BXV, rows, position_B, ALL)
        padded_BX = jnp.concatenate([drafts_BG, jnp.zeros_like(drafts_BG[:, :1])], axis=1)
        tokens_BX = jnp.where(slot_X < count_B[:, None], padded_BX, next_B[:, None])
        return tokens_BX, count_B, next_B, seen_BXV[row_B, count_B]

    start_B = jnp.zeros(num_rows, jnp.int32)
    first_BX, count_B, current_B, seen_BV = block(start_B, jnp.zeros((num_rows, VOCAB), bool), start_B + 1)
    second_BX = block(current_B, seen_BV, start_B + 2 + count_B)[0]
    pair_B2 = jnp.stack([first_BX[:, 0], jnp.where(count_B > 0, first_BX[:, 1], second_BX[:, 0])], axis=1)
    return pair_B2, count_B


def markov_law(logits_VV, sampling):
    """The law of the first token after token 0, and of the second after each first."""
    seen_VV = np.eye(VOCAB, dtype=bool) | (np.arange(VOCAB) == 0)[None]
    second_VV = np.stack([reference(logits_VV[first], seen_VV[first], sampling) for first in range(VOCAB)])
    return reference(logits_VV[0], seen_VV[0], sampling), second_VV


@pytest.mark.parametrize("case, draft_len", [("different", 3), ("disjoint", 2), ("filtered", 3)])
def test_speculated_tokens_have_the_law_of_the_target(case, draft_len):
    """The first two tokens jointly, in one block or in two: after a rejection the second block drafts again at
    positions whose noise the first block's dropped drafts have used."""
    (target_VV, drafter_VV), sampling = markov_logits()[case], LAWS[case]
    pair_B2, count_B = map(np.asarray, speculate(target_VV, drafter_VV, draft_len, seeded(sampling)))
    first_V, second_VV = markov_law(target_VV, sampling)
    counts = np.bincount(pair_B2[:, 0] * VOCAB + pair_B2[:, 1], minlength=VOCAB * VOCAB)
    assert_law(counts, first_V[:, None] * second_VV)

    rate = np.minimum(first_V, markov_law(drafter_VV, sampling)[0]).sum()
    four_sigma = 4 * math.sqrt(max(rate * (1 - rate), 0) / NUM_ROWS)
    assert count_B.max() <= draft_len
    # Where the laws are equal or disjoint this is exact up to the rounding of the reference.
    assert abs((count_B > 0).mean() - rate) <= four_sigma + 1e-12


def test_a_perfect_drafter_gives_the_text_of_plain_sampling():
    """q = p accepts everything and the token after it is a draw, so the block is what draws one by one give; a block
    without drafts is one draw."""
    rows = seeded(SETTINGS["plain"], FEW_ROWS)
    log_p_BXV, position_B = jax.nn.log_softmax(normal(9, FEW_ROWS, DRAFTS + 1, VOCAB)), jnp.arange(FEW_ROWS)
    plain_BX = jnp.stack([draws(log_p_BXV[:, i], rows, position_B + i, ALL) for i in range(DRAFTS + 1)], axis=1)
    draft_len_B = position_B % (DRAFTS + 1)
    got = accepts(plain_BX[:, :DRAFTS], draft_len_B, log_p_BXV[:, :DRAFTS], log_p_BXV, rows, position_B, ALL)
    np.testing.assert_array_equal(got.count_B, draft_len_B)
    np.testing.assert_array_equal(got.next_B, plain_BX[position_B, draft_len_B])
    none = accepts(plain_BX[:, :0], 0, None, log_p_BXV[:, :1], rows, position_B, ALL)
    np.testing.assert_array_equal(none.next_B, plain_BX[:, 0])


def test_a_rejection_where_nothing_is_left_draws_from_the_target():
    """p = q and a draft that neither allows: (p - q)+ is 0 everywhere."""
    rows, support = seeded(SETTINGS["plain"], FEW_ROWS), np.where(np.arange(VOCAB) < 2, np.log(0.5), -np.inf)
    log_p_BXV = jnp.asarray(np.tile(support.astype(np.float32), (FEW_ROWS, DRAFTS + 1, 1)))
    drafts_BG, position_B = jnp.full((FEW_ROWS, DRAFTS), 5), jnp.arange(FEW_ROWS)
    got = accepts(drafts_BG, jnp.full(FEW_ROWS, DRAFTS), log_p_BXV[:, :DRAFTS], log_p_BXV, rows, position_B, ALL)
    assert not got.count_B.any()
    assert set(np.asarray(got.next_B).tolist()) == {0, 1}


def test_greedy_accepts_the_longest_matching_prefix():
    """Where no row samples and nothing of the drafter's law is known, and in a batch where others do sample."""
    rng = np.random.default_rng(10)
    logits_BXV = normal(11, FEW_ROWS, DRAFTS + 1, VOCAB)
    best_BX = logits_BXV.argmax(-1)
    is_other_BG = rng.random((FEW_ROWS, DRAFTS)) < 0.3
    drafts_BG = ((best_BX[:, :DRAFTS] + is_other_BG) % VOCAB).astype(np.int32)
    draft_len_B = rng.integers(0, DRAFTS + 1, FEW_ROWS)
    want = [
        next((i for i in range(length) if drafts[i] != best[i]), length)
        for drafts, best, length in zip(drafts_BG, best_BX, draft_len_B, strict=True)
    ]
    assert len(set(want)) == DRAFTS + 1
    rows, greedy = rows_of([Sampling(seed=row) for row in range(FEW_ROWS)])
    log_q_BGV = jnp.log(jax.nn.one_hot(drafts_BG, VOCAB))
    for features, log_q in ((greedy, None), (ALL, log_q_BGV)):
        log_p_BXV = distributions(logits_BXV, jnp.zeros(logits_BXV.shape, bool), rows, features)
        got = accepts(drafts_BG, draft_len_B, log_q, log_p_BXV, rows, jnp.arange(FEW_ROWS), features)
        np.testing.assert_array_equal(got.count_B, want)
        np.testing.assert_array_equal(got.next_B, best_BX[np.arange(FEW_ROWS), want])


def test_seen_grows_with_the_inputs_of_the_block():
    tokens_BT = np.asarray([[1, 2, 1, 0], [3, 3, 4, 7]])
    is_token_BT = np.asarray([[True, True, True, False], [False, True, True, True]])
    seen_BV = np.asarray(sets_of(tokens_BT, is_token_BT, VOCAB))
    assert [set(row.nonzero()[0].tolist()) for row in seen_BV] == [{1, 2}, {3, 4, 7}]
    inputs_BX = np.asarray([[2, 5, 5], [0, 3, 6]])
    seen_BXV = np.asarray(grown(seen_BV, inputs_BX))
    for row, sets in enumerate(([{1, 2}, {1, 2, 5}, {1, 2, 5}], [{0, 3, 4, 7}, {0, 3, 4, 7}, {0, 3, 4, 6, 7}])):
        assert [set(marks.nonzero()[0].tolist()) for marks in seen_BXV[row]] == sets


# Bad input


def test_a_setting_out_of_range_is_named_with_a_remedy():
    for field, values in {
        "temperature": (-1.0, 1e-5, 1e5, math.nan, math.inf, "1", True),
        "top_k": (-1, 2**31, 2.0, None),
        "top_p": (0.0, 1.1, -0.5, math.nan),
        "min_p": (-0.1, 1.5, math.nan),
        "repetition_penalty": (0.0, -1.0, 1000.0, math.nan),
        "seed": (1.5,),
    }.items():
        for value in values:
            with pytest.raises(InputError) as error:
                Sampling(**{field: value})
            message = str(error.value)
            assert message.startswith(f"{field} is {value!r}; ") and message.endswith(".")


def test_what_is_missing_is_named():
    with pytest.raises(InputError, match="no requests"):
        rows_of([])
    rows, features = rows_of([SETTINGS["everything"]])
    log_probs_BXV = jnp.zeros((1, 2, VOCAB))
    with pytest.raises(ValueError, match="seen_BTV"):
        distribution(log_probs_BXV, None, rows, features)
