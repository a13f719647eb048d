"""Each parameter gets its group's rule, at its group's rate; stacked Muon is per-layer Muon."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from snlp_jax.config import OptimConfig
from snlp_jax.train.optim import (
    ADAM_GROUPS,
    LATER_GROUPS,
    MUON_DIMENSIONS,
    POLAR_EXPRESS,
    learning_rate_schedule,
    make_optimizer,
    param_labels,
)

L, D, F, V, NUM_VALUE = 3, 32, 64, 50, 2
CONSTANT = OptimConfig(warmup_steps=0, warmdown_fraction=0.0)
LABELS = {
    "embed": {
        "token": "embed",
        "smear_gate": "scalar",
        "smear_scale": "scalar",
        "value": "value_embed",
        "value_gate": "matrix",
    },
    "blocks": {
        "attn": {"query": "matrix", "key": "matrix", "value": "matrix", "out": "matrix"},
        "mlp": {"up": "matrix", "down": "matrix"},
        "hyper": {
            "attn": {"res_logits": "hyper", "pre_logits": "hyper", "phi": "hyper"},
            "mlp": {"post_logits": "hyper", "alpha": "hyper"},
        },
        "resid_scale": "resid_scale",
        "x0_scale": "x0_scale",
    },
    "head": {"kernel": "head", "mid_scale": "scalar"},
}
SHAPES = {
    "embed": {
        "token": (V, D),
        "smear_gate": (24,),
        "smear_scale": (),
        "value": (NUM_VALUE, V, D),
        "value_gate": (NUM_VALUE, 12, 4),
    },
    "blocks": {
        "attn": {"query": (L, D, D), "key": (L, D, D), "value": (L, D, D), "out": (L, D, D)},
        "mlp": {"up": (L, D, F), "down": (L, F, D)},
        "hyper": {
            "attn": {"res_logits": (L, 2, 2), "pre_logits": (L, 2), "phi": (L, 2 * D, 8)},
            "mlp": {"post_logits": (L, 2), "alpha": (L, 3)},
        },
        "resid_scale": (L,),
        "x0_scale": (L,),
    },
    "head": {"kernel": (D, V), "mid_scale": ()},
}


def random_tree(seed, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32), shapes, is_leaf=lambda x: type(x) is tuple
    )


FEWER = {
    "embed": {name: SHAPES["embed"][name] for name in ("token", "smear_gate", "smear_scale", "value", "value_gate")},
    "blocks": {
        "attn": {"query": (L, D, D)},
        "mlp": {"up": (L, D, F), "down": (L, F, D)},
        "hyper": {"attn": {"res_logits": (L, 2, 2), "phi": (L, 2 * D, 8)}},
        "resid_scale": (L,),
        "x0_scale": (L,),
    },
    "head": SHAPES["head"],
}
"""One leaf of every group, and of Muon's every shape."""
CONFIG = OptimConfig(warmup_steps=0, warmdown_fraction=0.0, batch_reference=1024, lr_scale=0.5, max_grad_norm=50.0)
TOKENS_PER_STEP = 4096


@pytest.fixture(scope="module")
def first_update():
    """``(params, grads) -> (updates, state)`` of a first step at CONFIG, compiled once."""
    optimizer = make_optimizer(CONFIG, random_tree(0, FEWER), 100, TOKENS_PER_STEP)
    return jax.jit(lambda params, grads: optimizer.update(grads, optimizer.init(params), params))


def spread(update):
    """Smallest over largest singular value, the smallest of all layers."""
    values = np.linalg.svd(np.asarray(update), compute_uv=False)
    return float((values.min(-1) / values.max(-1)).min())


def test_labels_leaf_by_leaf():
    assert param_labels(random_tree(0)) == LABELS
    params = random_tree(0)
    del params["embed"]["smear_gate"], params["embed"]["value"], params["blocks"]["x0_scale"]
    assert param_labels(params)["blocks"]["resid_scale"] == "resid_scale"


def test_unknown_path_is_named():
    params = random_tree(0)
    params["blocks"]["mlp"]["gate_scale"] = jnp.zeros((L, F))
    with pytest.raises(ValueError, match="blocks/mlp/gate_scale"):
        make_optimizer(OptimConfig(), params, 10, 1)


