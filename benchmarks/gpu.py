"""All that a first GPU should say, in one call that may be cut off at any moment.

    python benchmarks/gpu.py --minutes 8

The cells of benchmarks/speed.py's preset "first", the most important first, on random weights in bfloat16: bandwidth of
a copy and rate of a product; cached steps of a model of 32 layers of 640 channels and of one of 1.6 billion parameters
in order (the fastest of several forms), with 24 layers at once for one and two iterations, fused by twos, and with all
layers at once; MLPs one after another and at once; a region of 40 MB, which an L2 cache may hold, again and again; the
cached step with attention in one kernel; forward passes of 2,048 tokens; a training step with and without the solver
term, with its MFU. Each cell is written to the JSON file when it is done, so what a killed call has measured counts.
Needs one GPU of 80 GB, and less than 10 GB of host memory. On a CPU it runs the quick preset, which says nothing but
that it works.
"""

from dataclasses import dataclass
from typing import Any

import jax
import tyro

from benchmarks import speed
from snlp_jax.cli.entry import run_entry
from snlp_jax.errors import InputError


@dataclass(frozen=True)
class Args:
    """Time everything that a first GPU should say."""

    minutes: float = 8.0
    """After which nothing new is begun; what is under way takes a minute more."""
    out: str = ""
    """Empty: benchmarks/results/gpu_DEVICE_DATE.json; table and plot lie beside it."""

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise InputError(f"--minutes is {self.minutes}; it must be more than 0.")


def main(args: Args) -> dict[str, Any]:
    """What the JSON file holds."""
    on_cpu = jax.default_backend() == "cpu"
    return speed.main(
        speed.Args(
            preset="quick" if on_cpu else "first",
            command_buffers="default" if on_cpu else "each",
            time_budget=60.0 * args.minutes,
            repeats=5 if on_cpu else 20,
            out=args.out,
            name="gpu",
        )
    )


if __name__ == "__main__":
    run_entry(lambda: main(tyro.cli(Args, description=__doc__)))
