"""Reports wrong command-line input, and writes output files as a whole."""

import sys
from collections.abc import Callable
from pathlib import Path

from galore_fx.errors import GaloreFxError


class InputError(ValueError):
    """The user's input is wrong; the message gives the input and the allowed values."""


def run_command(name: str, main: Callable[[], object]) -> None:
    """Runs a command. Prints an error that the user can correct as one line on stderr and exits with status 2."""
    try:
        main()
    except (InputError, GaloreFxError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a temporary file beside ``path`` and renames it, so no partial file remains.

    Args:
        path: the file to write or replace.
        write: writes the content to the path that it is called with.

    Raises:
        InputError: the file cannot be written; an existing file is unchanged.
    """
    neighbour = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        write(neighbour)
        neighbour.replace(path)
    except (OSError, ValueError) as error:
        neighbour.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({error})") from error
    print(f"wrote {path}")
