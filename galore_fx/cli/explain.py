"""Prints what the passes do to a model, and which of its weights are projected and why.

    galore-fx explain llama-60m
    galore-fx explain path/to/config.json --recipe galore+ --batch 4 --seq 256
    galore-fx explain HUB/NAME --graph model.graphml
    galore-fx explain HUB/NAME --graph model.graphml

MODEL is a preset, a transformers config file, or a hub name; no weights are loaded. Exit status 2: the input is wrong.
"""

import argparse
from pathlib import Path

import networkx

import galore_fx
from galore_fx.cli.described_model import add_model_arguments, read
from galore_fx.cli.user_input import run_command, write_whole


def main(argv: list[str] | None = None) -> None:
    """Explains and prints."""
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
    """The command."""
    run_command("galore-fx explain", main)
