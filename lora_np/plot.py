"""Pictures of training, with matplotlib (extra `plot`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

Curve = Sequence[tuple[int, float]]  # (step, loss)


def check_matplotlib() -> None:
    """An ImportError that says what to install, before any work is done, if there is no matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install 'lora-np[plot]'") from error


def loss_curves(
    path: str | Path, title: str, curves: Mapping[str, Curve], levels: Mapping[str, float], *, unit: str
) -> None:
    """Draws held-out loss against steps into an image file: a line a curve, a dashed level for what has no steps."""
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    colours = ["#0b6e99", "#c2541b", "#4a7c2c", "#7a4a9e"]
    for (label, curve), colour in zip(curves.items(), colours, strict=False):
        steps, losses = zip(*curve, strict=True)
        axes.plot(steps, losses, label=label, color=colour, linewidth=1.8, marker="o", markersize=3)
    for label, level in levels.items():
        axes.axhline(level, label=label, color="#777777", linewidth=1.2, linestyle="--")
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel(f"held-out loss ({unit})")
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
