"""The language model alone: attention against its definition, parameters, initialisation, precision, refusals."""

import dataclasses
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from problems import PLAIN, SMALL, VARIANTS, all_sequential, random_params, random_tokens, relative_error

from snlp_jax.config import MachineConfig, ModelConfig, NormConfig, RopeConfig
from snlp_jax.errors import InputError
from snlp_jax.forward import forward
from snlp_jax.layout import split
from snlp_jax.model import LanguageModel, attention, num_params
from snlp_jax.model.attention import Kernel, KeyValue, attend, attend_any, choose_implementation
from snlp_jax.model.layers import RMS_EPS, rms_norm, rotary_table, rotate
from snlp_jax.notation import parse_schedule


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# ---------------------------------------------------------------- attention


def plain_attention(q_BTNH, k_BSKH, v_BSKH, window):
    """The definition in float64, query by query: t sees s iff t - window <= s <= t, queries are the last T of S."""
    q, k, v = (np.asarray(x, np.float64) for x in (q_BTNH, k_BSKH, v_BSKH))
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    out = np.zeros((B, T, N, v.shape[-1]))
    for b, i, n in np.ndindex(B, T, N):
        t, kv = S - T + i, n // (N // K)
        seen = [s for s in range(S) if t - window <= s <= t]
        scores = np.array([q[b, i, n] @ k[b, s, kv] for s in seen]) / math.sqrt(H)
        weights = np.exp(scores - scores.max())
        out[b, i, n] = (weights / weights.sum()) @ v[b, seen, kv]
    return out


@pytest.mark.parametrize("num_queries, num_keys, num_kv_heads", ((9, 9, 2), (3, 11, 1)))
def test_attention_is_its_definition(num_queries, num_keys, num_kv_heads):
    q = draw(0, 2, num_queries, 4, 6)
    k, v = (draw(seed, 2, num_keys, num_kv_heads, 6) for seed in (1, 2))
    run = jax.jit(lambda window: attend_any(q, KeyValue(k, v), window, ()))
    for window in (0, 1, 4, num_keys - 1, 100):
        # Float32 sums of at most eleven terms of size one.
        np.testing.assert_allclose(run(window), plain_attention(q, k, v, window), atol=2e-6)


def test_blockwise_attention_is_direct(monkeypatch):
    """Four blocks of queries against one, forward and gradient, with keys before the first query."""
    num_queries, num_keys = 64, 72
    q, k, v = draw(0, 1, num_queries, 2, 4), draw(1, 1, num_keys, 1, 4), draw(2, 1, num_keys, 1, 4)
    blocks = []
    block = attention._xla_block
    monkeypatch.setattr(attention, "_xla_block", lambda q, *rest: (blocks.append(q.shape[1]), block(q, *rest))[1])

    def both(q, k, v, window):
        weights = draw(3, 1, num_queries, 2, 4)
        loss = lambda q, k, v: jnp.sum(jnp.sin(3 * attend(q, KeyValue(k, v), window)) * weights)  # noqa: E731
        return attend(q, KeyValue(k, v), window), jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    windows = (10, 1000)
    run = jax.jit(lambda *args: both(*args))
    direct = [run(q, k, v, window) for window in windows]
    assert set(blocks) == {64}
    blocks.clear()
    monkeypatch.setattr(attention, "MIN_BLOCK", 16)
    monkeypatch.setattr(attention, "MAX_SCORES", 16 * 2 * num_keys)
    run = jax.jit(lambda *args: both(*args))  # a new function, traced anew
    in_blocks = [run(q, k, v, window) for window in windows]
    assert set(blocks) == {16}
    # Float32 sums over up to 72 keys or queries, in another order.
    chex.assert_trees_all_close(in_blocks, direct, atol=2e-5, rtol=1e-5)


