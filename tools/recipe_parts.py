"""Parts of a recipe on a command line: ``--part basis_bits=4``."""

import argparse
import json
from typing import Any


def add_part_option(parser: argparse.ArgumentParser) -> None:
    """Adds ``--part`` as the list ``arguments.part`` of names and values."""
    text = "any part of the recipe, such as basis_bits=4; may be given again"
    parser.add_argument("--part", action="append", default=[], metavar="NAME=VALUE", type=_part, help=text)


def add_fine_tuning_options(
    parser: argparse.ArgumentParser, *, lr: float, batch: int, base: str, base_steps: int
) -> None:
    """Those of a script that fine-tunes a base model which it trains itself."""
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", default=base, help="folder of the base model")
    parser.add_argument("--base-steps", type=int, default=base_steps)
    add_part_option(parser)


def _part(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} names no value; write NAME=VALUE, such as basis_bits=4")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