def test_state_holds_each_leaf_in_its_own_group():
    params = random_tree(0)
    state = jax.eval_shape(make_optimizer(OptimConfig(), params, 10, 1).init, params).inner_states

    def owned(moments):
        return jax.tree.map(lambda m: not isinstance(m, optax.MaskedNode), moments, is_leaf=_is_masked)

    def expected(label):
        return jax.tree.map(lambda own: own == label, LABELS)

    muon_state = state["matrix"].inner_state[0]
    assert owned(muon_state.mu) == expected("matrix")
    assert muon_state.mu["blocks"]["mlp"]["up"].shape == (L, D, F)
    assert state.keys() == {"matrix", *ADAM_GROUPS} - set(LATER_GROUPS)
    for label in state.keys() - {"matrix"}:
        adam_state = state[label].inner_state[0]
        assert owned(adam_state.mu) == expected(label)
        assert owned(adam_state.nu) == expected(label)


def test_biases_and_weights_of_norms_are_a_group_of_their_own():
    """It has a state only where there are any: checkpoints of other models began without."""
    params = random_tree(0)
    params["blocks"]["mlp"]["up_bias"], params["head"]["norm"] = jnp.zeros((L, F)), jnp.ones((D,))
    labels = param_labels(params)
    assert labels["blocks"]["mlp"]["up_bias"] == labels["head"]["norm"] == "vector"
    assert "vector" in jax.eval_shape(make_optimizer(OptimConfig(), params, 10, 1).init, params).inner_states


def _is_masked(node):
    return isinstance(node, optax.MaskedNode)


def test_matrices_are_orthogonalised_and_embeddings_are_not(first_update):
    params, grads = random_tree(0, FEWER), random_tree(1, FEWER)
    updates, _ = first_update(jax.tree.map(jnp.zeros_like, params), grads)  # without weights there is no decay
    # Five steps bring every singular value above 0.001 of the norm into [0.85, 1.15]; those of a square Gaussian
    # matrix may be smaller, so the tall and wide ones are tested.
    for update in (updates["blocks"]["mlp"]["up"], updates["blocks"]["mlp"]["down"], updates["embed"]["value_gate"]):
        assert spread(update) > 0.7
    assert spread(grads["blocks"]["mlp"]["up"]) < 0.3
    for name in ("token", "value"):
        assert spread(updates["embed"][name]) < 0.3
    assert spread(updates["head"]["kernel"]) < 0.3
    # Scale: matrix_lr * sqrt(max(1, fan_out / fan_in)) times an orthogonal matrix.
    for name, factor in (("up", 2**0.5), ("down", 1.0)):
        top = np.linalg.svd(np.asarray(updates["blocks"]["mlp"][name]), compute_uv=False).max()
        assert top == pytest.approx(0.5 * 0.02 * 2 * factor, rel=0.15)


def test_stacked_muon_is_muon_of_each_layer():
    """Over two steps, the momentum included."""

    def layer(tree, i):
        return {**tree, "blocks": jax.tree.map(lambda a: a[i : i + 1], tree["blocks"])}

    shapes = {"embed": {"token": (V, D)}, "blocks": {"mlp": FEWER["blocks"]["mlp"]}}

    @jax.jit
    def two_steps(params):
        optimizer = make_optimizer(CONSTANT, params, 100, 1)
        state = optimizer.init(params)
        for seed in (10, 11):
            grads = random_tree(seed, shapes)
            if params["blocks"]["mlp"]["up"].shape[0] == 1:
                grads = layer(grads, 1)
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params["blocks"]

    params = random_tree(0, shapes)
    stacked, single = two_steps(params), two_steps(layer(params, 1))
    for a, b in zip(jax.tree.leaves(stacked), jax.tree.leaves(single), strict=True):
        np.testing.assert_allclose(a[1:2], b, atol=1e-6, rtol=0)


