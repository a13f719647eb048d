"""The metrics file stays valid JSON whatever is written and whenever the writer dies."""

import errno
import json
import math
import struct
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from snlp_jax.errors import InputError
from snlp_jax.io.files import atomic_write, explain_full_disk
from snlp_jax.io.metrics import MetricsWriter, read_metrics


def test_records_come_back(tmp_path):
    with MetricsWriter(tmp_path / "run") as writer:
        writer.write(1, {"loss": 2.5, "tokens": 7})
        assert read_metrics(tmp_path / "run" / "metrics.jsonl") == [{"step": 1, "loss": 2.5, "tokens": 7.0}]
        writer.write(2, {"loss": jnp.float32(0.5), "lr": np.float64(0.25)})
    with MetricsWriter(tmp_path / "run") as writer:
        writer.write(3, {})
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert records[1:] == [{"step": 2, "loss": 0.5, "lr": 0.25}, {"step": 3}]


def test_non_finite_numbers_are_valid_json(tmp_path):
    def refuse(name):
        raise AssertionError(name)

    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"a": float("nan"), "b": float("inf"), "c": -np.inf})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse) == {"step": 1, "a": "nan", "b": "inf", "c": "-inf"}
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(record["a"])
    assert (record["b"], record["c"]) == (math.inf, -math.inf)


def test_truncation_at_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(tmp_path, last_step=-1) as writer:
        for step in range(5):
            writer.write(step, {"loss": float("nan") if step == 1 else step / 4})
    with open(path, "a") as file:
        file.write('{"step": 5, "lo')
    assert [record["step"] for record in read_metrics(path)] == [0, 1, 2, 3, 4]
    with MetricsWriter(tmp_path, last_step=3) as writer:
        writer.write(4, {"loss": 9.0})
    assert [record["step"] for record in read_metrics(path)] == [0, 1, 2, 3, 4]
    assert read_metrics(path)[-1]["loss"] == 9.0
    assert math.isnan(read_metrics(path)[1]["loss"])
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_torn_line_alone_is_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 1.0}\n{"step": 2, "loss": \xff')
    with MetricsWriter(tmp_path, last_step=10) as writer:
        writer.write(11, {})
    assert [record["step"] for record in read_metrics(path)] == [1, 11]


def test_bad_files_are_input_errors(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(InputError, match="does not exist"):
        read_metrics(path)
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(InputError, match="line 2"):
        read_metrics(path)


def test_tensorboard(tmp_path):
    """On disk when ``write`` returns, as metrics.jsonl is; a resumed run hides what comes again."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    with MetricsWriter(tmp_path, last_step=3, tensorboard=True) as writer:
        writer.write(4, {"some_loss": 1.5, "other": 2.0})
        (content,) = (file.read_bytes() for file in tmp_path.glob("events.out.tfevents.*"))
    events = []
    while content:  # length, its checksum, an event, its checksum
        (length,) = struct.unpack("<Q", content[:8])
        events.append(event_pb2.Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    assert events[0].file_version == "brain.Event:2"
    assert (events[1].step, events[1].session_log.status) == (4, event_pb2.SessionLog.START)
    values = [(event.step, event.summary.value[0]) for event in events[2:]]
    assert [(step, v.tag, v.simple_value) for step, v in values] == [(4, "some_loss", 1.5), (4, "other", 2.0)]


def test_missing_tensorboard_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(InputError, match=r'pip install "snlp-jax\[tensorboard\]"'):
        MetricsWriter(tmp_path, tensorboard=True)
    MetricsWriter(tmp_path)


def test_atomic_write(tmp_path, monkeypatch):
    path = tmp_path / "file"
    atomic_write(path, "old")
    atomic_write(path, b"new")
    assert path.read_bytes() == b"new"

    def fail(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(InputError, match="is full"):
        atomic_write(path, "newer")
    assert path.read_bytes() == b"new"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_other_errors_pass():
    with pytest.raises(OSError, match="denied"), explain_full_disk("x"):
        raise OSError(errno.EACCES, "denied")
