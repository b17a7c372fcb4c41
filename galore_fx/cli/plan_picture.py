"""Draws a plan's step: bytes by category through the step, against the budget."""

from pathlib import Path

import galore_fx


def draw(plan: galore_fx.Plan, path: Path) -> None:
    """Draws the step of a plan with a prediction, in the format of the file's suffix (svg, png, pdf).

    Raises:
        ValueError: matplotlib does not know the format.
        OSError: the file cannot be written.
    """
    import matplotlib  # optional: only pictures need it

    matplotlib.use("agg")
    from matplotlib import pyplot

    assert plan.prediction is not None
    names = [name for name, size in plan.prediction.categories.items() if size]
    moments = plan.prediction.timeline
    figure, axes = pyplot.subplots(figsize=(9, 4.2))
    rows = [[sizes.get(name, 0) / 2**30 for _, sizes in moments] for name in names]
    axes.stackplot(range(len(moments)), rows, labels=names)
    phases = [phase for phase, _ in moments]
    for start in (i for i, phase in enumerate(phases) if i and phase != phases[i - 1] and phase != "update"):
        axes.axvline(start, color="white", linewidth=0.8)
    for phase in dict.fromkeys(phases):
        middle = [i for i, found in enumerate(phases) if found == phase]
        axes.text(sum(middle) / len(middle), 0.98, phase, transform=axes.get_xaxis_transform(), ha="center", va="top")
    if plan.budget_bytes is not None:
        room = (plan.budget_bytes - plan.reserve_bytes) / 2**30
        axes.axhline(room, color="black", linestyle="--", label="budget - reserve")
    axes.set_xlabel("moments of one steady step, block by block")
    axes.set_ylabel("GiB")
    axes.margins(x=0)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
