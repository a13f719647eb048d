"""The kernel of a decoding step, in the interpreter, against XLA's attention to the same ring."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.speed_cells import decoding, random_state
from snlp_jax.cache import Past
from snlp_jax.config import MachineConfig, ModelConfig
from snlp_jax.errors import InputError
from snlp_jax.forward import Keep, forward
from snlp_jax.layout import prepare
from snlp_jax.model import LanguageModel
from snlp_jax.model.attention import KeyValue, Ring, attend_ring, choose_decoding
from snlp_jax.model.decode_kernel import attend_ring_at_once
from snlp_jax.notation import parse_schedule

CLOSE: dict[str, Any] = {"atol": 5e-6, "rtol": 1e-5}
"""Float32 sums over up to 163 keys of values of size one, in another order."""
CASES = {
    # Tokens of the step; heads, kv heads and slots; tokens before of every row; windows of the layers; cap of scores.
    "several queries of a head, several tokens, capped": (3, 6, 2, 150, (307, 149), (5, 147), 3.0),
    "empty and partly filled": (1, 2, 2, 70, (0, 3), (0, 69), 0.0),
    "most tokens at once": (16, 4, 1, 40, (90, 0), (10, 24), 0.0),
}


def operands(num_tokens, num_heads, num_kv_heads, num_slots, lengths, windows, num_layers=2):
    keys, batch, size = jax.random.split(jax.random.key(0), 5), len(lengths), 16
    of_step = (num_layers, batch, num_tokens)
    shapes = ((*of_step, num_heads), (*of_step, num_kv_heads), (*of_step, num_kv_heads))
    shapes += ((num_layers, batch, num_kv_heads, num_slots),) * 2
    q, *rest = (jax.random.normal(key, (*shape, size)) for key, shape in zip(keys, shapes, strict=True))
    return 3.0 * q, KeyValue(*rest[:2]), Ring(*rest[2:]), jnp.asarray(windows), jnp.asarray(lengths)


def at_once(target, **settings):
    return functools.partial(attend_ring_at_once, target=target, interpret=True, **settings)


def over_layers(attend):
    return jax.jit(jax.vmap(attend, in_axes=(0, 0, 0, 0, None)))


@pytest.mark.parametrize(
    "case, target",
    [
        ("several queries of a head, several tokens, capped", "triton"),
        ("empty and partly filled", "triton"),
        ("most tokens at once", "mosaic"),
    ],
)
def test_it_is_xla_attention(case, target):
    """Of layers with windows of their own and rows of their own lengths."""
    *shape, softcap = CASES[case]
    args = operands(*shape)
    kernel = at_once(target, softcap=softcap)
    expected = over_layers(functools.partial(attend_ring, softcap=softcap))(*args)
    chex.assert_trees_all_close(over_layers(kernel)(*args), expected, **CLOSE)


def test_a_tpu_takes_in_a_ring_block_by_block(monkeypatch):
    """The last block reaches beyond the ring, which has gone round."""
    monkeypatch.setattr("snlp_jax.model.decode_kernel.MOSAIC_BYTES", 1)
    args = operands(2, 2, 2, 150, (400, 140), (5, 148))
    kernel = at_once("mosaic")
    chex.assert_trees_all_close(over_layers(kernel)(*args), over_layers(attend_ring)(*args), **CLOSE)


def test_chunks_of_layers_are_one_kernel():
    """Two axes that are mapped over, and a window for all."""
    *args, _, lengths = operands(1, 2, 2, 40, (50,), (0,) * 4, num_layers=4)
    args = jax.tree.map(lambda leaf: leaf.reshape(2, 2, *leaf.shape[1:]), args)
    kernel = at_once("triton")
    chunks = lambda attend: jax.jit(jax.vmap(jax.vmap(lambda *own: attend(*own, 30, lengths))))  # noqa: E731
    chex.assert_trees_all_close(chunks(kernel)(*args), chunks(attend_ring)(*args), **CLOSE)
    assert str(jax.make_jaxpr(chunks(kernel))(*args)).count("pallas_call[") == 1


def test_derivatives_are_those_of_xla_attention():
    q, *rest = jax.tree.map(lambda leaf: leaf[0], operands(2, 2, 2, 20, (30,), (15, 15))[:-1])
    kernel = at_once("mosaic")
    size = lambda attend: lambda q: jnp.sum(attend(q, *rest, jnp.asarray([30])) ** 2)  # noqa: E731
    slope, expected = (jax.jit(jax.grad(size(attend)))(q) for attend in (kernel, attend_ring))
    chex.assert_trees_all_close(slope, expected, **CLOSE)


def test_a_cached_pass_is_that_with_xla_attention(monkeypatch):
    """Rings of two lengths, a region and a layer in order."""
    interpreted = functools.partial(attend_ring_at_once, interpret=True)
    monkeypatch.setattr("snlp_jax.model.nodes.attend_ring_at_once", interpreted)
    config = ModelConfig(
        num_layers=3, embed_dim=32, num_heads=2, num_kv_heads=1, vocab_size=32, seq_len=64, short_window=8,
        window_pattern="SL", attention_softcap=2.0,
    )  # fmt: skip

    def run(kernel):
        model = LanguageModel(config, MachineConfig(compute_dtype="float32", decode_attention=kernel), backend="gpu")
        wave = lambda leaf: 0.3 * np.cos(np.arange(leaf.size, dtype=np.float32) ** 2).reshape(leaf.shape)  # noqa: E731
        params = jax.tree.map(wave, model.abstract_params())
        weights = prepare(model, params, parse_schedule("idn:n=2,k=2", 3), num_tokens=2)
        programs, state = decoding(model, weights, 1, 20, 2)
        rings = random_state(state, 20).rings
        past = Past(jnp.ones((1, 1), jnp.int32), jnp.asarray([20]), rings)

        def pass_of(weights):
            keep = Keep(programs.rule)
            return forward(model, weights, jnp.asarray([[3, 4]]), past=past, keep=keep)

        return str(jax.make_jaxpr(pass_of)(weights)), jax.jit(pass_of)(weights).logits_BTV

    (plain, expected), (fused, logits) = run("xla"), run("pallas")
    assert "pallas_call" in fused and "pallas_call" not in plain
    # Float32 through three layers; logits are of size one.
    chex.assert_trees_all_close(logits, expected, atol=2e-5)


def test_choice():
    choose = lambda requested, backend, tokens=1, size=128: choose_decoding(  # noqa: E731
        requested, backend=backend, num_tokens=tokens, head_dim=size
    )
    assert {choose(requested, backend) for requested in ("auto", "xla") for backend in ("gpu", "tpu")} == {"xla"}
    assert (choose("pallas", "gpu"), choose("pallas", "tpu", size=96)) == ("triton", "mosaic")
    assert (choose("pallas", "gpu", 16), choose("pallas", "gpu", 17)) == ("triton", "xla")
    with pytest.raises(InputError, match="not .gpu. and 96"):
        choose("pallas", "gpu", size=96)


def test_a_model_refuses_it_where_it_does_not_run():
    config = ModelConfig(num_layers=2, embed_dim=256, num_heads=2, num_kv_heads=2)
    machine = MachineConfig(decode_attention="pallas")

    def chosen(model, num_tokens, is_cached):
        return model._choose_kernel(False)(num_tokens, is_cached).name

    assert chosen(LanguageModel(config, machine, backend="gpu"), 1, True) == "triton"
    assert chosen(LanguageModel(config, machine, backend="gpu").adapted(kernels=("triton",)), 1, True) == "triton"
    # The first tokens of a text are another matter.
    assert chosen(LanguageModel(config, machine, backend="cpu"), 1, False) == "xla"
    with pytest.raises(InputError, match="'cpu'"):
        chosen(LanguageModel(config, machine, backend="cpu"), 1, True)
    with pytest.raises(InputError, match="this mesh"):
        chosen(LanguageModel(config, machine, backend="tpu").adapted(kernels=()), 1, True)
    assert chosen(LanguageModel(config, backend="cpu").adapted(kernels=()), 1, True) == "xla"