def test_plain_two_dimensional_muon_agrees():
    """The dimension numbers of the stack mean what optax means for one matrix."""
    up = random_tree(1)["blocks"]["mlp"]["up"]
    plain_dimensions = optax.contrib.MuonDimensionNumbers()
    stack = optax.contrib.scale_by_muon(ns_coeffs=POLAR_EXPRESS, weight_dimension_numbers=MUON_DIMENSIONS)
    plain = optax.contrib.scale_by_muon(ns_coeffs=POLAR_EXPRESS, weight_dimension_numbers=plain_dimensions)
    run = jax.jit(lambda up: (stack.update(up, stack.init(up))[0], plain.update(up[1], plain.init(up[1]))[0]))
    together, alone = run(up)
    # float32 rounding, before the learning rate of 0.02: five steps whose coefficients reach 22.
    np.testing.assert_allclose(together[1], alone, atol=1e-5, rtol=0)


def test_schedule():
    config = OptimConfig(warmup_steps=40, warmdown_fraction=0.65, final_lr_fraction=0.05)
    schedule = jax.jit(learning_rate_schedule(config, 1000))
    assert schedule(0) == pytest.approx(1 / 40)
    assert schedule(39) == 1
    assert schedule(40) == 1
    assert schedule(350) == 1
    assert schedule(351) < 1
    assert schedule(675) == pytest.approx(0.525)
    assert schedule(999) == pytest.approx(0.05 + 0.95 / 650)
    assert schedule(1000) == pytest.approx(0.05)


def test_schedule_of_a_short_run_and_without_ramps():
    config = OptimConfig(warmup_steps=40, warmdown_fraction=0.65)
    values = np.asarray(jax.jit(jax.vmap(learning_rate_schedule(config, 50)))(jnp.arange(51)))
    assert values.max() <= 1
    assert np.abs(np.diff(values)).max() < 0.05
    assert (jax.jit(jax.vmap(learning_rate_schedule(CONSTANT, 50)))(jnp.arange(50)) == 1).all()


def test_rates_of_the_groups(first_update):
    """The first Adam update of a weight of zero is -lr * sign(gradient)."""
    params, grads = random_tree(0, FEWER), random_tree(1, FEWER)
    updates, _ = first_update(jax.tree.map(jnp.zeros_like, params), grads)
    width, batch = (D / 768) ** -0.5, (TOKENS_PER_STEP / 1024) ** 0.5
    expected = {
        ("embed", "token"): 0.3 * width * batch,
        ("embed", "value"): 0.15 * width * batch,
        ("head", "kernel"): 0.008 * width * batch,
        ("blocks", "resid_scale"): 0.005 * batch,
        ("blocks", "x0_scale"): 0.5 * batch,
        ("embed", "smear_gate"): 0.2,
        ("embed", "smear_scale"): 0.2,
        ("head", "mid_scale"): 0.2,
    }
    for (group, name), rate in expected.items():
        np.testing.assert_allclose(np.abs(updates[group][name]), 0.5 * rate, rtol=1e-4, err_msg=name)
    # The maps between streams, matrices among them, take a rate that scales with nothing.
    for leaf in jax.tree.leaves(updates["blocks"]["hyper"]):
        np.testing.assert_allclose(np.abs(leaf), 0.5 * 0.01, rtol=1e-4)


def test_zero_gradients_only_decay_the_weights(first_update):
    params = random_tree(0, FEWER)
    updates, state = first_update(params, jax.tree.map(jnp.zeros_like, params))
    assert all(bool(np.isfinite(leaf).all()) for leaf in jax.tree.leaves(jax.device_get((updates, state))))
    query = params["blocks"]["attn"]["query"]
    np.testing.assert_allclose(updates["blocks"]["attn"]["query"], -0.5 * 0.02 * 2 * 0.28 * query, rtol=1e-5)
    token_rate = 0.5 * 0.3 * 2 * (D / 768) ** -0.5
    np.testing.assert_allclose(updates["embed"]["token"], -token_rate * 0.001 * params["embed"]["token"], rtol=1e-5)
    assert float(updates["head"]["mid_scale"]) == 0


def test_clipping_scales_the_gradients_before_everything_else(first_update):
    params, grads = random_tree(0, FEWER), random_tree(1, FEWER)
    _, (_, grouped) = first_update(params, grads)
    norm = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(jax.device_get(grads))))
    mu = grouped.inner_states["embed"].inner_state[0].mu["embed"]["token"]
    np.testing.assert_allclose(mu, 0.2 * 50.0 * grads["embed"]["token"] / norm, rtol=1e-4)
