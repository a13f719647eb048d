"""Decoding with a cache: what comes out is what the whole forward pass says of the same text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import SMALL, VARIANTS, random_params

from snlp_jax.data.tokenizer import ByteTokenizer
from snlp_jax.errors import InputError
from snlp_jax.forward import forward
from snlp_jax.infer.engine import CacheRule, Engine, Request
from snlp_jax.infer.sampling import Sampling
from snlp_jax.layout import split
from snlp_jax.model import LanguageModel
from snlp_jax.notation import parse_schedule

LOG_PROBS = {"rtol": 0, "atol": 3e-5}
"""Logits of up to 15 in float32: two programs that add up in another order differ by 1.5e-5 each."""
TIE = 1e-4
"""Greedy tokens are compared where the two best logits are further apart than this."""
PROMPTS = (3, 11, 7)
"""Lengths; the short window is 4."""
LENGTH = 48
"""Of the padded texts that the reference reads: longer than the long window of 32."""
NEW = 35


def requests_of(config, new=NEW, seed=3, lengths=PROMPTS, **settings):
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, config.vocab_size, length).tolist() for length in lengths]
    return [Request(prompt, new, **settings) for prompt in prompts]


def full_logits(model, params, schedule, texts):
    """Logits [B, LENGTH, V] of the whole pass over texts that are filled up behind their ends."""
    tokens = np.zeros((len(texts), LENGTH), np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
    run = jax.jit(lambda weights, tokens: forward(model, weights, tokens).logits_BTV)
    return np.asarray(run(split(model, params, schedule), jnp.asarray(tokens)))


def assert_is_what_the_full_pass_says(model, params, schedule, requests, completions):
    """Every token is the likeliest after those before it, and its log-probability the full pass's."""
    texts = [[*request.tokens, *done.tokens] for request, done in zip(requests, completions, strict=True)]
    logits = full_logits(model, params, schedule, texts)
    for row, (request, done) in enumerate(zip(requests, completions, strict=True)):
        assert len(done.tokens) == request.max_new_tokens
        start = len(request.tokens)
        after = logits[row, start - 1 : start - 1 + len(done.tokens)]
        best = np.sort(after, axis=-1)[:, -2:]
        clear = best[:, 1] - best[:, 0] > TIE
        assert clear.mean() > 0.9
        np.testing.assert_array_equal(after.argmax(-1)[clear], np.asarray(done.tokens)[clear])
        log_probs = after - np.asarray(jax.nn.logsumexp(jnp.asarray(after), axis=-1))[:, None]
        expected = log_probs[np.arange(len(done.tokens)), done.tokens]
        np.testing.assert_allclose(done.log_probs, expected, **LOG_PROBS)


def run_both(config, setting, **settings):
    """The engine's completions under a setting, and what is needed to check them."""
    model = LanguageModel(config)
    params = random_params(model)
    schedule = parse_schedule(setting, config.num_layers)
    requests = requests_of(config)
    engine = Engine(model, params, schedule, **settings)
    return model, params, schedule, requests, engine.generate(requests)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "everything" else pytest.mark.slow) for name in VARIANTS]
)
@pytest.mark.parametrize("layout", ("auto", pytest.param("stack", marks=pytest.mark.slow)))
def test_sequential_decoding_is_the_full_pass(name, layout):
    found = run_both(VARIANTS[name], "seq", layout=layout)
    assert_is_what_the_full_pass_says(*found)


# ---------------------------------------------------------------- cache rules

WHOLE = ("idn:n=4,k=4", "sid:2-5,k=3,init=batch_forward", "idn:n=4,k=4,init=warm", "diag:n=4,k=4", "exact:n=6,k=1")
STREAM = ("hcn:n=4,k=4", "idn:n=4,k=4,init=warm")
ADAPTIVE = "idn:n=4,tol=1e-7"


@pytest.mark.parametrize("rule", ("last_eval", "refreshed"))
@pytest.mark.parametrize(
    "config, setting",
    [pytest.param(SMALL, WHOLE[0], id=WHOLE[0])]
    + [pytest.param(SMALL, s, id=s, marks=pytest.mark.slow) for s in (*WHOLE[1:], ADAPTIVE)]
    + [
        pytest.param(VARIANTS[v], s, id=f"{v}-{s}", marks=pytest.mark.slow)
        for v in VARIANTS
        if "hyper" in v
        for s in STREAM
    ],
)
def test_as_many_iterations_as_layers_are_sequential(config, setting, rule):
    """Whatever the cache keeps of the last evaluation or of the corrected trace, it is the exact one."""
    model, params, _, requests, completions = run_both(config, setting, rule=rule)
    assert_is_what_the_full_pass_says(model, params, parse_schedule("seq", config.num_layers), requests, completions)


