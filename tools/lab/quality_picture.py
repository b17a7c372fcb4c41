"""Plots held-out loss against counted peak for the variants of a study."""

from pathlib import Path
from typing import Any


def draw(rows: dict[str, Any], path: Path) -> None:
    """Writes the picture in the format of the file's suffix, with one point for each row of the first seed.

    Raises:
        ImportError: matplotlib is missing; ``pip install -e '.[plots]'``.
    """
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "galore_fx"  # equal rows give an identical file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name, row in rows.items():
        if ", seed " in name or "counted_peak_bytes" not in row:
            continue
        place = (row["counted_peak_bytes"] / 2**20, row["held_out_loss"])
        axes.plot(*place, "o", color="tab:orange" if _is_peer(row["arguments"]) else "tab:blue")
        axes.annotate(name, place, xytext=(4, 3), textcoords="offset points", fontsize=7)
    axes.set_xlabel("counted peak of a step, MiB")
    axes.set_ylabel("held-out loss, nats per token")
    axes.margins(x=0.15)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _is_peer(arguments: list[str]) -> bool:
    return bool(arguments) and not arguments[0].startswith("--")
