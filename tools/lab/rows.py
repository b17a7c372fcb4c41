"""Appends and reads rows of ``tools/lab/results/NAME.jsonl``: figures, commit, hardware, versions, load and date."""

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
RESULTS = Path(__file__).resolve().parent / "results"


def environment() -> dict[str, Any]:
    """Returns the fields of a row besides its figures: date (UTC), commit, device, threads, load average, versions."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
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


def record_row(name: str, row: dict[str, Any]) -> None:
    """Appends a row to ``tools/lab/results/NAME.jsonl``."""
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{name}.jsonl", "a") as file:
        file.write(json.dumps({**row, **environment()}) + "\n")


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or "cpu"


def read(name: str) -> list[dict[str, Any]]:
    """Returns all rows of ``NAME.jsonl``; an empty list if there is no file."""
    file = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
