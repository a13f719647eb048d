"""Joined kernels, as a GPU reads them, and transposed ones, as a CPU does, are those of training: in every family,
layout and pass."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from problems import random_params, random_tokens, relative_error
from test_model import GEMMA, LINEARIZED, QWEN

from benchmarks.hlo import read_program
from benchmarks.speed_cells import decoding
from snlp_jax.config import MachineConfig
from snlp_jax.forward import forward
from snlp_jax.infer import Engine, Placement
from snlp_jax.layout import canonical, prepare
from snlp_jax.model import LanguageModel
from snlp_jax.model.projections import join_projections
from snlp_jax.notation import parse_schedule
from snlp_jax.quantize import quantize

ROUNDING = 2e-5
"""Relative to the largest entry: the same float32 sums, which a wider product may add up in another order."""
TRANSPOSED = MachineConfig(compute_dtype="float32", attention="xla", transposed_from=1)
QWEN, GEMMA, LINEARIZED = (dataclasses.replace(config, num_layers=3) for config in (QWEN, GEMMA, LINEARIZED))
CASES = {
    "split": (QWEN, "idn:n=2,k=1,stage=split", "stack"),
    "chunks": (QWEN, "idn:n=2,k=1,stage=1xF2", "stack"),
    "gemma": (GEMMA, "idn:n=2,k=1", "list"),
    "replaced": (LINEARIZED, "idn:n=3,k=1", "stack"),
}


def models(config):
    """The same model as a GPU's weights are laid out, and a CPU's; both run here."""
    machine = MachineConfig(compute_dtype="float32", attention="xla")
    return LanguageModel(config, machine, backend="gpu"), LanguageModel(config, machine, backend="cpu")


def stacks_of(blocks):
    return blocks if isinstance(blocks, list) else [blocks]


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_separate_kernels(case):
    config, setting, layout = CASES[case]
    tokens, logits = random_tokens(config, length=6), []
    for model in models(config):
        params, schedule = random_params(model), parse_schedule(setting, config.num_layers)
        weights = prepare(model, params, schedule, num_tokens=tokens.size, layout=layout)
        trees = [tree for part in weights.parts for tree in stacks_of(part.blocks)]
        joined = model.backend == "gpu"
        assert all(("qkv" in tree["attn"]) == joined for tree in trees if "attn" in tree)
        assert all(("up_gate" in tree["mlp"]) == (joined and config.mlp != "relu2") for tree in trees if "mlp" in tree)
        logits.append(jax.jit(lambda w, t, model=model: forward(model, w, t).logits_BTV)(weights, tokens))
    assert relative_error(*logits) < ROUNDING


@pytest.mark.parametrize("precision", ("compute", "int8"))
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transposed_kernels(case, precision):
    config, setting, layout = CASES[case]
    tokens, logits = random_tokens(config, length=6), []
    plain = models(config)[1]
    params, schedule = quantize(random_params(plain), precision), parse_schedule(setting, config.num_layers)
    for model in (plain, LanguageModel(config, TRANSPOSED)):
        weights = prepare(model, params, schedule, num_tokens=tokens.size, layout=layout)
        names = {name for part in weights.parts for tree in stacks_of(part.blocks) for name in tree.get("mlp", ())}
        assert ("up_t" in names) == (model is not plain) and ("up" in names) == (model is plain)
        logits.append(jax.jit(lambda w, t, model=model: forward(model, w, t).logits_BTV)(weights, tokens))
    assert relative_error(*logits) < ROUNDING


def test_transposing_copies_once_and_for_few_tokens_alone():
    model = LanguageModel(dataclasses.replace(QWEN, use_tied_head=False), TRANSPOSED)
    params = random_params(model)
    assert "query" in canonical(model, params, 65)["blocks"]["attn"]
    made = canonical(model, params)
    for part, name in (("attn", "query"), ("mlp", "down")):
        assert (made["blocks"][part][f"{name}_t"] == params["blocks"][part][name].swapaxes(1, 2)).all()
        assert name not in made["blocks"][part]
    assert (made["head"]["kernel_t"] == params["head"]["kernel"].T).all() and "kernel" not in made["head"]
    assert jax.tree.structure(made["embed"]) == jax.tree.structure(params["embed"])
    again = canonical(model, made)
    assert all(one is other for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(made), strict=True))


def test_a_drafter_and_its_verifier_hold_one_copy():
    for backend in ("cpu", "gpu"):
        model = LanguageModel(dataclasses.replace(QWEN, window_pattern="L"), TRANSPOSED, backend=backend)
        engine = Engine(model, random_params(model), draft="idn:n=2,k=1", placement=Placement(layout="stack"))
        pointers = lambda weights: {  # noqa: E731
            leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(weights) if leaf.ndim == 3
        }
        assert pointers(engine.weights) == pointers(engine.exact)


def test_the_kernel_stays_on_the_left():
    """Without the barrier the compiler turns ``(W x)^T`` into ``x^T W^T``, whose right operand is packed anew."""
    model = LanguageModel(QWEN, TRANSPOSED)
    weights = prepare(model, random_params(model), parse_schedule("seq", QWEN.num_layers), layout="list")
    tokens = jnp.zeros((3, 1), jnp.int32)
    text = jax.jit(lambda w, t: forward(model, w, t).logits_BTV).lower(weights, tokens).compile().as_text()
    width, hidden = QWEN.embed_dim, QWEN.mlp_width
    assert f"f32[{hidden},3]" in text and f"f32[{width},3]" in text, "up and down, outputs before rows"


def test_joining_moves_numbers_and_changes_none():
    params = random_params(LanguageModel(QWEN))
    blocks, joined = params["blocks"], join_projections(params["blocks"])
    for part, name, names in (("attn", "qkv", ("query", "key", "value")), ("mlp", "up_gate", ("up", "gate"))):
        for what in ("", "_bias"):
            both = jnp.concatenate([blocks[part][each + what] for each in names], axis=-1)
            assert (joined[part][name + what] == both).all()
            assert not {each + what for each in names} & joined[part].keys()
    again = join_projections(joined)
    assert all(one is other for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(joined), strict=True))


def test_keys_and_values_alone_are_those_of_the_whole_layer():
    """The pass that refreshes a cache slices the joined kernel."""
    model = models(QWEN)[0]
    params, tokens = random_params(model), random_tokens(QWEN)
    x0 = model.embed(params, tokens)
    h_L = jnp.stack([x0 * (1 + i) for i in range(QWEN.num_layers)])
    blocks = join_projections(params["blocks"])
    rest = (h_L, model.context(params, blocks, tokens, 0, QWEN.num_layers), model.shared(x0))
    alone, whole = (jax.jit(fn)(blocks, *rest)[1].kv for fn in (model.refresh_fn, model.sweep_fn(0, QWEN.num_layers)))
    assert relative_error(alone.key_BTKH, whole.key_BTKH) < ROUNDING
    assert relative_error(alone.value_BTKH, whole.value_BTKH) < ROUNDING


def test_a_decoding_step_of_joined_stacks_copies_no_weight():
    config = dataclasses.replace(QWEN, window_pattern="L", embed_dim=64)
    model = LanguageModel(config, MachineConfig(compute_dtype="float32"), backend="gpu")
    schedule = parse_schedule("idn:n=3,k=1", 3)
    lay_out = lambda params: prepare(model, params, schedule, num_tokens=1)  # noqa: E731
    weights = jax.eval_shape(lay_out, model.abstract_params())
    programs, state = decoding(model, weights, batch=1, context=24)
    text = jax.jit(programs.decode, donate_argnums=1).lower(weights, state, jnp.int32(4)).compile().as_text()
    matrix = 4 * 64 * 64  # W_o, the smallest
    assert read_program(text, unknown_trips=1).moves(matrix) == ()