def test_choice_of_the_attention_kernel():
    def choose(requested, backend, T=256, H=128, dtype=jnp.bfloat16):
        return choose_implementation(requested, backend=backend, dtype=dtype, seq_len=T, head_dim=H)

    assert [choose("auto", backend) for backend in ("cpu", "gpu", "tpu")] == ["xla", "cudnn", "splash"]
    # One query is no flash attention; neither are lengths and heads that do not fill a tile, nor float32 on a GPU.
    assert choose("auto", "gpu", T=1) == choose("auto", "gpu", H=12) == choose("auto", "gpu", H=256) == "xla"
    assert choose("auto", "tpu", T=200) == choose("auto", "tpu", H=64) == "xla"
    assert choose("auto", "gpu", dtype=jnp.float32) == choose("xla", "gpu") == choose("xla", "tpu") == "xla"
    assert (choose("cudnn", "gpu"), choose("splash", "tpu")) == ("cudnn", "splash")
    for requested, backend, changed in (
        ("cudnn", "cpu", {}),
        ("cudnn", "tpu", {}),
        ("cudnn", "gpu", {"dtype": jnp.float32}),
        ("splash", "cpu", {}),
        ("splash", "tpu", {"T": 200}),
    ):
        with pytest.raises(InputError, match=f"{requested}.*{backend}"):
            choose(requested, backend, **changed)


def test_a_kernel_refuses_a_traced_window():
    q, window = draw(0, 1, 4, 2, 8), jnp.asarray(3)
    with pytest.raises(TypeError, match="cudnn attention needs a static window"):
        attend(q, KeyValue(q, q), window, Kernel("cudnn"))


def test_splash_attention_lowers_for_tpu():
    """Without a TPU: the kernel, a window, grouped heads and more keys than queries pass the compiler's front end."""
    for window, num_keys, num_kv_heads in ((64, 512, 2), (1000, 256, 1)):
        q = jax.ShapeDtypeStruct((1, 256, 2, 128), jnp.bfloat16)
        kv = jax.ShapeDtypeStruct((1, num_keys, num_kv_heads, 128), jnp.bfloat16)
        traced = jax.jit(lambda q, k, v: attend(q, KeyValue(k, v), window, Kernel("splash"))).trace(q, kv, kv)  # noqa: B023
        assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()


