"""What is saved comes back bit for bit, on any sharding; what is broken is skipped, with a sentence."""

import errno
import json
import logging
import shutil
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from snlp_jax.config import Config, DataConfig, EvalConfig, MeshConfig, OptimConfig, TrainConfig, to_json
from snlp_jax.errors import InputError
from snlp_jax.io.checkpoint import Checkpointer
from snlp_jax.io.checksum import checksum
from snlp_jax.io.run_dir import check_run_dir

L, D, F = 8, 16, 24


def layer_mesh(num_devices):
    axes = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((num_devices,), ("layer",), axis_types=axes, devices=jax.devices()[:num_devices])


def shardings(tree, mesh):
    """Stacks over the layer axis, everything else on every device."""
    spec = {True: PartitionSpec("layer"), False: PartitionSpec()}
    return jax.tree.map(lambda a: NamedSharding(mesh, spec[a.ndim == 3 and a.shape[0] == L]), tree)


def make_state(seed=0):
    """A little training state with every kind of node optax makes; new buffers each time."""
    return _make_state(jnp.int32(seed))


@jax.jit
def _make_state(seed):
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {
        "embed": {"token": jax.random.normal(keys[0], (10, D))},
        "blocks": {"up": jax.random.normal(keys[1], (L, D, F)), "scale": jnp.full((L,), 0.1, jnp.bfloat16)},
        "head": {"mid_scale": jnp.float32(0.2)},
    }
    labels = {"embed": "adam", "blocks": "sgd", "head": "adam"}
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.multi_transform({"adam": optax.adamw(1e-3), "sgd": optax.sgd(1e-2, momentum=0.9)}, labels),
    )
    opt_state = optimizer.init(params)
    _, opt_state = optimizer.update(jax.tree.map(jnp.ones_like, params), opt_state, params)
    return {"params": params, "opt_state": opt_state, "step": seed}


def abstract(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)


def assert_bit_equal(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def make_iterator():
    dataset = grain.MapDataset.range(100).seed(1).shuffle().repeat(None).batch(4)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1)))


def save_some(directory, val_losses, keep_last=3):
    """Checkpoint i + 1 holds ``make_state(i + 1)``, and the iterator after i + 1 batches."""
    iterator = make_iterator()
    with Checkpointer(directory, keep_last) as checkpointer:
        for i, val_loss in enumerate(val_losses):
            next(iterator)
            metrics = {} if val_loss is None else {"val_loss": val_loss}
            checkpointer.save(i + 1, make_state(i + 1), iterator, metrics)
    return iterator


def data_files(step_dir, item):
    """What holds arrays, and trees of where they lie: some of an earlier state of the tree, which nobody reads."""
    return [file for file in (step_dir / item).rglob("d/*") if file.is_file()]


def array_file(step_dir):
    """The file with most of the array data."""
    return max(data_files(step_dir, "params"), key=lambda file: file.stat().st_size)


# -- Round trips -------------------------------------------------------------------------------------------------------


def test_round_trip_with_structure_and_data(tmp_path):
    """NamedTuples, MaskedNodes and EmptyStates come back, and the next batch is the next batch."""
    with pytest.raises(InputError, match="no checkpoint directory"):
        Checkpointer(tmp_path / "absent", read_only=True)
    with Checkpointer(tmp_path, 3) as checkpointer:
        assert checkpointer.restore(abstract(make_state()), make_iterator()) is None
        assert (checkpointer.steps(), checkpointer.latest_step, checkpointer.best_step) == ([], None, None)
        with pytest.raises(InputError, match="no checkpoint"):
            checkpointer.restore_params(abstract(make_state()["params"]))
    iterator = save_some(tmp_path, [1.0, 2.0])
    with Checkpointer(tmp_path, 3) as checkpointer:
        restored = make_iterator()
        step, state = checkpointer.restore(abstract(make_state()), restored)
    assert step == 2
    assert_bit_equal(state, make_state(2))
    assert restored.get_state() == {"next_index": 2}, "the same for every number of processes"
    for _ in range(60):  # across the end of an epoch of 25 batches
        np.testing.assert_array_equal(next(restored), next(iterator))


def test_config_and_metrics_are_kept(tmp_path):
    config_json = to_json(Config())
    with Checkpointer(tmp_path, 1, config_json=config_json) as checkpointer:
        checkpointer.save(1, make_state(), None, {"val_loss": 1.5, "loss": float("nan")})
        meta = checkpointer.metadata(1)
        assert checkpointer.restore(make_state(), None)[0] == 1
    assert meta["config"] == json.loads(config_json)
    assert meta["metrics"] == {"val_loss": 1.5, "loss": "nan"}