TOKEN_LOCAL = (
    "idn:n=4,k=2",
    "jac:n=4,k=1",
    "sid:n=4,k=3,init=batch_forward",
    "idn:1-3,k=1+idn:3-6,k=2",
    "idn:n=4,k=1,stage=2xF2",
    "idn:n=4,k=2,stage=2xF2",
    "idn:n=4,k=1,stage=split",
    "idn:n=4,k=2,trust=0.5",
    "idn:n=2,k=1+skip:1-3",
)


@pytest.mark.parametrize(
    "config, setting",
    [pytest.param(SMALL, TOKEN_LOCAL[2], id=TOKEN_LOCAL[2])]
    + [pytest.param(SMALL, s, id=s, marks=pytest.mark.slow) for s in TOKEN_LOCAL if s != TOKEN_LOCAL[2]]
    + [
        pytest.param(VARIANTS[v], f"hcn:n=4,k={k}", id=f"{v}-{k}", marks=pytest.mark.slow)
        for v in VARIANTS
        if "hyper" in v
        for k in (1, 2)
    ],
)
def test_a_cache_of_each_evaluation_is_the_solver_on_the_whole_text(config, setting):
    found = run_both(config, setting, rule="per_iteration")
    assert_is_what_the_full_pass_says(*found)


@pytest.mark.slow
def test_rules_differ_where_they_may():
    """At K < N: else the tests above would not tell one rule from another."""
    texts = [run_both(SMALL, "idn:n=4,k=2", rule=rule)[-1] for rule in CacheRule.__args__]
    for one in range(3):
        for other in range(one):
            assert [done.log_probs for done in texts[one]] != [done.log_probs for done in texts[other]]


@pytest.mark.parametrize(
    "setting, rule, named",
    [
        ("idn:n=4,k=2,stage=2xF2", "last_eval", "fused"),
        ("idn:n=4,k=1,stage=split", "refreshed", "fused"),
        ("diag:n=4,k=2", "per_iteration", "Diagonal"),
        ("exact:n=4", "per_iteration", "Exact"),
        ("idn:n=4,k=2,init=warm", "per_iteration", "warm"),
        ("idn:n=4,tol=0.1", "per_iteration", "tol="),
        ("seq", "newest", "unknown cache rule 'newest'"),
    ],
)
def test_rules_without_an_invariant_are_refused(setting, rule, named):
    with pytest.raises(InputError, match=named):
        Engine(LanguageModel(SMALL), {}, parse_schedule(setting, SMALL.num_layers), rule=rule)


# ---------------------------------------------------------------- speculation

DRAFTERS = ("idn:n=6,k=1", "idn:n=4,k=1,init=warm", "exit:3", "skip:2-5", "pairs:n=6", "idn:n=4,k=1,stage=2xF2")


@pytest.mark.parametrize(
    "drafter", [pytest.param(d, marks=() if d == "skip:2-5" else pytest.mark.slow) for d in DRAFTERS]
)
def test_speculation_gives_the_sequential_text(drafter):
    """Also where rings turn round: drafts and rejections cross the end of every window."""
    model = LanguageModel(SMALL)
    params, requests = random_params(model), requests_of(SMALL)
    draft = parse_schedule(drafter, SMALL.num_layers)
    for draft_len in (3, None):
        engine = Engine(model, params, draft=draft, draft_len=draft_len, max_draft=3)
        completions = engine.generate(requests)
        assert_is_what_the_full_pass_says(model, params, parse_schedule("seq", 6), requests, completions)
        statistics = engine.statistics
        assert statistics.new_tokens == sum(request.max_new_tokens for request in requests)
        assert 0 <= statistics.accepted <= statistics.tested


def test_a_perfect_drafter_is_always_right():
    model = LanguageModel(SMALL)
    engine = Engine(model, random_params(model), draft=parse_schedule("idn:n=4,k=4", 6), draft_len=2, max_draft=3)
    requests = requests_of(SMALL, new=10, lengths=(5, 5))
    engine.generate(requests)
    assert engine.statistics.acceptance == 1.0
    # The prefill gives the first token, each round three more.
    assert engine.statistics.steps == 1 + 3


