"""Theorems about the diagnostics of the solver, and the diagnosis of a run that they make up."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import (
    EXACT,
    HALF,
    IDENTITY,
    JACOBI,
    NUM_LAYERS,
    PLAIN,
    SCALED,
    WIDTH,
    affine,
    constant,
    listed,
    nonlinear,
    pair,
    random_params,
    random_tokens,
    true_trace,
)

from snlp_jax.errors import InputError
from snlp_jax.eval.diagnose import diagnose, parallel_regions
from snlp_jax.eval.iterations import Gains, Predictions, exponent, iterations_needed, predict, predicted_errors
from snlp_jax.forward import forward
from snlp_jax.layout import split
from snlp_jax.model import LanguageModel
from snlp_jax.notation import parse_schedule
from snlp_jax.solver import Chain, Diagonal, LayerFns, PrefixState, Wanted, sequential, solve
from snlp_jax.solver.diagnostics import contraction, perturbation_growth, spectral_norms, trace_errors

MODEL = dataclasses.replace(PLAIN, num_layers=4, embed_dim=16)
STEPS = 200
"""Where sigma_2 = 0.995 sigma_1, 0.995^(4 x 199) = 2 % of the second direction's energy is left: 2e-4 too low."""


def two_norms(matrices):
    return np.asarray([np.linalg.norm(matrix, 2) for matrix in np.asarray(matrices, np.float64)])


# ---------------------------------------------------------------- errors


def test_errors_are_those_of_the_solver():
    """And K iterations settle K layers, no more."""

    @jax.jit
    def run(chain):
        found = trace_errors(chain, JACOBI, PrefixState(), num_iters=NUM_LAYERS)
        solution = solve(chain, JACOBI, PrefixState(), num_iters=3, want=Wanted(stats=True))
        exact = true_trace(chain, jnp)
        distance = jnp.linalg.norm(solution.trace - exact, axis=-1) / jnp.linalg.norm(exact, axis=-1)
        return found, found.ratio, solution, distance.mean(-1)

    found, ratio, solution, distance = jax.device_get(run(nonlinear()))
    assert found.error.shape == found.residual.shape == (NUM_LAYERS + 1, NUM_LAYERS)
    assert distance[-1] > 1e-3, "there is an error to compare"
    # Rounding of float32 in errors that are differences of states of size 1.
    np.testing.assert_allclose(found.error[3], distance, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.residual[:3], solution.stats["residual_norm"], rtol=1e-4, atol=1e-6)
    for k in range(NUM_LAYERS + 1):
        # The same operations on the same inputs, batched and single: float32 rounding at most.
        assert max(found.error[k, :k], default=0.0) < 1e-6
        if k < NUM_LAYERS:
            assert found.error[k, k] > 1e-3
    live = found.error[:-1] > 1e-4
    np.testing.assert_allclose(ratio[live], found.error[1:][live] / found.error[:-1][live], rtol=1e-6)  # one rounding


def test_a_ratio_of_nothing_is_nothing():
    found = jax.jit(lambda chain: trace_errors(chain, JACOBI, PrefixState(), num_iters=2).ratio)(constant())
    assert np.all(found[1] == 0)


def test_one_iteration_is_compiled_once_for_all():
    calls, chain = [], nonlinear()
    block = chain.fns.block

    def counting(*arguments):
        calls.append(1)
        return block(*arguments)

    chain, traced = dataclasses.replace(chain, fns=LayerFns(counting)), []
    for num_iters in (2, 9):
        calls.clear()
        jax.make_jaxpr(lambda n=num_iters: trace_errors(chain, IDENTITY, PrefixState(), num_iters=n))()
        traced.append(len(calls))
    assert traced[0] == traced[1], "the program does not grow with the iterations"


# ---------------------------------------------------------------- norms


