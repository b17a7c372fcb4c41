"""Reads and formats numbers of bytes.

Inside galore_fx bytes are integers. Input text may use decimal units (``GB`` = 10**9) or binary ones
(``GiB`` = 2**30); output text always uses binary ones.
"""

import math
import re

from galore_fx.errors import SettingError

_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_ALLOWED = "a number and a unit (B, KB, MB, GB, TB: powers of 1000; KiB, MiB, GiB, TiB: powers of 1024)"
_PATTERN = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]+)\s*")


def parse_bytes(value: str | int, name: str = "budget") -> int:
    """Reads a number of bytes.

    Args:
        value: text such as ``"16GB"`` or ``"15.5 GiB"``, or a positive integer of bytes.
        name: name of the setting, for messages.

    Returns:
        Bytes, a positive integer.

    Raises:
        SettingError: the value has another form, or is not positive; the message names it.
    """
    allowed = f"{_ALLOWED}{', or auto for what the device has' if name == 'budget' else ''}"
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise SettingError(f"{name} {value!r} is a {type(value).__name__}; give {allowed}, or an int of bytes")
    if isinstance(value, int):
        num_bytes = value
    else:
        match = _PATTERN.fullmatch(value)
        factor = _UNITS.get(match.group(2).upper()) if match else None
        if match is None or factor is None:
            raise SettingError(f"{name} {value!r} is not {allowed}, for example '16GB'")
        size = float(match.group(1)) * factor
        if not math.isfinite(size):
            raise SettingError(f"{name} {value!r} is more than any device has")
        num_bytes = int(size)
    if num_bytes <= 0:
        raise SettingError(f"{name} {value!r} must be more than 0 bytes")
    return num_bytes


def format_bytes(num_bytes: int) -> str:
    """Returns ``num_bytes`` as text in the largest binary unit, up to TiB, that it reaches."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"