def test_splash_attention_is_xla_attention(monkeypatch):
    """The Pallas kernel in the interpreter, with keys before the first query, and with a cap that most scores reach."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

    make = splash_attention_kernel.make_splash_mha
    monkeypatch.setattr(splash_attention_kernel, "make_splash_mha", lambda **kw: make(**kw, interpret=True))
    q, k, v = draw(0, 1, 128, 2, 128), draw(1, 1, 256, 1, 128), draw(2, 1, 256, 1, 128)
    run = jax.jit(attend, static_argnums=(2, 3))
    for cap in (0.0, 0.5):
        splash = run(q, KeyValue(k, v), 150, Kernel("splash", cap))
        # Float32 sums over up to 151 keys in blocks, against one sum.
        np.testing.assert_allclose(splash, run(q, KeyValue(k, v), 150, Kernel("xla", cap)), atol=1e-5)
    assert np.abs(np.asarray(splash) - np.asarray(run(q, KeyValue(k, v), 150))).max() > 0.1


# ---------------------------------------------------------------- small pieces


def test_rms_norm_and_rotary_are_their_formulas():
    x = draw(0, 1, 5, 2, 6)
    expected = x / np.sqrt(np.mean(np.square(np.asarray(x, np.float64)), -1, keepdims=True) + RMS_EPS)
    normed, rotated = jax.jit(lambda x: (rms_norm(x), rotate(x, *rotary_table(jnp.arange(5), 6, 100.0))))(x)
    np.testing.assert_allclose(normed, expected, rtol=2e-6)  # a few float32 operations
    rotated = np.asarray(rotated)
    for t, i in np.ndindex(5, 3):
        angle = t * 100.0 ** (-2 * i / 6)
        a, b = np.asarray(x[0, t, :, i]), np.asarray(x[0, t, :, i + 3])
        np.testing.assert_allclose(rotated[0, t, :, i], a * np.cos(angle) + b * np.sin(angle), atol=2e-6)
        np.testing.assert_allclose(rotated[0, t, :, i + 3], b * np.cos(angle) - a * np.sin(angle), atol=2e-6)


def test_smear_mixes_in_the_previous_unsmeared_embedding():
    model = LanguageModel(SMALL)
    params, tokens = random_params(model), random_tokens(SMALL, batch=1, length=5)
    embed = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["embed"])
    e = np.asarray(rms_norm(params["embed"]["token"][tokens[0]]), np.float64)
    gates = 1 / (1 + np.exp(-(e[:, :24] @ embed["smear_gate"])))
    expected = e.copy()
    expected[1:] += embed["smear_scale"] * gates[1:, None] * e[:-1]
    np.testing.assert_allclose(
        jax.jit(model.embed)(params, tokens)[0], expected, atol=3e-6
    )  # a float32 sum of 24 terms


def test_soft_cap_and_mid_layer_state_of_the_head():
    capped, plain = LanguageModel(SMALL), LanguageModel(PLAIN)
    params = jax.tree.map(lambda leaf: 30.0 * leaf, {"head": {"kernel": random_params(plain)["head"]["kernel"]}})
    params["head"]["mid_scale"] = jnp.asarray(0.5)
    h, h_mid = draw(0, 1, 3, 32), draw(1, 1, 3, 32)
    z = np.asarray(plain.logits(params, h - 0.5 * h_mid, None))
    chex.assert_shape(z, (1, 3, SMALL.vocab_size))
    assert np.abs(z).max() > 30
    # Logits of size 30 carry float32 errors of 1e-5.
    np.testing.assert_allclose(capped.logits(params, h, h_mid), 15 * np.tanh(z / 15), atol=1e-4)


# ---------------------------------------------------------------- the plain model

QWEN = dataclasses.replace(
    PLAIN, mlp="swiglu", norm=NormConfig(weight="plain"), use_qkv_bias=True, use_mlp_bias=True, num_kv_heads=2
)
GEMMA = dataclasses.replace(
    PLAIN,
    mlp="geglu",
    norm=NormConfig(weight="plus_one", use_post=True),
    rope=RopeConfig(direction="forward", fraction=0.5, local_base=100.0),
    window_pattern="SL",
    use_tied_head=True,
    attention_softcap=20.0,
    logit_softcap=30.0,
)
LINEARIZED = dataclasses.replace(SMALL, linear_attention=(2,), dropped_mlp=(1,), linear_mlp=(0,), linear_rank=4)


@pytest.mark.parametrize(
    "config",
    (
        pytest.param(SMALL, id="nanochat"),
        pytest.param(GEMMA, id="gemma"),
        pytest.param(LINEARIZED, id="linearized"),
    ),
)
def test_a_sequential_schedule_is_the_plain_model(config):
    """Documents included. The same operations in the same order: rounding is all that may differ. Streams are in
    test_corners.py."""
    config = dataclasses.replace(config, num_layers=3 if config is LINEARIZED else 2)
    model = LanguageModel(config)
    tokens, document = random_tokens(config, length=7), jnp.asarray([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 2, 2]])

    @jax.jit
    def both(params):
        weights = split(model, params, all_sequential(config))
        return model(params, tokens, document), forward(model, weights, tokens, document_BT=document).logits_BTV

    assert relative_error(*both(random_params(model))) < 3e-6


# ---------------------------------------------------------------- parameters

D32S = ModelConfig(vocab_size=32768, num_layers=32, embed_dim=640, num_heads=5, num_kv_heads=5, seq_len=2048)
D32 = dataclasses.replace(D32S, embed_dim=2048, num_heads=16, num_kv_heads=16)


@pytest.mark.parametrize(
    "config, total, matrices, value_embeds", ((D32S, 534.8, 157.3, 335.5), (D32, 2818.6, 1610.6, 1073.7))
)
def test_parameter_counts_of_the_published_models(config, total, matrices, value_embeds):
    """In millions, as published."""
    params = LanguageModel(config).abstract_params()
    blocks = [leaf for leaf in jax.tree.leaves(params["blocks"]) if leaf.ndim == 3]
    counted = (num_params(params), num_params({"blocks": blocks}), params["embed"]["value"].size)
    assert tuple(round(count / 1e6, 1) for count in counted) == (total, matrices, value_embeds)
    assert counted[1] == 12 * config.num_layers * config.embed_dim**2


def test_parameter_count_is_its_formula():
    D, V, L, kv = 32, 64, 6, 2 * 8  # the vocabulary of 50 is padded to 64
    block = D * D + 2 * D * kv + D * D + 8 * D * D + 2
    value_embeds = 3 * (V * kv + 12 * 2)
    params = LanguageModel(SMALL).abstract_params()
    assert num_params(params) == V * D + (24 + 1) + value_embeds + L * block + (D * V + 1)
    for config in (SMALL, VARIANTS["hyper_static"], VARIANTS["hyper_dynamic"]):
        for leaf in jax.tree.leaves(LanguageModel(config).abstract_params()["blocks"]):
            assert leaf.shape[0] == L and leaf.dtype == jnp.float32
            assert not leaf.weak_type  # or a training step would compile twice
    assert set(LanguageModel(PLAIN).abstract_params()["blocks"]) == {"attn", "mlp"}
    assert set(LanguageModel(PLAIN).abstract_params()["embed"]) == {"token"}


def test_fresh_parameters():
    """Output projections are zero, scalars ramp over depth, matrices have their stated spread; a key decides all."""
    config = dataclasses.replace(SMALL, vocab_size=500, embed_dim=64, num_layers=2)
    model = LanguageModel(config)
    init = jax.jit(model.init)
    params = init(jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(params, model.abstract_params())
    chex.assert_trees_all_equal(params, init(jax.random.key(0)))
    blocks, embed, head = (params[name] for name in ("blocks", "embed", "head"))
    assert not blocks["attn"]["out"].any() and not blocks["mlp"]["down"].any() and embed["smear_scale"] == 0
    np.testing.assert_allclose(blocks["resid_scale"], [1.15, 1.05], rtol=1e-6)
    np.testing.assert_allclose(blocks["x0_scale"], [0.2, 0.05], rtol=1e-5)  # float32 of differences
    assert head["mid_scale"] == np.float32(0.2)
    stated = {
        "query": (blocks["attn"]["query"], 1 / 8),
        "key": (blocks["attn"]["key"], 1 / 8),
        "value": (blocks["attn"]["value"], 1 / 8),
        "up": (blocks["mlp"]["up"], 0.4 / 8),
        "token": (embed["token"], 0.8),
        "value embeds": (embed["value"], 1 / 8),
        "head": (head["kernel"], 0.001),
    }
    for name, (leaf, spread) in stated.items():
        assert 0.95 < np.std(leaf) / spread < 1.05, name  # at least 4096 draws: the spread is known to 1.1 percent
        assert np.unique(np.asarray(leaf)).size > 0.9 * leaf.size, f"{name}: layers or tables share their draws"
    for gate in (embed["value_gate"], embed["smear_gate"]):
        assert gate.min() >= 0 and 0.01 < gate.max() <= 0.02
    logits = jax.jit(model)(params, random_tokens(config, length=4))
    assert np.isfinite(logits).all()
    # Rows of the normed state against a head of spread 0.001: logits of spread 0.008, a fresh model knows nothing.
    assert 0.004 < np.std(logits) < 0.016


def test_windows_follow_the_pattern_and_the_last_layer_sees_everything():
    windows = lambda **fields: dataclasses.replace(SMALL, **fields).windows  # noqa: E731
    assert windows() == (4, 4, 4, 32, 4, 32)
    assert windows(window_pattern="S", num_layers=3) == (4, 4, 32)
    assert windows(window_pattern="L", num_layers=2) == (32, 32)
    # The published rule: a quarter of the context rounded up to a multiple of 128.
    for seq_len, short in ((2048, 512), (2049, 640), (512, 128), (516, 256), (100, 128)):
        assert windows(short_window=0, seq_len=seq_len)[0] == short


def test_value_embeddings_alternate_from_the_last_layer():
    num_layers, owners = 5, (0, 2, 4)
    config = dataclasses.replace(SMALL, num_layers=num_layers)
    assert config.value_embed_layers == owners
    model = LanguageModel(config)
    params, tokens = random_params(model), random_tokens(config, length=4)
    context_of = lambda start, stop: jax.jit(  # noqa: E731
        lambda params: model.context(params, params["blocks"], tokens, start, stop)
    )(params)
    context = context_of(0, num_layers)
    np.testing.assert_array_equal(context.window, config.windows)
    for layer in range(num_layers):
        rows, gate = context.value_embed.rows_BTKH[layer], context.value_embed.gate[layer]
        if layer in owners:
            table = params["embed"]["value"][owners.index(layer)]
            np.testing.assert_array_equal(rows.reshape(2, 4, -1), table[tokens])
            np.testing.assert_array_equal(gate, params["embed"]["value_gate"][owners.index(layer)])
        else:
            assert not rows.any() and not gate.any()
    # A part of the layers gets its part of the context, and none where none of them owns a table.
    chex.assert_trees_all_equal(context_of(1, 3), jax.tree.map(lambda leaf: leaf[1:3], context))
    assert context_of(1, 2).value_embed is None
    assert dataclasses.replace(config, use_value_embeds=False).value_embed_layers == ()


# ---------------------------------------------------------------- precision, memory, refusals


def test_cast_keeps_the_residual_path_in_float32():
    model = LanguageModel(SMALL, MachineConfig(compute_dtype="bfloat16"))
    params = jax.eval_shape(model.cast, model.abstract_params())
    in_float32 = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if leaf.dtype == jnp.float32
    }
    assert in_float32 == {
        "blocks/resid_scale",
        "blocks/x0_scale",
        "embed/smear_gate",
        "embed/smear_scale",
        "embed/value_gate",
        "head/mid_scale",
    }


def test_bfloat16_is_close_to_float32_and_leaves_the_state_in_float32():
    tokens = random_tokens(SMALL, length=8)
    outputs = []
    for dtype in ("float32", "bfloat16"):
        model = LanguageModel(dataclasses.replace(SMALL, num_layers=2), MachineConfig(compute_dtype=dtype))
        weights = split(model, model.cast(random_params(model)), all_sequential(model.config))
        outputs.append(jax.jit(lambda w, t, model=model: forward(model, w, t))(weights, tokens))
    full, half = outputs
    assert half.logits_BTV.dtype == half.h_last.dtype == half.h_mid.dtype == jnp.float32
    # bfloat16 keeps 8 bits, 0.4 percent an operand; two layers of four products each add up to a few percent.
    root_mean_square = lambda x: float(np.sqrt(np.mean(np.square(x))))  # noqa: E731
    ratio = root_mean_square(half.h_last - full.h_last) / root_mean_square(full.h_last)
    assert 1e-4 < ratio < 0.03


def products_in(jaxpr):
    """Operand dtypes and precision of every matrix product of a program, those of inner programs included."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield *(str(var.aval.dtype) for var in eqn.invars), eqn.params["precision"]
        for inner in jaxprs_in_params(eqn.params):
            yield from products_in(inner)


