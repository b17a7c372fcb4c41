"""Runs all checks that a change must pass: format, lint, types, tests.

python tools/check.py            all checks
python tools/check.py --fast     without the tests
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Runs each check in turn; returns the number that failed."""
    checks = [
        [sys.executable, "-m", "ruff", "format", "--check", "."],
        [sys.executable, "-m", "ruff", "check", "."],
        [sys.executable, "tools/typecheck.py"],
    ]
    if "--fast" not in sys.argv[1:]:
        checks.append([sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal", "--durations=10"])
    failed = 0
    # One thread per test worker: threads of several workers would compete for the cores.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for command in checks:
        print("$", *command[1:], flush=True)
        failed += subprocess.run(command, cwd=ROOT, env=environment).returncode != 0
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
