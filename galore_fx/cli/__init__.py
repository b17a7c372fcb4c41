"""Defines the ``galore-fx`` command."""

import argparse
import importlib
import sys

COMMANDS = {
    "plan": "what a training step will take, before the model exists",
    "explain": "what the passes do to a model, and which weights are projected",
    "train": "train a model on text; without arguments a Llama of 10 M parameters on Python's own sources",
}


def main() -> None:
    """Runs ``galore-fx plan``, ``explain`` or ``train``; each has its own ``--help``."""
    parser = argparse.ArgumentParser(
        prog="galore-fx", description="Trains all parameters of a transformers model in little memory."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, words in COMMANDS.items():
        commands.add_parser(name, help=words, add_help=False)
    chosen = parser.parse_known_args(sys.argv[1:2])[0].command
    del sys.argv[1]
    importlib.import_module(f"galore_fx.cli.{chosen}").run()