def test_saved_on_eight_devices_restored_on_four_and_one(tmp_path):
    state = make_state()
    mesh = layer_mesh(8)
    sharded = jax.device_put(state, shardings(state, mesh))
    with Checkpointer(tmp_path, 1) as checkpointer:
        checkpointer.save(1, sharded, None, {})
        four = layer_mesh(4)
        wanted = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings(state, four)
        )
        _, on_four = checkpointer.restore(wanted, None)
        one = SingleDeviceSharding(jax.devices()[3])
        wanted = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=one), state)
        _, on_one = checkpointer.restore(wanted, None)
        _, by_default = checkpointer.restore(jax.eval_shape(lambda: state), None)
    assert on_four["params"]["blocks"]["up"].sharding.spec == PartitionSpec("layer")
    assert len(on_four["params"]["blocks"]["up"].sharding.device_set) == 4
    assert all(leaf.sharding == one for leaf in jax.tree.leaves(on_one))
    for restored in (on_four, on_one, by_default):
        assert_bit_equal(restored, state)


def test_donated_buffers_are_saved_as_they_were(tmp_path):
    state = make_state(1)
    expected = jax.tree.map(np.array, state)
    step_fn = jax.jit(lambda tree: jax.tree.map(lambda a: a + 1, tree), donate_argnums=0)
    with Checkpointer(tmp_path, 1) as checkpointer:
        checkpointer.save(1, state, None, {})
        step_fn(state)
        _, restored = checkpointer.restore(abstract(make_state()), None)
    assert_bit_equal(restored, expected)


@pytest.mark.parametrize("spec", [("layer",), (None, None, "layer")])
def test_a_checksum_is_the_sum_over_any_division(spec):
    """Whatever the devices hold, the parts add up to the checksum of the whole, and a changed bit shows."""
    mesh = layer_mesh(8)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.int8):
        array = (100 * jax.random.normal(jax.random.key(0), (8, 16, 24))).astype(dtype)
        whole = checksum(np.asarray(array), (slice(None),) * 3, array.shape)
        parts = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec))).addressable_shards
        held = [part for part in parts if part.replica_id == 0]
        assert whole == sum(checksum(np.asarray(part.data), part.index, array.shape) for part in held) % 2**64
        changed = np.array(array)
        changed.view(np.uint8)[5, 3, 2] ^= 1
        assert whole != checksum(changed, (slice(None),) * 3, array.shape)
        assert whole != checksum(np.asarray(array)[::-1], (slice(None),) * 3, array.shape)


# -- Which are kept ----------------------------------------------------------------------------------------------------


def test_newest_and_best_are_kept(tmp_path):
    losses = [1.0, float("nan"), None, 2.5]
    save_some(tmp_path, losses, keep_last=2)
    with Checkpointer(tmp_path, 2) as checkpointer:
        assert checkpointer.steps() == [1, 3, 4]
        assert (checkpointer.best_step, checkpointer.latest_step) == (1, 4)
        step, params = checkpointer.restore_params(abstract(make_state()["params"]), "best")
        assert step == 1
        assert_bit_equal(params, make_state(1)["params"])
        assert_bit_equal(checkpointer.restore_params(abstract(make_state()["params"]), 3)[1], make_state(3)["params"])
        assert checkpointer.restore_params(make_state()["params"])[0] == 4
        checkpointer.save(5, make_state(5), None, {"val_loss": 0.5})
        assert checkpointer.steps() == [4, 5]
        with pytest.raises(InputError, match="no checkpoint 2, only"):
            checkpointer.restore_params(abstract(make_state()["params"]), 2)


def test_without_val_loss_there_is_no_best_and_a_step_is_saved_once(tmp_path):
    """Of parameters alone, which are a state too."""
    state = {"params": make_state()["params"]}
    with Checkpointer(tmp_path, 1) as checkpointer:
        for step, val_loss in ((1, "nan"), (2, "inf"), (2, 0.1)):
            checkpointer.save(
                step, jax.tree.map(lambda leaf, step=step: leaf * step, state), None, {"val_loss": val_loss}
            )
        assert (checkpointer.steps(), checkpointer.best_step) == ([2], None)
        with pytest.raises(InputError, match="has a val_loss"):
            checkpointer.restore_params(abstract(state["params"]), "best")
        assert_bit_equal(checkpointer.restore(abstract(state), None)[1], jax.tree.map(lambda leaf: leaf * 2, state))


# -- Broken ones -------------------------------------------------------------------------------------------------------


def flip_a_byte(step_dir):
    file = array_file(step_dir)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


