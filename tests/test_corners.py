"""The table of corners: every form of weights, stage, correction, cache rule, mesh and dtype beside the plain model.

Each setting makes as many iterations as the region has nodes, so its logits are those of ``LanguageModel.__call__``,
which knows no schedule, cache or mesh. Four tokens are evaluated at once, or two of them behind a cache of the other
two. A feature that is added gets its rows here, or is refused in a sentence (``REFUSED``).
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import SMALL, random_params

from snlp_jax.cache import Past, append, fill, plan_rings
from snlp_jax.config import HiddenNormConfig, LossConfig, MachineConfig, MeshConfig
from snlp_jax.errors import InputError
from snlp_jax.forward import Keep, forward
from snlp_jax.infer.rules import check_settings
from snlp_jax.layout import in_order, prepare
from snlp_jax.linearize.calibrate import fit_calibration
from snlp_jax.model import LanguageModel
from snlp_jax.notation import parse_schedule
from snlp_jax.parallel.mesh import make_mesh, put_batch
from snlp_jax.train.loss import loss_fn, make_plan
from snlp_jax.train.passes import Passes
from snlp_jax.types import Batch

BASE = dataclasses.replace(SMALL, num_layers=3, embed_dim=32, num_heads=2, num_kv_heads=1, seq_len=8, short_window=2)
MODELS = {
    "window": BASE,  # SSL, as the last layer always sees all; an S layer sees two tokens and its own
    "mixed": dataclasses.replace(BASE, window_pattern="SLS"),
    "streams": dataclasses.replace(BASE, use_x0_resid=False, num_streams=2, sinkhorn_iters=4, window_pattern="L"),
    "dynamic": dataclasses.replace(BASE, use_x0_resid=False, num_streams=2, hyper_maps="dynamic", sinkhorn_iters=4),
    "linear": dataclasses.replace(BASE, linear_attention=(1,)),
    "affine": dataclasses.replace(BASE, linear_attention=(1,), linear_mlp=(1,)),
}
TOKENS_BT = np.random.default_rng(0).integers(0, BASE.vocab_size, (2, 4)).astype(np.int32)


class Corner(NamedTuple):
    """One row: a setting and where it runs."""

    setting: str
    model: str = "window"
    layout: str = "auto"
    rule: str = ""
    """What the cache keeps of a region; without one all tokens are evaluated at once."""
    mesh: MeshConfig | None = None
    sequential: str = "tensor"
    dtype: str = "float32"
    backend: str | None = None
    is_transposed: bool = False
    """Whether kernels are kept transposed, as a CPU has those of a wide model."""
    is_slow: bool = False
    """Whether it runs with the slow tests: others meet the same code in pairs."""


DATA, LAYER, BOTH = MeshConfig(data=2), MeshConfig(layer=2), MeshConfig(data=2, layer=2)
CORNERS = [
    # forms of weights in order and in a region; a stack read by rows is what accelerators do
    Corner("seq"),
    Corner("seq", layout="list", model="mixed", rule="last_eval"),
    Corner("seq", layout="stack", model="mixed", is_slow=True),
    Corner("seq", backend="tpu", model="mixed", rule="last_eval"),
    Corner("seq", model="linear", rule="last_eval"),
    Corner("idn:n=2,k=2", backend="tpu"),
    Corner("idn:n=3,k=3", layout="stack", model="mixed", rule="refreshed"),
    Corner("idn:n=3,k=3", layout="list", model="mixed", rule="refreshed"),
    Corner("sid:n=3,k=3,init=batch_forward", layout="list", rule="per_iteration"),
    Corner("sid:n=3,k=3,init=batch_forward", model="linear", rule="per_iteration", is_slow=True),
    Corner("idn:n=3,k=2", model="affine"),  # as many as there are other layers
    Corner("diag:n=3,k=3", model="affine", rule="refreshed", is_slow=True),
    Corner("seq", is_transposed=True, layout="stack", model="mixed", rule="last_eval"),
    Corner("idn:n=3,k=3", is_transposed=True, model="linear", rule="last_eval"),
    Corner("idn:n=3,k=3", is_transposed=True, layout="list", rule="refreshed", is_slow=True),
    Corner("hcn:n=3,k=3", is_transposed=True, model="dynamic", is_slow=True),
    # stages
    Corner("idn:n=3,k=3,stage=3xF1", is_transposed=True),
    Corner("idn:n=3,k=3,stage=3xF1", rule="per_iteration"),
    Corner("idn:n=3,k=3,stage=3xF1", layout="list", rule="per_iteration", is_slow=True),
    Corner("idn:n=3,k=3,stage=3xF1", layout="list", model="mixed"),
    Corner("idn:n=3,k=3,stage=3xF1", mesh=LAYER, rule="per_iteration"),
    # corrections
    Corner("diag:n=3,k=3,probes=2", rule="refreshed"),
    Corner("exact:n=3,k=3", model="mixed", rule="last_eval"),
    Corner("exact:n=3,k=3,damp=0.5", model="affine"),
    Corner("idn:n=3,k=3,trust=0.5"),
    Corner("cal:n=3,k=3,init=cal,fit=corner"),
    Corner("cal:n=3,k=3,fit=corner", layout="list", rule="per_iteration", is_slow=True),
    Corner("hcn:n=3,k=3", model="streams", rule="per_iteration", is_slow=True),
    Corner("hcn:n=3,k=3", model="dynamic", rule="last_eval"),
    # tolerances
    Corner("idn:n=3,tol=1e-9", layout="list", model="mixed", rule="last_eval"),
    Corner("idn:n=3,tol=1e-9", mesh=BOTH),
    # meshes
    Corner("seq", mesh=LAYER, sequential="ring", rule="last_eval"),
    Corner("seq", mesh=MeshConfig(tensor=2, data=2)),
    Corner("idn:1-3,k=2", mesh=LAYER, sequential="ring"),
    Corner("idn:n=3,k=3", mesh=DATA, model="mixed", rule="per_iteration"),
    Corner("idn:n=3,k=3", mesh=DATA, model="linear", rule="refreshed", is_slow=True),
    Corner("sid:n=3,k=3,init=batch_forward", mesh=LAYER, rule="per_iteration"),
    Corner("exact:n=3,k=3", mesh=LAYER, is_slow=True),
    Corner("cal:n=3,k=3,init=cal,fit=corner", mesh=BOTH),
    Corner("hcn:n=3,k=3", mesh=LAYER, model="streams", rule="refreshed"),
    # bfloat16
    Corner("seq", dtype="bfloat16", layout="list", rule="last_eval", is_slow=True),
    Corner("idn:n=3,k=3", dtype="bfloat16", rule="refreshed"),
    Corner("idn:n=3,k=3", dtype="bfloat16", mesh=BOTH),
]
TOLERANCE = {"float32": 3e-5, "bfloat16": 0.15}
"""Of logits of up to 15: programs that add up in another order, and in bfloat16 products of 8 bits (2^-8 of a state of
about 4 in each of three layers)."""


def name_of(corner: Corner) -> str:
    values = corner._replace(is_slow=False)._asdict()
    changed = {name: value for name, value in values.items() if value != Corner._field_defaults.get(name, "")}
    mesh = corner.mesh and "x".join(str(getattr(corner.mesh, axis)) for axis in ("data", "layer", "tensor"))
    return "-".join(str(mesh if name == "mesh" else value) for name, value in changed.items())


@functools.cache
def reference(model_name: str, dtype: str):
    """Parameters and the plain model's logits, for all corners of a model."""
    model = LanguageModel(MODELS[model_name], MachineConfig(compute_dtype=dtype))
    params = random_params(model)
    return params, np.asarray(jax.jit(model)(params, TOKENS_BT))


