"""Whole models on meshes are whole models on one device: logits, loss and gradients; what lies where, and how often the
devices talk."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from problems import SMALL, VARIANTS, random_params, random_tokens, relative_error

from benchmarks.hlo import count_collectives
from benchmarks.plan_compile import abstract_past
from snlp_jax.cache import Past, fill, plan_rings
from snlp_jax.chains import chains_of
from snlp_jax.config import (
    Config,
    HiddenNormConfig,
    LayerSkipConfig,
    LossConfig,
    MachineConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    SolverCEConfig,
    TrainConfig,
)
from snlp_jax.errors import InputError
from snlp_jax.forward import forward
from snlp_jax.layout import abstract_weights, arrange, prepare, split
from snlp_jax.model import LanguageModel
from snlp_jax.notation import parse_schedule
from snlp_jax.parallel import data_shard, make_mesh, put_batch
from snlp_jax.parallel.mesh import kernels_on
from snlp_jax.parallel.sharding import TRAINING, bytes_per_device, shardings_of
from snlp_jax.parts import Part
from snlp_jax.solver import SequentialSegment, sequential
from snlp_jax.train.loss import Plan, loss_fn
from snlp_jax.train.passes import Passes
from snlp_jax.train.step import abstract_state, make_init, make_step, optimizer_of
from snlp_jax.types import Batch

LOGITS, LOSS, GRADIENT = 3e-5, 5e-6, 5e-3
"""Relative to the largest entry. Float32 rounding (6e-8 an operation) of sums in another order, grown by eight layers;
the loss is a mean over tokens; gradients are sums over tokens and layers that partly cancel."""

EIGHT = dataclasses.replace(SMALL, num_layers=8)
STREAMS = dataclasses.replace(VARIANTS["hyper_static"], num_layers=4, num_streams=2)
DYNAMIC = dataclasses.replace(VARIANTS["hyper_dynamic"], num_layers=4)


def assert_close(actual, desired, tolerance):
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        assert relative_error(one, other) < tolerance


# ---------------------------------------------------------------- the forward pass

FOUR = dataclasses.replace(SMALL, num_layers=4)
FORWARD_CASES = (
    # config, mesh, how what runs in order lies, setting
    (FOUR, MeshConfig(layer=2), "ring", "idn:n=3,k=2"),  # a layer of zero weights fills up the devices
    (FOUR, MeshConfig(data=2, layer=2, tensor=2), "tensor", "idn:n=4,k=1,stage=2xF2"),
)
MORE_FORWARD_CASES = (
    (DYNAMIC, MeshConfig(data=2, layer=2), "ring", "hcn:n=4,k=2,init=batch_forward"),
    (FOUR, MeshConfig(layer=2, tensor=4), "tensor", "seq"),  # two kv heads on eight devices
    (FOUR, MeshConfig(layer=4), "ring", "skip:1-2+diag:2-4,k=2,mode=vjp,reuse=1,damp=0.1"),
    (FOUR, MeshConfig(layer=2), "tensor", "idn:0-1,k=1+sid:2-4,k=2,init=warm"),
    (VARIANTS["plain"], MeshConfig(data=2, layer=3), "tensor", "idn:n=4,tol=0.05"),
)


def case_id(case):
    config, mesh, sequential, setting = case
    kind = "one" if not config.num_streams else config.hyper_maps
    return f"{kind}-{mesh.data}x{mesh.layer}x{mesh.tensor}-{sequential}-{setting}"


@pytest.mark.parametrize(
    "config, mesh_config, sequential, setting",
    [pytest.param(*case, id=case_id(case)) for case in FORWARD_CASES]
    + [pytest.param(*case, id=case_id(case), marks=pytest.mark.slow) for case in MORE_FORWARD_CASES],
)
def test_logits_on_a_mesh_are_those_of_one_device(config, mesh_config, sequential, setting):
    model, mesh = LanguageModel(config), make_mesh(mesh_config)
    params, tokens = random_params(model), random_tokens(config, batch=4, length=6)
    schedule = parse_schedule(setting, config.num_layers)
    run = lambda mesh: jax.jit(lambda w, t: forward(model, w, t, mesh=mesh, with_stats=True))  # noqa: E731
    expected = run(None)(prepare(model, params, schedule, num_tokens=1, layout="stack"), tokens)
    weights = prepare(model, params, schedule, num_tokens=1, mesh=mesh, sequential=sequential)
    actual = run(mesh)(weights, put_batch(mesh, np.asarray(tokens), is_whole=True))
    assert_close(actual[:3], expected[:3], LOGITS)
    for one, other in zip(actual.solutions, expected.solutions, strict=True):
        assert_close(one.trace, other.trace, LOGITS)
        np.testing.assert_allclose(one.stats["residual_norm"], other.stats["residual_norm"], rtol=1e-3, atol=1e-5)


def collectives_of(config, mesh_config, sequential, setting, batch=2, past=0):
    model, mesh = LanguageModel(config), make_mesh(mesh_config)
    weights = abstract_weights(model, parse_schedule(setting, config.num_layers), mesh, sequential)
    tokens = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
    cache = abstract_past(model, weights, mesh, batch, past) if past else None
    run = jax.jit(lambda weights, tokens, cache: forward(model, weights, tokens, mesh=mesh, past=cache).logits_BTV)
    return count_collectives(run.lower(weights, tokens, cache).compile().as_text())


WIDE = dataclasses.replace(FOUR, num_kv_heads=4)
"""Heads that four devices divide."""


@pytest.mark.parametrize("past", (0, pytest.param(16, marks=pytest.mark.slow)))
def test_how_often_the_devices_talk(past):
    """K exchanges a region, one more for another guess than h0; two all-reduces a layer split by features; n - 1 moves
    of a ring and one all-reduce of its states; the embedding's rows and the logits."""
    ends = {"all-reduce": 1, "all-gather": 1}
    for setting, how, region, order in (
        ("sid:n=2,k=3,init=batch_forward", "tensor", 4, 2 * 2),
        ("idn:n=2,k=1", "ring", 1, 1),
    ):
        found = collectives_of(WIDE, MeshConfig(layer=4), how, setting, past=past)
        moves = 3 if how == "ring" and order else 0
        expected = {"all-gather": region + ends["all-gather"], "all-reduce": order + ends["all-reduce"]}
        assert found == expected | ({"collective-permute": moves} if moves else {}), (setting, how)