def test_norms_of_an_affine_chain_are_those_of_its_matrices():
    """``||J_l||`` and ``||J_l - A_l||``, in either layout; and with Jacobi, whose ``A_l e'_{l-1}`` is 0, an error
    e_{l-1} makes a next one of at most ``||J_l - A_l|| ||e_{l-1}||``."""
    corrections = (JACOBI, IDENTITY, HALF, EXACT)

    @jax.jit
    def run(chain):
        trace = true_trace(chain, jnp)
        norms = [contraction(chain, c, trace, num_steps=STEPS) for c in corrections]
        e_L = 1e-2 * jax.random.normal(jax.random.key(1), trace.shape)
        new_L = chain.sweep(jnp.concatenate([chain.h_in[None], (trace + e_L)[:-1]]))[0] - trace
        size = lambda e_L: jnp.linalg.norm(e_L.reshape(NUM_LAYERS, -1), axis=-1)  # noqa: E731
        of_list = spectral_norms(listed(chain), trace, STEPS)
        return spectral_norms(chain, trace, STEPS), of_list, norms, (size(e_L), size(new_L))

    whole, of_list, (jacobi, identity, half, exact), (before, after) = run(affine())
    w_LDD, eye = np.asarray(affine().params["w"], np.float64), np.eye(WIDTH)
    for found, matrices in (
        (whole, w_LDD),
        (of_list, w_LDD),
        (jacobi, w_LDD),
        (identity, w_LDD - eye),
        (half, w_LDD - 0.5 * eye),
    ):
        np.testing.assert_allclose(found, two_norms(matrices), rtol=1e-3)  # the power iteration's, see STEPS
    assert np.all(exact == 0)
    assert np.all(after[1:] <= 1.001 * jacobi[1:] * before[:-1])  # the power iteration's, see STEPS


def test_spectral_norm_is_of_the_whole_state():
    """A layer that sums its tokens multiplies a state that all tokens share by their number."""

    def block(params, h, ctx, shared):
        return params * jnp.broadcast_to(h.sum(0, keepdims=True), h.shape), ()

    chain = Chain.of(block, jnp.asarray([1.0, -2.0, 0.0]), jnp.ones((6, WIDTH)))
    found = jax.jit(lambda chain: spectral_norms(chain, true_trace(chain, jnp), 3))(chain)
    np.testing.assert_allclose(found, [6.0, 12.0, 0.0], rtol=1e-5)  # rank one: one step is exact to rounding