def swap_arrays(step_dir):
    """Well-formed, wrong arrays: nothing but the checksum can tell."""
    shutil.rmtree(step_dir / "params")
    shutil.copytree(step_dir.parent / "1" / "params", step_dir / "params")


def change_a_checksummed_metric(step_dir):
    file = step_dir / "meta" / "metadata"
    text = file.read_text()
    assert "3.0" in text
    file.write_text(text.replace("3.0", "0.1"))


BREAKS = {
    "other arrays": swap_arrays,
    "changed metadata": change_a_checksummed_metric,
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", BREAKS)
def test_broken_newest_is_skipped(tmp_path, how, caplog):
    save_some(tmp_path, [2.0, 1.0, 3.0])
    BREAKS[how](tmp_path / "3")
    with caplog.at_level(logging.WARNING, "snlp_jax"), Checkpointer(tmp_path, 2) as checkpointer:
        iterator = make_iterator()
        step, state = checkpointer.restore(abstract(make_state()), iterator)
        assert step == 2
        assert_bit_equal(state, make_state(2))
        expected = make_iterator()
        for _ in range(2):
            next(expected)
        np.testing.assert_array_equal(next(iterator), next(expected))
        messages = [record.getMessage() for record in caplog.records if record.name.startswith("snlp_jax")]
        assert len(messages) == 1
        assert messages[0].startswith("skipping checkpoint 3")
        assert "\n" not in messages[0]
        # The run goes on and saves that step again.
        assert checkpointer.steps() == [1, 2]
        assert (tmp_path / "3.corrupt").is_dir()
        checkpointer.save(3, make_state(3), make_iterator(), {"val_loss": 3.0})
        assert checkpointer.steps() == [2, 3]
        assert checkpointer.restore(abstract(make_state()), make_iterator())[0] == 3


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_whatever_file_is_damaged_wrong_arrays_never_come_back(tmp_path):
    """Each file of the newest in turn: either nobody needs it and the arrays are right, or the one before is used."""
    small = lambda step: {"params": {"w": jnp.arange(512.0) * step}, "step": jnp.int32(step)}  # noqa: E731
    with Checkpointer(tmp_path, 2) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, small(step), make_iterator(), {})
    whole = tmp_path.parent / f"{tmp_path.name}-whole"
    shutil.copytree(tmp_path / "2", whole)
    found, files = [], sorted(path.relative_to(tmp_path) for path in (tmp_path / "2").rglob("*") if path.is_file())
    for number, name in enumerate(files):
        content = bytearray((tmp_path / name).read_bytes())
        damage = ("flipped", "truncated", "deleted")[number % 3]
        if damage == "flipped" and content:
            content[len(content) // 2] ^= 4
        (tmp_path / name).unlink()
        if damage != "deleted":
            (tmp_path / name).write_bytes(content if damage == "flipped" else content[: len(content) // 2])
        with Checkpointer(tmp_path, 2) as checkpointer:
            step, state = checkpointer.restore(abstract(small(0)), make_iterator())
        assert_bit_equal(state, small(step))
        assert (tmp_path / "2.corrupt").exists() == (step == 1)
        found.append(step)
        for left in ("2", "2.corrupt"):
            shutil.rmtree(tmp_path / left, ignore_errors=True)
        shutil.copytree(whole, tmp_path / "2")
    assert {1, 2} == set(found), dict(zip(files, found, strict=True))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_none_is_good(tmp_path):
    save_some(tmp_path, [2.0, 1.0])
    for step in ("1", "2"):
        flip_a_byte(tmp_path / step)
    with Checkpointer(tmp_path, 2) as checkpointer:
        with pytest.raises(InputError, match="no good checkpoint"):
            checkpointer.restore(abstract(make_state()), make_iterator())
        with pytest.raises(InputError, match="no good checkpoint .2: "):
            checkpointer.restore_params(abstract(make_state()["params"]), "best")
        assert checkpointer.steps() == [1, 2]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_read_only_touches_nothing(tmp_path, caplog):
    save_some(tmp_path, [2.0, 1.0])
    flip_a_byte(tmp_path / "2")
    (tmp_path / "3.orbax-checkpoint-tmp").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with Checkpointer(tmp_path, read_only=True) as checkpointer:
        assert checkpointer.restore_params(abstract(make_state()["params"]), "last")[0] == 1
        with pytest.raises(ValueError, match="read only"):
            checkpointer.save(4, make_state(), None, {})
    assert sorted(tmp_path.rglob("*")) == before


def test_leftover_of_a_killed_save_is_removed(tmp_path):
    save_some(tmp_path, [2.0])
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
    with Checkpointer(tmp_path, 2) as checkpointer:
        assert checkpointer.steps() == [1]
        assert checkpointer.restore(abstract(make_state()), None)[0] == 1
        checkpointer.save(2, make_state(2), None, {})
    assert not list(tmp_path.glob("*tmp*"))


def test_other_arrays_than_the_template_are_an_input_error(tmp_path):
    """Not corruption: nothing is set aside, and the message names the array."""
    save_some(tmp_path, [2.0])
    state = make_state()
    wider = {**state, "params": {**state["params"], "embed": {"token": jnp.zeros((10, D + 1))}}}
    fewer = {**state, "params": {name: state["params"][name] for name in ("embed", "blocks")}}
    other = {**state, "step": jnp.float32(0)}
    more = {**state, "ema": state["params"]}
    cases = {"params/embed/token": wider, "params/head/mid_scale": fewer, "step": other, "ema/": more}
    with Checkpointer(tmp_path, 2) as checkpointer:
        for path, template in cases.items():
            with pytest.raises(InputError, match=path):
                checkpointer.restore(abstract(template), None)
        assert checkpointer.steps() == [1]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("RESOURCE_EXHAUSTED: Failed to write 11 bytes: No space left on device [os_error_code='28']"),
    ],
)
def test_full_disk_is_an_input_error(tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    with Checkpointer(tmp_path, 2) as checkpointer:
        monkeypatch.setattr(ocp.CheckpointManager, "save", fail)
        with pytest.raises(InputError, match=str(tmp_path)):
            checkpointer.save(1, make_state(), None, {"val_loss": 1.0})
        assert checkpointer.best_step is None


# -- The run directory -------------------------------------------------------------------------------------------------


def test_new_run_dir_gets_its_config(tmp_path):
    for name, resume in (("a/b", False), ("c", True)):
        check_run_dir(tmp_path / name, Config(), resume)
        assert sorted(file.name for file in (tmp_path / name).iterdir()) == ["checksums.json", "config.json"]
        assert (tmp_path / name / "config.json").read_text() == to_json(Config())


def test_a_field_that_came_later_had_its_default(tmp_path):
    saved = json.loads(to_json(Config()))
    del saved["lora"], saved["train"]["ema_decay"]
    Path(tmp_path / "config.json").write_text(json.dumps(saved))
    averaged = Config(train=TrainConfig(ema_decay=0.9))
    with pytest.raises(InputError, match="train.ema_decay is 0.0 there and 0.9 here"):
        check_run_dir(tmp_path, averaged, True)
    check_run_dir(tmp_path, Config(), True)


def test_used_run_dir_needs_resume(tmp_path):
    check_run_dir(tmp_path, Config(), False)
    with pytest.raises(InputError, match="use --resume or another --run-dir"):
        check_run_dir(tmp_path, Config(), False)
    check_run_dir(tmp_path, Config(), True)


@pytest.mark.parametrize("resume", [False, True])
def test_other_config_is_refused_by_name(tmp_path, resume):
    check_run_dir(tmp_path, Config(), False)
    with pytest.raises(InputError, match=r"optim\.matrix_lr is 0\.02 there and 0\.03 here"):
        check_run_dir(tmp_path, Config(optim=OptimConfig(matrix_lr=0.03)), resume)
    with pytest.raises(InputError, match=r"train\.num_steps"):
        check_run_dir(tmp_path, Config(train=TrainConfig(num_steps=7), data=DataConfig(seed=0)), resume)
    assert (tmp_path / "config.json").read_text() == to_json(Config())


def test_what_a_resumed_run_may_change(tmp_path):
    check_run_dir(tmp_path, Config(), False)
    train = TrainConfig(log_every=3, eval_every=4, checkpoint_every=5, keep_last=6, sample_every=7, tensorboard=True)
    mesh = MeshConfig(data=2, layer=3, ring_microbatches=4)
    changed = Config(run_dir="x", train=train, mesh=mesh, eval=EvalConfig(num_windows=3))
    check_run_dir(tmp_path, changed, True)
    assert (tmp_path / "config.json").read_text() == to_json(changed)


def test_unusable_run_dirs(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        check_run_dir(tmp_path / "file" / "run", Config(), False)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match=r"holds metrics\.jsonl of a run without config\.json"):
        check_run_dir(tmp_path / "half", Config(), True)
    (tmp_path / "torn").mkdir()
    Path(tmp_path / "torn" / "config.json").write_text('{"a"')
    with pytest.raises(InputError, match="not valid JSON"):
        check_run_dir(tmp_path / "torn", Config(), True)
