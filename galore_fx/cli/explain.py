"""Prints the changes that the passes make to a model, and why each of its weights is projected or not.

    galore-fx explain llama-60m
    galore-fx explain path/to/config.json --recipe galore+ --batch 4 --seq 256
    galore-fx explain HUB/NAME --graph model.graphml

MODEL is a preset, a transformers config file, or a hub name; no weights are loaded. The exit status is 2 if the input
is wrong.
"""

import argparse
from pathlib import Path

import networkx

import galore_fx
from galore_fx.cli.described_model import add_model_arguments, read
from galore_fx.cli.user_input import run_command, write_whole


def main(argv: list[str] | None = None) -> None:
    """Explains the model and prints the explanation."""
    parser = argparse.ArgumentParser(
        prog="galore-fx explain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    parser.add_argument("--graph", type=Path, metavar="FILE", help="write the model's structure there, as GraphML")
    arguments = parser.parse_args(argv)
    make_model, sample, settings = read(arguments)
    explanation = galore_fx.explain(make_model(), sample, **settings)
    print(explanation)
    if arguments.graph:
        write_whole(arguments.graph, lambda path: networkx.write_graphml(explanation.graph, path))


def run() -> None:
    """Runs the command."""
    run_command("galore-fx explain", main)
