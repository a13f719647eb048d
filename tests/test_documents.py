"""Documents that are packed into one window and masked are computed as if each were alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import SMALL, VARIANTS, random_params, relative_error

from snlp_jax.config import (
    Config,
    DataConfig,
    HiddenNormConfig,
    LossConfig,
    MachineConfig,
    MeshConfig,
    ModelConfig,
    SolverCEConfig,
)
from snlp_jax.errors import InputError
from snlp_jax.eval.calibrations import region_chains
from snlp_jax.eval.diagnose import diagnose
from snlp_jax.forward import forward
from snlp_jax.layout import prepare
from snlp_jax.model import LanguageModel, attention
from snlp_jax.model.attention import Kernel, KeyValue, attend
from snlp_jax.notation import parse_schedule
from snlp_jax.parallel import make_mesh, put_batch
from snlp_jax.parallel.sharding import TRAINING, shardings_of
from snlp_jax.run import BATCH_SIZE
from snlp_jax.train.loss import Plan, balanced, loss_fn
from snlp_jax.train.passes import Passes
from snlp_jax.types import Batch

ROUNDING = 3e-5
"""Relative to the largest entry: float32 rounding (6e-8 an operation), of rotations at other positions too, grown by
six layers that each amplify a little."""
LENGTHS = ((9, 14, 1, 8), (20, 12))
"""Of the documents of two rows; windows of 4 tokens bite in the longer ones."""
T, BOS = 32, 0
SWEEPS = dataclasses.replace(SMALL, window_pattern="SL")


def packed() -> Batch:
    """Rows of documents, each of which begins with the separator, and the separator that ends the last."""
    rng = np.random.default_rng(1)
    tokens, document = np.zeros((2, 2, T + 1), np.int32)
    for row, lengths in enumerate(LENGTHS):
        tokens[row] = rng.integers(1, SMALL.vocab_size, T + 1)
        tokens[row, np.cumsum((0, *lengths))] = BOS
        document[row] = np.cumsum(tokens[row] == BOS)
    return Batch(tokens, document=document)


def alone(batch: Batch) -> tuple[Batch, list[tuple[int, slice]]]:
    """Each document, with the separator that follows, at the start of a row of its own that is filled up with others'
    tokens, which a causal model cannot see and which count for nothing; and where it was."""
    places = [
        (row, slice(stop - length, stop))
        for row, lengths in enumerate(LENGTHS)
        for length, stop in zip(lengths, np.cumsum(lengths), strict=True)
    ]
    tokens = np.random.default_rng(2).integers(1, SMALL.vocab_size, (len(places) + 2, T + 1)).astype(np.int32)
    weight = np.zeros((len(places) + 2, T), np.float32)  # two rows more: a number that a mesh divides
    for index, (row, place) in enumerate(places):
        length = place.stop - place.start
        tokens[index, : length + 1] = batch.tokens[row, place.start : place.stop + 1]
        weight[index, :length] = 1.0
    return Batch(tokens, weight), places


def repeated(batch: Batch, rows: int) -> Batch:
    """The batch as so many rows, so that one program serves batches of different sizes; means stay what they are."""
    return jax.tree.map(lambda leaf: np.tile(leaf, (rows // leaf.shape[0], 1)), batch)


@pytest.mark.parametrize(
    "config, setting, layout",
    [
        pytest.param(SWEEPS, "idn:n=6,k=2", "stack", id="sweeps"),
        *(
            pytest.param(*case, id=name, marks=pytest.mark.slow)
            for name, case in {
                "remat": (dataclasses.replace(SMALL, remat=True), "sid:n=4,k=2", "stack"),
                "uneven_chunks": (VARIANTS["no_smear_no_mid"], "idn:n=6,k=2,stage=2xF3", "stack"),
                "dynamic_streams": (VARIANTS["hyper_dynamic"], "hcn:n=4,k=2", "list"),
            }.items()
        ),
    ],
)
def test_masked_documents_are_documents_alone(config: ModelConfig, setting: str, layout: str) -> None:
    model = LanguageModel(config)
    weights = prepare(
        model, random_params(model), parse_schedule(setting, config.num_layers), num_tokens=256, layout=layout
    )
    run = jax.jit(lambda w, tokens, document: forward(model, w, tokens, document_BT=document).logits_BTV)
    rows, places = alone(packed())
    batch, no_document = repeated(packed(), len(rows.tokens)), np.zeros((len(rows.tokens), T), np.int32)
    together = np.asarray(run(weights, batch.tokens[:, :-1], batch.document[:, :-1]))
    apart = np.asarray(run(weights, rows.tokens[:, :-1], no_document))
    for index, (row, place) in enumerate(places):
        assert relative_error(together[row, place], apart[index, : place.stop - place.start]) < ROUNDING
    mixed = np.asarray(run(weights, batch.tokens[:, :-1], no_document))
    assert relative_error(mixed[0, :9], together[0, :9]) < ROUNDING
    assert relative_error(mixed[0, 9:], together[0, 9:]) > 1e-3  # the mask is not without effect


LOSS = LossConfig(
    hidden_norm=HiddenNormConfig(weight=0.5, region_sizes=(3,), stride=1),
    solver_ce=SolverCEConfig(weight=1.0, region_sizes=(4,), num_iters=2),
)
PLAN = Plan((("hidden_norm", (3,)), ("solver_ce", (4,))))


def losses(model: LanguageModel, batch: Batch, mesh=None, ring: int = 1):
    """The parts of the loss, and the gradient of those that are means over targets."""
    params = random_params(model)
    if mesh is not None:
        params = jax.device_put(params, shardings_of(params, model.config, mesh, TRAINING))
    weights = {"hidden_norm": 0.0, "solver_ce": 1.0}

    def run(params, batch):
        def of(p):
            passes = Passes(model, p, balanced(batch), mesh=mesh, ring_microbatches=ring)
            return loss_fn(passes, LOSS, PLAN, weights)

        return jax.value_and_grad(of, has_aux=True)(params)

    (_, parts), grads = jax.jit(run)(params, put_batch(mesh, batch, is_whole=True))
    return jax.device_get(parts), jax.device_get(grads)


@pytest.mark.slow
def test_the_loss_of_masked_documents_is_that_of_documents_alone() -> None:
    """In value, through the sequential pass and the solver, the separators that end documents among the targets; and
    in gradient."""
    model = LanguageModel(dataclasses.replace(SMALL, num_layers=2))
    params, loss = random_params(model), LossConfig(solver_ce=SolverCEConfig(weight=1.0, region_sizes=(2,)))
    plan, (rows, _) = Plan((("solver_ce", (2,)),)), alone(packed())
    batch = repeated(packed(), len(rows.tokens))._replace(weight=np.ones_like(rows.weight))
    rows = rows._replace(document=np.zeros_like(rows.tokens))
    of = lambda p, batch: loss_fn(Passes(model, p, balanced(batch)), loss, plan, {"solver_ce": 1.0})  # noqa: E731
    run = jax.jit(jax.grad(of, has_aux=True))
    (grads, together), (grads_apart, apart) = run(params, batch), run(params, rows)
    for name in ("sequential_ce", "solver_ce"):
        # a mean over tokens of what is that close
        assert float(together[name]) == pytest.approx(float(apart[name]), rel=5e-6)
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(grads_apart), strict=True):
        # Sums over tokens and layers that partly cancel: a scalar's gradient is 1e-6 of what it is a sum of.
        assert np.abs(one - other).max() < 5e-3 * max(np.abs(other).max(), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh_config",
    [MeshConfig(data=2, layer=2), MeshConfig(layer=4, ring_microbatches=2)],
)
def test_masks_on_a_mesh(mesh_config: MeshConfig) -> None:
    model, batch = LanguageModel(dataclasses.replace(SMALL, num_layers=4)), packed()
    batch = jax.tree.map(lambda leaf: np.concatenate([leaf, leaf[::-1], leaf[:, ::-1], leaf[::-1, ::-1]]), batch)
    parts, grads = losses(model, batch)
    mesh_parts, mesh_grads = losses(model, batch, make_mesh(mesh_config), mesh_config.ring_microbatches)
    for name in parts:
        assert float(mesh_parts[name]) == pytest.approx(float(parts[name]), rel=5e-5)
    for one, other in zip(jax.tree.leaves(mesh_grads), jax.tree.leaves(grads), strict=True):
        assert relative_error(one, other) < 5e-3


@pytest.mark.slow
def test_calibration_and_diagnosis_read_documents_alone() -> None:
    """A region's input is each document's own; errors over a window are the mean of those over its equal documents."""
    model, batch = LanguageModel(SMALL), packed()
    params, schedule = random_params(model), parse_schedule("idn:n=3,k=1", SMALL.num_layers)
    region, (rows, places) = schedule.regions[0], alone(batch)
    fill = lambda x: np.resize(x, (BATCH_SIZE, T + 1))  # noqa: E731
    ((masked, _),) = region_chains(model, params, region, fill(batch.tokens), fill(batch.document))()
    ((apart, _),) = region_chains(model, params, region, fill(rows.tokens))()
    assert masked.shared.document_BT is not None  # what the fit's own evaluations read
    for index, (row, place) in enumerate(places):
        expected = apart.h_in[index, : place.stop - place.start]
        assert relative_error(masked.h_in[row, place], expected) < ROUNDING

    tokens_BT = batch.tokens[:1, :16]
    document_BT = np.repeat([[0, 1]], 8, axis=1)
    together, halves = (
        diagnose(model, params, some, {"region": region}, None, documents).regions[0].errors
        for some, documents in ((tokens_BT, document_BT), (tokens_BT.reshape(2, 8), None))
    )
    np.testing.assert_allclose(together, halves, rtol=1e-3, atol=1e-5)  # errors of exact states are rounding alone


@pytest.mark.slow
def test_the_splash_kernel_knows_documents(monkeypatch) -> None:
    """In the interpreter, with more keys than queries too; and it passes the compiler's front end."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    document = jnp.asarray(np.cumsum(rng.random((1, 256)) < 0.03, axis=1, dtype=np.int32))
    q, k, v = draw(1, 128, 1, 128), draw(1, 256, 1, 128), draw(1, 256, 1, 128)
    run = jax.jit(lambda q, k, v: attend(q, KeyValue(k, v), 60, Kernel("splash"), document))
    assert "tpu_custom_call" in run.trace(q, k, v).lower(lowering_platforms=("tpu",)).as_text()
    make = splash_attention_kernel.make_splash_mha
    monkeypatch.setattr(splash_attention_kernel, "make_splash_mha", lambda **kw: make(**kw, interpret=True))
    by = lambda kernel, *more: jax.jit(lambda q, k, v: attend(q, KeyValue(k, v), 60, Kernel(kernel), *more))(q, k, v)  # noqa: E731
    expected = by("xla", document)
    # Float32 sums over up to 61 keys in blocks, against one sum.
    np.testing.assert_allclose(by("splash", document), expected, atol=1e-5)
    assert float(jnp.abs(expected - by("xla")).max()) > 0.1
    np.testing.assert_array_equal(by("cudnn", document), expected)  # XLA's in its place
    monkeypatch.setattr(attention, "MAX_SCORES", 64 * 256)
    np.testing.assert_allclose(by("xla", document), expected, atol=1e-5)  # in blocks of queries


def test_refusals() -> None:
    with pytest.raises(InputError, match="data.mask_documents does not run on machine.attention 'cudnn'; use 'auto'"):
        Config(machine=MachineConfig(attention="cudnn"), data=DataConfig(mask_documents=True))
