"""Programs compiled ahead of time for TPUs and GPUs that are not here: how many collectives they execute.

Needs the compilers: ``make aot`` installs libtpu and the CUDA plugin into an environment of their own and runs this
file there. Each target compiles in a process of its own, because the two plugins and the suite's eight CPU devices want
different settings.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

SCRIPT = """
import json, sys
from snlp_jax.config import Config, MeshConfig, ModelConfig
from snlp_jax.notation import parse_schedule
from snlp_jax.parallel.chips import Slice
from snlp_jax.parallel.plan_compile import Work, compile_plan, plan_mesh, prepare_environment

prepare_environment()
chips = Slice.parse(sys.argv[1])
backend = "tpu" if chips.chip.torus_axes else "gpu"
model = ModelConfig(
    num_layers=16, embed_dim=int(sys.argv[4]), num_heads=8, num_kv_heads=8, seq_len=128, vocab_size=1024,
    attention=sys.argv[3], window_pattern="SSSL",
)
for kind, tensor, setting, sequential in json.loads(sys.argv[2]):
    mesh = plan_mesh(MeshConfig(layer=chips.num_chips // tensor, tensor=tensor), chips)
    work, schedule = Work(kind, batch_size=1, context=128), parse_schedule(setting, 16)
    compiled = compile_plan(Config(model=model), schedule, mesh, work, backend=backend, sequential=sequential)
    print(json.dumps(compiled.program.collectives))
"""

HEAD = {"all-reduce": 1, "all-gather": 1}
"""The embedding, whose rows are spread, and the logits: two in all, none for the mid-layer state."""
CASES = (
    ("decode", 1, "idn:n=16,k=2", "tensor", {"all-gather": 2}),
    ("decode", 1, "sid:n=8,k=3,init=batch_forward", "tensor", {"all-gather": 3 + 1, "all-reduce": 2 * 8}),
    ("decode", 1, "seq", "tensor", {"all-reduce": 2 * 16}),
    ("decode", 1, "seq", "ring", {"collective-permute": 8 - 1, "all-reduce": 1}),
    ("decode", 2, "idn:n=8,k=3", "tensor", {"all-gather": 3, "all-reduce": 2 * 3 + 2 * 8}),
    ("forward", 1, "idn:n=8,k=2,init=batch_forward", "tensor", {"all-gather": 2 + 1, "all-reduce": 2 * 8}),
    ("forward", 1, "idn:n=12,k=1", "ring", {"all-gather": 1, "collective-permute": 8 - 1, "all-reduce": 1}),
)
"""What is compiled, with how many chips on the tensor axis, and the collectives beside those of the ends: K in a region
and one more for a batched guess, two a layer in order or one a device in a ring; and with a tensor axis two a sweep."""
PLUGINS = {"v5e:2x4": "libtpu", "h100:8": "jax_cuda13_plugin"}


def compiled_counts(topology, cases=CASES, attention="xla", width=256):
    if find_spec(PLUGINS[topology]) is None:
        pytest.skip(f"{PLUGINS[topology]} is not installed here; `make aot` runs this with it")
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    what = json.dumps([case[:4] for case in cases])
    run = [sys.executable, "-c", SCRIPT, topology, what, attention, str(width)]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def assert_counts(cases, found):
    for case, counts in zip(cases, found, strict=True):
        region = case[4]
        assert counts == {kind: region.get(kind, 0) + HEAD.get(kind, 0) for kind in region | HEAD}, case


@pytest.mark.parametrize("topology", PLUGINS)
def test_collectives_of_the_compiled_programs(topology):
    assert_counts(CASES, compiled_counts(topology))


def test_splash_attention_runs_where_layers_are_spread():
    """The TPU's kernel may not stand where an axis of several chips is left to the compiler; its settings run over
    several lines of the text, which the counter has to step over."""
    cases = [("forward", 1, "idn:n=8,k=2", "ring", {"all-gather": 2, "collective-permute": 8 - 1, "all-reduce": 1})]
    assert_counts(cases, compiled_counts("v5e:2x4", cases, attention="auto", width=1024))
