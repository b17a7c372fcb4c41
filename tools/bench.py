"""Side-by-side benchmarks; each run appends rows to tools/results/.

    python tools/bench.py memory          memory through one step, as a picture (needs the plots extra)
    python tools/bench.py start           time to the first step: cold, warm, and with 24 layers
    python tools/bench.py step            one training step: plain AdamW, galore_torch, galore_fx
    python tools/bench.py update          one parameter's update with 8-bit states: galore_fx, bitsandbytes, torchao
    python tools/bench.py quantized       one training step with quantised weights, bases and states: galore, q-galore
    python tools/bench.py rounding        one training step in bfloat16, rounded to the nearest and stochastically
    python tools/bench.py refresh         new bases of one layer: SVD, subspace iteration, cross-head
    python tools/bench.py finetune        a fine-tuning step at a gap of 10: galore_torch, galore+
    python tools/bench.py step --case a --steps 15

A row holds the figures with shape, settings, hardware, versions, load average and date. Times are minima over
interleaved steps of one process, compared as ratios.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """What a row needs besides its figures."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent
    ).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "device": device,
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def record(name: str, row: dict[str, Any]) -> None:
    """Appends a row to ``tools/results/NAME.jsonl``."""
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{name}.jsonl", "a") as file:
        file.write(json.dumps({**row, **environment()}) + "\n")


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or "cpu"


def main() -> None:
    """Reads the command line and runs one benchmark."""
    import bench_finetune
    import bench_memory
    import bench_quantized
    import bench_refresh
    import bench_rounding
    import bench_start
    import bench_step
    import bench_update

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="BENCHMARK")
    bench_step.add_command(commands)
    bench_memory.add_command(commands)
    bench_start.add_command(commands)
    bench_update.add_command(commands)
    bench_quantized.add_command(commands)
    bench_rounding.add_command(commands)
    bench_refresh.add_command(commands)
    bench_finetune.add_command(commands)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
