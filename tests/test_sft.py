"""Fine-tuning: from any run, all parameters or adapters, through the solver, with an average over the steps."""

import dataclasses
import json
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import random_params
from tiny_run import MODEL as FOUR_LAYERS
from tiny_run import tiny, two_layers

from snlp_jax.config import Config, DataConfig, EvalConfig, LoraConfig, LossConfig, SolverCEConfig, TrainConfig, to_json
from snlp_jax.data.tokenizer import ByteTokenizer
from snlp_jax.data.turns import chat_format
from snlp_jax.errors import InputError
from snlp_jax.eval import evaluate_run
from snlp_jax.eval.perplexity import paired_interval, perplexity
from snlp_jax.io.checkpoint import Checkpointer
from snlp_jax.io.metrics import read_metrics
from snlp_jax.model import LanguageModel
from snlp_jax.train.loop import train
from snlp_jax.train.lora import init_adapters, merge
from snlp_jax.train.loss import Plan
from snlp_jax.train.start import with_origin_model
from snlp_jax.train.step import (
    abstract_saved,
    abstract_state,
    ema_decay,
    from_saved,
    init_state,
    make_reader,
    make_step,
    optimizer_of,
    to_saved,
)
from snlp_jax.types import Batch

MODEL = dataclasses.replace(FOUR_LAYERS, num_layers=2)
LORA = LoraConfig(rank=2, alpha=4.0, targets=("query", "value", "down"))
SOLVER = LossConfig(sequential_weight=0.5, solver_ce=SolverCEConfig(weight=1.0, region_sizes=(2,), ramp_fraction=0.0))
PLAN = Plan((("solver_ce", (2,)),))


def batch_of(seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, MODEL.vocab_size, (4, 17), dtype=np.int32)
    return Batch(tokens, (rng.random((4, 16)) < 0.4).astype(np.float32))


@pytest.fixture(scope="module")
def base():
    """Parameters that somebody has trained."""
    return random_params(LanguageModel(MODEL))


# -- Adapters ----------------------------------------------------------------------------------------------------------


def test_fresh_adapters_change_nothing_and_merged_ones_add_their_product(base) -> None:
    @jax.jit
    def run(base):
        fresh = init_adapters(jax.random.key(1), base, LORA)
        moved = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(2), leaf.shape), fresh)
        return merge(base, fresh, LORA), moved, merge(base, moved, LORA)

    unchanged, adapters, merged = run(base)
    chex.assert_trees_all_equal(unchanged, base)
    for path in (("attn", "query"), ("mlp", "down")):
        pick = lambda tree, path=path: tree["blocks"][path[0]][path[1]]  # noqa: E731
        for layer in range(MODEL.num_layers):
            product = np.asarray(pick(adapters)["a"][layer]) @ np.asarray(pick(adapters)["b"][layer])
            # float32 rounding of two orders of summation
            np.testing.assert_allclose(pick(merged)[layer], pick(base)[layer] + 2.0 * product, rtol=1e-5, atol=1e-6)
    untouched = lambda tree: [tree["embed"], tree["head"], tree["blocks"]["attn"]["key"], tree["blocks"]["mlp"]["up"]]  # noqa: E731
    chex.assert_trees_all_equal(untouched(merged), untouched(base))


def test_a_step_moves_adapters_alone_and_the_average_follows_its_formula(base) -> None:
    """Three steps: the base is the same bit for bit, adapters move, and what is read is the base with their average."""
    model = LanguageModel(MODEL)
    train_config = TrainConfig(num_steps=3, ema_decay=0.15, init_from="base")
    config = Config(model=MODEL, loss=SOLVER, lora=LORA, train=train_config)
    optimizer = optimizer_of(model, config)
    step = make_step(model, optimizer, config)
    state = jax.jit(lambda params: init_state(model, optimizer, config, params))(base)
    expected = jax.device_get(state["params"])
    for index, kept in enumerate((0.1, 0.15, 0.15)):  # min(0.15, 1 / 10), min(0.15, 2 / 11), ...
        assert float(ema_decay(0.15, jnp.asarray(index))) == pytest.approx(kept)
        state, metrics = step(state, batch_of(index), plan=PLAN)
        now = jax.device_get(state["params"])
        expected = jax.tree.map(lambda old, new, kept=kept: kept * old + (1 - kept) * new, expected, now)
    chex.assert_trees_all_close(jax.device_get(state["ema"]), expected, rtol=1e-5)
    chex.assert_trees_all_equal(state["base"], base)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(now)), "B moves with the first step, A after it"
    assert set(metrics) == {"loss", "sequential_ce", "solver_ce", "grad_norm"}
    metrics = {name: float(value) for name, value in metrics.items()}
    assert metrics["loss"] == pytest.approx(0.5 * metrics["sequential_ce"] + metrics["solver_ce"], rel=1e-5)
    read = make_reader(model, config)(state)
    chex.assert_trees_all_close(read, merge(base, state["ema"], LORA), rtol=1e-6)

    saved = to_saved(state, read)
    chex.assert_trees_all_equal(from_saved(saved), state)
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)  # noqa: E731
    assert shapes(abstract_saved(abstract_state(model, optimizer, config), model)) == shapes(saved)


