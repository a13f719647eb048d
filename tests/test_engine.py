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
    ALIKE,
    NEW,
    PROMPTS,
    ROUNDING,
    SIMPLE,
    TINY,
    assert_is_the_whole_pass,
    assert_log_probs,
    calm_params,
    decoded,
    engine_of,
    logits_after,
    model_of,
    requests_of,
)
from jax.sharding import NamedSharding, PartitionSpec
from problems import SMALL, VARIANTS, random_tokens

from benchmarks.hlo import count_collectives
from snlp_jax.cache import append, fill, plan_rings
from snlp_jax.config import MachineConfig, MeshConfig
from snlp_jax.errors import InputError
from snlp_jax.eval.calibrations import region_chains
from snlp_jax.forward import logits_of
from snlp_jax.infer import CacheRule, Drafting, Engine, Placement, Request, Sampling
from snlp_jax.infer.engine import bucket
from snlp_jax.layout import abstract_weights, prepare
from snlp_jax.linearize import fit_calibration
from snlp_jax.model import LanguageModel
from snlp_jax.model.block import KeyValue, Ring, Rings
from snlp_jax.notation import parse_schedule
from snlp_jax.parallel import make_mesh
from snlp_jax.solver import Schedule

FOUR = dataclasses.replace(TINY, num_layers=4)
"""Two pairs of layers."""
THREE = {name: dataclasses.replace(config, num_layers=3) for name, config in VARIANTS.items()}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


# ---------------------------------------------------------------- the sequential pass


@pytest.mark.parametrize("config", (slow(TINY), ALIKE), ids=("mixed", "alike"))
def test_sequential_decoding_is_the_whole_pass(config):
    """Lists and scans, also where prompts and texts are longer than all windows: each ring is gone round at least three
    times."""
    engine, requests, completions = decoded(config)
    assert min(PROMPTS) + NEW > 3 * (max(config.windows) + 1) and max(PROMPTS) > max(config.windows) + 1
    assert any(isinstance(part.blocks, list) for part in engine.weights.parts) == (config is TINY)
    assert_is_the_whole_pass(config, "seq", requests, completions)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, layout",
    (
        ("no_smear_no_mid", "list"),
        ("hyper_dynamic", "stack"),
    ),
)
def test_sequential_decoding_of_every_kind_of_model_is_the_whole_pass(name, layout):
    """Lists and stacks; stacks of different windows have rings in groups."""
    config = THREE[name]
    _, requests, completions = decoded(config, "seq", layout=layout)
    assert_is_the_whole_pass(config, "seq", requests, completions)


@pytest.mark.slow
def test_bfloat16_decodes_what_its_whole_pass_says():
    """Products in bfloat16, keys and values too; both programs round to 2**-9 and add up in another order."""
    machine = MachineConfig(compute_dtype="bfloat16")
    engine, requests, completions = decoded(TINY, "idn:n=2,k=2", machine=machine)
    state, _ = engine._prefill(requests)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.rings)} == {jnp.dtype("bfloat16")}
    all_logits = logits_after(TINY, "seq", requests, completions, machine=machine)
    assert_log_probs(all_logits, completions, atol=0.15)
    for logits, done in zip(all_logits, completions, strict=True):  # the likeliest up to that rounding
        assert (logits.max(-1) - logits[np.arange(NEW), done.tokens] < 0.15).all()


# ---------------------------------------------------------------- cache rules


@pytest.mark.parametrize(
    "config, setting, rule",
    [
        (ALIKE, "idn:n=2,k=2", "refreshed"),
        slow(ALIKE, "sid:1-3,k=2,init=batch_forward", "last_eval"),
        slow(TINY, "idn:n=3,k=3,init=warm", "last_eval"),
        slow(TINY, "exact:n=3,k=3", "last_eval"),
        slow(ALIKE, "idn:n=3,tol=1e-7", "refreshed"),
        slow(THREE["hyper_dynamic"], "idn:n=3,k=3,init=warm", "last_eval"),
    ],
)
def test_as_many_iterations_as_layers_are_sequential(config, setting, rule):
    """Whatever the cache keeps of the last evaluation or of the corrected trace, it is the exact one."""
    _, requests, completions = decoded(config, setting, rule)
    assert_is_the_whole_pass(config, "seq", requests, completions)


@pytest.mark.slow
def test_steps_of_many_rows_are_the_whole_pass():
    """A CPU sweeps them in a loop over layers."""
    model, params, _ = model_of(ALIKE)
    requests = requests_of(ALIKE)
    engine = Engine(model.adapted(one_by_one_from=1), params, "idn:n=3,k=3")
    assert_is_the_whole_pass(ALIKE, "seq", requests, engine.generate(requests))


