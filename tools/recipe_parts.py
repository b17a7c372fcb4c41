"""Parts of a recipe on a command line: ``--part basis_bits=4``."""

import argparse
import json
from typing import Any


def add_part_option(parser: argparse.ArgumentParser) -> None:
    """Adds ``--part`` as the list ``arguments.part`` of names and values."""
    text = "any part of the recipe, such as basis_bits=4; may be given again"
    parser.add_argument("--part", action="append", default=[], metavar="NAME=VALUE", type=_part, help=text)


def _part(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} names no value; write NAME=VALUE, such as basis_bits=4")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
