"""Training: the loss at a fresh start, what a step computes, and a run that is fed nonsense."""

import dataclasses
import functools
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_run import MODEL, ROOT, assert_self_contained, start, tiny, write_config

from snlp_jax.config import (
    Config,
    HiddenNormConfig,
    LayerSkipConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    SolverCEConfig,
    TrainConfig,
)
from snlp_jax.errors import DivergedError, InputError
from snlp_jax.io.checkpoint import Checkpointer
from snlp_jax.io.metrics import read_metrics
from snlp_jax.model import LanguageModel
from snlp_jax.parallel.mesh import make_mesh
from snlp_jax.train import loop, setup
from snlp_jax.train.flops import peak_flops, train_flops_per_token
from snlp_jax.train.loop import train
from snlp_jax.train.loss import Plan, balanced, compared_layers, loss_fn, make_plan, term_weight
from snlp_jax.train.observe import read_record
from snlp_jax.train.passes import Passes
from snlp_jax.train.step import abstract_state, init_state, make_step
from snlp_jax.types import Batch

ALL_TERMS = LossConfig(
    hidden_norm=HiddenNormConfig(weight=0.5, region_sizes=(2, 3), stride=2),
    solver_ce=SolverCEConfig(weight=1.0, region_sizes=(3,), num_iters=2),
    layer_skip=LayerSkipConfig(weight=0.1, region_sizes=(3,)),
)
ALL_PLAN = make_plan(ALL_TERMS, 0, 10, 0)
SWITCHES = ("use_x0_resid", "use_value_embeds", "use_smear", "use_mid_subtract")
ONES = {"hidden_norm": 1.0, "solver_ce": 1.0, "layer_skip": 1.0}


def batch_of(rows: int = 4, seed: int = 0, length: int = 17) -> Batch:
    return Batch(np.random.default_rng(seed).integers(0, MODEL.vocab_size, (rows, length), dtype=np.int32))


