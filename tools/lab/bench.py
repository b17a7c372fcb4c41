"""Runs side-by-side benchmarks; each run appends rows to tools/lab/results/.

    python -m tools.lab.bench memory          memory through one step, as a picture (needs the plots extra)
    python -m tools.lab.bench start           time to the first step: cold, warm, and with 24 layers
    python -m tools.lab.bench step            one training step: plain AdamW, galore_torch, galore_fx
    python -m tools.lab.bench update          one parameter's update with 8-bit states: galore_fx, bitsandbytes, torchao
    python -m tools.lab.bench quantized       one step with quantised weights, bases and states: galore, q-galore
    python -m tools.lab.bench rounding        one step in bfloat16, rounded to the nearest and stochastically
    python -m tools.lab.bench refresh         new bases of one layer: SVD, subspace iteration, cross-head
    python -m tools.lab.bench finetune        a fine-tuning step at a gap of 10: galore_torch, galore+
    python -m tools.lab.bench step --case a --steps 15

A row contains the figures with shape, settings, hardware, versions, load average and date. Times are minima over
interleaved steps of one process, compared as ratios.
"""

import argparse

from tools.lab import (
    bench_finetune,
    bench_memory,
    bench_quantized,
    bench_refresh,
    bench_rounding,
    bench_start,
    bench_step,
    bench_update,
)


def main() -> None:
    """Reads the command line and runs one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="BENCHMARK")
    for benchmark in (
        bench_step,
        bench_memory,
        bench_start,
        bench_update,
        bench_quantized,
        bench_rounding,
        bench_refresh,
        bench_finetune,
    ):
        benchmark.add_command(commands)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