def test_what_is_saved_of_an_average_alone() -> None:
    """The average stands where readers look, and once only."""
    model, config = LanguageModel(MODEL), Config(model=MODEL, train=TrainConfig(ema_decay=0.9))
    optimizer = optimizer_of(model, config)
    abstract = abstract_state(model, optimizer, config)
    state = {name: name if name in ("params", "ema") else tree for name, tree in abstract.items()}
    saved = to_saved(state, make_reader(model, config)(state))
    assert (saved["params"], saved["trained"]) == ("ema", "params") and "ema" not in saved
    assert from_saved(saved) == state
    plain = abstract_state(model, optimizer, Config())
    assert to_saved(plain, plain["params"]) is plain and from_saved(plain) is plain


# -- Runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base_dir(base, tmp_path_factory) -> Path:
    """A run that has ended, of random weights."""
    path = tmp_path_factory.mktemp("base") / "base"
    config = two_layers(tiny(path))
    path.mkdir()
    (path / "config.json").write_text(to_json(config))
    (path / "tokenizer.json").write_text(ByteTokenizer().to_json())
    with Checkpointer(path / "checkpoints", config_json=to_json(config)) as checkpoints:
        checkpoints.save(3, {"params": base}, None, {"val_loss": 1.0})
    return path


def tuning(run_dir: Path, base_dir: Path, **changes) -> Config:
    """Six steps of adapters on small talk, with all parts switched on."""
    talk = run_dir.parent / "talk.jsonl"
    records = [{"question": f"{i} + 1?", "answer": f"{i + 1}" * (1 + i % 3)} for i in range(120)]
    talk.write_text("".join(json.dumps(record) + "\n" for record in records))
    data = DataConfig(source=str(talk), format="chat", prompt_field="question", response_field="answer")
    schedule = TrainConfig(num_steps=6, batch_size=4, log_every=1, eval_every=6, eval_batches=2, checkpoint_every=6)
    config = Config(
        name="sft",
        run_dir=str(run_dir),
        model=dataclasses.replace(MODEL, seq_len=48),
        data=dataclasses.replace(data, val_fraction=0.2),
        loss=SOLVER,
        lora=LORA,
        train=dataclasses.replace(schedule, init_from=str(base_dir), ema_decay=0.9),
        eval=EvalConfig(("idn:n=2,k=1",), num_windows=8, batch_size=2, greedy_tokens=0, timing_repeats=0),
    )
    return dataclasses.replace(config, **changes)


