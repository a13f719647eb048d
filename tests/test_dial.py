"""The dial's arithmetic, and the plan of a run: what is counted, measured and refused before anything runs."""

import dataclasses
import math
import runpy
import sys
from pathlib import Path

import jax
import pytest
from tiny_run import MODEL, tiny

from snlp_jax.config import (
    Config,
    Dial,
    LossConfig,
    MeshConfig,
    ModelConfig,
    SolverCEConfig,
    TrainConfig,
    from_json,
    load_dial,
    to_json,
)
from snlp_jax.config.dial import scaling_params
from snlp_jax.errors import InputError
from snlp_jax.model import LanguageModel, num_params
from snlp_jax.parallel.mesh import make_mesh
from snlp_jax.planner import budget
from snlp_jax.planner.budget import flops_of_parts, plan_run
from snlp_jax.train import memory
from snlp_jax.train.flops import run_flops
from snlp_jax.train.loop import train
from snlp_jax.train.memory import GIB, capacity_of, check_state, state_bytes
from snlp_jax.train.step import abstract_state, optimizer_of

ROOT = Path(__file__).resolve().parents[1]
BASE = Config(
    name="base",
    model=ModelConfig(vocab_size=32_768, seq_len=2048),
    loss=LossConfig(solver_ce=SolverCEConfig(weight=1.0, region_sizes=(4, 8))),
)


# -- The dial ----------------------------------------------------------------------------------------------------------


def test_reference_depth_has_the_reference_batch() -> None:
    """At depth 12 every factor is 1: integers worked out by hand from the rules."""
    config = Dial(BASE).at(12)
    model, train = config.model, config.train
    assert (model.num_layers, model.embed_dim, model.num_heads, model.num_kv_heads) == (12, 768, 6, 6)
    params = 12 * 12 * 768**2 + 768 * 32_768
    assert params == 110_100_480
    assert train.batch_size * model.seq_len == config.optim.batch_reference == 2**19
    assert train.num_steps == 12 * params // 2**19 == 2520
    assert config.optim.matrix_weight_decay == BASE.optim.matrix_weight_decay
    assert train.batch_size // train.num_microbatches * model.seq_len == 65_536
    assert config.name == "base_d12" and config.loss == BASE.loss


@pytest.mark.parametrize("depth", [1, 5, 26])
def test_rules_hold_at_every_depth(depth: int) -> None:
    dial = Dial(BASE)
    config, reference = dial.at(depth), dial.at(12)
    model, train = config.model, config.train
    assert model.head_dim == 128 and 0 <= model.embed_dim - 64 * depth < 128
    tokens_per_step = train.batch_size * model.seq_len
    tokens = 12 * (12 * depth * model.embed_dim**2 + model.embed_dim * 32_768)
    assert tokens - tokens_per_step < train.num_steps * tokens_per_step <= tokens
    assert math.log2(tokens_per_step).is_integer()
    # The best batch, by a power of the tokens, is at most a factor sqrt(2) from the one that is taken.
    best = 2**19 * (tokens / (12 * 110_100_480)) ** 0.383
    assert abs(math.log2(tokens_per_step / best)) <= 0.5
    decay = config.optim.matrix_weight_decay / reference.optim.matrix_weight_decay
    assert decay == pytest.approx((tokens_per_step / 2**19) ** 0.5 * 12 * 110_100_480 / tokens)
    assert train.batch_size // train.num_microbatches * model.seq_len <= 65_536
    assert config.loss.solver_ce.region_sizes == tuple(sorted({max(1, round(n * depth / 12)) for n in (4, 8)}))


def test_dial_counts_the_matrices_and_the_head_of_the_model_itself() -> None:
    model = Dial(Config(model=dataclasses.replace(MODEL, vocab_size=300))).at(3).model
    params = LanguageModel(model).abstract_params()
    matrices = num_params(params["blocks"]["attn"]) + num_params(params["blocks"]["mlp"])
    assert scaling_params(model) == matrices + params["head"]["kernel"].size


def test_other_settings_of_the_dial() -> None:
    dial = Dial(BASE, aspect=32, head_dim=32, tokens_per_param=20.0, microbatch_tokens=4096)
    config = dial.at(4)
    assert (config.model.embed_dim, config.model.num_heads) == (128, 4)
    assert config.train.batch_size // config.train.num_microbatches == 2
    assert "20 x" in dial.describe(4) and "4 heads of 32" in dial.describe(4)
    with pytest.raises(InputError, match="depth is 0"):
        dial.at(0)
    config = load_dial(ROOT / "configs/dial.py").at(12)
    assert config.name == "dial_d12" and from_json(to_json(config)) == config
    assert config.model.vocab_size == config.data.bpe_vocab_size
    with pytest.raises(InputError, match="dial"):
        load_dial(ROOT / "configs/tiny.py")


# -- The plan ----------------------------------------------------------------------------------------------------------


def test_flops_add_up_to_those_of_the_run() -> None:
    """Parts of a step, with one term from half of the steps on."""
    loss = LossConfig(solver_ce=SolverCEConfig(weight=1.0, region_sizes=(2,), start_fraction=0.5))
    config = Config(
        model=dataclasses.replace(MODEL, num_layers=2, use_smear=False, use_value_embeds=False),
        loss=loss,
        train=TrainConfig(num_steps=8, batch_size=4),
    )
    parts = flops_of_parts(config)
    plain, term = parts.values()
    assert list(parts)[1:] == ["solver_ce"] and term > 0
    assert run_flops(config) == pytest.approx(8 * plain + 4 * term)


