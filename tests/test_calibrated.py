"""Calibrated surrogates and initial traces: exact on what they can express, safe whatever their numbers are, and
fitted by regressions that the moments reproduce."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import NUM_LAYERS, WIDTH, listed, nonlinear, pair, relative_error, translation, true_trace

from snlp_jax.config import MeshConfig
from snlp_jax.errors import InputError
from snlp_jax.linearize import (
    About,
    fingerprint,
    fit_calibration,
    fit_init,
    load_calibration,
    save_calibration,
    stored_calibrations,
)
from snlp_jax.parallel import make_mesh, solve_sharded
from snlp_jax.solver import (
    Calibrated,
    CalibratedInit,
    Calibration,
    Chain,
    Chunkwise,
    Identity,
    Iteration,
    MethodData,
    ParallelSegment,
    PrefixState,
    Preheat,
    ScaledIdentity,
    Wanted,
    solve,
    start,
    step,
)

NUM_SAMPLES, RANK = 64, 2


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def affine_chain(seed=0):
    """``h -> A_l h + c_l + noise``: maps of the kind ``basis``, and the part of y that no input explains."""
    a_LDD = np.stack([c * np.eye(WIDTH) for c in np.linspace(0.6, 1.3, NUM_LAYERS)])
    u, v = normal(2, WIDTH, RANK), normal(3, WIDTH, RANK)
    a_LDD = a_LDD + np.einsum("DX,LXY,EY->LDE", u, 0.1 * normal(4, NUM_LAYERS, RANK, RANK), v)

    def block(params, h, ctx, shared):
        return h @ params["a"].T + params["c"][None] + ctx, ()

    as_float = lambda x: jnp.asarray(x, jnp.float32)  # noqa: E731
    params = {"a": as_float(a_LDD), "c": as_float(normal(5, NUM_LAYERS, WIDTH))}
    noise = as_float(normal(6 + seed, NUM_LAYERS, NUM_SAMPLES, WIDTH))
    return Chain.of(block, params, as_float(1.0 + normal(7 + seed, NUM_SAMPLES, WIDTH)), ctx=noise)


def curved_chain(seed=0, num_samples=NUM_SAMPLES):
    h_in = jnp.asarray(0.5 + normal(seed, num_samples, WIDTH), jnp.float32)
    return dataclasses.replace(nonlinear_chain(), h_in=h_in)


nonlinear_chain = functools.cache(nonlinear)


def batches(chain, anchor=None, sizes=(32, 32)):
    """The same tokens as several chains, each with its anchor."""
    cuts = np.cumsum((0, *sizes))

    def part(leaf, axis, i):
        return None if leaf is None else jax.lax.slice_in_dim(leaf, cuts[i], cuts[i + 1], axis=axis)

    def one(i):
        cut = dataclasses.replace(chain, h_in=part(chain.h_in, 0, i), ctx=part(chain.ctx, 1, i))
        return cut, MethodData(anchor=part(anchor, 0, i))

    return [one(i) for i in range(len(sizes))]


def garbage(kind, num_iters=2, num_layers=NUM_LAYERS, init_rank=3):
    rng = np.random.default_rng(8)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    shape = (num_layers, num_iters)
    layers = {"intercept": draw(*shape, WIDTH), "init_scale": draw(num_layers)}
    for name in ("init", "preheat"):
        layers |= {f"{name}_{part}": draw(num_layers, WIDTH, init_rank) for part in "uv"}
        layers[f"{name}_intercept"] = draw(num_layers, WIDTH)
    layers["channel" if kind == "channel" else "scale"] = draw(*shape, *(WIDTH,) * (kind == "channel"))
    if kind != "basis":
        return Calibration(layers, {})
    layers["core"] = draw(*shape, RANK, RANK)
    return Calibration(layers, {name: draw(num_iters, WIDTH, RANK) for name in "uv"})


@functools.partial(jax.jit, static_argnames=("methods", "num_iters"))
def squared_errors(chain, fit, methods, num_iters):
    """Of each correction and initial trace, against the sequential trace."""
    truth, data = true_trace(chain, jnp), MethodData(fit)
    traces = [solve(chain, *method, data, num_iters=num_iters).trace for method in methods]
    return [jnp.square(trace - truth).mean() for trace in traces]


# ---------------------------------------------------------------- exactness


def test_one_step_is_exact_on_the_maps_of_its_kind():
    """Fitted on some text, exact on other, with the coefficients of the chain."""
    chain = affine_chain()
    fitted = fit_calibration(batches(chain), num_iters=1, kind="basis", rank=RANK, intercept=True, ridge=0.0)
    fresh = dataclasses.replace(affine_chain(seed=100), params=chain.params)

    @jax.jit
    def run(chain, fit):
        ones_L = jnp.broadcast_to(chain.h_in, (NUM_LAYERS, *chain.h_in.shape))
        moved_L = Calibrated().surrogate(chain, Iteration(0, ones_L, ones_L, (), ones_L, chain.h_in), fit).apply(ones_L)
        calibrated = solve(chain, Calibrated(), PrefixState(), MethodData(fit), num_iters=1).trace
        return calibrated, solve(chain, Identity(), PrefixState(), num_iters=1).trace, true_trace(chain, jnp), moved_L

    trace, fixed, exact, moved_L = run(fresh, fitted)
    # Moments of 64 samples in float32, through five layers; bases are found in turns, which end before the limit.
    assert relative_error(trace, exact) < 2e-4
    assert relative_error(fixed, exact) > 1e-2
    np.testing.assert_allclose(fitted.layers["intercept"], 0.0, atol=1e-3)  # the same errors times means of size one
    expected = np.einsum("TD,LED->LTE", fresh.h_in, fresh.params["a"])
    # The first layer meets d = 0: nothing to fit.
    np.testing.assert_allclose(moved_L[1:], expected[1:], rtol=1e-3, atol=1e-3)  # as above


def test_n_iterations_are_exact_whatever_the_numbers_are():
    """Iteration k + 1 finds nothing to correct in the first k layers: a residual of exactly 0.0."""

    @jax.jit
    def run(chain, fit):
        data = MethodData(fit, anchor=jnp.flip(chain.h_in))
        want = Wanted(stats=True)
        found = solve(chain, Calibrated(), CalibratedInit(), data, num_iters=NUM_LAYERS + 1, want=want)
        return found, true_trace(chain, jnp)

    solution, exact = run(nonlinear_chain(), garbage("basis"))
    settled = np.tril(np.ones((NUM_LAYERS + 1, NUM_LAYERS), bool), -1)
    residual_norm = np.asarray(solution.stats["residual_norm"])
    np.testing.assert_array_equal(residual_norm[settled], 0.0)
    assert residual_norm[NUM_LAYERS - 2, -1] > 0 and residual_norm[0, 1] > 0
    assert relative_error(solution.trace, exact) < 3e-6  # rounding of batched against single calls


def test_sharded_calibrations_are_unsharded():
    """Five layers on two devices, filled up to six: surrogates, intercepts and initial traces lie with their layers;
    the shared bases are everywhere."""
    want, mesh = Wanted(taps=(2,)), make_mesh(MeshConfig(layer=2))

    @jax.jit
    def run(chain, fit):
        method = (Calibrated(), CalibratedInit(), MethodData(fit))
        whole = solve(chain, *method, num_iters=2, want=want)
        sharded = solve_sharded(chain, *method, mesh=mesh, num_iters=2, want=want)
        parts = [(solution.trace, solution.value, solution.tapped[0]) for solution in (whole, sharded)]
        return *parts, true_trace(chain, jnp)

    whole, sharded, exact = run(nonlinear_chain(), garbage("basis"))
    for one, other in zip(sharded, whole, strict=True):
        assert relative_error(one, other) < 1e-4  # rounding of products in another order, grown by such numbers
    assert relative_error(whole[0], exact) > 1e-3


def test_preheat_of_streams_starts_all_of_them_from_the_anchor():
    """An anchor [T, D] without streams guesses states [T, R, D]: every stream the same map of it."""
    anchor = jnp.asarray(normal(3, 6, WIDTH), jnp.float32)

    @jax.jit
    def run(alone, data):
        streams = dataclasses.replace(alone, h_in=jnp.zeros((6, 3, WIDTH)))
        return Preheat()(alone, data).h_L, Preheat()(streams, data).h_L

    alone = dataclasses.replace(nonlinear_chain(), h_in=anchor)
    expected, h_L = run(alone, MethodData(garbage("scalar"), anchor=anchor))
    expected = np.broadcast_to(np.asarray(expected)[:, :, None], h_L.shape)
    np.testing.assert_allclose(h_L, expected, rtol=1e-5, atol=1e-6)  # rounding of batched products


def test_an_initial_trace_of_full_rank_is_exact_on_affine_chains():
    chain = dataclasses.replace(affine_chain(), ctx=jnp.zeros((NUM_LAYERS, NUM_SAMPLES, WIDTH)))
    fits = {rank: fit_of(fit_init(batches(chain), CalibratedInit(), rank=rank, ridge=0.0)) for rank in (1, WIDTH)}

    @jax.jit
    def run(chain, fits):
        guess = lambda fit: CalibratedInit()(chain, MethodData(fit)).h_L  # noqa: E731
        return true_trace(chain, jnp), {rank: guess(fit) for rank, fit in fits.items()}

    exact, traces = run(chain, fits)
    assert relative_error(traces[WIDTH], exact) < 1e-5  # moments of 64 samples in float32
    assert relative_error(traces[1], exact) > 1e-2


def fit_of(layers):
    return Calibration({name: jnp.asarray(leaf, jnp.float32) for name, leaf in layers.items()}, {})


def test_preheat_is_the_regression_on_principal_components():
    anchor = jnp.asarray(normal(11, NUM_SAMPLES, WIDTH) * [3.0, 2.0, 1.0, 0.5], jnp.float32)
    chain = curved_chain()
    fit = fit_of(fit_init(batches(chain, anchor), Preheat(), rank=RANK, ridge=0.0))
    run = jax.jit(lambda chain, data: (Preheat()(chain, data).h_L, true_trace(chain, jnp)))
    h_L, truth = run(chain, MethodData(fit, anchor=anchor))
    x = np.asarray(anchor, np.float64)
    scores = (x - x.mean(0)) @ np.linalg.svd(x - x.mean(0))[2][:RANK].T
    design = np.concatenate([scores, np.ones((NUM_SAMPLES, 1))], axis=1)
    expected = [design @ np.linalg.lstsq(design, h, rcond=None)[0] for h in np.asarray(truth, np.float64)]
    np.testing.assert_allclose(h_L, np.stack(expected), rtol=1e-4, atol=1e-4)  # moments in float32


# ---------------------------------------------------------------- the fit


@jax.jit
def activations(chain, fit, index):
    """The trace that iteration ``index`` finds, its evaluations and the exact trace."""
    data = MethodData(fit)
    guess, _, state = start(chain, Calibrated(), PrefixState(), data)
    advance = lambda earlier, guess: step(chain, Calibrated(), guess, state, earlier).guess  # noqa: E731
    it = step(chain, Calibrated(), jax.lax.fori_loop(0, index, advance, guess), state, index).iteration
    return it.h_L, it.y_L, true_trace(chain, jnp)


@jax.jit
def affine_parts(chain, fit, index):
    """Columns of A_l, and b_l, of iteration ``index``."""
    unit_L = jnp.broadcast_to(jnp.eye(WIDTH), (NUM_LAYERS, WIDTH, WIDTH))
    it = Iteration(index, unit_L, unit_L, (), unit_L, unit_L[0])
    columns = Calibrated().surrogate(chain, it, fit).apply(unit_L)
    return columns.swapaxes(1, 2), Calibrated().predict(chain, it, fit) - unit_L


def direct_fit(chain, fitted, kind, index, intercept):
    """The regressions of iteration ``index`` on stored activations, layer after layer, in float64."""
    h_L, y_L, truth = (np.asarray(x, np.float64) for x in activations(chain, fitted, index))
    u, v = (np.asarray(fitted.common[name][index], np.float64) for name in "uv") if kind == "basis" else (None, None)
    rows, d = [], np.zeros_like(y_L[0])
    centre = (lambda x: x - x.mean(0)) if intercept else (lambda x: x)
    for l in range(NUM_LAYERS):
        t = truth[l] - y_L[l]
        a_DD, b_D = np.eye(WIDTH), np.zeros(WIDTH)
        if l > index:
            x, target = centre(d), centre(t)
            if kind == "scalar":
                a_DD = np.eye(WIDTH) * (x * target).sum() / (x * x).sum()
            elif kind == "channel":
                a_DD = np.diag((x * target).sum(0) / (x * x).sum(0))
            else:
                units = [np.outer(u[:, i], v[:, j]) for i in range(RANK) for j in range(RANK)]
                basis = [np.eye(WIDTH), *units]
                design = np.stack([(x @ unit.T).ravel() for unit in basis], axis=1)
                a_DD = np.tensordot(np.linalg.lstsq(design, target.ravel(), rcond=None)[0], np.stack(basis), 1)
            b_D = (t - d @ a_DD.T).mean(0) if intercept else b_D
        d = d @ a_DD.T + y_L[l] - h_L[l] + b_D
        rows.append((a_DD, b_D))
    return [np.stack(part) for part in zip(*rows, strict=True)]


@pytest.mark.parametrize("kind, intercept", (("scalar", False), ("basis", True)))
def test_moments_give_the_regression_on_the_solvers_own_updates(kind, intercept):
    """In both iterations, from four batches in a stream that is opened anew for each pass."""
    chain = curved_chain()
    fitted = fit_calibration(
        lambda: iter(batches(chain)), num_iters=2, kind=kind, rank=RANK, intercept=intercept, ridge=0.0
    )
    assert ("intercept" in fitted.layers) == intercept
    for index in range(2):
        a_LDD, b_LD = direct_fit(chain, fitted, kind, index, intercept)
        maps, added = affine_parts(chain, fitted, index)
        # Float32 moments; of a residual that the first iteration has made small in the second.
        np.testing.assert_allclose(maps, a_LDD, rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(added, np.broadcast_to(b_LD[:, None], added.shape), rtol=2e-3, atol=2e-3)
        assert not np.any(b_LD[: index + 1]) and (not intercept or np.abs(b_LD[-1]).max() > 0.01)


def test_fitted_surrogates_and_a_fitted_start_beat_the_fixed_ones_on_other_text():
    """The start is fitted first and the surrogates to it."""
    text, held_out = [(curved_chain(0, 256), MethodData())], curved_chain(1, 64)
    h0, init = PrefixState(), CalibratedInit()
    fitted = fit_calibration(text, num_iters=1, kind="channel", init=init, init_rank=WIDTH)
    methods = ((Calibrated(), init), (Identity(), init), (Identity(), h0), (ScaledIdentity(), h0))
    calibrated, from_init, *fixed = squared_errors(held_out, fitted, methods, 1)
    assert calibrated < from_init and calibrated < 0.8 * min(fixed)


def test_streams_are_samples():
    """A chain that treats each stream alike is fitted as one of more tokens, list layout as stack."""
    chain = curved_chain()
    wide = lambda params, h, ctx, shared: (h + jnp.tanh(h @ params["w"] + params["c"][None, None]), ())  # noqa: E731
    streams = Chain.of(wide, chain.params, chain.h_in.reshape(-1, 2, WIDTH))
    expected, actual = (
        fit_calibration(
            [(text, MethodData())], num_iters=1, kind="channel", intercept=True, init=CalibratedInit(), init_rank=2
        )
        for text in (listed(chain), streams)
    )
    assert actual.layers.keys() == expected.layers.keys()
    for name in ("channel", "intercept", "init_scale"):
        np.testing.assert_allclose(actual.layers[name], expected.layers[name], rtol=1e-4, atol=1e-4)  # float32 sums


# ---------------------------------------------------------------- refusals and files


def test_refusals():
    chain = translation()
    only_maps = Calibration({"scale": jnp.ones((NUM_LAYERS, 1))}, {})
    only_init = Calibration({"init_scale": jnp.ones((NUM_LAYERS,))}, {})
    for message, fit, init, chain_of in (
        ("data.fit", None, PrefixState(), translation),
        ("fitted to 4 layers", garbage("scalar", num_layers=4), PrefixState(), translation),
        ("tree of 2", garbage("scalar"), PrefixState(), pair),
        ("no 'init' part", only_maps, CalibratedInit(), translation),
        ("data.anchor", garbage("scalar"), Preheat(), translation),
        ("no surrogate", only_init, PrefixState(), translation),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda: solve_once(chain_of(), init, MethodData(fit)))  # noqa: B023
    text = [(chain, MethodData())]
    refused = {
        "kind 'dense'": lambda: fit_calibration(text, num_iters=1, kind="dense"),
        "num_iters is 0": lambda: fit_calibration(text, num_iters=0),
        f"rank {WIDTH + 1}": lambda: fit_calibration(text, num_iters=1, rank=WIDTH + 1),
        "no text": lambda: fit_calibration([], num_iters=1),
        "tree of 2": lambda: fit_calibration([(pair(), MethodData())], num_iters=1),
        "data.anchor": lambda: fit_calibration(text, num_iters=1, kind="scalar", init=Preheat(), init_rank=1),
    }
    for message, call in refused.items():
        with pytest.raises(InputError, match=message):
            call()


def solve_once(chain, init, data):
    return solve(chain, Calibrated(), init, data, num_iters=1).value


def test_a_calibration_is_read_as_it_was_written(tmp_path):
    params = {"w": jnp.ones((2, 3)), "b": jnp.zeros((3,), jnp.bfloat16)}
    about = About("basis", 2, 7, 2, num_tokens=1000, seed=3, fingerprint=fingerprint(params), init="calibrated")
    written = garbage("basis")
    save_calibration(tmp_path, "fit-1", garbage("scalar"), about)
    path = save_calibration(tmp_path, "fit-1", written, about)
    assert path == tmp_path / "calibrations" / "fit-1.npz" and len(list(path.parent.iterdir())) == 1
    region = ParallelSegment(2, 7, 1, Calibrated(), CalibratedInit(), fit="fit-1")
    read = load_calibration(tmp_path, region, about.fingerprint)
    assert stored_calibrations(tmp_path, about.fingerprint) == {"fit-1": about}
    assert jax.tree.structure(read) == jax.tree.structure(written)
    jax.tree.map(np.testing.assert_array_equal, read, written)

    other = fingerprint(params | {"w": params["w"].at[1, 2].set(1.5)})
    (path.parent / "broken.npz").write_bytes(b"no archive")
    for changes, params_of, message in (
        ({"fit": "fit-2"}, about.fingerprint, "fit-2"),
        ({}, other, "checkpoint"),
        ({"stop": 8}, about.fingerprint, "layers 2-7"),
        ({"stage": Chunkwise(1)}, about.fingerprint, "stage per layer, but the region has 1xF5"),
        ({"fit": "broken"}, about.fingerprint, "no calibration file"),
        ({"fit": "../fit"}, about.fingerprint, "letters"),
    ):
        with pytest.raises(InputError, match=message):
            load_calibration(tmp_path, dataclasses.replace(region, **changes), params_of)


def test_a_fingerprint_sees_names_shapes_types_and_values():
    params = {"w": jnp.arange(6.0).reshape(2, 3)}
    variants = (
        params,
        {"v": params["w"]},
        {"w": params["w"].reshape(3, 2)},
        {"w": params["w"].astype(jnp.float16)},
        {"w": params["w"].at[0, 0].set(-0.0)},
    )
    assert len({fingerprint(variant) for variant in variants}) == len(variants)
    assert fingerprint(params) == fingerprint({"w": np.asarray(params["w"])})
