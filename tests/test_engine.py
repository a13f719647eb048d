"""Decoding with a cache: what comes out is what the whole forward pass says of the same text."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import (
    NEW,
    PROMPTS,
    ROUNDING,
    TINY,
    assert_is_the_whole_pass,
    assert_log_probs,
    calm_params,
    logits_after,
    model_of,
    requests_of,
)
from jax.sharding import NamedSharding, PartitionSpec
from problems import SMALL, VARIANTS, random_tokens

from snlp_jax.cache import append, fill, plan_rings
from snlp_jax.config import MeshConfig
from snlp_jax.data.tokenizer import ByteTokenizer
from snlp_jax.errors import InputError
from snlp_jax.eval.calibrations import region_problems
from snlp_jax.infer.engine import Engine, Request
from snlp_jax.infer.rules import CacheRule
from snlp_jax.infer.sampling import Sampling
from snlp_jax.layout import prepare
from snlp_jax.linearize import fit_calibration
from snlp_jax.model import LanguageModel
from snlp_jax.model.block import KeyValue, Ring, Rings
from snlp_jax.notation import parse_schedule
from snlp_jax.parallel import make_mesh
from snlp_jax.parallel.hlo import count_collectives

ALIKE = dataclasses.replace(TINY, window_pattern="L")
"""One window: a scan over a stack."""


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow, id="-".join(str(value) for value in values))


def run(config, setting, requests=None, **settings):
    """The engine, the requests and what it makes of them."""
    model, params, _ = model_of(config)
    engine = Engine(model, settings.pop("params", params), parse_schedule(setting, config.num_layers), **settings)
    requests = requests or requests_of(config)
    return engine, requests, engine.generate(requests)


# ---------------------------------------------------------------- the sequential pass


def test_sequential_decoding_is_the_whole_pass():
    """Also where prompts and texts are longer than all windows: each ring is gone round at least three times."""
    _, requests, completions = run(TINY, "seq")
    assert min(PROMPTS) + NEW > 3 * (max(TINY.windows) + 1) and max(PROMPTS) > max(TINY.windows) + 1
    assert_is_the_whole_pass(TINY, "seq", requests, completions)


def test_a_scan_over_layers_of_one_window_is_the_whole_pass():
    engine, requests, completions = run(ALIKE, "seq")
    assert not any(isinstance(blocks, list) for blocks in engine.weights.blocks)
    assert_is_the_whole_pass(ALIKE, "seq", requests, completions)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, layout",
    [(name, "list") for name in VARIANTS] + [(name, "stack") for name in ("no_smear_no_mid", "hyper_dynamic")],
)
def test_sequential_decoding_of_every_kind_of_model_is_the_whole_pass(name, layout):
    """Lists and stacks; stacks of different windows have rings in groups."""
    _, requests, completions = run(VARIANTS[name], "seq", layout=layout)
    assert_is_the_whole_pass(VARIANTS[name], "seq", requests, completions)


@pytest.mark.slow
@pytest.mark.parametrize("setting", ("seq", "idn:n=2,k=2"))
def test_bfloat16_decodes_what_its_whole_pass_says(setting):
    """Products in bfloat16, keys and values too; both programs round to 2**-9 and add up in another order."""
    config = dataclasses.replace(TINY, compute_dtype="bfloat16")
    engine, requests, completions = run(config, setting)
    assert LanguageModel(config).dtype == jnp.bfloat16
    state, _ = engine._prefill(requests)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.rings)} == {jnp.dtype("bfloat16")}
    all_logits = logits_after(config, "seq", requests, completions)
    assert_log_probs(all_logits, completions, atol=0.15)
    for logits, done in zip(all_logits, completions, strict=True):  # the likeliest up to that rounding
        assert (logits.max(-1) - logits[np.arange(NEW), done.tokens] < 0.15).all()


# ---------------------------------------------------------------- cache rules

AS_MANY = (
    "idn:n=2,k=2",
    "idn:n=4,k=4",
    "jac:n=3,k=3",
    "sid:1-4,k=3,init=batch_forward",
    "idn:n=4,k=4,init=warm",
    "diag:n=3,k=3",
    "exact:n=4,k=4",
    "idn:n=4,tol=1e-7",
)
HYPER = tuple(name for name in VARIANTS if "hyper" in name)


@pytest.mark.parametrize("rule", ("last_eval", "refreshed"))
@pytest.mark.parametrize(
    "name, setting",
    [(None, AS_MANY[0])]
    + [slow(None, setting) for setting in AS_MANY[1:]]
    + [slow(name, setting) for name in HYPER for setting in ("hcn:n=4,k=4", "idn:n=4,k=4,init=warm")],
)
def test_as_many_iterations_as_layers_are_sequential(name, setting, rule):
    """Whatever the cache keeps of the last evaluation or of the corrected trace, it is the exact one."""
    config = VARIANTS[name] if name else TINY
    _, requests, completions = run(config, setting, rule=rule)
    assert_is_the_whole_pass(config, "seq", requests, completions)


@pytest.mark.parametrize("config", (TINY, ALIKE), ids=("mixed", "alike"))
def test_steps_of_many_rows_are_the_whole_pass(config):
    """A CPU sweeps them in a loop over layers, which rings of several lengths do not have."""
    model, params, _ = model_of(config)
    requests, schedule = requests_of(config), parse_schedule("idn:n=3,k=3", config.num_layers)
    engine = Engine(model.adapted(one_by_one_from=1), params, schedule)
    assert_is_the_whole_pass(config, "seq", requests, engine.generate(requests))


TOKEN_LOCAL = (
    "sid:n=2,k=1,init=batch_forward",
    "sid:n=3,k=2,init=batch_forward",
    "idn:n=4,k=2",
    "jac:n=4,k=1",
    "idn:0-2,k=1+idn:2-4,k=2",
    "idn:n=4,k=1,stage=2xF2",
    "idn:n=4,k=2,stage=2xF2",
    "idn:n=4,k=1,stage=split",
    "idn:n=4,k=2,trust=0.5",
    "idn:n=2,k=1+skip:1-2",
)


@pytest.mark.parametrize(
    "name, setting",
    [(None, TOKEN_LOCAL[0])]
    + [slow(None, setting) for setting in TOKEN_LOCAL[1:]]
    + [slow(name, f"hcn:n=4,k={k}") for name in HYPER for k in (1, 2)],
)
def test_a_cache_of_each_evaluation_is_the_solver_on_the_whole_text(name, setting):
    config = VARIANTS[name] if name else TINY
    _, requests, completions = run(config, setting, rule="per_iteration")
    assert_is_the_whole_pass(config, setting, requests, completions)


@pytest.mark.slow
def test_rules_differ_where_they_may():
    """At K < N: else the tests above would not tell one rule from another."""
    texts = [run(TINY, "idn:n=4,k=2", rule=rule)[-1] for rule in CacheRule.__args__]
    for one, other in itertools.combinations(texts, 2):
        assert [done.log_probs for done in one] != [done.log_probs for done in other]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, setting, rule, reference",
    (
        ("channel", "cal:n=3,k=1,init=cal,fit=mine", "per_iteration", None),
        ("basis", "cal:n=3,k=2,init=cal,fit=mine", "per_iteration", None),
        ("channel", "cal:n=3,k=3,fit=mine", "last_eval", "seq"),
        ("basis", "cal:n=3,k=3,init=cal,fit=mine", "refreshed", "seq"),
    ),
)
def test_fitted_surrogates_and_guesses_decode_under_every_rule(kind, setting, rule, reference):
    model, params, _ = model_of(TINY)
    schedule = parse_schedule(setting, TINY.num_layers)
    (region,) = schedule.regions
    windows = np.asarray(random_tokens(TINY, batch=32, length=17))
    problems = region_problems(model, params, region, windows)
    how = {"num_iters": region.num_iters, "kind": kind, "rank": 4, "init": region.init, "init_rank": 4}
    fits = {"mine": fit_calibration(problems, **how)}
    _, requests, completions = run(TINY, setting, rule=rule, fits=fits)
    fitted = {"fits": fits} if reference is None else {}
    assert_is_the_whole_pass(TINY, reference or setting, requests, completions, **fitted)


@pytest.mark.slow
def test_iterations_are_counted_for_every_token():
    """One where anything is good enough, as many as layers where nothing is; the text is that of k = these. The first
    token of every row comes out of the prefill."""
    config = dataclasses.replace(TINY, use_x0_resid=False)
    calm = calm_params(0.01, config)  # residuals far below one half
    fixed = {k: run(config, f"idn:n=3,k={k}", params=calm)[-1] for k in (1, 3)}
    counts = []
    for tolerance in ("0.5", "1e-3", "1e-5", "1e-30"):
        engine, _, completions = run(config, f"idn:n=3,tol={tolerance}", params=calm)
        counts.append(engine.statistics.iterations / (len(PROMPTS) * (NEW - 1)))
        if counts[-1] in fixed:
            assert [done.tokens for done in completions] == [done.tokens for done in fixed[counts[-1]]]
    assert counts[0] == 1 and counts[-1] == 3 and counts == sorted(counts) and len(set(counts)) > 2, counts


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


# ---------------------------------------------------------------- memory and devices


@pytest.mark.parametrize("layout", ("list", "stack"))
def test_memory_follows_the_windows(layout):
    """For a text of 1000 tokens a layer holds its window and the tokens at hand, not the text."""
    model, params, _ = model_of(SMALL)
    assert set(SMALL.windows) == {4, 32}
    weights = prepare(model, params, parse_schedule("idn:n=2,k=1", 6), num_tokens=1, layout=layout)
    length_B, num_bytes = jnp.zeros(3, jnp.int32), 0
    for segment, plan in zip(weights.segments, plan_rings(model, weights, capacity=1000, block=5), strict=True):
        leaf = jax.ShapeDtypeStruct((segment.num_layers, 3, 1000, SMALL.num_kv_heads, SMALL.head_dim), jnp.float32)
        rings = jax.eval_shape(lambda kv, plan=plan: fill(plan, kv, length_B), KeyValue(leaf, leaf))
        num_bytes += sum(leaf.dtype.itemsize * math.prod(leaf.shape) for leaf in jax.tree.leaves(rings.groups))
    token = 2 * 4 * 3 * SMALL.num_kv_heads * SMALL.head_dim  # keys and values in float32 for three rows
    assert num_bytes == token * sum(window + 5 for window in SMALL.windows)


@pytest.mark.parametrize("rows", (2, 18))
def test_writing_the_cache_of_rows_on_several_devices_is_no_exchange(rows):
    """Each device writes the tokens of its own rows, few or many."""
    mesh = make_mesh(MeshConfig(data=2))

    def leaf(spec, *shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    ring, new = leaf((None, "data"), 3, rows, 2, 9, 4), leaf((None, "data"), 3, rows, 1, 2, 4)
    length_B = leaf(("data",), rows, dtype=jnp.int32)
    write = functools.partial(append, is_on_mesh=True)
    shape = Rings((Ring(ring, ring),), ((0, 1, 2),))
    compiled = jax.jit(write, donate_argnums=0).lower(shape, KeyValue(new, new), length_B).compile()
    assert count_collectives(compiled.as_text()) == {}


MESHES = {"2": MeshConfig(layer=2), "2x2": MeshConfig(data=2, layer=2), "tensor": MeshConfig(tensor=2)}
PLACES = (("2", "tensor"), ("2", "ring"), ("2x2", "ring"), ("tensor", "tensor"))
ON_MESHES = (
    # setting, rule, drafter; ring or tensor
    ("seq", "last_eval", None),
    ("idn:n=2,k=2", "last_eval", None),
    ("idn:n=3,k=3", "refreshed", None),  # a layer of zero weights fills up the devices
    ("idn:n=4,k=4,init=warm", "last_eval", None),
    ("idn:n=3,k=1", "per_iteration", None),
    ("seq", "last_eval", "exit:3"),
    ("seq", "last_eval", "idn:n=3,k=1"),
    ("seq", "last_eval", "idn:n=4,k=1,stage=2xF2"),
)


@pytest.mark.parametrize(
    "mesh, sequential, setting, rule, drafter",
    [
        case if case == ("2", "ring", "idn:n=2,k=2", "last_eval", None) else slow(*case)
        for case in ((*place, *case) for place in PLACES for case in ON_MESHES)
    ],
)
def test_devices_together_give_the_text_of_one(mesh, sequential, setting, rule, drafter):
    """Also where the verifier has layers that the drafter leaves out: their cache lies with them."""
    how = {"mesh": make_mesh(MESHES[mesh]), "sequential": sequential, "rule": rule}
    if drafter:
        how |= {"draft": parse_schedule(drafter, TINY.num_layers), "draft_len": 2, "max_draft": 2}
    engine, requests, completions = run(TINY, setting, **how)
    assert_is_the_whole_pass(TINY, setting if rule == "per_iteration" else "seq", requests, completions)
    if drafter is None:
        return
    state, _ = engine._prefill(requests)
    for is_spread, rings in zip(engine.exact.is_spread, state.rings, strict=True):
        for leaf in jax.tree.leaves(rings):
            assert (leaf.sharding.shard_shape(leaf.shape)[0] < leaf.shape[0]) == (is_spread and mesh != "tensor")


@pytest.mark.slow
def test_an_adaptive_drafter_on_a_mesh_gives_the_text_of_one_device():
    how = {"draft": parse_schedule("exit:3", TINY.num_layers), "max_draft": 3}
    _, requests, completions = run(TINY, "seq", mesh=make_mesh(MESHES["2x2"]), sequential="ring", **how)
    assert_is_the_whole_pass(TINY, "seq", requests, completions)


def test_rows_that_a_mesh_cannot_share_are_refused():
    model, params, _ = model_of(TINY)
    engine = Engine(model, params, mesh=make_mesh(MeshConfig(data=2)))
    with pytest.raises(InputError, match="3 requests do not divide over the mesh's 2 parts"):
        engine.generate([Request([1])] * 3)


# ---------------------------------------------------------------- requests

CHOSEN = Sampling(temperature=0.8, top_k=20, repetition_penalty=1.2, seed=5)


@pytest.mark.parametrize("others", (3, pytest.param(0, marks=pytest.mark.slow)))
def test_sampled_text_depends_on_the_request_alone(others):
    """Not on the other requests of the batch, their lengths, their number or its place among them; its
    log-probabilities are the model's own, whatever the temperature, the filters and the penalty make of them."""
    one = Request([1, 2, 3], 12, CHOSEN)
    some = requests_of(TINY, new=9, lengths=(3, 11, 7), sampling=Sampling(temperature=1.0, top_p=0.9, seed=1))
    engine, requests, among = run(TINY, "seq", [*some, one])
    assert_log_probs(logits_after(TINY, "seq", requests, among), among)
    beside = requests_of(TINY, new=12, lengths=(2, 5, 14), seed=4, sampling=Sampling(0.5, repetition_penalty=1.1))
    again = engine.generate([one, *beside[:others]])[0]
    assert again.tokens == among[-1].tokens
    np.testing.assert_allclose(again.log_probs, among[-1].log_probs, rtol=0, atol=ROUNDING)
    other_seed = dataclasses.replace(one, sampling=dataclasses.replace(CHOSEN, seed=6))
    assert engine.generate([other_seed, *beside[:others]])[0].tokens != among[-1].tokens