@pytest.mark.parametrize("variant", ("everything", "hyper_dynamic"))
def test_products_of_a_training_step_in_bfloat16(variant):
    """Forward and backward, a layer at a time and all at once: operands are bfloat16 on both sides, but for maps and
    gates, which are float32 in full precision. What is stored for the MLP's backward pass is bfloat16."""
    config = dataclasses.replace(VARIANTS[variant], num_layers=2)
    model, tokens = LanguageModel(config, MachineConfig(compute_dtype="bfloat16")), random_tokens(config, length=6)
    full = (jax.lax.Precision.HIGHEST,) * 2

    def at_once(params):
        x0 = model.embed(params, tokens)
        h_L = jnp.stack([model.expand(x0)] * 2)
        ctx = model.context(params, params["blocks"], tokens, 0, 2)
        return model.sweep_fn(0, 2)(params["blocks"], h_L, ctx, model.shared(x0))[0].sum()

    with jax.default_matmul_precision("bfloat16"):
        for loss in (lambda params: model(params, tokens).sum(), at_once):
            program = jax.make_jaxpr(jax.grad(loss))(model.abstract_params())
            products = set(products_in(program.jaxpr))
            assert {product[:2] for product in products} <= {("bfloat16",) * 2, ("float32",) * 2}
            assert all(precision == full for *dtypes, precision in products if dtypes == ["float32"] * 2)
            assert not re.search(rf"f32\[(2,)?2,6,{config.mlp_width}\]", str(program))


