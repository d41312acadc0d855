"""Figures: what was measured, once a round; as a table, as JSON, and one run beside another."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple


class Figure(NamedTuple):
    """One thing measured: in which benchmark, on what, of whom or what, in which unit, and its values, one a round.

    Units: s, B, GFLOP/s, GB/s, tokens/s, launches, copies; share, of a limit, and x, a ratio, have none.
    """

    bench: str
    case: str
    what: str
    unit: str
    values: Sequence[float]

    @property
    def key(self) -> tuple[str, str, str]:
        return self.bench, self.case, self.what

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def least(self) -> float:
        return min(self.values)

    @property
    def most(self) -> float:
        return max(self.values)

    def over(self, other: Figure, unit: str = "x") -> Figure:
        """The quotients of two figures, round by round: drift cancels. It is named "this / other"."""
        what = f"{self.what} / {other.what}"
        return self._replace(
            what=what, unit=unit, values=[a / b for a, b in zip(self.values, other.values, strict=True)]
        )

    def rate(self, amount: float, what: str, unit: str) -> Figure:
        """An amount over these seconds."""
        return self._replace(what=what, unit=unit, values=[amount / seconds for seconds in self.values])


class Run(NamedTuple):
    """What one run measured, and what it depends on."""

    environment: Mapping[str, Any]
    figures: Sequence[Figure]

    def find(self, bench: str, case: str, what: str) -> Figure | None:
        """The figure of that key, if it was measured."""
        return next((figure for figure in self.figures if figure.key == (bench, case, what)), None)

    def ratio(self, bench: str, case: str, one: str, other: str) -> Figure | None:
        """The quotient of two figures, whichever stands above."""
        return self.find(bench, case, f"{one} / {other}") or self.find(bench, case, f"{other} / {one}")

    def of(self, bench: str) -> list[Figure]:
        """The figures of a benchmark."""
        return [figure for figure in self.figures if figure.bench == bench]


# --- JSON ------------------------------------------------------------------------------------------------------------


def to_json(run: Run) -> str:
    """{"environment": {...}, "figures": [{bench, case, what, unit, median, least, most, values}, ...]}."""
    rows = [{**f._asdict(), "median": f.median, "least": f.least, "most": f.most} for f in run.figures]
    return json.dumps({"environment": run.environment, "figures": rows}, indent=1)


def read(path: Path) -> Run:
    """A run from the file that --json wrote."""
    try:
        raw = json.loads(path.read_text())
        run = Run(raw["environment"], [Figure(*(row[name] for name in Figure._fields)) for row in raw["figures"]])
        if not run.figures:
            raise ValueError("it has no figures")
        for figure in run.figures:
            if not figure.values or not all(0 < value < math.inf for value in figure.values):
                raise ValueError(f"{': '.join(figure.key)}: expected numbers above 0, got {figure.values!r:.60}")
        return run
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a file that `python -m bench ... --json` wrote: {error!r}") from error


# --- Text ------------------------------------------------------------------------------------------------------------


def shown(value: float, unit: str) -> str:
    """A value with its unit, three or four digits of it."""
    if unit == "s":
        return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} us"
    if unit == "B":
        return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.3g} MB"
    if unit == "share":
        return f"{value:.1%}"
    if unit == "x":
        return f"{value:.2f}x" if value >= 0.1 else f"{value:.2g}x"
    if unit in ("launches", "copies"):
        return f"{value:,.0f} {unit}"
    return f"{value:.1f} {unit}"


def text(run: Run) -> str:
    """All figures as a table: the median, and in brackets the least and the most."""
    lines = [f"{key}: {value}" for key, value in run.environment.items()]
    for (bench, case), group in groupby(run.figures, key=lambda figure: (figure.bench, figure.case)):
        lines += ["", f"{bench}: {case}"]
        found = list(group)
        width = max(len(f.what) for f in found)
        for f in found:
            spread = f"({shown(f.least, f.unit)} to {shown(f.most, f.unit)})" if len(f.values) > 1 else ""
            lines.append(f"  {f.what:{width}} {shown(f.median, f.unit):>16}  {spread}".rstrip())
    return "\n".join(lines)


# --- One run beside another ------------------------------------------------------------------------------------------


class Change(NamedTuple):
    """A figure in two runs: the ratio of the medians, the second over the first, and whether the spreads are apart."""

    before: Figure
    after: Figure
    ratio: float
    outside: bool


def compare(before: Run, after: Run) -> list[Change]:
    """The figures that both runs have, in the order of the second. Outside: no value of one is within the other's."""
    old = {figure.key: figure for figure in before.figures}
    return [
        Change(old[f.key], f, f.median / old[f.key].median, f.least > old[f.key].most or f.most < old[f.key].least)
        for f in after.figures
        if f.key in old
    ]


def comparison(before: Run, after: Run) -> str:
    """What changed, as text: environments first, then each figure, a star where the spreads are apart.

    A ValueError if there is no figure that both have.
    """
    names = dict.fromkeys((*before.environment, *after.environment))
    pairs = [(name, before.environment.get(name), after.environment.get(name)) for name in names]
    lines = [f"{name}: {old} -> {new}" for name, old, new in pairs if old != new]
    changes = compare(before, after)
    if not changes:
        raise ValueError("nothing to compare: the two runs have no figure in common")
    for change in changes:
        f, old = change.after, change.before
        what = f"{f.bench}: {f.case}: {f.what}"
        values = f"{shown(old.median, f.unit):>14} -> {shown(f.median, f.unit):>14}"
        lines.append(f"{'*' if change.outside else ' '} {what:72} {values}  {change.ratio:.3f}")
    for there, missing, where in ((before, after, "first"), (after, before, "second")):
        lines += [
            f"only in the {where}: {': '.join(key)}"
            for key in _keys(there.figures)
            if key not in _keys(missing.figures)
        ]
    return "\n".join([*lines, "* the two runs' values do not overlap"])


def _keys(figures: Iterable[Figure]) -> dict[tuple[str, str, str], None]:
    return dict.fromkeys(figure.key for figure in figures)