def test_every_weight_lives_once():
    """Regions by layer, the rest by heads, features and vocabulary; value embeddings with their layers."""
    config = dataclasses.replace(EIGHT, embed_dim=64, num_heads=8, num_kv_heads=8)
    model, mesh = LanguageModel(config), make_mesh(MeshConfig(layer=8))
    whole = sum(leaf.size * 4 for leaf in jax.tree.leaves(model.abstract_params()))
    for setting in ("idn:n=8,k=1", "seq"):
        weights = abstract_weights(model, parse_schedule(setting, 8), mesh)
        extra = bytes_per_device(weights) - whole / 8
        # Gates and scalars on every device, and the table of a device whose layer has none (one of 8 x 4).
        assert 0 <= extra < 0.12 * whole / 8 + (0.6 * whole / 8 if setting != "seq" else 0), setting


# ---------------------------------------------------------------- a cached step


@pytest.mark.parametrize(
    "config",
    (
        pytest.param(dataclasses.replace(SMALL, num_layers=2), id="everything"),
        pytest.param(dataclasses.replace(STREAMS, window_pattern="L"), id="mhc", marks=pytest.mark.slow),
    ),
)
def test_a_step_with_a_cache_is_the_end_of_the_whole_pass(config):
    """Keys and values of S tokens, exact ones, and the last of these tokens for the smear: what follows is as if the
    whole had been read in order, solved (K = N) on a mesh."""
    model = LanguageModel(config)
    params, tokens = random_params(model), random_tokens(config, length=11)
    S, L = 8, config.num_layers

    @jax.jit
    def whole(params, tokens):
        x0 = model.embed(params, tokens)
        part = Part(params["blocks"], None, None, SequentialSegment(0, L), (0, L))
        (chain,) = chains_of(model, params, part, tokens, model.shared(x0), model.expand(x0))
        kv = sequential(chain, with_aux=True).aux.kv
        return jax.tree.map(lambda leaf: leaf[:, :, :S], kv), model(params, tokens)

    kv, expected = whole(params, tokens)
    length_B = jnp.full((len(tokens),), S)
    mesh, schedule = make_mesh(MeshConfig(layer=2)), parse_schedule(f"idn:n={L},k={L}", L)
    weights = prepare(model, params, schedule, num_tokens=1, mesh=mesh)
    (plan,) = plan_rings(model, weights, capacity=11, block=3, mesh=mesh)
    run = jax.jit(lambda w, t, p: forward(model, w, t, past=p, mesh=mesh).logits_BTV)
    step = run(weights, tokens[:, S:], Past(tokens[:, S - 1 : S], length_B, (fill(plan, kv, length_B),)))
    assert_close(step, expected[:, S:], LOGITS)