@pytest.mark.parametrize(
    "config, setting",
    [
        (ALIKE, "idn:n=3,k=2"),
        slow(TINY, "sid:n=3,k=2,init=batch_forward"),
        slow(FOUR, "idn:n=4,k=2,stage=2xF2"),
        slow(TINY, "idn:n=3,k=1,stage=split"),
        slow(ALIKE, "idn:n=1,k=1+skip:1-2"),
        slow(THREE["hyper_dynamic"], "hcn:n=3,k=1"),
    ],
)
def test_a_cache_of_each_evaluation_is_the_solver_on_the_whole_text(config, setting):
    _, requests, completions = decoded(config, setting, "per_iteration")
    assert_is_the_whole_pass(config, setting, requests, completions)


@pytest.mark.slow
def test_rules_differ_where_they_may():
    """At K < N: else the tests above would not tell one rule from another."""
    texts = [decoded(ALIKE, "idn:n=3,k=2", rule)[-1] for rule in CacheRule.__args__]
    for one, other in itertools.combinations(texts, 2):
        assert [done.log_probs for done in one] != [done.log_probs for done in other]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, setting, rule, reference",
    (
        ("channel", "cal:n=3,k=1,init=cal,fit=mine", "per_iteration", None),
        ("basis", "cal:n=3,k=3,init=cal,fit=mine", "refreshed", "seq"),
    ),
)
def test_fitted_surrogates_and_guesses_decode_under_every_rule(kind, setting, rule, reference):
    model, params, _ = model_of(TINY)
    schedule = parse_schedule(setting, TINY.num_layers)
    (region,) = schedule.regions
    windows = np.asarray(random_tokens(TINY, batch=32, length=17))
    problems = region_chains(model, params, region, windows)
    fit = fit_calibration(problems, num_iters=region.num_iters, kind=kind, rank=4, init=region.init, init_rank=4)
    requests, fits = requests_of(TINY), {"mine": fit}
    completions = engine_of(TINY, schedule, rule=rule, fits=fits).generate(requests)
    fitted = {"fits": fits} if reference is None else {}
    assert_is_the_whole_pass(TINY, reference or setting, requests, completions, **fitted)


@pytest.mark.slow
def test_iterations_are_counted_for_every_token():
    """One where anything is good enough, as many as layers where nothing is; the text is that of k = these. The first
    token of every row comes out of the prefill."""
    config = dataclasses.replace(ALIKE, use_x0_resid=False)
    calm, requests = calm_params(0.01, config), requests_of(config)  # residuals far below one half
    once = engine_of(config, "idn:n=3,k=1", params=calm).generate(requests)
    counts = []
    for tolerance in ("0.5", "1e-2", "1e-30"):
        engine = engine_of(config, f"idn:n=3,tol={tolerance}", params=calm)
        completions = engine.generate(requests)
        counts.append(engine.statistics.iterations / (len(PROMPTS) * (NEW - 1)))
        if tolerance == "0.5":
            assert [done.tokens for done in completions] == [done.tokens for done in once]
    assert counts[0] == 1 < counts[1] < counts[2] == 3, counts


def test_rules_without_an_invariant_are_refused():
    for setting, rule, named in (
        ("idn:n=4,k=2,stage=2xF2", "last_eval", "fused"),
        ("idn:n=4,k=1,stage=split", "refreshed", "fused"),
        ("diag:n=4,k=2", "per_iteration", "Diagonal"),
        ("exact:n=4", "per_iteration", "Exact"),
        ("idn:n=4,k=2,init=warm", "per_iteration", "warm"),
        ("idn:n=4,tol=0.1", "per_iteration", "tol="),
        ("seq", "newest", "'newest'"),
    ):
        with pytest.raises(InputError, match=named):
            Engine(LanguageModel(SMALL), {}, setting, rule=rule)


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


def test_rings_on_devices_that_share_the_rows_follow_the_windows():
    """Each device has all layers, and rings as long as without a mesh."""
    model, schedule = LanguageModel(TINY), parse_schedule("idn:n=3,k=1", 3)
    mesh = make_mesh(MeshConfig(data=2))
    weights = abstract_weights(model, schedule, mesh)
    (plan,) = plan_rings(model, weights, capacity=1000, block=1, mesh=mesh)
    assert plan.sizes == (5, 9) and plan.num_slots == sum(window + 1 for window in TINY.windows)


def test_long_texts_are_filled_up_by_a_fifth_at_most():
    assert [bucket(count) for count in (1, 17, 2048, 2049, 4100)] == [16, 32, 2048, 2560, 4608]


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


