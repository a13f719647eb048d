"""The planner: what it reads off a compiled program, and that its formula says the same without compiling."""

import dataclasses
import json
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from problems import SMALL

from benchmarks import scaling
from benchmarks.hlo import Op, count_collectives, read_program
from benchmarks.plan import Args, parse_mesh, run_plan, widest_mesh
from benchmarks.plan_compile import Work, compile_plan
from benchmarks.plan_formula import expected
from benchmarks.plan_prices import PricedSlice
from snlp_jax.config import Config, MeshConfig, ModelConfig
from snlp_jax.errors import InputError
from snlp_jax.layout import abstract_weights
from snlp_jax.model import LanguageModel
from snlp_jax.notation import parse_schedule
from snlp_jax.parallel import make_mesh
from snlp_jax.parallel.chips import CHIPS, chip_of

MODEL = dataclasses.replace(SMALL, num_layers=4, num_kv_heads=4)

# ---------------------------------------------------------------- reading programs


def read(text):
    return read_program("HloModule m\n\n" + textwrap.dedent(text))


def test_loops_count_once_a_trip_and_stacks_once_a_slice():
    """L products of [B, D] with [D, D], in a scan: 2 B D D L FLOPs, and every weight is read once."""
    L, B, D = 6, 8, 64
    run = jax.jit(lambda w, x: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0])
    program = read_program(run.lower(jnp.ones((L, D, D)), jnp.ones((B, D))).compile().as_text())
    assert program.flops == 2 * B * D * D * L
    weights, states = 4 * L * D * D, 4 * L * B * D
    # Slices and states may be copied on the way; the whole stack in every trip would be six times the weights.
    assert weights + states <= program.bytes_read < 3 * (weights + states)
    assert program.num_kernels >= L and not program.collectives


def test_collectives_inside_loops():
    mesh = make_mesh(MeshConfig(layer=4))

    def local(x):
        body = lambda x, _: (jnp.cos(jax.lax.psum(x, "layer")), None)  # noqa: E731
        return jax.lax.all_gather(jax.lax.scan(body, x, None, length=5)[0], "layer")

    spec = PartitionSpec()
    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    program = read_program(run.lower(jnp.ones((3, 7))).compile().as_text())
    assert program.collectives == {"all-reduce": 5, "all-gather": 1}
    assert program.payload == {"all-reduce": 5 * 84, "all-gather": 4 * 84}
    assert {op.group for op in program.ops if op.is_collective} == {4}


def test_the_dialects_of_accelerators():
    """TPUs fetch weights onto the chip, count loops by a comparison, and name groups by mesh axes; GPUs split an
    exchange in two; both write a product with one row as a multiply and a sum."""
    program = read(
        """\
        %body (p: (s32[], f32[64])) -> (s32[], f32[64]) {
          %p = (s32[]{:T(128)}, f32[64]{0:T(128)}) parameter(0)
          %x = f32[64]{0:T(128)} get-tuple-element(%p), index=1
          %r = f32[64]{0:T(128)} all-reduce(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add
        }

        %condition (p: (s32[], f32[64])) -> pred[] {
          %p = (s32[]{:T(128)}, f32[64]{0:T(128)}) parameter(0)
          %limit = s32[]{:T(128)} constant(5)
          %i = s32[]{:T(128)} get-tuple-element(%p), index=0
          ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
        }

        %product (w: bf16[64,32], x: f32[64]) -> f32[32] {
          %w = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} parameter(0)
          %x = f32[64]{0:T(128)} parameter(1)
          %wide = f32[64,32]{1,0:T(8,128)} convert(%w)
          %rows = f32[64,32]{1,0:T(8,128)} broadcast(%x), dimensions={0}
          %each = f32[64,32]{1,0:T(8,128)} multiply(%wide, %rows)
          %zero = f32[]{:T(128)} constant(0)
          ROOT %sum = f32[32]{0:T(128)} reduce(%each, %zero), dimensions={0}, to_apply=%add
        }

        ENTRY %main (w: bf16[64,32], x: f32[64]) -> f32[32] {
          %w = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
          %x = f32[64]{0:T(128)} parameter(1)
          %fetch = (bf16[64,32]{1,0:T(8,128)(2,1)S(1)}, bf16[64,32]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%w)
          %near = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} copy-done(%fetch)
          %zero = s32[]{:T(128)} constant(0)
          %t = (s32[]{:T(128)}, f32[64]{0:T(128)}) tuple(%zero, %x)
          %loop = (s32[]{:T(128)}, f32[64]{0:T(128)}) while(%t), condition=%condition, body=%body
          %y = f32[64]{0:T(128)} get-tuple-element(%loop), index=1
          %a = f32[32]{0:T(128)S(1)} fusion(%near, %y), kind=kLoop, calls=%product
          %b = f32[32]{0:T(128)S(1)} fusion(%near, %y), kind=kLoop, calls=%product
          %g = (f32[32]{0}, f32[256]{0}) all-gather-start(%b), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
          ROOT %h = f32[256]{0} all-gather-done(%g)
        }
        """
    )
    assert program.collectives == {"all-reduce": 5, "all-gather": 1}
    assert program.payload == {"all-reduce": 5 * 256, "all-gather": 1024}
    assert [op.group for op in program.ops if op.is_collective] == [4, 8]
    assert program.flops == 2 * (2 * 64 * 32)
    weights, vector = 2 * 64 * 32, 4 * 64
    assert program.bytes_read == weights + 2 * vector  # fetched once, used twice
    assert program.num_kernels == 2  # the copy runs beside them