# ---------------------------------------------------------------- training

LOSSES = {
    "hidden_norm": HiddenNormConfig(weight=0.5, region_sizes=(2,), stride=2),
    "solver_ce": SolverCEConfig(weight=0.5, region_sizes=(4,)),
    "layer_skip": LayerSkipConfig(weight=0.3, region_sizes=(2,)),
}
EVERY_TERM = LossConfig(**LOSSES)


def with_correction(name, **more):
    terms = {
        key: dataclasses.replace(term, correction=name, **more) for key, term in LOSSES.items() if key != "layer_skip"
    }
    return LossConfig(**terms)


@functools.cache
def one_device(config, loss):
    model = LanguageModel(config)
    return value_and_grad(model, loss, None, 1)(random_params(model), batch_of(config))


def batch_of(config):
    return Batch(np.asarray(random_tokens(config, batch=8, length=9)))


def value_and_grad(model, loss, mesh, ring_microbatches):
    plan = Plan(tuple((name, term.region_sizes) for name, term in loss.terms.items()))
    weights, settings = {name: term.weight for name, term in loss.terms.items()}, {"mesh": mesh}
    settings["ring_microbatches"] = ring_microbatches

    def run(params, batch):
        of = lambda params: loss_fn(Passes(model, params, batch, jax.random.key(3), **settings), loss, plan, weights)  # noqa: E731
        return jax.value_and_grad(of, has_aux=True)(params)

    return jax.jit(run)


TRAINING_CASES = (
    (
        dataclasses.replace(SMALL, num_layers=3),
        LossConfig(hidden_norm=LOSSES["hidden_norm"]),
        MeshConfig(data=2, layer=3),
    ),
    (FOUR, EVERY_TERM, MeshConfig(data=2, layer=2, tensor=2, ring_microbatches=4)),
    (FOUR, with_correction("diag"), MeshConfig(layer=2, tensor=2)),
    (dataclasses.replace(FOUR, remat=True), EVERY_TERM, MeshConfig(data=4, layer=2, ring_microbatches=2)),
    (DYNAMIC, with_correction("hcn"), MeshConfig(data=2, layer=2, ring_microbatches=2)),
    (dataclasses.replace(SMALL, use_x0_resid=False), with_correction("idn"), MeshConfig(layer=6)),  # tables by entries
)


