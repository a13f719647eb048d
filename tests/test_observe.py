"""What a run shows of itself: frontier and residuals, the profile, wandb, its record, and the report."""

import dataclasses
import json
import sys
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import random_params
from tiny_run import MODEL, assert_self_contained, tiny

from snlp_jax.config import Config, EvalConfig, MeshConfig, to_json
from snlp_jax.errors import InputError
from snlp_jax.eval.diagnose import diagnose
from snlp_jax.io.metrics import MetricsWriter, read_metrics
from snlp_jax.model import LanguageModel
from snlp_jax.notation import parse_schedule
from snlp_jax.parallel.mesh import make_mesh
from snlp_jax.train.observe import Meter, RunRecord, frontier_settings, make_observe, read_record
from snlp_jax.train.report import changed_fields, curves_of, make_html, thinned, write_html
from snlp_jax.types import Batch


def batches(count: int = 2, rows: int = 4) -> list[Batch]:
    rng = np.random.default_rng(0)
    return [Batch(rng.integers(0, MODEL.vocab_size, (rows, 17), dtype=np.int32)) for _ in range(count)]


# -- Frontier and residuals --------------------------------------------------------------------------------------------


def test_frontier_and_residuals(tmp_path: Path) -> None:
    """Solver settings differ from the sequential pass, one iteration leaves no residual in the first layer and some in
    the others; of the two batches each counts; the second time nothing is compiled."""
    config = dataclasses.replace(tiny(tmp_path / "run"), eval=EvalConfig(solvers=("idn:n=3,k=2",)))
    model = LanguageModel(config.model)
    params, held_out = random_params(model), batches()
    observe = make_observe(model, config, make_mesh(config.mesh))
    observed = observe(params, held_out)
    assert list(observed) == ["frontier/seq", "frontier/idn:n=3,k=2", "residual/01", "residual/02", "residual/03"]
    assert abs(observed["frontier/idn:n=3,k=2"] - observed["frontier/seq"]) > 1e-4
    assert observed["residual/01"] < 1e-5 < 0.01 < min(observed["residual/02"], observed["residual/03"])

    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
    alone = [observe(params, [batch]) for batch in held_out]
    for name, value in observed.items():
        assert value == pytest.approx(np.mean([each[name] for each in alone]), rel=1e-5, abs=1e-7)
    assert not [name for name in compiled if "backend_compile" in name]


@pytest.mark.slow
def test_residuals_are_those_of_the_diagnosis(tmp_path: Path) -> None:
    config = tiny(tmp_path / "run")
    model = LanguageModel(config.model)
    params, held_out = random_params(model), batches()
    observed = make_observe(model, config, make_mesh(config.mesh))(params, held_out)
    (region,) = parse_schedule("idn:n=3,k=1", 4).regions
    tokens = np.concatenate([batch.tokens for batch in held_out])[:, :-1]
    (measured,) = diagnose(model, params, tokens, {"idn:n=3": region}).regions
    assert [observed[f"residual/{layer:02d}"] for layer in measured.layers] == pytest.approx(
        measured.residuals[1], rel=1e-4, abs=1e-6
    )


@pytest.mark.slow
def test_frontier_on_a_mesh_is_that_of_one_device(tmp_path: Path) -> None:
    config = tiny(tmp_path / "run")
    model = LanguageModel(config.model)
    params, held_out = random_params(model), batches()
    expected = make_observe(model, config, make_mesh(config.mesh))(params, held_out)
    mesh = make_mesh(MeshConfig(data=2, layer=2, tensor=2))
    # Sums in another order, through four layers.
    assert make_observe(model, config, mesh)(params, held_out) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_frontier_settings(tmp_path: Path) -> None:
    """A short list without any; fitted maps, which belong to one checkpoint, are left out; bad ones are refused."""
    config = tiny(tmp_path / "run")
    assert list(frontier_settings(config)) == ["seq", *(f"idn:n={n},k={k}" for n in (2, 3) for k in (1, 2))]
    with_fit = dataclasses.replace(config, eval=EvalConfig(solvers=("cal:n=2,k=1,fit=mine", "jac:n=2,k=1")))
    assert list(frontier_settings(with_fit)) == ["seq", "jac:n=2,k=1"]
    wrong = dataclasses.replace(config, eval=EvalConfig(solvers=("hcn:n=2,k=1",)))
    with pytest.raises(InputError, match="hcn"):
        make_observe(LanguageModel(config.model), wrong, make_mesh(config.mesh))


# -- The meter and the record ------------------------------------------------------------------------------------------


def test_meter_tells_waiting_from_training(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 11.0, 20.0, 22.0, 30.0])  # started, wait from 10 to 11, pause from 20 to 22, read at 30
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    meter = Meter(Config(), tokens_per_step=7, num_devices=1)
    assert meter.rates(1) == {}
    with meter.spending("wait"):
        pass
    with meter.spending("pause"):
        pass
    rates = meter.rates(5)
    assert rates["tokens_per_s"] == 4 * 7 / 28 and rates["data_wait"] == 1 / 28


