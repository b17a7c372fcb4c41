"""Runs ``galore-fx train`` from a checkout: python tools/train.py --help."""

from galore_fx.cli.train import run

if __name__ == "__main__":
    run()