def plain(run_dir: Path) -> Config:
    """A run of one layer without added losses: little to compile."""
    model = dataclasses.replace(MODEL, num_layers=1, use_smear=False, use_value_embeds=False, use_mid_subtract=False)
    return dataclasses.replace(tiny(run_dir), model=model, loss=LossConfig())


def test_plan_measures_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = plain(tmp_path / "run")
    plan = plan_run(config)
    assert sum(plan.params.values()) == num_params(LanguageModel(config.model).abstract_params())
    assert plan.tokens == 12 * 4 * 16 and plan.train_tokens > 1000
    assert plan.seconds is None, "a CPU has no peak in the table"
    state = plan.state_bytes
    assert state["parameters"] == 4 * sum(plan.params.values()) == state["gradients"]
    # Muon keeps one moment, AdamW two.
    matrices = plan.params["matrix"]
    assert state["optimizer"] == pytest.approx(8 * sum(plan.params.values()) - 4 * matrices, rel=0.01)
    assert state["parameters"] + state["optimizer"] < plan.step_bytes < plan.capacity
    assert "not known" in capsys.readouterr().out
    assert not config.run_path.exists(), "a plan writes nothing"


def test_what_cannot_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the plan, which has measured the step; and by any run, before it writes, for its state alone."""
    config = plain(tmp_path / "run")
    mesh = make_mesh(MeshConfig())
    model = LanguageModel(config.model)
    state = abstract_state(model, optimizer_of(model, config, mesh), config, mesh)
    needed = sum(state_bytes(state).values())
    for module in (budget, memory):
        monkeypatch.setattr(module, "capacity_of", lambda _: needed)
    check_state(state, mesh)
    monkeypatch.setattr(budget, "step_bytes", lambda *_: needed + 1)
    with pytest.raises(InputError, match=r"training step would take .*num_microbatches.*remat.*mesh\.data"):
        plan_run(config)
    monkeypatch.setattr(memory, "capacity_of", lambda _: needed - 1)
    with pytest.raises(InputError, match=r"parameters, the optimizer's state .*on each device.*smaller model"):
        train(config)
    assert not config.run_path.exists()


def test_a_step_that_cannot_fit_is_refused_before_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled only where the state is not small beside what is free."""
    config, asked = plain(tmp_path / "run"), []
    state = abstract_state(LanguageModel(config.model), optimizer_of(LanguageModel(config.model), config), config)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    monkeypatch.setattr(memory, "step_bytes", lambda *given: asked.append(given) or 30 * held)
    monkeypatch.setattr(memory, "free_of", lambda _: 29 * held)
    with pytest.raises(InputError, match=r"training step would take .*num_microbatches.*remat.*mesh\.data"):
        train(config)
    assert len(asked) == 1 and not config.run_path.exists()
    _, _, mesh, state, row = asked[0]
    assert row["tokens"].shape[1] == config.model.seq_len + 1
    monkeypatch.setattr(memory, "free_of", lambda _: 1000 * held)
    memory.check_step(LanguageModel(config.model), config, mesh, state, row)
    assert len(asked) == 1


def test_devices_of_a_cpu_share_its_memory() -> None:
    one, eight = capacity_of(make_mesh(MeshConfig())), capacity_of(make_mesh(MeshConfig(data=8)))
    assert one is not None and one > GIB // 4 and one // 8 == eight


# -- train.py ----------------------------------------------------------------------------------------------------------


def run_train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *flags: str) -> int:
    """The entry script in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    try:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def test_flags_of_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    seen = []
    monkeypatch.setattr("snlp_jax.planner.budget.plan_run", lambda *args: seen.append(args))
    monkeypatch.setattr("snlp_jax.train.loop.train", lambda config, **_: seen.append(config))
    dial = str(ROOT / "configs/dial.py")
    assert run_train(monkeypatch, tmp_path, dial, "--depth", "4", "--plan", "--train.seed", "7") == 0
    config, topology = seen.pop()
    assert (config.model.num_layers, config.train.seed, topology) == (4, 7, "")
    assert "256 = 2 heads of 128" in capsys.readouterr().out
    assert run_train(monkeypatch, tmp_path, dial, "--plan", "v5e:2x4", "--mesh.data", "8") == 0
    assert seen.pop()[1] == "v5e:2x4"
    assert run_train(monkeypatch, tmp_path, dial, "--profile", "20:5") == 0
    profiled = seen.pop().train
    assert (profiled.profile_start, profiled.profile_steps) == (20, 5)
    for flags, words in (
        (["--depth", "0"], "depth is 0"),
        (["--profile", "5"], "FIRST:COUNT"),
        (["--profile", "0:5"], "FIRST:COUNT"),
    ):
        assert run_train(monkeypatch, tmp_path, dial, *flags) == 2
        assert words in capsys.readouterr().err
    assert run_train(monkeypatch, tmp_path, str(ROOT / "configs/tiny.py"), "--depth", "3") == 2
    assert "dial" in capsys.readouterr().err
    assert not seen
