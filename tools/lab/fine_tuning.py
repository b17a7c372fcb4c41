"""Command-line options of scripts that train a base model and fine-tune it."""

import argparse

from galore_fx.cli.recipe_options import add_part_option


def add_fine_tuning_options(
    parser: argparse.ArgumentParser, *, lr: float, batch: int, base: str, base_steps: int
) -> None:
    """Adds the options to a parser; the keywords are their defaults."""
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", default=base, help="folder of the base model")
    parser.add_argument("--base-steps", type=int, default=base_steps)
    add_part_option(parser)