def test_convolutions_that_stand_for_batched_products():
    """A TPU writes [8, 256, 128] x [8, 256, 128] -> [8, 256, 256] as a window of 8 that meets one entry a place."""
    program = read(
        """\
        ENTRY %main (a: bf16[8,256,128], b: bf16[8,256,128]) -> f32[8,256,256] {
          %a = bf16[8,256,128]{2,1,0} parameter(0)
          %b = bf16[8,256,128]{2,1,0} parameter(1)
          ROOT %c = f32[8,256,256]{2,1,0} convolution(%a, %b), window={size=8 stride=7 lhs_dilate=8}, LABELS
        }
        """.replace("LABELS", "dim_labels=0bf_0oi->0bf")
    )
    assert program.flops == 2 * 8 * 256 * 256 * 128


def test_work_that_depends_on_data_is_refused():
    run = jax.jit(lambda x: jax.lax.while_loop(lambda x: x.sum() < 100.0, lambda x: x * 2.0, x))
    text = run.lower(jnp.ones(3)).compile().as_text()
    with pytest.raises(ValueError, match="the number of trips of loop '.*' depends on data"):
        read_program(text)
    assert count_collectives(text) == {}  # there are none, however often it runs
    with pytest.raises(ValueError, match="no ENTRY computation"):
        read_program("not a program")


# ---------------------------------------------------------------- the formula


@pytest.mark.parametrize(
    "axes, setting, sequential, kind",
    (
        ({"layer": 2, "data": 2}, "sid:n=3,k=2,init=batch_forward", "ring", "decode"),
        pytest.param({"layer": 2, "tensor": 2}, "idn:n=2,k=1", "tensor", "decode", marks=pytest.mark.slow),
    ),
)
def test_the_formula_is_what_is_compiled(axes, setting, sequential, kind):
    """The same collectives, as many and of the same sizes, and the same products: the gates and norms that the formula
    leaves out are less than a twentieth even in a model of width 32."""
    mesh, work = make_mesh(MeshConfig(**axes)), Work(kind, batch_size=8, context=16)
    schedule, model = parse_schedule(setting, MODEL.num_layers), LanguageModel(MODEL)
    compiled = compile_plan(Config(model=MODEL), schedule, mesh, work, backend="cpu", sequential=sequential)
    formula = expected(model, abstract_weights(model, schedule, mesh, sequential), mesh, work)
    assert formula.collectives == compiled.program.collectives
    for kind, size in compiled.program.payload.items():
        filling = 512 * axes["layer"] * formula.collectives[kind]  # SID's one scalar takes 128 numbers in a total
        assert formula.payload[kind] <= size <= formula.payload[kind] + filling, kind
    assert compiled.program.flops == pytest.approx(formula.flops, rel=0.05)
    assert compiled.memory > formula.bytes_read / max(1, schedule.depth)


# ---------------------------------------------------------------- chips


def test_steps_between_chips():
    """Half way round a closed axis, end to end along an open one, in the most compact box."""
    steps = lambda topology, group: PricedSlice.parse(topology).steps(group)  # noqa: E731
    assert steps("v5e:4x4", 16) == 3 + 3
    assert steps("v5e:16x16", 256) == 8 + 8
    assert steps("v5e:16x16", 16) == 3 + 3
    assert steps("v5p:4x4x4", 64) == 2 + 2 + 2
    assert steps("v5p:2x2x4", 4) == 2
    assert steps("h100:8", 8) == 7


def test_exchanges_never_get_cheaper():
    """With more bytes, or with more chips where there are none; and an all-reduce is no cheaper than the all-gather
    that is half of it."""
    for topology in ("v4:2x2x2", "v5e:4x8", "h100:8"):
        chips = PricedSlice.parse(topology)
        groups = [group for group in (2, 4, 8) if group <= chips.num_chips]
        for kind in ("all-reduce", "all-gather", "collective-permute"):
            times = [[chips.exchange_seconds(kind, size, group) for size in (0, 1e4, 1e7)] for group in groups]
            assert np.all(np.diff(times, axis=1) > 0), kind
            assert np.all(np.diff(times, axis=0)[:, 0] >= 0), kind  # of bytes more chips may bring more links
        assert chips.exchange_seconds("all-reduce", 1e7, 8) >= chips.exchange_seconds("all-gather", 1e7, 8)
        assert chips.exchange_seconds("all-reduce", 1e7, 1) == 0.0
        kernel = chips.seconds(Op("fusion", 3, flops=0.0, bytes_read=int(chips.chip.hbm_bandwidth)))
        assert kernel == pytest.approx(3 * (1.0 + chips.latency.kernel_launch))


