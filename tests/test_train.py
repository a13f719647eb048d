"""Training: the loss at a fresh start, what a step computes, and a run that is fed nonsense."""

import dataclasses
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_run import MODEL, ROOT, start, tiny, write_config

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
from snlp_jax.train.flops import peak_flops, train_flops_per_token
from snlp_jax.train.loop import train
from snlp_jax.train.loss import Plan, balanced, compared_layers, loss_fn, make_plan, term_weight
from snlp_jax.train.optim import make_optimizer
from snlp_jax.train.step import init_state, make_step
from snlp_jax.types import Batch

ALL_TERMS = LossConfig(
    hidden_norm=HiddenNormConfig(weight=0.5, region_sizes=(2, 3), stride=2),
    solver_ce=SolverCEConfig(weight=1.0, region_sizes=(3,), num_iters=2),
    layer_skip=LayerSkipConfig(weight=0.1, region_sizes=(3,)),
)
ALL_PLAN = make_plan(ALL_TERMS, 0, 10, 0)
ONES = {"hidden_norm": 1.0, "solver_ce": 1.0, "layer_skip": 1.0}


def batch_of(rows: int = 4, seed: int = 0, length: int = 17) -> Batch:
    return Batch(np.random.default_rng(seed).integers(0, MODEL.vocab_size, (rows, length), dtype=np.int32))