@pytest.mark.parametrize(
    "config, loss, mesh_config",
    (
        TRAINING_CASES[0],
        *(pytest.param(*c, marks=pytest.mark.slow) for c in TRAINING_CASES[1:]),
    ),
)
def test_loss_and_gradients_on_a_mesh_are_those_of_one_device(config, loss, mesh_config):
    model, mesh = LanguageModel(config), make_mesh(mesh_config)
    (value, parts), grads = one_device(config, loss)
    params = random_params(model)
    params = jax.device_put(params, shardings_of(params, config, mesh, TRAINING))
    run = value_and_grad(model, loss, mesh, mesh_config.ring_microbatches)
    (mesh_value, mesh_parts), mesh_grads = run(params, put_batch(mesh, batch_of(config), is_whole=True))
    np.testing.assert_allclose(mesh_value, value, rtol=LOSS)
    for name in parts:
        np.testing.assert_allclose(mesh_parts[name], parts[name], rtol=10 * LOSS)  # differences of nearly equal states
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        mesh_grad = functools.reduce(lambda tree, key: tree[key.key], path, mesh_grads)
        assert relative_error(mesh_grad, grad) < GRADIENT, path
        assert float(jnp.abs(grad).max()) > 0, path


def test_gradients_in_bfloat16_on_a_mesh_are_those_of_one_device():
    """One token is three quarters of the text: a sum of its many gradients would stand still in bfloat16. A region is
    part of the loss, whose weights are read on every device of the data axis, each of which has a row of the batch.
    Nothing is computed again, which two programs would round in two ways."""
    fields = {"num_layers": 1, "seq_len": 128, "use_mid_subtract": False, "remat": False}
    config, rng = dataclasses.replace(SMALL, **fields), np.random.default_rng(0)
    loss = LossConfig(solver_ce=SolverCEConfig(weight=2.0, region_sizes=(1,)))
    tokens = np.where(rng.random((8, 129)) < 0.75, 7, rng.integers(0, config.vocab_size, (8, 129))).astype(np.int32)
    model = LanguageModel(config, MachineConfig(compute_dtype="bfloat16"))
    mesh = make_mesh(MeshConfig(data=8))
    params = random_params(model)
    _, expected = value_and_grad(model, loss, None, 1)(params, Batch(tokens))
    params = jax.device_put(params, shardings_of(params, config, mesh, TRAINING))
    _, actual = value_and_grad(model, loss, mesh, 1)(params, put_batch(mesh, Batch(tokens), is_whole=True))
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        difference = np.linalg.norm(np.asarray(one - other)) / np.linalg.norm(np.asarray(other))
        # A kernel's gradient is rounded to bfloat16 on every device, by at most 2^-9.
        assert difference < 0.004, (path, difference)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, setting, mesh_config",
    (
        (FOUR, "idn:n=4,k=2,stage=2xF2,mid=input,init=batch_forward", MeshConfig(data=2, layer=2)),
        (STREAMS, "hcn:n=3,k=1", MeshConfig(layer=2)),
    ),
)
def test_gradients_through_any_schedule_on_a_mesh(config, setting, mesh_config):
    """The weights are laid out under the gradient, so it comes back to the parameters as they are."""
    model, mesh = LanguageModel(config), make_mesh(mesh_config)
    params, tokens, schedule = random_params(model), random_tokens(config, length=8), parse_schedule(setting, 4)

    def loss(mesh, params, tokens):
        weights = split(model, params, schedule) if mesh is None else arrange(model, params, schedule, mesh, "ring")
        logits_BTV = forward(model, weights, tokens, mesh=mesh).logits_BTV
        return jnp.sum(jnp.sin(logits_BTV + jnp.arange(logits_BTV.shape[-1])[None, None]))

    gradient = lambda mesh, tokens: jax.jit(jax.grad(functools.partial(loss, mesh)))(params, tokens)  # noqa: E731
    expected = gradient(None, tokens)
    actual = gradient(mesh, put_batch(mesh, np.asarray(tokens), is_whole=True))
    floor = 1e-6 * max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        # Maps that one fused step does not reach have a gradient of 0 but for rounding.
        assert float(jnp.abs(one - other).max()) < GRADIENT * float(jnp.abs(other).max()) + floor


CONFIG = Config(
    model=dataclasses.replace(FOUR, num_heads=4, num_kv_heads=4),
    optim=OptimConfig(warmup_steps=1, max_grad_norm=1.0),
    loss=LossConfig(hidden_norm=LOSSES["hidden_norm"]),
    train=TrainConfig(num_steps=10, batch_size=8, num_microbatches=2),
)