def test_nothing_is_left_by_a_correction_of_the_chain_s_class():
    """Of a state of two leaves."""

    @jax.jit
    def run(chain):
        trace = true_trace(chain, jnp)
        norms = [contraction(chain, c, trace, num_steps=3) for c in (SCALED, Diagonal(), IDENTITY)]
        return spectral_norms(chain, trace, 3), *norms

    whole, scaled, diagonal, identity = run(pair())
    scales = np.asarray(pair().params["s"])
    assert np.all(scaled < 1e-6) and np.all(diagonal < 1e-6)  # s v - s v, two roundings
    np.testing.assert_allclose(whole, np.abs(scales), rtol=1e-5)  # a few roundings
    np.testing.assert_allclose(identity, np.abs(scales - 1), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- growth of perturbations


def product(w, h, ctx, shared):
    return h @ w, ()


def matrices(w_LDD):
    """``h -> h W_l``."""
    h_in = jnp.asarray(np.random.default_rng(8).normal(size=(3, w_LDD.shape[-1])), jnp.float32)
    return Chain.of(product, jnp.asarray(w_LDD, jnp.float32), h_in)


@functools.cache
def grower(*corrections):
    def run(chain):
        trace = sequential(chain, with_trace=True).trace
        return [perturbation_growth(chain, correction, trace) for correction in corrections]

    return jax.jit(run)


def grown(chain, *corrections):
    return jax.device_get(grower(*corrections)(chain))


def test_growth_does_not_tell_a_turn_from_a_stretch_but_what_is_left_does():
    """Layers that double a perturbation and turn it by 90 degrees: the exponent is log 2 as of layers that double it
    alone, of which Identity leaves 1 and not the root of 5."""
    turn = np.asarray([[0.0, 2.0], [-2.0, 0.0]])
    for w, left in ((turn, 5**0.5), (2 * np.eye(2), 1.0)):
        identity, jacobi = grown(matrices(np.stack([w] * 4)), IDENTITY, JACOBI)
        np.testing.assert_allclose(identity.log_growth, math.log(2), rtol=1e-5)  # float32 norms
        np.testing.assert_allclose(identity.left, left, rtol=1e-5)
        np.testing.assert_allclose(identity.carried, 1.0, rtol=1e-5)
        np.testing.assert_allclose(jacobi.left, 2.0, rtol=1e-5)
        assert np.all(jacobi.carried == 0)
        np.testing.assert_allclose(identity.sizes[1:] / identity.sizes[:-1], 2.0, rtol=1e-5)


def test_the_exponent_tends_to_the_largest_eigenvalue_and_stays_below_the_norms():
    """Of one matrix over and over, far from normal; over few layers of any matrices it is below the norms' mean log."""
    w = np.asarray([[0.9, 3.0, 0.0], [0.0, 0.6, 2.0], [0.0, 0.0, 0.3]])
    (deep,) = grown(matrices(np.stack([w] * 60)), IDENTITY)
    np.testing.assert_allclose(deep.log_growth[30:], math.log(0.9), atol=1e-4)  # (0.6 / 0.9)^30 = 5e-6
    assert deep.log_growth[0] > math.log(0.9), "a perturbation grows at first"
    (few,) = grown(affine(), IDENTITY)
    norms = two_norms(affine().params["w"])
    assert exponent(few.log_growth) < np.log(norms).mean() and np.all(few.log_growth <= np.log(norms) + 1e-5)


def test_predicted_iterations_are_those_of_a_chain_of_one_number():
    """Layers ``h -> m h + c``, one number m and one direction: there the recursion of norms is that of the errors."""
    num_layers, w = 8, np.full((8, 1, 1), 1.25)
    chain = dataclasses.replace(matrices(w), h_in=jnp.ones((1, 1)), ctx=jnp.ones(num_layers))
    chain = dataclasses.replace(chain, fns=LayerFns(lambda w, h, ctx, shared: (h @ w + ctx, ())))
    corrections = (JACOBI, IDENTITY, HALF)
    run = jax.jit(lambda c: [trace_errors(c, each, PrefixState(), num_iters=num_layers).error for each in corrections])
    counts = []
    for error, growth in zip(jax.device_get(run(chain)), grown(chain, *corrections), strict=True):
        gains = Gains(*(np.asarray(values).tolist() for values in growth))
        curve = predicted_errors(error[0].tolist(), gains.left, gains)
        np.testing.assert_allclose(curve, error[:, -1], rtol=1e-4, atol=1e-6)  # float32 errors of states of 20
        for tolerance in (0.3, 0.03, 0.003):
            counts.append(iterations_needed(error[:, -1].tolist(), tolerance))
            assert predict(error[0].tolist(), gains, gains.left, tolerance) == Predictions(*[counts[-1]] * 3)
    assert len(set(counts)) > 4


def test_the_closed_form_of_the_documentation():
    """Errors that grow evenly with depth, one exponent, Identity: ``(e^x - 1)^k C(N - 1, k) / (k + 1)`` of the error is
    left after k iterations."""
    N, left = 10, math.exp(0.2) - 1
    gains = Gains([0.2] * N, [left] * N, [1.0] * N, [1.0] * (N + 1))
    curve = predicted_errors([0.1 * node for node in range(1, N + 1)], gains.left, gains)
    expected = [left**k * math.comb(N - 1, k) / (k + 1) for k in range(N + 1)]
    np.testing.assert_allclose(curve, expected, rtol=1e-9)


def test_what_counts_as_solved():
    assert [iterations_needed(curve, 0.1) for curve in ([1, 0.5, 0], [0.1, 0], [1, 0.05, 0.2, 0])] == [2, 0, 3]
    nan = float("nan")
    assert iterations_needed([nan, nan, 0.0]) == 2
    gains = Gains([500.0] * 3, [1e300] * 3, [1.0] * 3, [1.0] * 4)
    assert predict([1.0, 1.0, 1.0], gains, [math.inf] * 3) == Predictions(3, 3, 3)


def test_bad_numbers_are_refused():
    chain = affine()
    with pytest.raises(ValueError, match="num_iters is 0"):
        jax.eval_shape(lambda: trace_errors(chain, IDENTITY, PrefixState(), num_iters=0))
    with pytest.raises(ValueError, match="num_steps is 0"):
        jax.eval_shape(lambda: spectral_norms(chain, true_trace(chain, jnp), 0))


# ---------------------------------------------------------------- diagnosis of a language model


def regions_of(*settings):
    return parallel_regions({text: parse_schedule(text, MODEL.num_layers) for text in settings})


def test_distinct_regions_of_settings():
    found = regions_of("seq", "idn:n=2,k=1", "idn:k=2,n=2", "idn:n=2,tol=0.1", "jac:0-1,k=1+sid:n=2,k=1+skip:1-2")
    assert list(found) == ["idn:n=2", "jac:0-1+sid:n=2+skip:1-2 [0-1]", "jac:0-1+sid:n=2+skip:1-2 [2-4]"]
    with pytest.raises(InputError, match="parallel region"):
        regions_of("seq", "exit:2")


def test_diagnosis_of_a_language_model_is_that_of_its_forward_pass():
    """The error of a region that ends the model is that of the last state; a chunk's truth is the fused model."""
    model, settings = LanguageModel(MODEL), ("idn:n=4,stage=2xF2", "idn:n=3,stage=split")
    params, tokens_BT = random_params(model), np.asarray(random_tokens(MODEL, batch=2, length=6))
    diagnosis = diagnose(model, params, tokens_BT, regions_of(*settings))
    fused, shared = diagnosis.regions
    assert [region.setting for region in diagnosis.regions] == list(settings)
    assert [region.surrogate for region in diagnosis.regions] == ["Identity, Chunkwise(num_chunks=2)", "Identity"]
    assert [region.layers for region in diagnosis.regions] == [[1, 3], [1, 2, 3]]
    assert [np.shape(region.errors) for region in diagnosis.regions] == [(3, 2), (2, 3)]
    for k, row in enumerate(fused.errors[1:], start=1):
        assert max(row[:k]) < 1e-5  # float32 rounding of batched against single products
    for region in diagnosis.regions:
        assert region.errors[0][-1] > 1e-2 and min(region.spectral_norms) > 1 and min(region.contractions) > 1e-2
        assert region.exponent < np.log(region.spectral_norms).mean() and region.predicted.by_norms == len(
            region.layers
        )
    assert (fused.needed, shared.needed) == (2, None) and 0 < diagnosis.exponent < 1

    weights = split(model, params, parse_schedule(settings[1], 4))
    run = jax.jit(lambda w, p: (forward(model, w, tokens_BT).h_last, forward(model, p, tokens_BT).h_last))
    h_last, exact = jax.device_get(run(weights, split(model, params, parse_schedule("seq", 4))))
    distance_BT = np.linalg.norm(h_last - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert shared.errors[1][-1] == pytest.approx(distance_BT.mean(), rel=1e-4)  # float32 sums in another order
    saved = json.loads(diagnosis.to_json())
    assert len(saved["regions"]) == 2 and saved["regions"][0]["predicted"]["by_norms"] == 2
    assert len(saved["regions"][1]["gains"]["sizes"]) == 4