@functools.cache
def perturbed(model: LanguageModel, scale: float = 0.1) -> dict:
    """Fresh parameters have zero output projections, on which every solver setting is exact: move away from them."""

    @jax.jit
    def make() -> dict:
        leaves, treedef = jax.tree.flatten(model.init(jax.random.key(0)))
        keys = jax.random.split(jax.random.key(1), len(leaves))
        moved = [leaf + scale * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
        return jax.tree.unflatten(treedef, moved)

    return make()


# -- Loss --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fresh_initialisation_is_finite() -> None:
    """In value and gradient, and traced once a plan. Without x0 the solver's trace equals the target exactly, where a
    plain norm has the gradient 0/0."""
    model = LanguageModel(dataclasses.replace(MODEL, **dict.fromkeys(SWITCHES, False)))
    params = jax.jit(model.init)(jax.random.key(0))
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def loss(params, batch):
        run = lambda p: loss_fn(Passes(model, p, batch), ALL_TERMS, ALL_PLAN, ONES)  # noqa: E731
        return jax.value_and_grad(run, has_aux=True)(params)

    for seed in range(2):
        (value, metrics), grads = loss(params, batch_of(seed=seed))
    chex.assert_tree_all_finite((value, grads, metrics))
    assert float(value) == pytest.approx(
        float(metrics["sequential_ce"] + 2 * metrics["hidden_norm"] + metrics["solver_ce"] + metrics["layer_skip"]),
        rel=1e-6,
    )
    assert float(metrics["hidden_norm"]) == 0.0


def test_terms_mean_what_they_say() -> None:
    """CE through N iterations is the sequential CE, in value and gradient; N iterations leave no hidden distance; the
    loss is the sum of its terms."""
    model = LanguageModel(dataclasses.replace(MODEL, num_layers=2, use_smear=False, use_mid_subtract=False))
    params = perturbed(model)
    solver = SolverCEConfig(weight=1.0, region_sizes=(2,), num_iters=2)
    hidden = HiddenNormConfig(weight=1.0, region_sizes=(1,))
    skip = LayerSkipConfig(weight=1.0, region_sizes=(1,))
    others = LossConfig(
        solver_ce=dataclasses.replace(solver, num_iters=1), layer_skip=dataclasses.replace(skip, region_sizes=(2,))
    )

    @jax.jit
    def run(params):
        def metrics_of(p, config):
            return loss_fn(Passes(model, p, batch_of()), config, make_plan(config, 0, 1, 0), ONES)

        gradient = lambda config: jax.value_and_grad(metrics_of, has_aux=True)(params, config)  # noqa: E731
        alone = LossConfig(sequential_weight=0.0, solver_ce=solver)
        one_layer = LossConfig(hidden_norm=hidden, layer_skip=skip)
        return gradient(LossConfig()), gradient(alone), metrics_of(params, one_layer)[1], metrics_of(params, others)[1]

    ((_, plain), plain_grads), ((_, metrics), grads), one_layer, other = run(params)
    # float32 rounding of batched against scanned matrix products, amplified by the layers
    assert float(metrics["solver_ce"]) == pytest.approx(float(plain["sequential_ce"]), rel=1e-5)
    chex.assert_trees_all_close(grads, plain_grads, rtol=2e-3, atol=2e-5)
    # On a region of one layer, one iteration is the layer: no distance, and layer skip is the same thing.
    assert float(one_layer["hidden_norm"]) < 1e-5
    assert float(one_layer["layer_skip"]) < 1e-5
    assert abs(float(other["solver_ce"] - other["sequential_ce"])) > 1e-3
    assert float(other["layer_skip"]) > 0.05
    total = other["sequential_ce"] + other["solver_ce"] + other["layer_skip"]
    assert float(other["loss"]) == pytest.approx(float(total), rel=1e-6)


@pytest.mark.slow
def test_every_correction_can_be_trained_for() -> None:
    """On a region of one layer every correction is that layer; on larger ones each has a distance of its own, and the
    random vectors of the Diagonal correction follow the key."""
    plain = dataclasses.replace(MODEL, num_layers=3)
    streams = dataclasses.replace(plain, num_streams=2, use_x0_resid=False)

    @functools.cache
    def distance_of(config: ModelConfig, correction: str, n: int, stride: int = 1):
        model = LanguageModel(config)
        term = HiddenNormConfig(weight=1.0, region_sizes=(n,), correction=correction, diagonal_stride=stride)
        loss = LossConfig(sequential_weight=0.0, hidden_norm=term)

        def value(p, key):
            return loss_fn(Passes(model, p, batch_of(), key), loss, make_plan(loss, 0, 1, 0), ONES)[0]

        with_gradient = correction in ("diag", "hcn") and n > 1 and stride == 1
        run = jax.jit(jax.value_and_grad(value) if with_gradient else lambda p, key: (value(p, key), {}))
        return lambda key=0: run(perturbed(model), jax.random.key(key))

    for config, correction in ((plain, "diag"), (streams, "hcn")):
        assert distance_of(config, correction, 1)()[0] < 1e-5  # rounding of batched against scanned matrix products
    distances = []
    for config, correction in ((plain, "jac"), (plain, "sid"), (plain, "diag"), (streams, "hcn")):
        distance, gradients = distance_of(config, correction, 2)()
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(gradients)))
        assert not gradients or jax.jit(optax.tree.norm)(gradients) > 1e-3
        distances.append(float(distance))
    assert min(distances) > 1e-3 and len({round(value, 5) for value in distances}) == 4
    assert float(distance_of(plain, "diag", 2)(key=1)[0]) != distances[2]
    assert float(distance_of(plain, "diag", 2, stride=2)()[0]) != distances[2]


@pytest.mark.slow
def test_detached_target_stops_the_gradient() -> None:
    """What is detached is the target: the gradient of the same value differs."""
    model = LanguageModel(dataclasses.replace(MODEL, num_layers=3))
    params = perturbed(model)

    def gradient(detach: bool):
        term = HiddenNormConfig(weight=1.0, region_sizes=(3,), detach_target=detach)
        config = LossConfig(sequential_weight=0.0, hidden_norm=term)
        return jax.jit(
            jax.value_and_grad(
                lambda p: loss_fn(Passes(model, p, batch_of()), config, make_plan(config, 0, 1, 0), ONES)[0]
            )
        )(params)

    (attached, attached_grads), (detached, detached_grads) = gradient(False), gradient(True)
    assert float(attached) == float(detached)
    distance = optax.tree.norm(jax.tree.map(jnp.subtract, attached_grads, detached_grads))
    assert float(distance) > 0.01 * float(optax.tree.norm(attached_grads))