@functools.cache
def calibration(num_iters=3):
    """Any numbers will do: with as many iterations as nodes they do not matter. Fitted to noise of the right shapes."""
    from snlp_jax.eval.calibrations import region_chains

    config = MODELS["window"]
    model, params = LanguageModel(config), reference("window", "float32")[0]
    region = parse_schedule("cal:n=3,k=3,init=cal,fit=corner", 3).regions[0]
    windows = np.random.default_rng(1).integers(0, config.vocab_size, (32, 5))
    return fit_calibration(
        region_chains(model, params, region, windows),
        num_iters=num_iters,
        kind="scalar",
        init=region.init,
        init_rank=4,
    )


def logits_of(corner: Corner):
    """Logits of the four tokens at once, or of the last two behind a cache of the first two."""
    machine = MachineConfig(compute_dtype=corner.dtype, transposed_from=int(corner.is_transposed))
    model = LanguageModel(MODELS[corner.model], machine, backend=corner.backend)
    schedule = parse_schedule(corner.setting, 3)
    mesh = make_mesh(corner.mesh) if corner.mesh else None
    fits = {"corner": calibration()} if "fit=" in corner.setting else None
    params, _ = reference(corner.model, corner.dtype)
    weights = prepare(
        model, params, schedule, num_tokens=8, layout=corner.layout, mesh=mesh, sequential=corner.sequential, fits=fits
    )
    plans, keep = plan_rings(model, weights, 4, 1, mesh), Keep(corner.rule or "last_eval")
    fill_all = lambda plan, kv, length: tuple(fill(plan, each, length) for each in kv)  # noqa: E731

    def write(rings, kv, length_B):
        if type(kv) is tuple:
            return tuple(append(ring, each, length_B) for ring, each in zip(rings, kv, strict=True))
        return append(rings, kv, length_B)

    @jax.jit
    def run(weights, exact, tokens_BT):
        if not corner.rule:
            return forward(model, weights, tokens_BT, mesh=mesh).logits_BTV
        length_B = jnp.full((len(tokens_BT),), 2, jnp.int32)
        prefix = forward(model, exact, tokens_BT[:, :2], mesh=mesh, keep=keep)
        rings = tuple(
            plan and (fill_all if type(update.kv) is tuple else fill)(plan, update.kv, length_B)
            for plan, update in zip(plans, prefix.updates, strict=True)
        )

        def step(carry, pair_B2):
            rings, length_B = carry
            past = Past(pair_B2[:, :1], length_B, rings)
            output = forward(model, weights, pair_B2[:, 1:], mesh=mesh, past=past, keep=keep)
            pairs = zip(rings, output.updates, strict=True)
            rings = tuple(ring and write(ring, update.kv, length_B) for ring, update in pairs)
            return (rings, length_B + 1), output.logits_BTV[:, 0]

        pairs = jnp.stack([tokens_BT[:, 1:3], tokens_BT[:, 2:4]])
        _, decoded = jax.lax.scan(step, (rings, length_B), pairs)
        return jnp.concatenate([prefix.logits_BTV, decoded.swapaxes(0, 1)], axis=1)

    exact = weights if corner.rule == "per_iteration" else in_order(weights)
    return run(weights, exact, put_batch(mesh, TOKENS_BT, is_whole=True))


