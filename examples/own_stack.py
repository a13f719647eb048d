"""Twelve residual layers of one's own, evaluated all at once; what this prints, and why: docs/own_stack.md."""

import functools

import jax

from snlp_jax import Calibrated, CalibratedInit, Chain, Diagonal, Identity, MethodData, PrefixState
from snlp_jax.linearize import fit_calibration
from snlp_jax.solver.diagnostics import trace_errors

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


@functools.partial(jax.jit, static_argnames=("correction", "guess"))
def errors(params, h_in, correction, guess, fit=None):
    """Error of the last layer's output after 0 to N iterations, relative to the layers run in order."""
    chain = Chain.of(layer, params, h_in)
    return trace_errors(chain, correction, guess, MethodData(fit), num_iters=NUM_LAYERS).error[:, -1]


def main():
    params_key, train_key, test_key = jax.random.split(jax.random.key(0), 3)
    params, states = init(params_key), lambda key: jax.random.normal(key, (256, WIDTH))
    keys = jax.random.split(train_key, 16)  # for the fit: 4096 inputs
    text = [(Chain.of(layer, params, states(key)), MethodData()) for key in keys]
    fitted = fit_calibration(text, num_iters=2, kind="basis", rank=8, init=CalibratedInit(), init_rank=16)
    print("error after k iterations        k=1      k=2      k=4     k=12")
    for name, correction, guess, fit in (
        ("Identity", Identity(), PrefixState(), None),
        ("Diagonal, one probe", Diagonal(), PrefixState(), None),
        ("Diagonal, four probes", Diagonal(num_probes=4), PrefixState(), None),
        ("calibrated, with its guess", Calibrated(), CalibratedInit(), fitted),
    ):
        error_of = errors(params, states(test_key), correction, guess, fit)
        print(f"{name:27}" + "".join(f"{error_of[k]:9.1e}" for k in (1, 2, 4, NUM_LAYERS)))


if __name__ == "__main__":
    main()