@pytest.mark.parametrize("draft", (None, "skip:2-5"))
def test_sampled_text_depends_on_the_request_alone(draft):
    """Not on the other requests of the batch, their number, their lengths or its place among them."""
    model = LanguageModel(SMALL)
    settings = {"draft": parse_schedule(draft, 6), "draft_len": 2, "max_draft": 3} if draft else {}
    engine = Engine(model, random_params(model), **settings)
    sampling = Sampling(temperature=0.8, top_k=20, repetition_penalty=1.2, seed=5)
    one = Request([1, 2, 3], 12, sampling)
    others = requests_of(SMALL, new=9, sampling=Sampling(temperature=1.0, seed=1))
    alone = engine.generate([one])[0]
    among = engine.generate([*others, one])[-1]
    assert alone.tokens == among.tokens
    assert engine.generate([dataclasses.replace(one, sampling=dataclasses.replace(sampling, seed=6))])[0].tokens != (
        alone.tokens
    )


# ---------------------------------------------------------------- requests


def test_stops_streams_and_buckets():
    """Stop tokens and strings end a row and only that row, where they stand; requests of a bucket compile once."""
    config = dataclasses.replace(SMALL, vocab_size=257)
    model = LanguageModel(config)
    engine = Engine(model, random_params(model), tokenizer=ByteTokenizer())
    prompts = [[104, 105], [72, 101, 108, 108, 111]]
    plain = engine.generate([Request(prompt, 20) for prompt in prompts])
    compiled = len(engine._programs)

    stop = plain[0].tokens[6]
    first = plain[0].tokens.index(stop)
    stopped = engine.generate([Request(prompts[0], 20, stop_tokens=(stop,)), Request(prompts[1], 18)])
    assert stopped[0].tokens == plain[0].tokens[:first] and stopped[0].finish == "stop"
    assert stopped[1].tokens == plain[1].tokens[:18] and stopped[1].finish == "length"
    assert len(stopped[0].log_probs) == first
    assert len(engine._programs) == compiled

    got = {0: ([], ""), 1: ([], "")}
    pieces = [0, 0]

    def listen(row, tokens, text):
        pieces[row] += 1
        got[row] = (got[row][0] + tokens, got[row][1] + text)

    text = plain[1].text
    string = text[3:5]
    streamed = engine.generate(
        [Request(prompts[0], 20), Request(prompts[1], 20, stop_strings=(string, "never"))], on_tokens=listen
    )
    assert streamed[0].tokens == plain[0].tokens
    assert streamed[1].text == text[: text.index(string)] and streamed[1].finish == "stop"
    for row in (0, 1):
        assert got[row] == (streamed[row].tokens, streamed[row].text)
    assert pieces[0] > 1
    assert len(engine._programs) == compiled


@pytest.mark.parametrize(
    "request_, named",
    [
        (None, "there are no requests"),
        (Request([]), "the prompt is empty"),
        (Request([3, 99999]), "99999"),
        (Request([-1]), "-1"),
        (Request([1], max_new_tokens=0), "max_new_tokens is 0"),
        (Request([1] * 300, max_new_tokens=21), "321, more than the rotary embedding's 320"),
        (Request([1], stop_strings=("x",)), "need a tokenizer"),
    ],
)
def test_bad_requests_are_one_sentence(request_, named):
    engine = Engine(model := LanguageModel(SMALL), random_params(model))
    with pytest.raises(InputError, match=named) as caught:
        engine.generate([] if request_ is None else [request_])
    assert "\n" not in str(caught.value) and not engine._programs


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"schedule": "idn:n=2", "draft": "exit:3"}, "not both"),
        ({"draft": "seq"}, "saves nothing"),
        ({"draft": "exit:3", "rule": "refreshed"}, "leave it out"),
        ({"draft": "exit:3", "draft_len": 9}, "draft length of 9 lies outside 1 to 8"),
        ({"draft": "exit:3", "max_draft": 0}, "max_draft is 0"),
    ],
)
def test_drafters_without_a_meaning_are_refused(settings, named):
    settings = {k: parse_schedule(v, 6) if k in ("schedule", "draft") else v for k, v in settings.items()}
    with pytest.raises(InputError, match=named):
        Engine(LanguageModel(SMALL), {}, **settings)
