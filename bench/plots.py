"""Pictures of a run, with matplotlib (extra `plot`): the roofline, peers, time and memory against sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_np.training.plot import check_matplotlib

from .figures import Figure, Run
from .roofline import EACH_CORE, READ, STREAM
from .step import EAGER, OURS
from .step import PEERS as STEP_PEERS

BLUE, ORANGE, GREEN, GREY = "#0b6e99", "#c2541b", "#4a7c2c", "#777777"
_OFFSET: dict[str, Any] = {"textcoords": "offset points", "fontsize": 9, "color": "#333333"}
PEERS = (*STEP_PEERS, "transformers", "PEFT", "loralib")


def draw(folder: Path, run: Run) -> None:
    """A PNG file for each picture of which there are figures."""
    check_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, Callable[[Run], Any]] = {
        "roofline": roofline, "peers": peers, "scaling": scaling, "memory": memory,
    }  # fmt: skip
    for name, picture in pictures.items():
        figure = picture(run)
        if figure is not None:
            figure.savefig(folder / f"{name}.png")


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(width, height), dpi=150, layout="constrained")
    axes = picture.subplots(rows, columns, squeeze=False).ravel()
    for one in axes:
        one.set_axisbelow(True)
        one.grid(alpha=0.25)
        one.spines[["top", "right"]].set_visible(False)
    return picture, axes


def _spread(figure: Figure) -> tuple[float, float]:
    """How far the least and the most lie from the median."""
    return figure.median - figure.least, figure.most - figure.median


def roofline(run: Run) -> Any:
    """Each primitive's speed against its operations a byte, below the machine's two limits; both axes logarithmic."""
    points = {f.case: f for f in run.of("ops") if f.what == "operations"}
    if not points:
        return None
    intensity = {f.case: f.median for f in run.of("ops") if f.what == "operations a byte"}
    limits = {f.what: f.median for f in run.of("ops") if f.case == "the machine"}
    products = limits[f"products, {EACH_CORE}"]
    memory = max(limits[f"memory, {STREAM}"], limits[f"memory, {READ}"])
    names = sorted(points, key=lambda name: (intensity[name], points[name].median))
    picture, (axes, bars) = _figure(8, 7 + 0.26 * len(names), 2, 1)
    ridge, left, right = products / memory, min(intensity.values()) / 1.6, max(intensity.values()) * 3
    axes.loglog([left, ridge, right], [memory * left, products, products], color=GREY, linewidth=1.5)
    low = left * (ridge / left) ** 0.25  # both limits are named above them, where no point is
    axes.annotate(f"{products:.0f} GFLOP/s, large products", (ridge, products), (-4, 4), **_OFFSET, ha="right")
    axes.annotate(f"{memory:.0f} GB/s", (low, memory * low), (-6, 4), **_OFFSET, ha="right")
    for name in names:
        spread = [[side] for side in _spread(points[name])]
        axes.errorbar(
            intensity[name], points[name].median, spread, fmt="o", color=_colour(name), markersize=4, linewidth=1
        )
    axes.set_xlabel("operations a byte (FLOP/B)")
    axes.set_ylabel("speed, all cores together (GFLOP/s)")
    shares = {f.case: f for f in run.of("ops") if f.what == "share of the roofline"}
    spreads = [list(side) for side in zip(*(_spread(shares[name]) for name in names), strict=True)]
    bars.barh(
        [f"{number}  {name}" for number, name in enumerate(names, 1)], [shares[name].median for name in names],
        xerr=spreads, color=[_colour(name) for name in names], height=0.6, error_kw={"ecolor": GREY},
    )  # fmt: skip
    bars.axvline(1, color=GREY, linewidth=1.5)
    bars.margins(y=0.01)
    bars.invert_yaxis()  # from 1 down, as they are read
    bars.set_xlabel("share of the roofline; above 1: data in cache; orange: backward")
    picture.draw_without_rendering()  # only then is it known where the points stand
    _number(axes, [(intensity[name], points[name].median) for name in names])
    return picture


# Where a number may stand, in points from its own: further and further out, eight ways each.
_AROUND = [(r * math.cos(turn * math.pi / 4), r * math.sin(turn * math.pi / 4)) for r in (9, 16, 24, 34, 46, 60, 76)
           for turn in (1, 7, 3, 5, 0, 4, 2, 6)]  # fmt: skip
_WIDE, _HIGH = 12.0, 9.0  # of a number with two digits, in points


def _number(axes: Any, places: Sequence[tuple[float, float]]) -> None:
    """Numbers the points from 1, so that no number covers another or a point; a line leads to one that stands apart."""
    points = axes.transData.transform(places) * 72 / axes.figure.dpi
    taken: list[tuple[float, float, float, float]] = [(x, y, 5.0, 5.0) for x, y in points]  # centre and size
    for number, (x, y) in enumerate(points, 1):
        free = (at for at in _AROUND if not any(_meet((x + at[0], y + at[1], _WIDE, _HIGH), other) for other in taken))
        at = next(free, _AROUND[0])
        taken.append((x + at[0], y + at[1], _WIDE, _HIGH))
        line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "shrinkA": 4, "shrinkB": 2}
        axes.annotate(
            str(number), places[number - 1], at, **_OFFSET, ha="center", va="center",
            arrowprops=line if math.hypot(*at) > 16 else None,
        )  # fmt: skip


def _meet(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two boxes, by centre and size, have a part in common."""
    return all(abs(one[i] - other[i]) < (one[i + 2] + other[i + 2]) / 2 for i in (0, 1))