def saved_state(config: Config, step: int) -> dict:
    """All arrays of a checkpoint."""
    model, optimizer = LanguageModel(config.model), optimizer_of(LanguageModel(config.model), config)
    abstract = abstract_saved(abstract_state(model, optimizer, config), model)
    with Checkpointer(config.run_path / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.latest_step == step
        return checkpoints.restore(abstract, None)[1]


@pytest.fixture(scope="module")
def adapted(base_dir: Path, tmp_path_factory) -> Config:
    """A run of adapters that has ended."""
    config = tuning(tmp_path_factory.mktemp("adapted") / "run", base_dir)
    train(config)
    return config


@pytest.mark.slow
def test_a_run_of_adapters_on_conversations(base, adapted: Config) -> None:
    """It records where it starts from, and is read like any run: by merged parameters, on the responses alone."""
    config = adapted
    whole = saved_state(config, 6)
    records = {
        (record["step"], "val_loss" in record): record for record in read_metrics(config.run_path / "metrics.jsonl")
    }
    before, after = records[0, True], records[6, True]
    assert {"val_sequential_ce", "val_solver_ce"} <= set(before)
    assert before["val_loss"] == pytest.approx(0.5 * before["val_sequential_ce"] + before["val_solver_ce"], rel=1e-6)

    report = evaluate_run(config.run_path, config, "last")
    # The same windows in other batches, weighted by their targets: float32 rounding of sums.
    assert {result.setting: np.log(result.ppl) for result in report.results} == pytest.approx(
        {"seq": after["val_sequential_ce"], "idn:n=2,k=1": after["val_solver_ce"]}, rel=1e-4
    )
    chex.assert_trees_all_equal(whole["base"], base)
    chex.assert_trees_all_equal(whole["params"]["embed"], base["embed"])


def test_a_recipe_fits_any_model_that_a_flag_names(base_dir: Path) -> None:
    """Unless a flag asks for a model too; a file that names a run describes its model."""
    file = Config(model=dataclasses.replace(MODEL, num_layers=8, num_heads=4, seq_len=48), loss=SOLVER)
    named = dataclasses.replace(file, train=TrainConfig(init_from=str(base_dir)))
    fitted = with_origin_model(named, file)
    assert fitted == dataclasses.replace(named, model=dataclasses.replace(MODEL, seq_len=48))
    assert with_origin_model(named, named) is named and with_origin_model(file, file) is file
    chosen = dataclasses.replace(named, model=dataclasses.replace(MODEL, num_layers=4))
    assert with_origin_model(chosen, file) is chosen
    with pytest.raises(InputError, match="'nowhere' does not exist"):
        with_origin_model(dataclasses.replace(file, train=TrainConfig(init_from="nowhere")), file)


MISMATCHES = {
    "no such run": ({"train": {"init_from": "nowhere"}}, "run directory 'nowhere' does not exist"),
    "model": ({"model": {"num_heads": 4}}, "holds a model with model.num_heads 2, and here it is 4"),
    "switch": ({"model": {"use_smear": False}}, "holds a model with model.use_smear True, and here it is False"),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_starting_from_another_model_is_refused(case: str, base_dir: Path, tmp_path: Path) -> None:
    changes, sentence = MISMATCHES[case]
    config = tuning(tmp_path / "run", base_dir)
    changed = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in changes.items()}
    with pytest.raises(InputError, match=sentence):
        train(dataclasses.replace(config, **changed))
    assert not config.run_path.exists(), "nothing was written"


def test_adapters_need_a_base() -> None:
    with pytest.raises(InputError, match="lora.rank is 2, but train.init_from is empty"):
        Config(lora=LORA)
    with pytest.raises(InputError, match="names a matrix twice"):
        LoraConfig(targets=("up", "up"))
    with pytest.raises(InputError, match="train.ema_decay is 1.0; give 0, or less than 1"):
        TrainConfig(ema_decay=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ("adapters, average", "all parameters, solver alone"))
def test_runs_learn_and_resume_bit_for_bit(arm: str, base_dir: Path, tmp_path: Path) -> None:
    """Though where they started from is gone by then."""
    origin = tmp_path / "origin"
    shutil.copytree(base_dir, origin)
    lora = dataclasses.replace(LORA, lr=0.02) if "adapters" in arm else LoraConfig()  # rank 2 learns slowly
    config = tuning(tmp_path / "run", origin, lora=lora)
    steps = {"num_steps": 40, "checkpoint_every": 20, "eval_every": 40, "num_microbatches": 2}
    schedule = dataclasses.replace(config.train, **steps, ema_decay=0.9 * ("average" in arm))
    config = dataclasses.replace(config, train=schedule)
    if "alone" in arm:
        config = dataclasses.replace(config, loss=dataclasses.replace(SOLVER, sequential_weight=0.0))
    train(config)
    whole = saved_state(config, 40)
    losses = {r["step"]: r["val_solver_ce"] for r in read_metrics(config.run_path / "metrics.jsonl") if "val_loss" in r}
    assert losses[40] < (0.95 if "adapters" in arm else 0.8) * losses[0]
    shutil.rmtree(origin)
    shutil.rmtree(config.run_path / "checkpoints" / "40")
    train(config, resume=True)
    chex.assert_trees_all_equal(saved_state(config, 40), whole)


@pytest.mark.slow
def test_adapters_train_on_a_mesh(adapted: Config, tmp_path: Path) -> None:
    """The same losses as on one device, up to rounding; the checkpoint depends on no mesh."""
    alone, mesh = adapted, dataclasses.replace(adapted.mesh, data=2, layer=2)
    spread = dataclasses.replace(alone, run_dir=str(tmp_path / "spread"), mesh=mesh)
    train(spread)
    # Sums in another order, over six steps.
    chex.assert_trees_all_close(saved_state(spread, 6)["trained"], saved_state(alone, 6)["trained"], atol=2e-3)


# -- Readers -----------------------------------------------------------------------------------------------------------


def test_only_weighted_targets_are_evaluated() -> None:
    rng = np.random.default_rng(0)
    nll, reference = rng.random((2, 6, 9)).astype(np.float32)
    weight = (rng.random((6, 9)) < 0.5).astype(np.float32)
    assert perplexity(nll, weight) == pytest.approx(np.exp(nll[weight > 0].mean()), rel=1e-6)
    low, high = paired_interval(nll, reference, num_bootstrap=200, weight_WT=weight)
    assert low < np.expm1((nll - reference)[weight > 0].mean()) < high
    scrambled = np.where(weight > 0, nll, 9.0)
    assert paired_interval(scrambled, reference, num_bootstrap=200, weight_WT=weight) == (low, high)


def test_a_question_is_asked_in_the_template() -> None:
    tokenizer = ByteTokenizer()
    tokens = chat_format(tokenizer).prompt([("user", "Why?")])
    assert tokens[0] == tokenizer.bos_id and tokenizer.decode(tokens) == "User: Why?\nAssistant:"
