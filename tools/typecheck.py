"""Runs mypy --strict on the package in its installed layout.

``passes/`` and ``runtime/`` install as ``galore_fx.passes`` and ``galore_fx.runtime``, which mypy cannot see in a
checkout. A temporary tree of links has the installed layout; paths in mypy's output are mapped back.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Runs mypy; returns its exit status."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "galore_fx"
        package.mkdir()
        for source in (ROOT / "galore_fx").iterdir():
            if source.name != "__pycache__":
                (package / source.name).symlink_to(source)
        for name in ("passes", "runtime"):
            (package / name).symlink_to(ROOT / name)
        command = [
            sys.executable,
            "-m",
            "mypy",
            "--config-file",
            str(ROOT / "pyproject.toml"),
            "-p",
            "galore_fx",
        ]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    for name in ("passes", "runtime"):
        done.stdout = done.stdout.replace(f"galore_fx/{name}/", f"{name}/")
    print(done.stdout, done.stderr, sep="", end="")
    return done.returncode


if __name__ == "__main__":
    raise SystemExit(main())