def test_plan_and_weights() -> None:
    term = SolverCEConfig(weight=2.0, region_sizes=(1, 2, 3), sample_region=True, start_fraction=0.5, ramp_fraction=0.2)
    config = LossConfig(solver_ce=term)
    assert make_plan(config, 49, 100, 0) == Plan()
    drawn = [make_plan(config, step, 100, 7).sizes[0][1] for step in range(50, 100)]
    assert {size for (size,) in drawn} == {1, 2, 3}
    assert drawn == [make_plan(config, step, 100, 7).sizes[0][1] for step in range(50, 100)]
    assert drawn != [make_plan(config, step, 100, 8).sizes[0][1] for step in range(50, 100)]
    # A sampled size stands for the whole set of three, so that the expectation is the summed loss.
    assert [float(term_weight(term, jnp.asarray(s), 100)) for s in (50, 60, 70, 99)] == pytest.approx([0, 3, 6, 6])
    summed = dataclasses.replace(term, sample_region=False, ramp_fraction=0.0)
    assert make_plan(LossConfig(solver_ce=summed), 50, 100, 0).sizes == (("solver_ce", (1, 2, 3)),)
    assert float(term_weight(summed, jnp.asarray(50), 100)) == 2.0
    assert compared_layers(8, 3)[-1] == 7
    assert compared_layers(3, 1) == [0, 1, 2]


# -- Step --------------------------------------------------------------------------------------------------------------


def test_microbatches_and_weights() -> None:
    """A step learns the mean over the targets that count, whatever the others are; it is equal to itself over
    microbatches that hold different numbers of them, and compiles once."""
    model, plain = LanguageModel(dataclasses.replace(MODEL, num_layers=2, **dict.fromkeys(SWITCHES, False))), batch_of()
    params, weight = perturbed(model), np.zeros((4, 16), np.float32)
    weight[:3, 13:] = weight[1, 15:] = 1.0
    weight[0, 14:] = 0.0
    run = jax.jit(lambda batch: loss_fn(Passes(model, params, balanced(batch)), LossConfig(), Plan(), ONES)[1]["loss"])
    parts = []
    for row, column in zip(*np.nonzero(weight), strict=True):
        alone = np.zeros_like(weight)
        alone[row, column] = 1.0
        parts.append(run(plain._replace(weight=alone)))
    np.testing.assert_allclose(run(plain._replace(weight=weight)), np.mean(parts), rtol=1e-5)

    results = []
    for num_microbatches in (1, 2):
        config = Config(model=model.config, train=TrainConfig(num_steps=8, num_microbatches=num_microbatches))
        optimizer = optax.sgd(1e-2)  # Muon's own compilation is a third of a step's
        step = make_step(model, optimizer, config)
        state = jax.jit(functools.partial(init_state, model, optimizer, config, params))()
        for seed in range(3):
            state, metrics = step(state, batch_of(seed=seed)._replace(weight=weight), plan=Plan())
        assert step._cache_size() == 1 and int(state["step"]) == 3
        results.append((metrics, state["params"]))
    # Means of halves against means of wholes, after three float32 steps.
    chex.assert_trees_all_close(results[0], results[1], rtol=1e-3, atol=1e-5)


def test_flops() -> None:
    config = ModelConfig(num_layers=32, embed_dim=640, num_heads=5, num_kv_heads=5, seq_len=2048, vocab_size=32768)
    matrices = 32 * 12 * 640**2 + 640 * 32768
    assert train_flops_per_token(config) == 6 * matrices + 12 * 32 * 640 * 2048
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("cpu") is None


# -- Run ---------------------------------------------------------------------------------------------------------------


