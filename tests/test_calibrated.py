"""Calibrated surrogates and initial traces: exact on what they can express, safe whatever their numbers are, and
fitted by regressions that the moments reproduce."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import NUM_LAYERS, WIDTH, error, listed, nonlinear, pair, relative_error, translation, true_trace

from snlp_jax.config import MeshConfig
from snlp_jax.errors import InputError
from snlp_jax.linearize import (
    About,
    fingerprint,
    fit_calibration,
    fit_init,
    load_calibration,
    save_calibration,
)
from snlp_jax.parallel import make_mesh, solve_sharded
from snlp_jax.solver import (
    BatchForward,
    Identity,
    Iteration,
    LayerProblem,
    PrefixState,
    ScaledIdentity,
    sequential,
    solve,
)
from snlp_jax.solver.calibrated import Calibrated, CalibratedInit, Calibration, Preheat
from snlp_jax.solver.linear import shift

NUM_SAMPLES, RANK = 64, 2
KINDS = ("scalar", "channel", "basis")


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def affine_chain(kind, seed=0):
    """``h -> A_l h + c_l + noise``: maps that ``kind`` can express, and the part of y that no input explains."""
    scale = np.linspace(0.6, 1.3, NUM_LAYERS)
    a_LDD = np.stack([c * np.eye(WIDTH) for c in scale])
    if kind == "channel":
        a_LDD = np.stack([np.diag(row) for row in normal(1, NUM_LAYERS, WIDTH)])
    if kind == "basis":
        u, v = normal(2, WIDTH, RANK), normal(3, WIDTH, RANK)
        a_LDD = a_LDD + np.einsum("DX,LXY,EY->LDE", u, 0.1 * normal(4, NUM_LAYERS, RANK, RANK), v)

    def block(params, h, ctx, shared):
        return h @ params["a"].T + params["c"][None] + ctx, ()

    as_float = lambda x: jnp.asarray(x, jnp.float32)  # noqa: E731
    params = {"a": as_float(a_LDD), "c": as_float(normal(5, NUM_LAYERS, WIDTH))}
    noise = as_float(normal(6 + seed, NUM_LAYERS, NUM_SAMPLES, WIDTH))
    return LayerProblem(block, params, noise, None, as_float(1.0 + normal(7 + seed, NUM_SAMPLES, WIDTH)), NUM_LAYERS)


def curved_chain(seed=0, num_samples=NUM_SAMPLES):
    problem = nonlinear()
    h_in = jnp.asarray(0.5 + normal(seed, num_samples, WIDTH), jnp.float32)
    return dataclasses.replace(problem, h_in=h_in)


def batches(problem, sizes=(16, 16, 16, 16)):
    """The same tokens as several problems."""
    cuts = np.cumsum((0, *sizes))
    part = lambda leaf, axis, i: jax.lax.slice_in_dim(leaf, cuts[i], cuts[i + 1], axis=axis)  # noqa: E731
    return [
        dataclasses.replace(
            problem,
            h_in=part(problem.h_in, 0, i),
            ctx=None if problem.ctx is None else part(problem.ctx, 1, i),
            anchor=None if problem.anchor is None else part(problem.anchor, 0, i),
        )
        for i in range(len(sizes))
    ]


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


def compiled(function, problem):
    """``function(problem)`` as one program."""
    arrays = {name: getattr(problem, name) for name in ("params", "ctx", "h_in", "anchor", "calibration")}
    return jax.jit(lambda arrays: function(dataclasses.replace(problem, **arrays)))(arrays)


def solved(problem, correction, num_iters=1, init=None):
    return compiled(lambda p: solve(p, correction, num_iters=num_iters, init=init or PrefixState()).trace, problem)


def squared_errors(problem, corrections, num_iters, init=None):
    """Of each correction, against the sequential trace."""

    def run(problem):
        truth = sequential(problem, with_trace=True).trace
        traces = [solve(problem, c, num_iters=num_iters, init=init or PrefixState()).trace for c in corrections]
        return [jnp.square(trace - truth).mean() for trace in traces]

    return compiled(run, problem)


# ---------------------------------------------------------------- exactness


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_is_exact_on_the_maps_of_its_kind(kind):
    """Fitted on some text, exact on other, with the coefficients of the chain."""
    problem = affine_chain(kind)
    fitted = fit_calibration(batches(problem), num_iters=1, kind=kind, rank=RANK, intercept=True, ridge=0.0)
    fresh = dataclasses.replace(affine_chain(kind, seed=100), params=problem.params, calibration=fitted)
    # Moments of 64 samples in float32, through five layers; bases are found in turns, which end before the limit.
    assert error(solved(fresh, Calibrated()), fresh) < (2e-4 if kind == "basis" else 2e-5)
    assert error(solved(fresh, Identity()), fresh) > 1e-2
    np.testing.assert_allclose(fitted.layers["intercept"], 0.0, atol=1e-3)  # the same errors times means of size one
    ones = fresh.h_in[None] * jnp.ones((NUM_LAYERS, 1, 1))
    iteration = Iteration(0, ones, ones, (), ones, fresh.h_in)
    moved = compiled(lambda p: Calibrated().surrogate(p, iteration, ()).apply(ones), fresh)
    expected = jnp.einsum("TD,LED->LTE", fresh.h_in, fresh.params["a"])
    # The first layer meets d = 0: nothing to fit.
    np.testing.assert_allclose(moved[1:], expected[1:], rtol=1e-3, atol=1e-3)  # as above


@pytest.mark.parametrize(
    "kind, init", (("scalar", Preheat()), ("channel", PrefixState()), ("basis", CalibratedInit())), ids=KINDS
)
def test_n_iterations_are_exact_whatever_the_numbers_are(kind, init):
    """Iteration k + 1 finds nothing to correct in the first k layers: a residual of exactly 0.0."""
    problem = nonlinear()
    problem = dataclasses.replace(problem, calibration=garbage(kind), anchor=jnp.flip(problem.h_in))

    @jax.jit
    def run(params, calibration):
        here = dataclasses.replace(problem, params=params, calibration=calibration)
        return solve(here, Calibrated(), num_iters=NUM_LAYERS + 1, init=init, with_stats=True)

    solution = run(problem.params, problem.calibration)
    settled = np.tril(np.ones((NUM_LAYERS + 1, NUM_LAYERS), bool), -1)
    residual_norm = np.asarray(solution.stats["residual_norm"])
    np.testing.assert_array_equal(residual_norm[settled], 0.0)
    assert residual_norm[NUM_LAYERS - 2, -1] > 0 and residual_norm[0, 1] > 0
    assert error(solution.trace, problem) < 3e-6  # rounding of another compiled program: scan instead of vmap


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_calibrations_are_unsharded(kind):
    """Five layers on four devices, filled up to eight: surrogates, intercepts and initial traces lie with their layers;
    the shared bases are everywhere."""
    problem = dataclasses.replace(nonlinear(), calibration=garbage(kind), anchor=nonlinear().h_in)
    settings = {"num_iters": 3, "init": CalibratedInit(), "taps": (2,)}

    @jax.jit
    def run(problem_arrays):
        here = dataclasses.replace(problem, **problem_arrays)
        return solve(here, Calibrated(), **settings), solve_sharded(
            here, Calibrated(), mesh=make_mesh(MeshConfig(layer=4)), **settings
        )

    whole, sharded = run({"params": problem.params, "h_in": problem.h_in, "calibration": problem.calibration})
    for one, other in (
        (sharded.trace, whole.trace),
        (sharded.value, whole.value),
        (sharded.tapped[0], whole.tapped[0]),
    ):
        assert relative_error(one, other) < 1e-4  # rounding of products in another order, grown by such numbers
    assert relative_error(whole.trace, true_trace(problem)) > 1e-3


def test_preheat_of_streams_starts_all_of_them_from_the_anchor():
    """An anchor [T, D] without streams guesses states [T, R, D]: every stream the same map of it."""
    fitted = garbage("scalar")
    anchor = jnp.asarray(normal(3, 6, WIDTH), jnp.float32)
    chain = nonlinear()
    alone = dataclasses.replace(chain, h_in=anchor, anchor=anchor, calibration=fitted)
    streams = dataclasses.replace(alone, h_in=jnp.zeros((6, 3, WIDTH)))
    expected = np.broadcast_to(Preheat()(alone).h_L[:, :, None], (NUM_LAYERS, 6, 3, WIDTH))
    np.testing.assert_allclose(Preheat()(streams).h_L, expected, rtol=1e-5, atol=1e-6)  # rounding of batched products


def test_an_initial_trace_of_full_rank_is_exact_on_affine_chains():
    problem = dataclasses.replace(affine_chain("basis"), ctx=jnp.zeros((NUM_LAYERS, NUM_SAMPLES, WIDTH)))
    traces = {}
    for rank in (1, WIDTH):
        layers = fit_init(batches(problem), CalibratedInit(), rank=rank, ridge=0.0)
        layers = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in layers.items()}
        traces[rank] = compiled(
            lambda p: CalibratedInit()(p).h_L, dataclasses.replace(problem, calibration=Calibration(layers, {}))
        )
    assert error(traces[WIDTH], problem) < 1e-5  # moments of 64 samples in float32
    assert error(traces[1], problem) > 1e-2


def test_preheat_is_the_regression_on_principal_components():
    anchor = jnp.asarray(normal(11, NUM_SAMPLES, WIDTH) * [3.0, 2.0, 1.0, 0.5], jnp.float32)
    problem = dataclasses.replace(curved_chain(), anchor=anchor)
    layers = fit_init(batches(problem), Preheat(), rank=RANK, ridge=0.0)
    layers = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in layers.items()}
    h_L = compiled(lambda p: Preheat()(p).h_L, dataclasses.replace(problem, calibration=Calibration(layers, {})))
    x = np.asarray(anchor, np.float64)
    scores = (x - x.mean(0)) @ np.linalg.svd(x - x.mean(0))[2][:RANK].T
    design = np.concatenate([scores, np.ones((NUM_SAMPLES, 1))], axis=1)
    truth = np.asarray(sequential(problem, with_trace=True).trace, np.float64)
    expected = np.stack([design @ np.linalg.lstsq(design, h, rcond=None)[0] for h in truth])
    np.testing.assert_allclose(h_L, expected, rtol=1e-4, atol=1e-4)  # moments in float32


# ---------------------------------------------------------------- the fit


def direct_fit(problem, fitted, kind, index, intercept):
    """The regressions of iteration ``index`` on stored activations, layer after layer, in float64."""

    def activations(problem):
        guess = PrefixState()(problem)
        for earlier in range(index):
            x_L = shift(guess.h_L, guess.entering)
            guess = Calibrated()(problem, Iteration(earlier, x_L, *problem.sweep(x_L), guess.h_L, guess.entering))
        y_L = problem.sweep(shift(guess.h_L, guess.entering))[0]
        return guess.h_L, y_L, sequential(problem, with_trace=True).trace

    h_L, y_L, truth = (np.asarray(x, np.float64) for x in compiled(activations, problem))
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


@pytest.mark.parametrize("kind, intercept", (("scalar", False), ("channel", True), ("basis", True)))
def test_moments_give_the_regression_on_the_solvers_own_updates(kind, intercept):
    """In both iterations, from four batches in a stream that is opened anew for each pass."""
    problem = curved_chain()
    fitted = fit_calibration(
        lambda: iter(batches(problem)), num_iters=2, kind=kind, rank=RANK, intercept=intercept, ridge=0.0
    )
    assert ("intercept" in fitted.layers) == intercept
    problem = dataclasses.replace(problem, calibration=fitted)
    unit = jnp.broadcast_to(jnp.eye(WIDTH), (NUM_LAYERS, WIDTH, WIDTH))
    for index in range(2):
        a_LDD, b_LD = direct_fit(problem, fitted, kind, index, intercept)
        iteration = Iteration(index, unit, unit, (), unit, unit[0])
        columns, predicted = compiled(
            lambda p, it=iteration: (Calibrated().surrogate(p, it, ()).apply(unit), Calibrated().predict(p, it)),
            problem,
        )
        # Float32 moments; of a residual that the first iteration has made small in the second.
        np.testing.assert_allclose(columns.swapaxes(1, 2), a_LDD, rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(predicted - unit, np.broadcast_to(b_LD[:, None], unit.shape), rtol=2e-3, atol=2e-3)
        assert not np.any(b_LD[: index + 1]) and (not intercept or np.abs(b_LD[-1]).max() > 0.01)


def test_fitted_surrogates_beat_the_fixed_ones_on_other_text():
    problem, held_out = curved_chain(0, 256), curved_chain(1, 64)
    held_out = dataclasses.replace(held_out, calibration=fit_calibration([problem], num_iters=2, kind="channel"))
    corrections = (Calibrated(), Calibrated(damping=0.5), Identity(), ScaledIdentity())
    for num_iters in (1, 2):
        mine, damped, *fixed = squared_errors(held_out, corrections, num_iters)
        assert mine < 0.8 * min(fixed) and mine < damped


@pytest.mark.parametrize("init", (CalibratedInit(), BatchForward()), ids=lambda init: type(init).__name__)
def test_a_fitted_start_is_fitted_first_and_the_surrogates_to_it(init):
    problem, held_out = curved_chain(0, 256), curved_chain(1, 64)
    fitted = fit_calibration([problem], num_iters=1, kind="channel", init=init, init_rank=WIDTH)
    held_out = dataclasses.replace(held_out, calibration=fitted)
    mine, fixed = squared_errors(held_out, (Calibrated(), Identity()), 1, init)
    assert mine < fixed and mine < squared_errors(held_out, (Identity(),), 1)[0]


def test_streams_are_samples():
    """A chain that treats each stream alike is fitted as one of more tokens, list layout as stack."""
    problem = curved_chain()
    streams = dataclasses.replace(problem, h_in=problem.h_in.reshape(-1, 2, WIDTH))
    settings = {"num_iters": 1, "kind": "channel", "intercept": True, "init": CalibratedInit(), "init_rank": 2}
    expected = fit_calibration([listed(problem)], **settings)
    wide = lambda params, h, ctx, shared: (h + jnp.tanh(h @ params["w"] + params["c"][None, None]), ())  # noqa: E731
    streams = dataclasses.replace(streams, block_fn=wide)
    actual = fit_calibration([streams], **settings)
    assert actual.layers.keys() == expected.layers.keys()
    for name in ("channel", "intercept", "init_scale"):
        np.testing.assert_allclose(actual.layers[name], expected.layers[name], rtol=1e-4, atol=1e-4)  # float32 sums
    problem = dataclasses.replace(problem, calibration=actual)
    streams = dataclasses.replace(streams, calibration=actual)
    one, other = (solved(p, Calibrated(), init=CalibratedInit())[-1] for p in (problem, streams))
    np.testing.assert_allclose(other.reshape(one.shape), one, rtol=1e-5, atol=1e-5)  # rounding of batched products


# ---------------------------------------------------------------- refusals and files


def test_refusals():
    problem = translation()
    run = lambda problem, init=PrefixState(): solve(problem, Calibrated(), num_iters=1, init=init)  # noqa: E731, B008
    with pytest.raises(ValueError, match="needs problem.calibration"):
        run(problem)
    with pytest.raises(ValueError, match="fitted to 4 layers, but this region has 5"):
        run(dataclasses.replace(problem, calibration=garbage("scalar", num_layers=4)))
    with pytest.raises(ValueError, match="this state is a tree of 2"):
        run(dataclasses.replace(pair(), calibration=garbage("scalar")))
    only_maps = Calibration({"scale": jnp.ones((NUM_LAYERS, 1))}, {})
    with pytest.raises(ValueError, match="holds no 'init' part"):
        run(dataclasses.replace(problem, calibration=only_maps), CalibratedInit())
    with pytest.raises(ValueError, match="needs problem.anchor"):
        run(dataclasses.replace(problem, calibration=garbage("scalar")), Preheat())
    only_init = Calibration({"init_scale": jnp.ones((NUM_LAYERS,))}, {})
    with pytest.raises(ValueError, match="holds no surrogate"):
        run(dataclasses.replace(problem, calibration=only_init))
    for settings, message in (
        ({"kind": "dense"}, "kind 'dense' is not one of scalar, channel, basis"),
        ({"num_iters": 0}, "num_iters is 0"),
        ({"kind": "basis", "rank": WIDTH + 1}, f"rank {WIDTH + 1} of a calibration lies outside 1 to"),
        ({"problems": []}, "no text to calibrate on"),
        ({"problems": [pair()]}, "this state is a tree of 2"),
        ({"init": Preheat(), "init_rank": 1}, "these problems have none"),
    ):
        settings = {"problems": [problem], "num_iters": 1, "kind": "scalar"} | settings
        with pytest.raises(InputError, match=message):
            fit_calibration(settings.pop("problems"), **settings)


def test_a_calibration_is_read_as_it_was_written(tmp_path):
    params = {"w": jnp.ones((2, 3)), "b": jnp.zeros((3,), jnp.bfloat16)}
    about = About("basis", 2, 7, 2, num_tokens=1000, seed=3, fingerprint=fingerprint(params), init="calibrated")
    written = garbage("basis")
    save_calibration(tmp_path, "fit-1", garbage("scalar"), about)
    path = save_calibration(tmp_path, "fit-1", written, about)
    assert path == tmp_path / "calibrations" / "fit-1.npz" and len(list(path.parent.iterdir())) == 1
    read, about_read = load_calibration(tmp_path, "fit-1", fingerprint=fingerprint(params), start=2, stop=7)
    assert about_read == about
    assert jax.tree.structure(read) == jax.tree.structure(written)
    jax.tree.map(np.testing.assert_array_equal, read, written)

    here = {"fingerprint": about.fingerprint, "start": 2, "stop": 7}
    other = fingerprint(params | {"w": params["w"].at[1, 2].set(1.5)})
    (path.parent / "broken.npz").write_bytes(b"no archive")
    for name, settings, message in (
        ("fit-2", here, "there is no calibration 'fit-2' in .*; fit it first"),
        ("fit-1", here | {"fingerprint": other}, "was fitted to another checkpoint; fit it again"),
        ("fit-1", here | {"stop": 8}, "was fitted to layers 2-7, but the region has 2-8; fit one to it"),
        ("fit-1", here | {"stage": "chunk2"}, "was fitted to stage per layer, but the region has chunk2"),
        ("broken", here, "is no calibration file; fit 'broken' again"),
        ("../fit", here, "name '../fit' must be letters, digits"),
    ):
        with pytest.raises(InputError, match=message):
            load_calibration(tmp_path, name, **settings)


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