@pytest.mark.slow
def test_a_tolerance_leaves_a_row_its_own_cache():
    """A row that stops early keeps the keys and values of its own last evaluation, however long others go on."""
    config = dataclasses.replace(TINY, use_x0_resid=False)
    one, others = Request([1, 2, 3], 24), requests_of(TINY, new=24, lengths=(3, 11, 7))
    engine, _, among = run(config, "idn:n=3,tol=0.1", [*others, one], params=calm_params(0.1, config))
    most = 3 * 4 * 23
    assert 0.4 * most < engine.statistics.iterations < 0.9 * most, "rows stop at different iterations"
    alone = engine.generate([one])[0]
    assert alone.tokens == among[-1].tokens
    np.testing.assert_allclose(alone.log_probs, among[-1].log_probs, rtol=0, atol=ROUNDING)


def test_stops_streams_and_buckets():
    """Stop tokens and strings end a row and only that row, where they stand; requests of a bucket compile once."""
    config = dataclasses.replace(ALIKE, vocab_size=257, num_layers=2)
    model, params, _ = model_of(config)
    engine = Engine(model, params, tokenizer=ByteTokenizer())
    prompts = [[104, 105], [72, 101, 108, 108, 111]]
    plain = engine.generate([Request(prompt, 20) for prompt in prompts])
    compiled = len(engine._programs)
    assert compiled == 2 and engine.statistics.compile_seconds > 0

    stop = plain[0].tokens[6]
    first = plain[0].tokens.index(stop)
    stopped = engine.generate([Request(prompts[0], 20, stop_tokens=(stop,)), Request(prompts[1], 18)])
    assert stopped[0].tokens == plain[0].tokens[:first] and stopped[0].finish == "stop"
    assert stopped[1].tokens == plain[1].tokens[:18] and stopped[1].finish == "length"
    assert len(stopped[0].log_probs) == first
    assert len(engine._programs) == compiled and engine.statistics.compile_seconds == 0

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

    first_tokens = engine.generate([Request(prompts[0], 1), Request(prompts[1], 20, stop_tokens=(plain[1].tokens[0],))])
    assert first_tokens[0].tokens == plain[0].tokens[:1] and first_tokens[0].finish == "length"
    assert first_tokens[1].tokens == [] and first_tokens[1].finish == "stop" and first_tokens[1].text == ""
    assert engine.statistics.steps == 0