def parts_of_training(config, mesh):
    model = LanguageModel(config.model)
    optimizer = optimizer_of(model, config, mesh)
    return model, optimizer, make_step(model, optimizer, config, mesh)


@pytest.mark.slow
def test_steps_on_a_mesh_are_steps_on_one_device():
    """Optimizer, clipping and accumulated gradients included: parameters after three steps.

    Not from a fresh initialisation: gradients that are 0 there but for rounding make whole steps of Adam.
    """
    plan = Plan((("hidden_norm", (3,)),))
    rows = [np.asarray(random_tokens(CONFIG.model, batch=8, length=9, seed=seed)) for seed in range(3)]
    results = []
    for mesh_config in (MeshConfig(), MeshConfig(data=2, layer=2, tensor=2, ring_microbatches=2)):
        mesh = make_mesh(mesh_config)
        config = dataclasses.replace(CONFIG, mesh=mesh_config)
        model, optimizer, step = parts_of_training(config, mesh)
        state = make_init(model, optimizer, CONFIG, mesh)()
        params = random_params(model)
        state["params"] = jax.device_put(params, shardings_of(params, config.model, mesh, TRAINING))
        for tokens in rows:
            state, metrics = step(state, put_batch(mesh, Batch(tokens), is_whole=True), plan=plan)
        results.append((jax.device_get(state["params"]), {name: float(value) for name, value in metrics.items()}))
    (params, metrics), (mesh_params, mesh_metrics) = results
    assert mesh_metrics == pytest.approx(metrics, rel=1e-4)
    # Adam divides by the root of tiny second moments in the first steps, which turns rounding into a share of a step.
    assert_close(mesh_params, params, 1e-3)


def test_every_leaf_of_the_training_state_has_its_spec():
    mesh = make_mesh(MeshConfig(data=2, layer=2, tensor=2))
    model, optimizer, _ = parts_of_training(CONFIG, mesh)
    state = abstract_state(model, optimizer, CONFIG, mesh)
    both = ("layer", "tensor")
    params = {
        "embed/token": P(both, "data"),
        "embed/smear_gate": P(),
        "embed/smear_scale": P(),
        "embed/value": P("layer", None, ("tensor", "data")),
        "embed/value_gate": P("layer", None, "tensor"),
        "blocks/attn/query": P("layer", "data", "tensor"),
        "blocks/attn/key": P("layer", "data", "tensor"),
        "blocks/attn/value": P("layer", "data", "tensor"),
        "blocks/attn/out": P("layer", "tensor", "data"),
        "blocks/mlp/up": P("layer", "data", "tensor"),
        "blocks/mlp/down": P("layer", "tensor", "data"),
        "blocks/resid_scale": P("layer"),
        "blocks/x0_scale": P("layer"),
        "head/kernel": P("data", both),
        "head/mid_scale": P(),
    }
    seen: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        owner = next((known for known in params if name.endswith("/" + known)), None)
        spec = params[owner] if owner else P()
        assert leaf.sharding.spec == spec, (name, leaf.sharding.spec)
        assert owner or leaf.size < 16, name  # counters, and the coefficients of Muon's polynomials
        seen[owner or "counter"] = seen.get(owner or "counter", 0) + 1
    # Muon keeps one moment of a matrix, Adam two of the rest.
    matrices = {name for name in params if "attn" in name or "mlp" in name or name == "embed/value_gate"}
    assert {name: seen[name] for name in params} == {name: 2 if name in matrices else 3 for name in params}