@pytest.mark.filterwarnings("ignore:the attention windows")
@pytest.mark.parametrize(
    "corner",
    [pytest.param(corner, id=name_of(corner), marks=[pytest.mark.slow] * corner.is_slow) for corner in CORNERS],
)
def test_every_corner_is_the_plain_model(corner):
    _, expected = reference(corner.model, corner.dtype)
    np.testing.assert_allclose(logits_of(corner), expected, rtol=0, atol=TOLERANCE[corner.dtype])


REFUSED = {
    "fused layers under a rule without a limit": ("idn:n=2,k=1,stage=1xF2", "last_eval", "fused"),
    "a tolerance where every evaluation has a cache": ("idn:n=3,tol=0.1", "per_iteration", "tol"),
    "an oracle where every evaluation has a cache": ("idn:n=3,k=2,init=warm", "per_iteration", "warm"),
}


def test_what_has_no_limit_is_refused():
    for setting, rule, word in REFUSED.values():
        with pytest.raises(InputError, match=word):
            check_settings(parse_schedule(setting, 3), rule)


def test_a_ring_crosses_layers_that_are_left_out():
    """Bug 5 of the review: a ring's cuts were inferred from its parts, and a skip over the mid-layer has none."""
    config = dataclasses.replace(BASE, num_layers=4)
    model, mesh = LanguageModel(config), make_mesh(LAYER)
    params = random_params(model)
    schedule = parse_schedule("skip:0-3+idn:3-4,k=1", 4)
    run = lambda mesh: jax.jit(lambda w, t: forward(model, w, t, mesh=mesh).logits_BTV)  # noqa: E731
    on_mesh = run(mesh)(prepare(model, params, schedule, mesh=mesh, sequential="ring"), TOKENS_BT)
    alone = run(None)(prepare(model, params, schedule), TOKENS_BT)
    np.testing.assert_allclose(on_mesh, alone, rtol=0, atol=TOLERANCE["float32"])


def test_the_callers_choice_of_kernels_holds():
    """Bug 12: a pass gave every part all kernels that run there, also where the caller had allowed XLA's alone."""
    model = LanguageModel(BASE).adapted(kernels=())
    assert model.adapted(kernels=("cudnn", "splash"))._kernels == {"xla"}


def test_windows_that_differ_between_devices_are_named():
    """Such layers share no compiled sweep and compute scores for the longest window; this was silent."""
    params, _ = reference("window", "float32")
    with pytest.warns(UserWarning, match=r"windows of layers 1-3"):
        prepare(LanguageModel(MODELS["window"]), params, parse_schedule("idn:n=2,k=1", 3), mesh=make_mesh(LAYER))


def test_a_plain_cross_entropy_keeps_no_trace():
    """The states that the head reads ride along in the loop: nothing of shape [L, B, T, D] is made."""
    model, batch = LanguageModel(BASE), Batch(jnp.asarray(np.pad(TOKENS_BT, ((0, 0), (0, 1)))))
    params = model.abstract_params()
    trace_shape = (BASE.num_layers, *TOKENS_BT.shape, BASE.embed_dim)

    def shapes_of(loss):
        plan = make_plan(loss, 0, 1, 0)
        run = lambda p: loss_fn(Passes(model, p, batch), loss, plan, {"hidden_norm": 1.0})[0]  # noqa: E731
        return str(jax.make_jaxpr(run)(params)).count("f32[{},{},{},{}]".format(*trace_shape))

    assert shapes_of(LossConfig()) == 0
    assert shapes_of(LossConfig(hidden_norm=HiddenNormConfig(weight=1.0, region_sizes=(3,)))) > 0