@pytest.mark.parametrize(
    "request_, named",
    [
        (None, "there are no requests"),
        (Request([]), "the prompt is empty"),
        (Request([[1, 2], [3, 4]]), "flat sequence"),
        (Request([0.5]), "flat sequence"),
        (Request([3, 99999]), "99999"),
        (Request([-1]), "-1"),
        (Request([1], max_new_tokens=0), "max_new_tokens is 0"),
        (Request([1] * 300, max_new_tokens=21), "321, more than the rotary embedding's 320"),
        (Request([1], stop_strings=("x",)), "need a tokenizer"),
    ],
)
def test_bad_requests_are_one_sentence(request_, named):
    model, params, _ = model_of(SMALL)
    engine = Engine(model, params)
    with pytest.raises(InputError, match=named) as caught:
        engine.generate([] if request_ is None else [request_])
    assert "\n" not in str(caught.value) and not engine._programs


@pytest.mark.slow
def test_a_text_may_be_as_long_as_the_rotary_embedding():
    """The last position is the longest context's; LENGTH of the reference is not reached, so two engines are compared:
    one decodes the whole text, one its last tokens after a prompt."""
    longest = TINY.max_context
    engine, _, whole = run(TINY, "seq", [Request([1, 2, 3], longest - 3)])
    prompt = [1, 2, 3, *whole[0].tokens[:-20]]
    again = engine.generate([Request(prompt, 20)])[0]
    assert len(whole[0].tokens) == longest - 3
    assert again.tokens == whole[0].tokens[-20:]
    np.testing.assert_allclose(again.log_probs, whole[0].log_probs[-20:], atol=1e-4)  # rounding of other sums