def _colour(name: str) -> str:
    return ORANGE if "backward" in name or ", d" in name else BLUE


def peers(run: Run) -> Any:
    """How many times as fast as each peer, with the spread of the rounds."""
    ratios = [
        f for bench in ("step", "decode", "switch", "peers") for f in run.of(bench)
        if f.unit == "x" and f.case not in ("import", "installed size") and _peer(f) is not None
    ]  # fmt: skip
    if not ratios:
        return None
    picture, (axes,) = _figure(8, 1.3 + 0.45 * len(ratios))
    names = [f"{_peer(f)}\n{_work(f)}" for f in ratios]
    spreads = [list(side) for side in zip(*map(_spread, ratios), strict=True)]
    axes.barh(names, [f.median for f in ratios], xerr=spreads, color=BLUE, height=0.6, error_kw={"ecolor": GREY})
    for i, f in enumerate(ratios):
        axes.annotate(f"{f.median:.2f}", (f.most, i), (5, -3), textcoords="offset points", fontsize=8)
    axes.axvline(1, color=ORANGE, linewidth=1.2)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7.5)
    axes.set_xlabel(f"{OURS}: times as fast (medians; lines: least to most)")
    return picture


def _peer(ratio: Figure) -> str | None:
    """The peer that a quotient is taken with, if it is one."""
    sides = [side.split(":")[0] for side in ratio.what.split(" / ")]
    return next((side for side in sides if side.partition(", TF32")[0] in PEERS), None)


def _work(ratio: Figure) -> str:
    return f"{ratio.bench}: {ratio.case}"


def scaling(run: Run) -> Any:
    """A step's time against batch, length, layers and rank; dashed: in proportion to its products, through the last."""
    panels = {
        "against N": "texts in the batch, N", "against T": "tokens of one text, T (SmolLM2)",
        "against layers": "layers", "against r": "rank, r",
    }  # fmt: skip
    if not run.of("scaling"):
        return None
    picture, all_axes = _figure(9, 6.5, 2, 2)
    for axes, (case, label) in zip(all_axes, panels.items(), strict=True):
        times, products = _curve(run, "scaling", case, "s"), _curve(run, "scaling", case, "GFLOP")
        (last, time), theirs = list(times.items())[-1], _curve(run, "scaling", f"{case}, {EAGER}", "s")
        rate = time.median / products[last].median
        _draw_times(axes, times, BLUE, OURS)
        if theirs:
            _draw_times(axes, theirs, ORANGE, EAGER)
        axes.plot(
            list(times), [rate * products[n].median for n in times], "--", color=GREY,
            label="in proportion to the products",
        )  # fmt: skip
        axes.set_xlabel(label)
        axes.set_ylabel("a LoRA step (s)")
        if case == "against T":  # from powers of two to ones sixty times as large
            axes.loglog(base=2)
            axes.yaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_major_formatter("{x:g}")
        else:
            axes.set_xlim(0)
            axes.set_ylim(0, 1.15 * max(f.median for f in times.values()))
        axes.legend(frameon=False, fontsize=8)
    return picture


def _draw_times(axes: Any, times: Mapping[int, Figure], colour: str, label: str) -> None:
    """A curve of times with the spread of their rounds."""
    spreads = [list(side) for side in zip(*map(_spread, times.values()), strict=True)]
    axes.errorbar(
        list(times), [f.median for f in times.values()], spreads, fmt="o-", color=colour, markersize=4, label=label
    )


def memory(run: Run) -> Any:
    """The peak of a LoRA step's process against the batch."""
    curves = {f.case.split(", ", 2)[-1]: f.case for f in run.of("memory") if f.case.startswith("against the batch")}
    if not curves:
        return None
    picture, (axes,) = _figure(7, 4.2)
    for (label, case), colour in zip(curves.items(), (BLUE, ORANGE), strict=False):
        peaks = _curve(run, "memory", case, "B")
        axes.plot(list(peaks), [f.median / 1e9 for f in peaks.values()], "o-", color=colour, markersize=4, label=label)
    axes.set_xlabel("texts in the batch, N")
    axes.set_ylabel("peak memory of the process (GB)")
    axes.set_xlim(0)
    axes.set_ylim(0)
    axes.legend(frameon=False)
    return picture


def _curve(run: Run, bench: str, case: str, unit: str) -> dict[int, Figure]:
    """The figures of a case in a unit, by the number in their names: N=4."""
    return {int(f.what.split(",")[0].split("=")[1]): f for f in run.of(bench) if f.case == case and f.unit == unit}