def test_record_keeps_the_sessions_of_a_resumed_run(tmp_path: Path) -> None:
    assert read_record(tmp_path) == {"sessions": []}
    RunRecord(tmp_path, 0, 0.0, {"num_params": 3}).update(4)
    RunRecord(tmp_path, 4, 0.0, {"num_params": 3}).update(9)
    record = read_record(tmp_path)
    assert [(s["first_step"], s["last_step"]) for s in record["sessions"]] == [(0, 4), (4, 9)]
    assert record["num_params"] == 3
    RunRecord(tmp_path, 0, 0.0).update(1)
    assert len(read_record(tmp_path)["sessions"]) == 1, "a run that begins anew forgets"
    (tmp_path / "run.json").write_text("torn {")
    assert read_record(tmp_path) == {"sessions": []}
    RunRecord(None, 0, 0.0).update(1)


# -- wandb -------------------------------------------------------------------------------------------------------------


class FakeRun:
    """What the writer uses of a wandb run."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.id = settings["id"] or "abc123"
        self.logged: list[dict] = []
        self.is_finished = False

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, values: dict) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.is_finished = True


def test_wandb_gets_the_same_scalars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[FakeRun] = []

    def init(**settings: Any) -> FakeRun:
        runs.append(FakeRun(settings))
        return runs[-1]

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for step in (1, 2):
        with MetricsWriter(tmp_path, wandb_project="mine", name="n", config={"a": 1}) as writer:
            writer.write(step, {"loss": jnp.float32(0.5)})
    first, second = runs
    assert (
        first.settings["project"] == "mine" and first.settings["name"] == "n" and first.settings["config"] == {"a": 1}
    )
    assert first.settings["id"] is None and second.settings["id"] == "abc123", "a resumed run goes on in the same one"
    assert [first.logged, second.logged] == [[{"step": 1, "loss": 0.5}], [{"step": 2, "loss": 0.5}]]
    assert first.is_finished and second.is_finished
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]

    def fail(**_: Any) -> None:
        raise RuntimeError("no key")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=fail))
    with pytest.raises(InputError, match="no key.*wandb login"):
        MetricsWriter(tmp_path, wandb_project="mine")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r'pip install "snlp-jax\[wandb\]"'):
        MetricsWriter(tmp_path, wandb_project="mine")


def test_a_writer_of_nothing_writes_nothing(tmp_path: Path) -> None:
    with MetricsWriter(None, tensorboard=True, wandb_project="mine") as writer:
        writer.write(1, {"loss": 1.0})
    assert not list(tmp_path.iterdir())


# -- The report --------------------------------------------------------------------------------------------------------


def test_report_of_a_long_run_is_small_and_shows_the_evaluation(tmp_path: Path) -> None:
    config = Config(name="long", train=dataclasses.replace(Config().train, num_steps=20_000))
    rng = np.random.default_rng(0)
    lines = []
    for step in range(40, 20_001, 40):
        record = {"step": step, "loss": 3 + rng.normal(), "grad_norm": 1.0}
        if step % 2000 == 0:
            record |= {f"frontier/s{i}": 3 + rng.random() for i in range(2)} | {"frontier/seq": 3.0, "val_loss": 3.0}
        lines.append(json.dumps(record))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "config.json").write_text(to_json(config))
    (tmp_path / "eval").mkdir()
    result = {"setting": "idn:n=8,k=2 <i>", "depth": 6, "ppl": 3.05, "ppl_change": 0.0071, "top1": 0.964}
    result |= {"ppl_interval": [0.0058, 0.0085], "timing": None}
    (tmp_path / "eval" / "eval.json").write_text(json.dumps({"results": [result], "info": {"step": 20_000}}))
    path = write_html(tmp_path)
    page = path.read_text()
    assert path.stat().st_size < 300_000
    assert "+0.71%" in page and "+0.58% to +0.85%" in page and "96.40%" in page
    assert "&lt;i&gt;" in page and "<i>" not in page
    assert_self_contained(page)
    with pytest.raises(InputError, match=r"no config\.json"):
        write_html(tmp_path / "eval")


def test_report_without_matplotlib_has_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = make_html(Config(), [{"step": 1, "loss": 2.5}], {"sessions": []}, None)
    assert "<img" not in page and "needs matplotlib" not in page.replace("need matplotlib", "") and "2.5" in page
    assert "pip install &quot;snlp-jax[plots]&quot;" in page


def test_curves() -> None:
    records = [{"step": 2, "a": 1.0}, {"step": 1, "a": 0.0}, {"step": 2, "a": 5.0, "b": float("nan")}]
    curves = curves_of(records)
    assert curves["a"][0].tolist() == [1, 2] and curves["a"][1].tolist() == [0.0, 5.0]
    values = np.arange(1000.0)
    values[:10] = np.nan
    steps, means = thinned((np.arange(1000), values), 100)
    assert len(means) == 100 and np.isnan(means[0]) and means[1] == np.mean(np.arange(10, 20)) and steps[-1] == 999
    changed = changed_fields(dataclasses.replace(Config(), name="x", mesh=MeshConfig(data=2)))
    assert changed == [("name", "x", "run"), ("mesh.data", "2", "1")]
