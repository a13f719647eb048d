"""Twelve residual layers of one's own, evaluated all at once; what this prints, and why: docs/own_stack.md."""

import functools

import jax

from snlp_jax import LayerProblem, sequential, solve
from snlp_jax.linearize import fit_calibration
from snlp_jax.solver import Calibrated, CalibratedInit, Diagonal, Identity, PrefixState, relative_norm

NUM_LAYERS, WIDTH, HIDDEN = 12, 32, 64


def layer(params, h, ctx, shared):
    """One layer, ``(params_l, h, ctx_l, shared) -> (h', what it leaves behind)``; yours may be any JAX function."""
    return params["keep"] * h + jax.nn.gelu(h @ params["up"]) @ params["down"], ()


def init(key):
    up, down, keep = jax.random.split(key, 3)
    return {  # leaves lead with the layer axis
        "up": jax.random.normal(up, (NUM_LAYERS, WIDTH, HIDDEN)) / WIDTH**0.5,
        "down": 0.3 * jax.random.normal(down, (NUM_LAYERS, HIDDEN, WIDTH)) / HIDDEN**0.5,
        "keep": jax.random.uniform(keep, (NUM_LAYERS, WIDTH), minval=0.8, maxval=1.0),
    }


def problem(params, h_in, calibration=None):
    return LayerProblem(layer, params, None, None, h_in, NUM_LAYERS, calibration=calibration)


@functools.partial(jax.jit, static_argnames=("correction", "guess"))
def errors(params, h_in, correction, guess, calibration=None):
    """Error of the last layer's output after 1, 2, 4 and N iterations, relative to the layers run in order."""
    chain = problem(params, h_in, calibration)
    exact = sequential(chain).value
    solved = (solve(chain, correction, num_iters=k, init=guess).value for k in (1, 2, 4, NUM_LAYERS))
    return [relative_norm(value[None], exact[None])[0] for value in solved]


def main():
    params_key, train_key, test_key = jax.random.split(jax.random.key(0), 3)
    params, states = init(params_key), lambda key: jax.random.normal(key, (256, WIDTH))
    texts = [problem(params, states(key)) for key in jax.random.split(train_key, 16)]  # for the fit: 4096 inputs
    fitted = fit_calibration(texts, num_iters=2, kind="basis", rank=8, init=CalibratedInit(), init_rank=16)
    print("error after k iterations        k=1      k=2      k=4     k=12")
    for name, correction, guess, calibration in (
        ("Identity", Identity(), PrefixState(), None),
        ("Diagonal, one probe", Diagonal(), PrefixState(), None),
        ("Diagonal, four probes", Diagonal(num_probes=4), PrefixState(), None),
        ("calibrated, with its guess", Calibrated(), CalibratedInit(), fitted),
    ):
        cells = "".join(f"{error:9.1e}" for error in errors(params, states(test_key), correction, guess, calibration))
        print(f"{name:27}{cells}")


if __name__ == "__main__":
    main()
