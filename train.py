"""Train: ``python train.py configs/NAME.py [--resume | --plan] [--depth N] [--field.sub value ...]``."""

import time

STARTED = time.time()

import argparse  # noqa: E402
import dataclasses  # noqa: E402
import re  # noqa: E402
import sys  # noqa: E402

from snlp_jax.cli.entry import run_entry  # noqa: E402
from snlp_jax.cli.flags import Kind, gathered, kinds_of, parse  # noqa: E402
from snlp_jax.cli.launch import add_flags, from_flags, is_supervised, joined, supervise  # noqa: E402
from snlp_jax.config import Config, load_config, load_dial  # noqa: E402
from snlp_jax.errors import InputError  # noqa: E402

EPILOG = "Every field of the config is a flag: `python train.py configs/demo.py --help` lists them with their defaults."


def profiled(config: Config, text: str) -> Config:
    """The config with FIRST:COUNT as the steps to profile."""
    if not re.fullmatch(r"[1-9]\d*:[1-9]\d*", text):
        raise InputError(f"--profile {text!r}: write FIRST:COUNT, such as 20:5, with steps counted from 1.")
    first, count = map(int, text.split(":"))
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, profile_start=first, profile_steps=count)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, add_help=False)
    parser.add_argument("config", help="a file that binds `config = Config(...)`, such as configs/demo.py")
    parser.add_argument("--resume", action="store_true", help="continue the run in the run directory, if there is one")
    parser.add_argument("--depth", type=int, help="the config of so many layers, from a file that binds a `dial`")
    plan = "do not train: count and measure the run, refuse one that does not fit (TOPOLOGY: on chips such as v5e:2x4)"
    parser.add_argument("--plan", nargs="?", const="", metavar="TOPOLOGY", help=plan)
    parser.add_argument("--profile", metavar="FIRST:COUNT", help="trace these steps into RUN/profile")
    add_flags(parser)
    if len(sys.argv) == 1 or sys.argv[1] in ("-h", "--help"):
        parser.print_help()
        return
    own: dict[str, Kind] = {f"--{name}": "switch" for name in ("resume", "distributed")}
    ours, rest = parser.parse_known_args(gathered(sys.argv[1:], kinds_of(Config) | own))
    processes = from_flags(ours)
    if processes is not None and not is_supervised():
        sys.exit(supervise(processes))
    default = load_config(ours.config)
    if ours.depth is not None:
        dial = load_dial(ours.config)
        default = dial.at(ours.depth)
        print(f"{default.name}, before other flags:\n{dial.describe(ours.depth)}", flush=True)
    config = parse(Config, default=default, args=rest, prog=f"train.py {ours.config}")
    config = profiled(config, ours.profile) if ours.profile is not None else config
    with joined(processes):
        from snlp_jax.train.start import with_origin_model

        config = with_origin_model(config, default)
        if ours.plan is not None:
            from snlp_jax.planner.budget import plan_run

            plan_run(config, ours.plan)
            return
        from snlp_jax.train.loop import train

        train(config, resume=ours.resume, started=STARTED)


if __name__ == "__main__":
    run_entry(main)
