"""Adds options for the parts of a recipe to a command line: ``--part basis_bits=4``."""

import argparse
import json
from typing import Any

from galore_fx.recipes.table import parts_table


class _ListParts(argparse.Action):
    """Prints the table of all parts and ends the command."""

    def __call__(self, parser: argparse.ArgumentParser, *_arguments: Any) -> None:
        print(parts_table("simple"))
        parser.exit()


def add_part_option(parser: argparse.ArgumentParser) -> None:
    """Adds ``--part``, which fills the list ``arguments.part`` of (name, value) pairs, and ``--list-parts``."""
    text = "any part of the recipe, such as basis_bits=4; may be given again"
    parser.add_argument("--part", action="append", default=[], metavar="NAME=VALUE", type=_part, help=text)
    parser.add_argument("--list-parts", action=_ListParts, nargs=0, help="show all parts of a recipe, and end")


def _part(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} names no value; write NAME=VALUE, such as basis_bits=4")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
