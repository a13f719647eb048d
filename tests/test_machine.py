"""Precision and kernels are those of the machine where a run is opened, not of the one that trained it."""

import dataclasses
import json
import runpy
import sys

import jax.numpy as jnp
import pytest
from tiny_run import ROOT, random_run

from snlp_jax.cli.infer import Args, open_engine
from snlp_jax.config import Config, MachineConfig, from_json, load_config, to_json
from snlp_jax.errors import InputError
from snlp_jax.io.run_dir import check_run_dir
from snlp_jax.run import load_run, read_config

OLD = {"attention": "splash", "decode_attention": "pallas", "compute_dtype": "float32"}
"""As a run of an older version, trained on a TPU, has them among the fields of its model."""


@pytest.fixture(scope="module")
def old_run(tmp_path_factory):
    run = random_run(tmp_path_factory.mktemp("machine") / "run")
    values = json.loads((run / "config.json").read_text())
    del values["machine"]
    values["model"] |= OLD
    (run / "config.json").write_text(json.dumps(values))
    return run


def test_the_machine_is_chosen_where_a_run_is_opened(old_run, monkeypatch):
    trained_with = MachineConfig(compute_dtype="float32")  # changes numbers, so it stays; kernels do not
    assert read_config(old_run).machine == open_engine(Args(old_run)).model.machine == trained_with
    assert load_run(old_run, "last").model.dtype == jnp.float32
    machine = MachineConfig("bfloat16", attention="xla")
    assert load_run(old_run, "last", machine).model.machine == machine
    assert open_engine(Args(old_run, machine=machine)).model.machine == machine
    seen = []
    monkeypatch.setattr("snlp_jax.eval.evaluate_run", lambda *args: seen.append(args[1]) or sys.exit(0))
    flags = ["--machine.attention", "xla", "--machine.compute-dtype", "bfloat16"]
    monkeypatch.setattr(sys, "argv", ["eval.py", str(old_run), *flags])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "eval.py"), run_name="__main__")
    assert seen[0].machine == machine


def test_older_configs_mean_the_same(old_run, tmp_path):
    saved = from_json((old_run / "config.json").read_text())
    assert saved.machine == MachineConfig(**OLD)
    assert from_json(to_json(saved)) == saved
    # A resumed run may take other kernels, and no other precision.
    check_run_dir(old_run, dataclasses.replace(saved, machine=MachineConfig("float32")), resume=True)
    with pytest.raises(InputError, match=r"machine\.compute_dtype"):
        check_run_dir(old_run, dataclasses.replace(saved, machine=MachineConfig()), resume=True)
    path = tmp_path / "old.py"
    path.write_text("from snlp_jax.config import *\nconfig = Config(model=ModelConfig(attention='xla'))\n")
    with pytest.raises(InputError, match="attention"):
        load_config(path)


def test_kernels_that_lack_a_feature_are_refused():
    for fields in ({"data": {"mask_documents": True}}, {"model": {"attention_softcap": 50.0}}):
        with pytest.raises(InputError, match="machine.attention 'cudnn'"):
            from_json(json.dumps(fields | {"machine": {"attention": "cudnn"}}), Config)