def test_a_run_learns_shows_itself_and_is_not_run_twice(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The one real run of the suite: samples, a profile, rates and memory, a record, a report."""
    config = tiny(tmp_path / "run", num_steps=30, sample_every=30, sample_tokens=8, eval_every=10, checkpoint_every=15)
    steps = dataclasses.replace(config.train, profile_start=2, profile_steps=2)
    term = dataclasses.replace(config.loss.solver_ce, start_fraction=0.0, region_sizes=(1,))
    model = dataclasses.replace(config.model, num_layers=2, use_smear=False, use_value_embeds=False)
    config = dataclasses.replace(config, name="<b>mine</b>", model=model, train=steps, loss=LossConfig(solver_ce=term))
    train(config)
    output, records = capsys.readouterr().out, read_metrics(config.run_path / "metrics.jsonl")
    losses = [record["sequential_ce"] for record in records if "sequential_ce" in record]
    assert len(losses) == 30 and all(np.isfinite(losses))
    assert np.mean(losses[-5:]) < 0.85 * losses[0]
    evaluated = {record["step"]: record for record in records if "val_sequential_ce" in record}
    assert list(evaluated) == [10, 15, 20, 30] and {"val_loss", "val_solver_ce"} <= set(evaluated[20])
    assert {path.name for path in config.run_path.iterdir()} >= {"config.json", "tokenizer.json", "checkpoints"}
    assert ">>>" in output and "profile of steps 2 to 3" in output
    assert len(list((config.run_path / "profile").rglob("*.trace.json.gz"))) == 1
    rates = [record for record in records if "tokens_per_s" in record]
    assert rates and all(0 <= record["data_wait"] < 1 and record["host_mib"] > 10 for record in rates)
    (session,) = read_record(config.run_path)["sessions"]
    assert (session["first_step"], session["last_step"]) == (0, 30) and session["seconds"] > 0
    page = (config.run_path / "report.html").read_text()
    assert "<b>mine" not in page and "&lt;b&gt;mine&lt;/b&gt;" in page
    assert all(word in page for word in ("train.num_steps", "30 of 30", session["jax"]))
    assert_self_contained(page)

    with pytest.raises(InputError, match="--resume"):
        train(config)
    train(config, resume=True)
    assert "finished" in capsys.readouterr().out
    other = dataclasses.replace(config, optim=OptimConfig(warmup_steps=3))
    with pytest.raises(InputError, match="optim.warmup_steps"):
        train(other, resume=True)
    text = Path(config.data.source)
    text.write_text(text.read_text() + "\n\nanother paragraph of text")
    with pytest.raises(InputError, match="corpus has changed"):
        train(config, resume=True)


def test_val_loss_appears_once_every_term_has_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no checkpoint from before counts as the best."""
    monkeypatch.setattr(setup, "loss_fn", lambda *_, **__: (0.0, {"loss": jnp.ones(()), "sequential_ce": jnp.ones(())}))
    monkeypatch.setattr(setup, "Passes", lambda *_, **__: None)
    config = tiny(tmp_path / "run")  # the term begins at step 6 of 12
    evaluate = setup._make_eval(LanguageModel(MODEL), config, make_mesh(config.mesh))
    assert [set(evaluate({}, [batch_of()], step)) for step in (5, 6)] == [
        {"val_sequential_ce"},
        {"val_sequential_ce", "val_loss"},
    ]


# -- The loop, around a step that computes nothing ---------------------------------------------------------------------

count = jax.jit(lambda step, tokens: step + (tokens[0, 0] >= 0))


@pytest.fixture
def fake_step(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[int], float]]:
    """Replaces initialisation, step, evaluation and frontier, so that nothing large is compiled: the entries give what
    step n reports."""
    report: dict[str, Callable[[int], float]] = {"loss": lambda step: 1.0, "val_loss": lambda step: 1.0}

    def make_init(model, optimizer, config, mesh):
        shapes = abstract_state(model, optimizer, config, mesh)
        put = lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)  # noqa: E731
        return lambda params: jax.tree.map(put, shapes)

    def step(state, batch, *, plan):
        state = {**state, "step": count(state["step"], batch.tokens)}
        return state, {"loss": np.float32(report["loss"](int(jax.device_get(state["step"]))))}

    monkeypatch.setattr(loop, "make_init", make_init)
    monkeypatch.setattr(setup, "make_step", lambda *_: step)
    evaluate = lambda params, rows, step: {"val_loss": report["val_loss"](step + 1)}  # noqa: E731
    monkeypatch.setattr(setup, "_make_eval", lambda *_: evaluate)
    monkeypatch.setattr(setup, "make_observe", lambda *_: lambda params, rows: {"frontier/seq": 1.0})
    return report


