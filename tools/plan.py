"""Runs ``galore-fx plan`` from a checkout: python tools/plan.py --help."""

from galore_fx.cli.plan import run

if __name__ == "__main__":
    run()
