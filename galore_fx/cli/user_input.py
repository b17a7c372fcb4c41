"""What a user gives on a command line, and how a command says that it cannot be used."""

import sys
from collections.abc import Callable
from pathlib import Path

from galore_fx.errors import GaloreFxError


class InputError(ValueError):
    """What the user gave is wrong; the message says what and what is allowed."""


def run_command(name: str, main: Callable[[], object]) -> None:
    """Runs a command; what the user can mend is one line on stderr and exit status 2."""
    try:
        main()
    except (InputError, GaloreFxError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file through a neighbour, so that nothing half-written is left.

    Raises:
        InputError: the file cannot be written; an older one is unchanged.
    """
    neighbour = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        write(neighbour)
        neighbour.replace(path)
    except (OSError, ValueError) as error:
        neighbour.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({error})") from error
    print(f"wrote {path}")