def checkpoints_of(config: Config) -> Checkpointer:
    return Checkpointer(config.run_path / "checkpoints", read_only=True)


def test_diverging_run_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path, fake_step) -> None:
    fake_step["loss"] = lambda step: float("nan") if step == 6 else 1.0
    config = tiny(tmp_path / "run")
    with pytest.raises(DivergedError, match="step 6 gave .* of step 3"):
        train(config)
    with checkpoints_of(config) as checkpoints:
        assert checkpoints.steps() == [3]


def test_the_best_checkpoint_is_the_best_of_all_that_were_saved(tmp_path: Path, fake_step) -> None:
    """Also where the two periods do not meet."""
    fake_step["val_loss"] = lambda step: abs(step - 6.5)
    config = tiny(tmp_path / "run", eval_every=4, checkpoint_every=3, keep_last=1, frontier_every=5)
    train(config)
    records = read_metrics(config.run_path / "metrics.jsonl")
    assert [record["step"] for record in records if "frontier/seq" in record] == [5, 10, 12]
    with checkpoints_of(config) as checkpoints:
        assert (checkpoints.steps(), checkpoints.best_step) == ([6, 12], 6)


@pytest.mark.parametrize("step", [5, 12])
def test_a_signal_saves_and_ends_the_run_unless_it_is_ending_anyway(
    tmp_path: Path, fake_step, step: int, capsys: pytest.CaptureFixture
) -> None:
    """No evaluation comes before: who sends a signal does not wait for long. In the last step nothing is left."""

    def loss(now: int) -> float:
        if now == step:
            signal.raise_signal(signal.SIGTERM)
        return 1.0

    fake_step["loss"] = loss
    config = tiny(tmp_path / "run")
    train(config)
    output = capsys.readouterr().out
    with checkpoints_of(config) as checkpoints:
        assert checkpoints.latest_step == step
    records = read_metrics(config.run_path / "metrics.jsonl")
    is_last = step == 12
    assert any(record["step"] == step and "val_loss" in record for record in records) == is_last
    assert ("continue with --resume" in output, "finished in" in output) == (not is_last, is_last)
    assert (config.run_path / "report.html").exists() == is_last


def test_a_step_may_move_nothing_unseen(tmp_path: Path, fake_step, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that was not put on the devices would be moved there within the step: that raises."""
    monkeypatch.setattr(loop, "put_batch", lambda mesh, batch: batch)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train(tiny(tmp_path / "run"))


# -- Bad input ---------------------------------------------------------------------------------------------------------

BAD_FLAGS = {
    "no such corpus": (["--data.source", "/nowhere/at/all"], "/nowhere/at/all"),
    "corpus too small": (["--model.seq-len", "100000"], "tokens"),
    "vocabulary mismatch": (["--model.vocab-size", "300"], "300"),
    "head size": (["--model.num-heads", "5"], "num_heads 5"),
    "region outside the model": (["--loss.solver-ce.region-sizes", "9"], "9"),
    "unknown field": (["--model.num-layer", "9"], "num-layer"),
}


def test_bad_input_is_one_sentence_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Every case goes through the real entry point; one of them in a process of its own."""
    config = tiny(tmp_path / "run")
    process = start(config, tmp_path, "--model.num-heads", "4", "--model.num-kv-heads", "3")
    output = process.communicate()[0]
    assert process.returncode == 2 and "num_kv_heads 3" in output and "Traceback" not in output, output
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    for flags, expected in BAD_FLAGS.values():
        monkeypatch.setattr(sys, "argv", ["train.py", str(write_config(config, tmp_path)), *flags])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        captured = capsys.readouterr()
        assert stopped.value.code == 2 and expected in captured.err + captured.out, flags
    assert not config.run_path.exists(), "nothing was written"