def test_logits_that_are_split_by_vocabulary_are_gathered_once():
    """The padded vocabulary is cropped after it is whole: cropped before, its pieces move about."""
    model, mesh = LanguageModel(SIMPLE), make_mesh(MeshConfig(tensor=2))
    assert SIMPLE.padded_vocab_size > SIMPLE.vocab_size
    weights = abstract_weights(model, Schedule.of(SIMPLE.num_layers), mesh)
    h_B1D = jax.ShapeDtypeStruct((4, 1, SIMPLE.embed_dim), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))

    def step(weights, h_B1D):
        logits_BTV = logits_of(model, weights, h_B1D, h_B1D, mesh)
        return logits_BTV.argmax(-1), jax.nn.logsumexp(logits_BTV, -1)

    compiled = jax.jit(step).lower(weights, h_B1D).compile()
    assert count_collectives(compiled.as_text()) == {"all-gather": 1}


MESHES = {
    "2": MeshConfig(layer=2),
    "2x2": MeshConfig(data=2, layer=2),
    "tensor": MeshConfig(tensor=2),
}


@pytest.mark.parametrize(
    "mesh, sequential, config, setting, rule, drafter",
    [
        ("2", "ring", ALIKE, "idn:n=2,k=2", "last_eval", None),
        slow("2", "tensor", TINY, "idn:n=3,k=3", "refreshed", None),  # a layer of zero weights fills up the devices
        slow("2x2", "ring", TINY, "idn:n=3,k=3,init=warm", "last_eval", None),
        slow("2x2", "tensor", TINY, "idn:n=3,k=1", "per_iteration", None),
        slow("2x2", "ring", FOUR, "seq", "last_eval", "idn:n=4,k=1,stage=2xF2"),
        slow("tensor", "tensor", TINY, "seq", "last_eval", "idn:n=3,k=1"),
    ],
)
def test_devices_together_give_the_text_of_one(mesh, sequential, config, setting, rule, drafter):
    """Also where the verifier has layers that the drafter leaves out: their cache lies with them."""
    placement, draft = Placement(make_mesh(MESHES[mesh]), sequential), drafter and Drafting(drafter, 2)
    engine, requests = engine_of(config, setting, rule=rule, draft=draft, placement=placement), requests_of(config)
    completions = engine.generate(requests)
    assert_is_the_whole_pass(config, setting if rule == "per_iteration" else "seq", requests, completions)
    if drafter is None:
        return
    state, _ = engine._prefill(requests)
    for part, rings in zip(engine.exact.parts, state.rings, strict=True):
        for leaf in jax.tree.leaves(rings):
            assert (leaf.sharding.shard_shape(leaf.shape)[0] < leaf.shape[0]) == (part.is_spread and mesh != "tensor")


def test_rows_that_a_mesh_cannot_share_are_refused():
    engine = engine_of(TINY, placement=Placement(make_mesh(MeshConfig(data=2))))
    with pytest.raises(InputError, match="3 requests"):
        engine.generate([Request([1])] * 3)


# ---------------------------------------------------------------- requests

CHOSEN = Sampling(temperature=0.8, top_k=20, repetition_penalty=1.2, seed=5)


def test_sampled_text_depends_on_the_request_alone():
    """Not on the other requests of the batch, their lengths or its place among them; its log-probabilities are the
    model's own, whatever the temperature, the filters and the penalty make of them."""
    one = Request([1, 2, 3], 12, CHOSEN)
    some = requests_of(SIMPLE, new=9, lengths=(3, 11, 7), sampling=Sampling(temperature=1.0, top_p=0.9, seed=1))
    engine, requests = engine_of(SIMPLE), [*some, one]
    among = engine.generate(requests)
    assert_log_probs(logits_after(SIMPLE, "seq", requests, among), among)
    beside = requests_of(SIMPLE, new=12, lengths=(2, 5, 14), seed=4, sampling=Sampling(0.5, repetition_penalty=1.1))
    again, *_ = engine.generate([one, *beside])
    assert again.tokens == among[-1].tokens
    np.testing.assert_allclose(again.log_probs, among[-1].log_probs, rtol=0, atol=ROUNDING)
    other_seed = dataclasses.replace(one, sampling=dataclasses.replace(CHOSEN, seed=6))
    assert engine.generate([other_seed, *beside])[0].tokens != among[-1].tokens
    # A penalty leaves out what ends the text: else a prompt that holds it would make ending less likely.
    state, _ = engine._prefill([*some, dataclasses.replace(one, stop_tokens=(2,))])
    assert np.asarray(state.seen_BV)[-1, 1:4].tolist() == [True, among[-1].tokens[0] == 2, True]


