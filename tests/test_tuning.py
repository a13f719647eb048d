"""The form of kernels that a CPU likes: chosen by readings, kept in the cache folder, and read from there."""

import dataclasses
import json

import numpy as np
from problems import SMALL, random_params

from snlp_jax.cli import tuning
from snlp_jax.cli.tuning import FILE, NEVER, Reading, choose, keep, measure, tuned
from snlp_jax.config import MachineConfig
from snlp_jax.layout import canonical
from snlp_jax.model import LanguageModel


def test_the_width_from_which_on_transposed_kernels_gain():
    """At 256 they lose, though at 128 they gain; a width counts by all its numbers of rows."""
    readings = [
        *(Reading(128, rows, 2.0, 1.0) for rows in (1, 8)),
        *(Reading(256, rows, 1.0, 1.1) for rows in (1, 8)),
        Reading(512, 1, 1.0, 1.2),
        Reading(512, 8, 2.0, 1.5),
        Reading(1024, 1, 1.0, 1.0),
    ]
    assert choose(readings) == 512
    assert choose([reading._replace(transposed_ms=9.0) for reading in readings]) == NEVER


def test_a_choice_is_kept_and_read(tmp_path, monkeypatch):
    """By commands, of machines that say nothing else."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuned(MachineConfig()) == MachineConfig()
    assert keep([Reading(64, 1, 2.0, 1.0)]) == 64
    assert tuned(MachineConfig(attention="xla")) == MachineConfig(attention="xla", transposed_from=64)
    assert tuned(MachineConfig(transposed_from=7)).transposed_from == 7
    file = tmp_path / "snlp_jax" / FILE
    assert json.loads(file.read_text())["readings"] == [{"width": 64, "rows": 1, "plain_ms": 2.0, "transposed_ms": 1.0}]
    for damaged in ("{", "[]", '{"transposed_from": "512"}', '{"transposed_from": -1}'):
        file.write_text(damaged)
        assert tuned(MachineConfig()) == MachineConfig(), damaged


def test_the_width_decides():
    config = dataclasses.replace(SMALL, embed_dim=32)
    for width, backend, is_transposed in ((32, "cpu", True), (33, "cpu", False), (0, "cpu", False), (32, "tpu", False)):
        model = LanguageModel(config, MachineConfig(transposed_from=width), backend=backend)
        assert ("out_t" in canonical(model, random_params(model))["blocks"]["attn"]) == is_transposed


def test_both_forms_are_measured_on_equal_numbers(monkeypatch):
    outputs = []
    monkeypatch.setattr(tuning, "NUM_LAYERS", 2)
    monkeypatch.setattr(tuning, "_seconds", lambda run, *arguments: outputs.append(np.asarray(run(*arguments))) or 1.0)
    found = list(measure((8, 16), (1, 3), repeats=1))
    assert [(each.width, each.rows) for each in found] == [(8, 1), (8, 3), (16, 1), (16, 3)]
    for plain, transposed in zip(outputs[::2], outputs[1::2], strict=True):
        assert plain.shape == transposed.shape
        np.testing.assert_allclose(plain, transposed, atol=1e-5)  # float32 sums of 64 numbers of order 1
