"""Pictures of training and of what the paper measures, with matplotlib (extra `plot`)."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..backend import Array
from ..formats.files.atomic import replaced_files
from ..formats.files.extras import missing
from ..formats.files.messages import naming

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = Sequence[tuple[int, float]]  # (step, loss)
COLOURS = ["#0b6e99", "#c2541b", "#4a7c2c", "#7a4a9e", "#9a7d0a", "#777777"]
ON_DARK = ["#5bb8e0", "#f0935b", "#8fc46c", "#bf94dd", "#d9bf4a", "#999999"]


def check_picture(path: Path) -> None:
    """Before any work: an error as of `check_matplotlib`; a ValueError or OSError if no such picture can be drawn."""
    check_matplotlib()
    from matplotlib.figure import Figure

    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected a name for the picture, got a folder")
    with replaced_files(path.parent, last=path.name) as folder, naming(path):
        Figure().savefig(folder / path.name)
        for drawn in folder.iterdir():
            drawn.unlink()


def check_matplotlib() -> None:
    """An ImportError that says what to install, before any work is done, if there is no matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise missing("--plot", "matplotlib", "plot") from error


def loss_curves(
    path: str | Path, title: str, curves: Mapping[str, Curve], levels: Mapping[str, float], *, unit: str
) -> None:
    """Draws held-out loss against steps into an image file: a line a curve, a dashed level for what has no steps."""
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    for (label, curve), colour in zip(curves.items(), COLOURS, strict=False):
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
    path = Path(path)
    with replaced_files(path.parent, last=path.name) as folder:
        figure.savefig(folder / path.name)


# --- SVG for a page, light or dark: as wide as a phone, so that its text stays readable there ----------------------

WIDTH = 4.6  # inches


def spread_curves(
    curves: Mapping[str, Sequence[tuple[int, float, float, float]]],
    levels: Mapping[str, float],
    x: str,
    y: str,
    dark: bool,
) -> str:
    """Curves of (x, mean, least, most) over a logarithmic x, bars from least to most, and dashed levels. -> SVG."""
    with _theme(dark) as colours:
        figure, axes = _figure(3.4)
        for (label, points), colour in zip(curves.items(), colours, strict=False):
            at, mean, least, most = zip(*points, strict=True)
            bars = [_apart(mean, least), _apart(most, mean)]
            axes.errorbar(at, mean, bars, label=label, color=colour, linewidth=1.6, marker="o", markersize=4, capsize=3)
        for (label, level), style in zip(levels.items(), ("--", ":"), strict=False):
            axes.axhline(level, label=label, color=colours[-1], linewidth=1.2, linestyle=style)
        ticks = sorted({at for points in curves.values() for at, *_ in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{at}" for at in ticks])
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        figure.legend(frameon=False, fontsize=8, ncols=3, loc="outside upper left")
        return _svg(figure)


def spread_points(points: Mapping[str, tuple[float, float, float]], x: str, dark: bool) -> str:
    """A line for each label, with a point at its mean, or median, and a bar from the least to the most. -> SVG."""
    with _theme(dark) as colours:
        figure, axes = _figure(0.9 + 0.24 * len(points))
        middle, least, most = zip(*points.values(), strict=True)
        bars = [_apart(middle, least), _apart(most, middle)]
        axes.errorbar(middle, range(len(points)), xerr=bars, color=colours[0], fmt="o", markersize=5, capsize=3)
        axes.set_yticks(range(len(points)), list(points))
        axes.invert_yaxis()
        axes.set_xlabel(x)
        return _svg(figure)


def heat_maps(panels: Mapping[str, Array | Sequence[Sequence[float]]], x: str, y: str, dark: bool) -> str:
    """Matrices of numbers from 0 to 1 beneath each other, on one scale of colours; rows and columns from 1. -> SVG."""
    with _theme(dark):
        figure, all_axes = _figure(1.3 * len(panels) + 0.6, panels=len(panels))
        for axes, (title, rows) in zip(all_axes, panels.items(), strict=True):
            values = np.asarray(rows)
            extent = (0.5, values.shape[1] + 0.5, values.shape[0] + 0.5, 0.5)
            image = axes.imshow(values, vmin=0, vmax=1, aspect="auto", extent=extent, interpolation="nearest")
            axes.grid(False)
            axes.set_title(title, fontsize=9, loc="left")
            axes.set_ylabel(y)
        axes.set_xlabel(x)
        figure.colorbar(image, ax=list(all_axes))
        return _svg(figure)


def _apart(high: Sequence[float], low: Sequence[float]) -> list[float]:
    return [h - m for h, m in zip(high, low, strict=True)]


@contextmanager
def _theme(dark: bool) -> Iterator[list[str]]:
    """Ink for a light page or a dark one. -> the colours to draw with."""
    from matplotlib import rc_context

    ink = "#d8d8d8" if dark else "#333333"
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    more: dict[str, Any] = {
        "font.size": 9,
        "axes.facecolor": "none",
        "axes.grid": True,
        "grid.alpha": 0.25,
        "svg.hashsalt": "lora_np",
    }
    style: Any = {**dict.fromkeys(inked, ink), "axes.spines.top": False, "axes.spines.right": False, **more}
    with rc_context(style):
        yield ON_DARK if dark else COLOURS


def _figure(height: float, *, panels: int = 0) -> tuple[Figure, Any]:
    """A figure for a page, and its axes: one, or `panels` beneath each other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="none")
    return figure, figure.subplots(panels, sharex=True, squeeze=False)[:, 0] if panels else figure.subplots()


def _svg(figure: Figure) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]