def test_chips_by_the_names_of_devices():
    names = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e", "NVIDIA H100 80GB": "h100"}
    for kind, name in names.items():
        chip = chip_of(kind)
        assert chip is not None and chip.name == name
    assert chip_of("cpu") is None
    assert all(chip.source for chip in CHIPS.values())


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "config.py"
    model = ModelConfig(num_layers=16, embed_dim=512, num_heads=4, num_kv_heads=4, seq_len=256, vocab_size=1024)
    path.write_text(f"from snlp_jax.config import *\nconfig = Config(model={model!r})\n")
    return str(path)


def test_the_table_without_compiling(config_file, tmp_path, capsys):
    """Three plans; the region's exchanges are K + 1 and not two a layer, and everything is written down."""
    out = tmp_path / "plan.json"
    args = Args(config_file, "v5e:4x4", solver="idn:n=16,k=2", compile=False, json=str(out))
    record = run_plan(args)
    assert json.loads(out.read_text()) == json.loads(json.dumps(record))
    ours, tensor, ring = record["plans"]
    assert ours["collectives"] == {"all-gather": 3, "all-reduce": 1}
    assert tensor["collectives"] == {"all-reduce": 2 * 16 + 1, "all-gather": 1}
    assert ring["collectives"] == {"collective-permute": 15, "all-reduce": 2, "all-gather": 1}
    for plan in record["plans"]:
        parts = plan["memory_seconds"] + plan["exchange_seconds"] + plan["kernel_seconds"]
        assert plan["seconds"] == pytest.approx(parts) and min(parts, plan["held"]) > 0
    assert "in order, ring" in capsys.readouterr().out
    without = run_plan(dataclasses.replace(args, kernel_us=0.0, json="", twins=False))["plans"]
    assert [plan["kernel_seconds"] for plan in without] == [0.0]


def test_the_tensor_parallel_twin_splits_all_it_can():
    assert widest_mesh(MeshConfig(layer=16), 4) == MeshConfig(layer=4, tensor=4)
    assert widest_mesh(MeshConfig(data=2, layer=4, tensor=2), 8) == MeshConfig(data=2, layer=8, tensor=1)
    assert widest_mesh(MeshConfig(layer=8), 5) == MeshConfig(layer=1, tensor=8)


def test_refusals(config_file):
    for changes, word in (
        ({"topology": "v7:4x4"}, "unknown chip 'v7'"),
        ({"topology": "v5e:16"}, "v5e has 2 axes"),
        ({"topology": "v5e"}, "is no shape"),
        ({"topology": "h100:16"}, "a switch joins 8"),
        ({"mesh": "layer=8"}, "has 8 places"),
        ({"mesh": "rows=16"}, "cannot read 'rows=16'"),
        ({"solver": "idn:n=99"}, "n=99"),
        ({"solver": "idn:n=4,k=1,stage=split"}, "split stage"),
        ({"forward": True, "train": True}, "choose one"),
        ({"train": True}, "no formula"),
        ({"new_tokens": 0}, "--new-tokens"),
        ({"mesh": "data=2,layer=8", "batch": 3}, "not a multiple of data=2"),
        ({"config": "configs/none.py"}, "does not exist"),
    ):
        with pytest.raises(InputError, match=word) as raised:
            run_plan(dataclasses.replace(Args(config_file, "v5e:4x4", compile=False), **changes))
        assert "\n" not in str(raised.value)


def test_a_mesh_of_all_chips_by_default():
    assert parse_mesh("", PricedSlice.parse("v5p:2x2x4")) == MeshConfig(layer=16)
    assert parse_mesh("layer=4, tensor=4", PricedSlice.parse("v5e:4x4")) == MeshConfig(layer=4, tensor=4)


# ---------------------------------------------------------------- the sweep


def test_the_sweep(tmp_path, monkeypatch):
    """The region's arm may split its chips as it likes, so it is never slower than with all of them on one axis; one
    iteration needs less than two; and without launches everything is faster."""
    monkeypatch.setattr(scaling, "SLICES", {"v5e": ("1x2",), "h100": ("2",)})
    out = tmp_path / "scaling.json"
    scaling.main(scaling.Args(check=False, widths=(256,), depths=(8,), out=str(out), plot=""))
    saved = json.loads(out.read_text())
    rows = [dict(zip(saved["fields"], row, strict=True)) for row in saved["rows"]]
    assert len(rows) == 2 * len(scaling.ITERATIONS)
    for first, second in zip(rows, rows[1:], strict=False):
        assert first["topology"] != second["topology"] or first["seconds"] < second["seconds"]
    for row in rows:
        chips = PricedSlice.parse(row["topology"])
        setting = f"idn:n=6,k={row['iterations']}"
        program = scaling.formula(8, 256, (2, 1), setting, "tensor", chips.chip)
        assert row["seconds"] <= scaling.price(program, chips) * (1 + 1e-3)  # written with four digits
        assert row["fused"] < row["seconds"] and row["tensor_fused"] < row["tensor"]
    with pytest.raises(InputError, match="--widths must be multiples of 128"):
        scaling.Args(widths=(100,))
