"""How much is taken at once, and what is refused before it is too much."""

import dataclasses
from pathlib import Path

import pytest

from snlp_jax import memory
from snlp_jax.config import LinearizeConfig, ModelConfig
from snlp_jax.errors import InputError
from snlp_jax.linearize import nbl
from snlp_jax.memory import GIB, check_room, free_bytes, free_host_bytes, host_bytes, rows_at_once
from snlp_jax.model import LanguageModel

LARGE = ModelConfig(num_layers=30, embed_dim=576, num_heads=9, num_kv_heads=3, seq_len=2048)


def test_small_models_take_whole_batches_and_large_ones_equal_parts() -> None:
    small = ModelConfig(num_layers=12, embed_dim=128, num_heads=2, num_kv_heads=1, seq_len=128)
    assert rows_at_once(small, 128, 32) == 32
    assert rows_at_once(LARGE, 2048, 32) == 1
    assert rows_at_once(LARGE, 512, 32) == 4  # of the 7 that fit
    assert rows_at_once(LARGE, 512, 6) == 6
    assert rows_at_once(LARGE, 2048, 32, backend="gpu") == 4
    assert rows_at_once(dataclasses.replace(LARGE, num_streams=4, use_x0_resid=False), 512, 32) == 1


def test_parts_divide_among_devices() -> None:
    assert rows_at_once(LARGE, 2048, 32, multiple=4) == 4
    assert rows_at_once(LARGE, 2048, 12, multiple=3) == 3
    assert rows_at_once(LARGE, 2**20, 8, multiple=8) == 8


def test_free_memory_is_what_the_machine_or_its_container_leaves(tmp_path: Path, monkeypatch) -> None:
    def write(name: str, text: str) -> tuple[str]:
        (tmp_path / name).write_text(text)
        return (str(tmp_path / name),)

    monkeypatch.setattr(memory, "MEMINFO", *write("meminfo", "MemTotal: 9 kB\nMemAvailable:    4096 kB\nodd line\n"))
    for name in ("CGROUP_LIMITS", "CGROUP_USED", "CGROUP_STAT"):
        monkeypatch.setattr(memory, name, (str(tmp_path / "none"),))
    assert free_host_bytes() == free_bytes() == 4096 * 1024
    monkeypatch.setattr(memory, "CGROUP_LIMITS", write("max", "3000000\n"))
    monkeypatch.setattr(memory, "CGROUP_USED", write("current", "2500000\n"))
    monkeypatch.setattr(memory, "CGROUP_STAT", write("stat", "anon 7\ninactive_file 100000\n"))
    assert host_bytes() == 3000000 and free_host_bytes() == 600000
    write("max", "max\n")
    assert host_bytes() > 3000000


def test_what_needs_more_than_is_free_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: 3 * GIB)
    check_room("it", 3 * GIB, "lower it")
    check_room("it", None, "lower it")
    with pytest.raises(InputError, match=r"^setting 'x' would take 4.5 GiB, but 3 GiB are free; lower --seq-len.$"):
        check_room("setting 'x'", 9 * GIB // 2, "lower --seq-len")
    monkeypatch.setattr(memory, "free_bytes", lambda: None)
    check_room("it", 2**60, "lower it")


def test_statistics_are_taken_in_turns_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many layers as half of what is free holds, at least one; a number that is asked for stays."""
    model, options = LanguageModel(LARGE), LinearizeConfig(attention=2, mlp=2)
    one = nbl.layer_bytes(model, options)
    assert one == 2 * nbl.layer_bytes(model, LinearizeConfig(attention=1))
    for free, layers in ((0, 1), (7 * one, 3), (10**15, 30)):
        monkeypatch.setattr(nbl, "free_host_bytes", lambda free=free: free)
        assert nbl.layers_at_once(model, options) == layers
    monkeypatch.setattr(nbl, "free_host_bytes", lambda: 8 * one)
    assert nbl.num_steps(model, options, 5) == -(-30 // 4) * 5 + 2 * 30
    assert nbl.statistics_bytes(model, options) > 4 * one
    assert nbl.layers_at_once(model, LinearizeConfig(attention=1, layers_at_once=7)) == 7
