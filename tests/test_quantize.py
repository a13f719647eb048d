"""Kernels of eight bits: bounds of their error, and that every reader takes them for the kernel ``q s``."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from problems import PLAIN, SMALL, random_params, random_tokens, relative_error
from tiny_run import random_run

from snlp_jax.cli.infer import Args, open_engine
from snlp_jax.config import EvalConfig, MachineConfig, MeshConfig
from snlp_jax.errors import InputError
from snlp_jax.eval.run import open_run
from snlp_jax.forward import forward
from snlp_jax.layout import prepare
from snlp_jax.model import LanguageModel
from snlp_jax.model.projections import PARTS
from snlp_jax.notation import parse_schedule
from snlp_jax.parallel.mesh import make_mesh
from snlp_jax.quantize import input_squares, quantize
from snlp_jax.run import read_config

ROUNDING = 2e-5
"""Relative to the largest entry: float32 sums of ``(x q) s`` against those of ``x (q s)``."""
GATED = dataclasses.replace(PLAIN, num_layers=2, mlp="swiglu", use_qkv_bias=True, num_kv_heads=2)
MIXED = dataclasses.replace(
    SMALL, num_layers=3, linear_attention=(0,), dropped_mlp=(1,), linear_mlp=(2,), linear_rank=4
)


def kernels_of(params):
    """Path -> leaf, of all that is quantised."""
    found = {(part, name): leaf for part in PARTS for name, leaf in params["blocks"].get(part, {}).items()}
    found = {path: leaf for path, leaf in found.items() if leaf.ndim == 3}
    return found | ({("head", "kernel"): params["head"]["kernel"]} if "kernel" in params["head"] else {})


def multiplied(params):
    """``(W, s)`` by path, W = q s."""
    found = {}
    for (part, name), q in kernels_of(params).items():
        scale = (params["head"] if part == "head" else params["blocks"][part])[f"{name}_scale"]
        found[part, name] = np.asarray(q, np.float32) * np.asarray(scale)[..., None, :], np.asarray(scale)
    return found


def as_floats(params, quantised):
    """The same parameters with kernels ``q s``."""
    params = jax.tree.map(lambda leaf: leaf, params)
    for (part, name), (kernel, _) in multiplied(quantised).items():
        (params["head"] if part == "head" else params["blocks"][part])[name] = jnp.asarray(kernel)
    return params


def logits_of(model, every_params, setting, tokens, layout="auto", mesh=None):
    """Of several parameters, compiled once for those of equal types."""
    schedule = parse_schedule(setting, model.config.num_layers)
    run = jax.jit(lambda w, t: forward(model, w, t, mesh=mesh).logits_BTV)
    lay_out = functools.partial(prepare, num_tokens=tokens.size, layout=layout, mesh=mesh)
    return [run(lay_out(model, params, schedule), tokens) for params in every_params]


@functools.cache
def plain(precision):
    """Parameters of layers of every kind, and the same quantised."""
    params = random_params(LanguageModel(MIXED))
    return params, quantize(params, precision)


def test_an_entry_errs_by_half_a_step_at_most():
    params, quantised = plain("int8")
    for path, (kernel, scale) in multiplied(quantised).items():
        error = np.abs(np.asarray(kernels_of(params)[path]) - kernel)
        assert (error <= 0.5 * scale[..., None, :] * (1 + 1e-4)).all(), path  # W / s is rounded before it is rounded
        assert kernels_of(quantised)[path].dtype == jnp.int8
        assert np.abs(kernels_of(quantised)[path]).max() == 127


def test_float8_errs_by_a_sixteenth_of_an_entry():
    """Three bits of mantissa behind the leading one; below 2^-6, entries 2^-9 s apart."""
    params, quantised = plain("float8")
    for path, (kernel, scale) in multiplied(quantised).items():
        exact = np.asarray(kernels_of(params)[path])
        bound = np.maximum(np.abs(exact) / 16, 2.0**-10 * scale[..., None, :])
        assert (np.abs(exact - kernel) <= bound * (1 + 1e-4)).all(), path


def test_a_channel_of_zeros_stays_zero():
    params = jax.tree.map(lambda leaf: leaf, plain("int8")[0])
    params["blocks"]["attn"]["out"] = params["blocks"]["attn"]["out"].at[:, :, 3].set(0.0)
    quantised = multiplied(quantize(params, "int8"))["attn", "out"]
    assert (quantised[0][:, :, 3] == 0).all() and np.isfinite(quantised[0]).all()


def test_what_is_no_kernel_stays_and_bytes_shrink():
    params, quantised = plain("int8")
    assert quantised["embed"] is params["embed"]
    num_bytes = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))  # noqa: E731
    saved = sum(3 * leaf.size for leaf in kernels_of(params).values())
    scales = sum(4 * scale.size for _, scale in multiplied(quantised).values())
    assert num_bytes(quantised) == num_bytes(params) - saved + scales
    model, schedule = LanguageModel(MIXED), parse_schedule("idn:n=2,k=1", 3)
    full, small = (prepare(model, each, schedule, num_tokens=1).num_bytes for each in (params, quantised))
    assert full - small == saved - scales


@pytest.fixture(scope="module")
def calibrated():
    """``(params, squares)`` of a model of every kind of layer, on random text."""
    model, params = LanguageModel(MIXED), plain("int8")[0]
    batches = [{"tokens": np.asarray(random_tokens(MIXED, length=9, seed=seed))} for seed in (1, 2)]
    return model, params, batches, input_squares(model, params, batches)


def test_calibrated_channels_err_no_more_than_plain_ones(calibrated):
    """c = 1 is among the candidates. Some channel gains by clipping, or nothing is tested."""
    _, params, _, squares = calibrated
    errors = []
    for quantised in (plain("int8")[1], quantize(params, "int8", squares)):
        found = {}
        for (part, name), (kernel, _) in multiplied(quantised).items():
            exact = np.asarray(kernels_of(params)[part, name], np.float64)
            square = np.asarray(squares[part][name], np.float64)
            found[part, name] = (square[..., None] * (exact - kernel) ** 2).sum(-2)
        errors.append(found)
    whole, clipped = errors
    for path in whole:  # sums of float32 chose
        assert (clipped[path] <= whole[path] * (1 + 1e-5) + 1e-12).all(), path
    assert any((clipped[path] < 0.98 * whole[path]).any() for path in whole)


def test_squares_are_those_of_the_inputs(calibrated):
    """By their definition, at the two ends of the model: the first layer's and the head's."""
    model, params, batches, squares = calibrated
    tokens = jnp.concatenate([batch["tokens"] for batch in batches])[:, :-1]
    weights = prepare(model, params, parse_schedule("seq", 3), num_tokens=1)
    output = jax.jit(lambda w, t: forward(model, w, t))(weights, tokens)
    normed = model.head_input(params, model.readout(params, output.h_last, output.h_mid))
    np.testing.assert_allclose(
        squares["head"]["kernel"][0], jnp.square(normed).mean((0, 1)), rtol=1e-4
    )  # sums in another order
    # Norms without weights: the squares of every normed input have the mean 1.
    for part, name in (("attn", "query"), ("mlp", "up")):
        np.testing.assert_allclose(squares[part][name].mean(-1), 1.0, rtol=1e-4)
    np.testing.assert_array_equal(squares["attn"]["query"], squares["attn"]["value"])


def test_squares_of_a_gpu_are_those_of_kernels_as_trained(calibrated):
    """Where products are joined, the parameters that are quantised are not."""
    model, params, batches, squares = calibrated
    on_gpu = LanguageModel(MIXED, MachineConfig(compute_dtype="float32"), backend="gpu")
    made = jax.eval_shape(lambda params: input_squares(on_gpu, params, batches), params)
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, squares)


CASES = {
    "mixed": (MIXED, "idn:n=2,k=1", "stack"),
    "chunks": (dataclasses.replace(GATED, num_layers=4), "idn:n=4,k=1,stage=2xF2", "stack"),
}


@pytest.mark.parametrize("case", ["mixed", pytest.param("chunks", marks=pytest.mark.slow)])
def test_logits_are_those_of_the_kernel_q_s(case):
    config, setting, layout = CASES[case]
    tokens = random_tokens(config, length=6)
    # A GPU joins the scales of projections too.
    model = LanguageModel(config, MachineConfig(compute_dtype="float32", attention="xla"), backend="gpu")
    params = random_params(model)
    quantised = quantize(params, "int8")
    each = (quantised, as_floats(params, quantised), params)
    found, expected, exact = logits_of(model, each, setting, tokens, layout)
    assert relative_error(found, expected) < ROUNDING
    assert relative_error(found, exact) > 100 * ROUNDING


def test_scales_are_spread_over_a_mesh_like_biases():
    mesh = make_mesh(MeshConfig(layer=2, tensor=2), devices=jax.devices()[:4])
    model, tokens = LanguageModel(GATED), random_tokens(GATED, length=6)
    quantised = quantize(random_params(model), "int8")
    (alone,), (spread,) = (logits_of(model, [quantised], "idn:n=2,k=1", tokens, mesh=on) for on in (None, mesh))
    assert relative_error(spread, alone) < ROUNDING
    weights = prepare(model, quantised, parse_schedule("idn:n=2,k=1", 2), num_tokens=1, mesh=mesh)
    region = weights.parts[-1].blocks["mlp"]
    assert region["up_scale"].sharding.spec == PartitionSpec("layer", "tensor")
    assert region["up"].sharding.spec == PartitionSpec("layer", None, "tensor")


# ---------------------------------------------------------------- the two commands


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return random_run(tmp_path_factory.mktemp("quantize") / "run")


@pytest.mark.slow
def test_eval_opens_a_run_with_calibrated_kernels(run_dir):
    config, its = read_config(run_dir), EvalConfig(solvers=("seq",), weights="int8", weight_calibration=512)
    run = open_run(run_dir, dataclasses.replace(config, eval=its))
    assert run.params["blocks"]["mlp"]["up"].dtype == jnp.int8
    assert run.params["head"]["kernel_scale"].shape == (config.model.padded_vocab_size,)


def test_mistakes_end_in_one_sentence():
    for weights, calibration, named in (("int4", 0, "int4"), ("int8", -1, "is -1"), ("compute", 9, "no scales")):
        with pytest.raises(InputError, match=named):
            EvalConfig(weights=weights, weight_calibration=calibration)
    with pytest.raises(InputError, match="'int4'"):
        quantize(random_params(LanguageModel(SMALL)), "int4")


def test_infer_reads_quantised_kernels(run_dir):
    engine = open_engine(Args(run_dir, weights="int8"))
    assert {leaf.dtype for leaf in jax.tree.leaves(engine.weights.parts)} >= {jnp.dtype("int8")}
    with pytest.raises(InputError, match="weight_calibration is -3"):
        open_engine(Args(run_dir, weights="int8", weight_calibration=-3))