def test_parameters_and_optimizer_shrink_with_the_devices():
    """Bytes that the compiled step holds on one device, tokens and metrics aside."""
    held = []
    for mesh_config in (MeshConfig(), MeshConfig(data=2, layer=2, tensor=2)):
        mesh = make_mesh(mesh_config)
        model, optimizer, _ = parts_of_training(CONFIG, mesh)
        abstract = abstract_state(model, optimizer, CONFIG, mesh)
        keep = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state))
        analysis = keep.lower(abstract).compile().memory_analysis()
        assert abs(analysis.argument_size_in_bytes - bytes_per_device(abstract)) < 1024  # alignment of small leaves
        held.append(analysis.argument_size_in_bytes)
    for devices, size in zip((1, 8), held, strict=True):
        # Gates and scalars are on every device: under a hundredth of this small model.
        assert held[0] / devices <= size < 1.01 * held[0] / devices + 2048


def test_the_state_is_born_split():
    """No device ever holds a whole parameter: temporary and output bytes of the compiled initialisation."""
    model = LanguageModel(dataclasses.replace(CONFIG.model, embed_dim=128, use_value_embeds=False))
    mesh = make_mesh(MeshConfig(data=2, layer=4))
    optimizer = optimizer_of(model, Config(), mesh)
    state = jax.eval_shape(make_init(model, optimizer, CONFIG, mesh))
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    analysis = make_init(model, optimizer, CONFIG, mesh).lower().compile().memory_analysis()
    assert analysis.output_size_in_bytes < 1.02 * whole / 8 + 4096


# ---------------------------------------------------------------- what a mesh is asked for


def test_batches_over_the_data_axis():
    mesh = make_mesh(MeshConfig(data=4, layer=2))
    assert data_shard(mesh) == (0, 1)
    rows = np.arange(24).reshape(8, 3)
    batch = put_batch(mesh, rows)
    np.testing.assert_array_equal(batch, rows)
    assert batch.sharding.spec == P("data") and batch.addressable_shards[0].data.shape == (2, 3)


def test_refusals():
    batch_of_6, batch_of_8 = TrainConfig(batch_size=6), TrainConfig(batch_size=8)
    for make, keyword in (
        (lambda: Config(model=EIGHT, mesh=MeshConfig(layer=3)), "mesh.layer 3"),
        (lambda: Config(model=EIGHT, train=batch_of_6, mesh=MeshConfig(data=4)), "multiple of 4"),
        (lambda: Config(model=EIGHT, train=batch_of_8, mesh=MeshConfig(layer=2, ring_microbatches=3)), "multiple of 3"),
        (lambda: Config(mesh=MeshConfig(ring_microbatches=2)), "no ring"),
        (lambda: MeshConfig(tensor=0), "mesh.tensor is 0"),
    ):
        with pytest.raises(InputError, match=keyword):
            make()


def test_a_model_for_another_backend():
    """What is compiled ahead of time takes that backend's dtype."""
    assert LanguageModel(ModelConfig(), backend="tpu").dtype == jnp.bfloat16
    assert LanguageModel(ModelConfig()).backend == jax.default_backend()


def test_attention_kernels_on_a_mesh():
    """Where the compiler may not split them they are left out, and an explicit wish for one is refused."""
    split, whole = make_mesh(MeshConfig(layer=4, tensor=2)), make_mesh(MeshConfig(data=2, layer=4))
    assert kernels_on(split, is_spread=True) == () and kernels_on(whole, is_spread=False) == ()
    assert kernels_on(whole, is_spread=True) == ("cudnn", "splash", "triton", "mosaic")
    assert kernels_on(make_mesh(MeshConfig(data=8)), is_spread=False) == ("cudnn",)
    config = dataclasses.replace(SMALL, embed_dim=512, num_heads=4)

    def choose(machine, *allowed):
        model = LanguageModel(config, machine, backend="tpu")
        for kernels in allowed:
            model = model.adapted(kernels=kernels)
        return model._choose_kernel(False)(128, False).name

    assert choose(MachineConfig(), ("cudnn", "splash")) == "splash" and choose(MachineConfig(), ("cudnn",)) == "xla"
    assert choose(MachineConfig(), (), ("splash",)) == "xla"  # what a caller excludes stays excluded on a mesh
    with pytest.raises(InputError, match="over this mesh"):
        choose(MachineConfig(attention="splash"), ())