def test_remat_recomputes_blocks():
    config = dataclasses.replace(SMALL, num_layers=2)
    for remat in (False, True):
        model = LanguageModel(dataclasses.replace(config, remat=remat))

        def run(params, setting, model=model):
            weights = split(model, params, parse_schedule(setting, 2))
            return forward(model, weights, random_tokens(config)).logits_BTV

        for setting in ("seq", "idn:n=2,k=1"):
            program = str(jax.make_jaxpr(run, static_argnums=1)(random_params(model), setting))
            assert ("remat" in program or "checkpoint" in program) == remat


def test_check_tokens():
    model = LanguageModel(SMALL)
    model.check_tokens(np.array([[0, 49]]))
    for tokens, keyword in (([[0, 50]], "id 50"), ([[-3, 60]], "id -3"), ([[]], "no tokens")):
        with pytest.raises(InputError, match=keyword):
            model.check_tokens(np.array(tokens))


def test_context_ends_with_the_rotary_table():
    model = LanguageModel(SMALL)
    run = lambda length: jax.eval_shape(  # noqa: E731
        lambda params: model.shared(model.embed(params, jnp.zeros((1, length), jnp.int32))), model.abstract_params()
    )
    run(SMALL.max_context)
    with pytest.raises(InputError, match="321 tokens"):
        run(321)
