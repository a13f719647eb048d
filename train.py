"""Train: ``python train.py configs/NAME.py [--resume] [--field.sub value ...]``."""

import time

STARTED = time.time()

import argparse  # noqa: E402
import sys  # noqa: E402

import tyro  # noqa: E402

from snlp_jax.config import Config, load_config  # noqa: E402
from snlp_jax.entry import run_entry  # noqa: E402
from snlp_jax.parallel.processes import add_flags, from_flags, is_supervised, joined, supervise  # noqa: E402

EPILOG = "Every field of the config is a flag: `python train.py configs/demo.py --help` lists them with their defaults."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, add_help=False)
    parser.add_argument("config", help="a file that binds `config = Config(...)`, such as configs/demo.py")
    parser.add_argument("--resume", action="store_true", help="continue the run in the run directory, if there is one")
    add_flags(parser)
    if len(sys.argv) == 1 or sys.argv[1] in ("-h", "--help"):
        parser.print_help()
        return
    ours, rest = parser.parse_known_args()
    processes = from_flags(ours)
    if processes is not None and not is_supervised():
        sys.exit(supervise(processes))
    config = tyro.cli(Config, default=load_config(ours.config), args=rest, prog=f"train.py {ours.config}")
    with joined(processes):
        from snlp_jax.train.loop import train

        train(config, resume=ours.resume, started=STARTED)


if __name__ == "__main__":
    run_entry(main)