@pytest.mark.slow
def test_a_tolerance_leaves_a_row_its_own_cache():
    """A row that stops early keeps the keys and values of its own last evaluation, however long others go on."""
    config = dataclasses.replace(ALIKE, use_x0_resid=False)
    one, others = Request([1, 2, 3], 24), requests_of(config, new=24, lengths=(3, 11, 7))
    placement = Placement(layout="list")
    engine = engine_of(config, "idn:n=3,tol=0.1", params=calm_params(0.1, config), placement=placement)
    among = engine.generate([*others, one])
    most = 3 * 4 * 23
    assert 0.4 * most < engine.statistics.iterations < 0.9 * most, "rows stop at different iterations"
    alone = engine.generate([one])[0]
    assert alone.tokens == among[-1].tokens
    np.testing.assert_allclose(alone.log_probs, among[-1].log_probs, rtol=0, atol=ROUNDING)


def test_stops_streams_and_buckets():
    """Stop tokens and strings end a row and only that row, where they stand; requests of a bucket compile once."""
    engine, requests, plain = decoded(ALIKE)
    compiled = len(engine._programs)
    assert compiled == 2

    def changed(**of_row):
        return [dataclasses.replace(each, **of_row.get(f"row{row}", {})) for row, each in enumerate(requests)]

    stop = plain[0].tokens[6]
    first = plain[0].tokens.index(stop)
    stopped = engine.generate(changed(row0={"stop_tokens": (stop,)}, row3={"max_new_tokens": 18}))
    assert stopped[0].tokens == plain[0].tokens[:first] and stopped[0].finish == "stop"
    assert stopped[3].tokens == plain[3].tokens[:18] and stopped[3].finish == "length"
    assert len(stopped[0].log_probs) == first and stopped[1] == plain[1]
    assert len(engine._programs) == compiled and engine.statistics.compile_seconds == 0

    got = {row: ([], "") for row in range(4)}
    pieces = [0] * 4

    def listen(row, tokens, text):
        pieces[row] += 1
        got[row] = (got[row][0] + tokens, got[row][1] + text)

    text = plain[1].text
    string = text[3:5]
    streamed = engine.generate(changed(row1={"stop_strings": (string, "never")}), on_tokens=listen)
    assert streamed[0].tokens == plain[0].tokens
    assert streamed[1].text == text[: text.index(string)] and streamed[1].finish == "stop"
    assert all(got[row] == (streamed[row].tokens, streamed[row].text) for row in range(4))
    assert pieces[0] > 1
    # What the loop made behind the stop string until the host looked is no token of the answer.
    assert engine.statistics.new_tokens == sum(len(done.tokens) for done in streamed) < 4 * NEW

    first_tokens = engine.generate(changed(row0={"max_new_tokens": 1}, row1={"stop_tokens": (plain[1].tokens[0],)}))
    assert first_tokens[0].tokens == plain[0].tokens[:1] and first_tokens[0].finish == "length"
    assert first_tokens[1].tokens == [] and first_tokens[1].finish == "stop" and first_tokens[1].text == ""
    assert len(engine._programs) == compiled


def test_bad_requests_are_one_sentence():
    engine = Engine(*model_of(SMALL)[:2])
    for requests, named in (
        ([], "no requests"),
        ([Request([])], "empty"),
        ([Request([[1, 2], [3, 4]])], "flat sequence"),
        ([Request([0.5])], "flat sequence"),
        ([Request([3, 99999])], "99999"),
        ([Request([-1])], "-1"),
        ([Request([1]), Request([1], max_new_tokens=0)], "request 1: max_new_tokens is 0"),
        ([Request([1] * 300, max_new_tokens=21)], "321"),
        ([Request([1], stop_strings=("x",))], "need a tokenizer"),
    ):
        with pytest.raises(InputError, match=named) as caught:
            engine.generate(requests)
        assert "\n" not in str(caught.value) and not engine._programs


@pytest.mark.slow
def test_a_text_may_be_as_long_as_the_rotary_embedding():
    """The last position is the longest context's; LENGTH of the reference is not reached, so two engines are compared:
    one decodes the whole text, one its last tokens after a prompt."""
    longest = SIMPLE.max_context
    engine = engine_of(SIMPLE)
    whole = engine.generate([Request([1, 2, 3], longest - 3)])
    prompt = [1, 2, 3, *whole[0].tokens[:-20]]
    again = engine.generate([Request(prompt, 20)])[0]
    assert len(whole[0].tokens) == longest - 3
    assert again.tokens == whole[0].tokens[-20:]
    np.testing.assert_allclose(again.log_probs, whole[0].log_probs[-20:], atol=1e-4)  # rounding of other sums
