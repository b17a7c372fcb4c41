"""Prints the predicted memory of a training step, before the model exists.

    galore-fx plan llama-60m --budget 2GB --batch 1 --seq 256
    galore-fx plan path/to/config.json --batch 4 --seq 1024 --dtype bfloat16 --device cuda
    galore-fx plan HUB/NAME --recipe galore --json plan.json --plot plan.svg
    galore-fx plan llama-1b --budget 24GB --compare
    galore-fx plan llama-7b --budget 24GB --seq 512 --recipe gradnormlorp --rank 128 --state-bits 8 --compare

MODEL is a preset, a transformers config file, or a hub name. The step is simulated on tensors without memory: no
weights are loaded and no GPU is needed. For --device cpu, library kernels run on zeros to measure their scratch memory.
The exit status is 0 if the step fits (or no budget is given), and 2 if it does not or the input is wrong.
"""

import argparse
import functools
import gc
import importlib.util
import os
import sys
from pathlib import Path

import galore_fx
from galore_fx.cli.compare_plans import compare
from galore_fx.cli.described_model import add_model_arguments, read
from galore_fx.cli.plan_picture import draw
from galore_fx.cli.user_input import InputError, write_whole
from galore_fx.units import format_bytes, parse_bytes


def main(argv: list[str] | None = None) -> int:
    """Plans the step, prints the plan and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="galore-fx plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    parser.add_argument("--budget", help="16GB, 15.5GiB, ...; without one the step is only predicted")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="where it is to be trained (cuda)")
    parser.add_argument("--compare", action="store_true", help="beside other ways of training the same model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw one step there (svg or png; needs matplotlib)")
    arguments = parser.parse_args(argv)
    try:
        if arguments.budget is not None:
            parse_bytes(arguments.budget)  # checks the budget before the model is created
        make_model, sample, settings = read(arguments)
        plan = galore_fx.plan(make_model(), arguments.budget, sample=sample, device=arguments.device, **settings)
        print(plan.table())
        if arguments.compare:
            print(f"\n{compare(make_model, sample, plan, arguments.device)}")
        if arguments.json:
            write_whole(arguments.json, lambda path: path.write_text(plan.to_json()))
        if arguments.plot:
            if importlib.util.find_spec("matplotlib") is None:
                raise InputError("--plot needs matplotlib; pip install -e '.[plots]'")
            write_whole(arguments.plot, functools.partial(draw, plan))
    except (InputError, galore_fx.GaloreFxError) as error:
        print(f"galore-fx plan: {error}", file=sys.stderr)
        return 2
    if plan.within_budget:
        return 0
    assert plan.budget_bytes is not None
    print(
        f"does not fit: the smallest plan needs {format_bytes(plan.peak_bytes)}, the budget is "
        f"{format_bytes(plan.budget_bytes)}. What would fit: {'; '.join(plan.nearest)}",
        file=sys.stderr,
    )
    return 2


def run() -> None:
    """Runs the command and ends the process at once, without the shutdown of torch's compiler."""
    gc.disable()  # the process is too short for cyclic garbage to matter
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