def perturbed(model: LanguageModel, scale: float = 0.1) -> dict:
    """Fresh parameters have zero output projections, on which every solver setting is exact: move away from them."""
    leaves, treedef = jax.tree.flatten(jax.jit(model.init)(jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [leaf + scale * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, moved)


# -- Loss --------------------------------------------------------------------------------------------------------------

VARIANTS = {
    "all": {},
    "plain": {"use_x0_resid": False, "use_value_embeds": False, "use_smear": False, "use_mid_subtract": False},
    "no_x0": {"use_x0_resid": False},
    "windows": {"window_pattern": "SSL"},
    "remat": {"remat": True, "use_qk_norm": False, "logit_softcap": 0.0},
}


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=() if name == "all" else pytest.mark.slow) for name in VARIANTS]
)
def test_fresh_initialisation_is_finite(variant: str) -> None:
    """Without x0 the solver's trace equals the target exactly, where a plain norm has the gradient 0/0."""
    model = LanguageModel(dataclasses.replace(MODEL, **VARIANTS[variant]))
    params = jax.jit(model.init)(jax.random.key(0))
    loss = lambda p: loss_fn(model, p, batch_of(), ALL_TERMS, ALL_PLAN, ONES)  # noqa: E731
    (value, metrics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    chex.assert_tree_all_finite((value, grads, metrics))
    assert float(value) == pytest.approx(
        float(metrics["sequential_ce"] + 2 * metrics["hidden_norm"] + metrics["solver_ce"] + metrics["layer_skip"]),
        rel=1e-6,
    )
    if not model.config.use_x0_resid:
        assert float(metrics["hidden_norm"]) == 0.0


def test_terms_mean_what_they_say() -> None:
    """CE through N iterations is the sequential CE, in value and gradient; N iterations leave no hidden distance."""
    model = LanguageModel(MODEL)
    params = perturbed(model)

    def run(config: LossConfig):
        plan = make_plan(config, 0, 1, 0)
        loss = lambda p: loss_fn(model, p, batch_of(), config, plan, ONES)  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    (_, plain), plain_grads = run(LossConfig())
    solver = LossConfig(sequential_weight=0.0, solver_ce=SolverCEConfig(weight=1.0, region_sizes=(4,), num_iters=4))
    (_, metrics), grads = run(solver)
    # float32 rounding of batched against scanned matrix products, amplified by four layers
    assert float(metrics["solver_ce"]) == pytest.approx(float(plain["sequential_ce"]), rel=1e-5)
    chex.assert_trees_all_close(grads, plain_grads, rtol=2e-3, atol=2e-5)
    one = LossConfig(solver_ce=SolverCEConfig(weight=1.0, region_sizes=(4,), num_iters=1))
    (_, metrics), _ = run(one)
    assert abs(float(metrics["solver_ce"] - metrics["sequential_ce"])) > 1e-3

    # On a region of one layer, one iteration is the layer: no distance, and layer skip is the same thing.
    (_, metrics), _ = run(
        LossConfig(
            hidden_norm=HiddenNormConfig(weight=1.0, region_sizes=(1,)),
            layer_skip=LayerSkipConfig(weight=1.0, region_sizes=(1,)),
        )
    )
    assert float(metrics["hidden_norm"]) < 1e-5
    assert float(metrics["layer_skip"]) < 1e-5
    (_, metrics), _ = run(LossConfig(layer_skip=LayerSkipConfig(weight=1.0, region_sizes=(3,))))
    assert float(metrics["layer_skip"]) > 0.05


@pytest.mark.slow
def test_every_correction_can_be_trained_for() -> None:
    """On a region of one layer every correction is that layer; on larger ones each has a distance of its own, and the
    random vectors of the Diagonal correction follow the key."""

    def run(
        config: ModelConfig, correction: str, n: int, key: int = 0, with_gradient: bool = False, **fields
    ) -> tuple[float, dict]:
        model = LanguageModel(config)
        loss = LossConfig(
            sequential_weight=0.0,
            hidden_norm=HiddenNormConfig(weight=1.0, region_sizes=(n,), correction=correction, **fields),
        )
        value = lambda p, key: loss_fn(model, p, batch_of(), loss, make_plan(loss, 0, 1, 0), ONES, key)[0]  # noqa: E731
        run = jax.value_and_grad(value) if with_gradient else lambda p, key: (value(p, key), {})
        return jax.jit(run)(perturbed(model), jax.random.key(key))

    streams = dataclasses.replace(MODEL, num_streams=2, use_x0_resid=False)
    distances = {}
    for config, correction in ((MODEL, "jac"), (MODEL, "sid"), (MODEL, "diag"), (streams, "hcn"), (streams, "idn")):
        if correction in ("diag", "hcn"):
            assert run(config, correction, 1)[0] < 1e-5  # rounding of batched against scanned matrix products
        distance, gradients = run(config, correction, 3, with_gradient=correction in ("diag", "hcn"))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
        assert not gradients or optax.tree.norm(gradients) > 1e-3
        distances[correction, config.num_streams] = float(distance)
    assert min(distances.values()) > 1e-3 and len({round(value, 5) for value in distances.values()}) == 5
    assert run(MODEL, "diag", 3, key=1)[0] != distances["diag", 0]
    assert run(MODEL, "diag", 3, diagonal_stride=3)[0] != distances["diag", 0]


@pytest.mark.slow
def test_detached_target_stops_the_gradient() -> None:
    """What is detached is the target: the gradient of the same value differs."""
    model = LanguageModel(MODEL)
    params = perturbed(model)

    def gradient(detach: bool):
        term = HiddenNormConfig(weight=1.0, region_sizes=(3,), detach_target=detach)
        config = LossConfig(sequential_weight=0.0, hidden_norm=term)
        return jax.jit(
            jax.value_and_grad(lambda p: loss_fn(model, p, batch_of(), config, make_plan(config, 0, 1, 0), ONES)[0])
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


def test_step_compiles_once_a_plan_and_microbatches_agree() -> None:
    model = LanguageModel(MODEL)
    loss = LossConfig(solver_ce=SolverCEConfig(weight=1.0, region_sizes=(1, 3), sample_region=True))
    plans = [Plan((("solver_ce", (n,)),)) for n in (1, 3)]
    results = []
    for num_microbatches in (1, 2):
        config = Config(model=MODEL, loss=loss, train=TrainConfig(num_steps=8, num_microbatches=num_microbatches))
        optimizer = make_optimizer(config.optim, model.abstract_params(), 8, 64)
        step = make_step(model, optimizer, config)
        state = jax.jit(lambda opt=optimizer: init_state(model, opt, 0))()
        for index in range(6):
            state, metrics = step(state, batch_of(seed=index), plan=plans[index % 2])
        assert step._cache_size() == 2, "one compilation for each plan"
        assert int(state["step"]) == 6
        results.append(metrics)
    # Means of halves against means of wholes, after six float32 steps.
    chex.assert_trees_all_close(results[0], results[1], rtol=1e-3)


def test_only_targets_with_a_weight_are_learned() -> None:
    """The mean over the targets that count, whatever the others are, in the pass and through the solver; and equal to
    itself over microbatches that hold different numbers of them."""
    model, plan = LanguageModel(MODEL), Plan((("solver_ce", (3,)),))
    loss = LossConfig(solver_ce=SolverCEConfig(weight=1.0, region_sizes=(3,)))
    params = jax.jit(model.init)(jax.random.key(0))
    params["head"]["kernel"] = 0.3 * jax.random.normal(jax.random.key(1), params["head"]["kernel"].shape)
    plain = batch_of()
    weight = np.zeros((4, 16), np.float32)
    weight[:3, 9:] = weight[1, 12:] = 1.0
    weight[0, 11:] = 0.0
    run = jax.jit(lambda batch: loss_fn(model, params, balanced(batch), loss, plan, ONES)[1])
    masked, parts = run(plain._replace(weight=weight)), []
    for row, column in zip(*np.nonzero(weight), strict=True):
        alone = np.zeros_like(weight)
        alone[row, column] = 1.0
        parts.append(run(plain._replace(weight=alone)))
    for name in ("sequential_ce", "solver_ce"):
        np.testing.assert_allclose(masked[name], np.mean([part[name] for part in parts]), rtol=1e-5)
        np.testing.assert_allclose(
            run(plain._replace(weight=np.full_like(weight, 7.0)))[name], run(plain)[name], rtol=1e-6
        )
    halves = []
    for num_microbatches in (1, 2):
        config = Config(model=MODEL, loss=loss, train=TrainConfig(num_steps=8, num_microbatches=num_microbatches))
        optimizer = make_optimizer(config.optim, model.abstract_params(), 8, 64)
        state = jax.jit(lambda opt=optimizer: init_state(model, opt, 0))()
        halves.append(make_step(model, optimizer, config)(state, plain._replace(weight=weight), plan=plan)[1])
    chex.assert_trees_all_close(halves[0], halves[1], rtol=1e-4)


def test_loss_is_traced_once_a_plan() -> None:
    chex.clear_trace_counter()
    model = LanguageModel(MODEL)
    params = jax.jit(model.init)(jax.random.key(0))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def loss(params, batch):
        return loss_fn(model, params, batch, ALL_TERMS, ALL_PLAN, ONES)[0]

    for seed in range(3):
        loss(params, batch_of(seed=seed))


def test_flops() -> None:
    config = ModelConfig(num_layers=32, embed_dim=640, num_heads=5, num_kv_heads=5, seq_len=2048, vocab_size=32768)
    matrices = 32 * 12 * 640**2 + 640 * 32768
    assert train_flops_per_token(config) == 6 * matrices + 12 * 32 * 640 * 2048
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("cpu") is None


# -- Run ---------------------------------------------------------------------------------------------------------------


def test_run_learns_writes_and_is_not_run_twice(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = tiny(tmp_path / "run", num_steps=40, sample_every=40, sample_tokens=8)
    train(config)
    records = read_metrics(config.run_path / "metrics.jsonl")
    losses = [record["sequential_ce"] for record in records if "sequential_ce" in record]
    assert len(losses) == 40
    assert np.mean(losses[-5:]) < 0.8 * losses[0]
    assert all(np.isfinite(losses))
    # val_loss appears once the late term has begun, so that no checkpoint from before counts as the best.
    evaluated = {record["step"]: record for record in records if "val_sequential_ce" in record}
    assert "val_loss" not in evaluated[18]
    assert {"val_loss", "val_solver_ce"} <= set(evaluated[24])
    assert {path.name for path in config.run_path.iterdir()} >= {"config.json", "tokenizer.json", "checkpoints"}
    assert ">>>" in capsys.readouterr().out

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


def test_diverging_run_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    config = tiny(tmp_path / "run")
    config = dataclasses.replace(config, optim=OptimConfig(warmup_steps=2, embed_lr=1e38, scalar_lr=1e38))
    with pytest.raises(DivergedError, match=r"step \d+ gave .*last good checkpoint"):
        train(config)
    with Checkpointer(config.run_path / "checkpoints", read_only=True) as checkpoints:
        for step in checkpoints.steps():
            chex.assert_tree_all_finite(
                checkpoints.restore_params(LanguageModel(config.model).abstract_params(), step)[1]["blocks"]
            )


BAD_FLAGS = {
    "no such corpus": (["--data.source", "/nowhere/at/all"], "/nowhere/at/all"),
    "corpus too small": (["--model.seq-len", "100000"], "tokens"),
    "vocabulary mismatch": (["--model.vocab-size", "300"], "300"),
    "head size": (["--model.num-heads", "5"], "num_heads 5"),
    "kv heads": (["--model.num-heads", "4", "--model.num-kv-heads", "3"], "num_kv_heads 3"),
    "window letters": (["--model.window-pattern", "SXL"], "SXL"),
    "region outside the model": (["--loss.solver-ce.region-sizes", "9"], "9"),
    "iterations": (["--loss.solver-ce.num-iters", "0"], "num_iters is 0"),
    "unknown field": (["--model.num-layer", "9"], "num-layer"),
    "wrong type": (["--model.num-layers", "many"], "many"),
}


def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path: Path) -> None:
    """Every case goes through the real entry point; three of them in a process of their own."""
    config = tiny(tmp_path / "run")
    for flags, expected in (BAD_FLAGS["no such corpus"], BAD_FLAGS["kv heads"], BAD_FLAGS["wrong type"]):
        process = start(config, tmp_path, *flags)
        output = process.communicate()[0]
        assert process.returncode == 2, output
        assert expected in output
        assert "Traceback" not in output
    assert not config.run_path.exists()


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_input_is_refused(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import runpy

    config = tiny(tmp_path / "run")
    flags, expected = BAD_FLAGS[case]
    monkeypatch.setattr(sys, "argv", ["train.py", str(write_config(config, tmp_path)), *flags])
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    message = captured.err + captured.out
    assert expected in message
    assert not config.run_path.exists(), "nothing was written"
