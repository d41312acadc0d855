"""What was merged instead, where a folder or a file is not the merge: mistakes that are known, by name."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from ..files.messages import shown
from .comparison import Comparison, Difference
from .evidence import ALIGNED, NEAR
from .target import Scale
from .tied import is_head

SHOWN = 10  # modules in one line
UNSURE = 0.12  # standard deviation of a scale, from which on it says nothing
MANY = 0.1  # part of a tensor's elements
# |Q(W0) - W0| / |W0| of normal weights: 0.005 to 0.008 for the grids of 8 bits, 0.08 to 0.11 for those of 4.
FEW_BITS = {8: (0.002, 0.03), 4: (0.05, 0.2)}
NOT_MERGED, TURNED, ELSE = "not merged", "the transpose of the update merged", "something else than this adapter"
OFF_BASE = "the update on another base"
GGUF_HEAD = "output.weight"


def explained(found: Comparison, scales: Collection[Scale]) -> str | None:
    """What was merged instead, where a folder looks like something known; None: it does not.

    scales: those of the adapted modules.
    """
    if found.holds:
        return None
    said = [_tied_still(found), _base(found), _updates(found, scales)]
    return "; ".join(text for text in said if text is not None) or None


def mistake(one: Difference, *, rounded: bool = False) -> str | None:
    """What a tensor looks like that is not the merge; None: nothing known.

    rounded: whether the base is known to be a rounded one, by all tensors
    """
    if one.fits or one.scale is None or one.not_finite:
        return None
    if one.turned:
        return TURNED
    if one.unchanged:
        return NOT_MERGED
    rounded |= one.rounded_to is not None
    if one.deviation > UNSURE:  # of a small update, below the errors
        return None if rounded else ELSE
    unsure = _unsure(one.scale, one.deviation)
    if abs(one.scale - 1) <= unsure:
        return OFF_BASE if one.beyond > MANY * one.elements and one.off_base > FEW_BITS[8][0] and not rounded else None
    if one.aligned < ALIGNED and not rounded:
        return ELSE
    known = {0.0: NOT_MERGED, -1.0: "subtracted", 2.0: "merged twice"}
    near = [text for value, text in known.items() if abs(one.scale - value) <= unsure]
    return near[0] if near else f"{one.scale:.4g} times the update"


def _unsure(scale: float, deviation: float) -> float:
    """How far a multiple may be from another and be called that."""
    return max(NEAR * max(1.0, abs(scale)), 4 * deviation)


def _tied_still(found: Comparison) -> str | None:
    """A head that was left out, as if it were the token table still."""
    heads = [key for key in found.missing if is_head(key) or key == GGUF_HEAD]
    if not heads:
        return None
    return f"{shown(heads[0])} left out, as if it were still the token table, of which the adapter changes one end"


def _base(found: Comparison) -> str | None:
    """The merge onto another base, or onto this one in fewer bits."""
    grids = {one.rounded_to for one in found.changed} - {None}
    if found.rounded_to is not None or grids:
        return f"a base that was rounded to {found.rounded_to or min(map(str, grids))} before"
    off = [one.off_base for one in found.changed if mistake(one) == OFF_BASE]
    if not off or 2 * len(off) < len(found.changed):
        return None
    text = f"the adapter on another base, whose weights are off by {np.median(off):.2g} of their size"
    bits = [n for n, (least, most) in FEW_BITS.items() if least <= min(off) and max(off) <= most]
    alike = max(off) <= 1.5 * min(off) and len(off) == len(found.changed)
    return text + (f", in all tensors alike, as rounding to about {bits[0]} bits leaves them" if bits and alike else "")


def _updates(found: Comparison, scales: Collection[Scale]) -> str | None:
    """Other updates than the adapter's, or in some tensors alone."""
    seen = [one for one in found.changed if one.scale is not None]
    is_rounded = found.rounded_to is not None
    named = [(one, text) for one in seen if (text := mistake(one, rounded=is_rounded)) is not None]
    texts = {text for _, text in named}
    if texts and texts <= {ELSE, OFF_BASE} and len(named) == len(seen):
        return None if _base(found) is not None else ELSE
    if texts == {TURNED} and len(named) == len(seen):
        return TURNED
    if not named or (len(named) == len(seen) and _alike(found, seen)):
        return _of_all(found, scales)
    pattern = _without_patterns(seen, any(rslora for *_, rslora in scales))
    if pattern is not None:
        return pattern
    groups: dict[str, list[str]] = defaultdict(list)
    for one, text in named:
        groups[text].append(one.tensor)
    return "; ".join(f"{_where(names, [one.tensor for one in seen])}: {text}" for text, names in groups.items())


def _alike(found: Comparison, seen: Sequence[Difference]) -> bool:
    """Whether the same multiple was added throughout."""
    c = found.scale
    return c is not None and all(
        one.scale is not None and abs(one.scale - c) <= _unsure(c, one.deviation) and not one.turned for one in seen
    )


def _of_all(found: Comparison, scales: Collection[Scale]) -> str | None:
    """The multiple that was added throughout, by how it comes about."""
    c = found.scale
    if c is None or found.deviation > UNSURE or abs(c - 1) <= _unsure(1.0, found.deviation):
        return None
    if all(one.unchanged for one in found.changed):
        c = 0.0
    if found.aligned < ALIGNED and found.rounded_to is None:
        return ELSE
    known = [(-1.0, "the adapter subtracted"), (2.0, "the adapter merged twice"), (0.0, "the base: nothing was merged")]
    if len(scales) == 1:
        s, r, rslora = next(iter(scales))
        alpha = s * (math.sqrt(r) if rslora else r)
        known += [
            (1 / s, "B A with no scale: alpha / r is missing"),
            (alpha / s, "B A times alpha: the division by r is missing"),
            (alpha / math.sqrt(r) / s, "the scale alpha / sqrt(r) in the place of alpha / r"),
            (alpha / r / s, "the scale alpha / r in the place of alpha / sqrt(r)"),
            (s, "the scale applied twice"),
        ]
    fitting = [text for value, text in known if abs(value - 1) > NEAR and abs(c - value) <= NEAR * max(abs(value), 1.0)]
    return ", or ".join(fitting) or f"the adapter with {c:.4g} times its scale"


def _without_patterns(seen: Sequence[Difference], rslora: bool) -> str | None:
    """Whether one rank, one alpha, or one scale of all was taken, where modules have their own.

    The scales that were used, c s, tell it: they are then alike themselves, or times the ranks, or over the alphas s r.
    """
    if len({one.s for one in seen}) < 2:
        return None
    ours = [(one.scale * one.s, one.s, one.rank**0.5 if rslora else one.rank) for one in seen
            if one.scale is not None and one.s and one.rank]  # fmt: skip
    if len(ours) != len(seen) or len(ours) < 2 or any(used <= 0 for used, *_ in ours):
        return None
    if _one([used for used, *_ in ours]):
        return f"one scale, {ours[0][0]:.4g}, for all modules, as without rank_pattern and alpha_pattern"
    if not _one([s * r for _, s, r in ours]) and _one([used * r for used, _, r in ours]):
        return "one alpha for all modules, as without alpha_pattern"
    if not _one([r for *_, r in ours]) and _one([used / (s * r) for used, s, r in ours]):
        return "one rank for all modules in the scale alpha / r, as without rank_pattern"
    return None


def _one(values: Iterable[float]) -> bool:
    """Whether these numbers are one."""
    values = list(values)
    return max(values) - min(values) <= NEAR * max(values)


def _where(names: Sequence[str], of: Sequence[str]) -> str:
    """Which tensors: whole layers, or all of a kind, or some by name."""
    layers, kinds = {_layer(name) for name in names}, {_kind(name) for name in names}
    if len(names) == len(of):
        return f"all {len(of)} tensors"
    if None not in layers and len(names) == sum(_layer(name) in layers for name in of):
        several = sorted(int(str(layer)) for layer in layers)
        return f"layer{'s' if len(several) > 1 else ''} {' '.join(map(str, several))}"
    if len(names) > 1 and len(names) == sum(_kind(name) in kinds for name in of):
        layers_of = [(kind, sum(_kind(name) == kind for name in of)) for kind in sorted(kinds)]
        return ", ".join(shown(f"{_short(kind)} in all {n} layers") for kind, n in layers_of)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return " ".join(shown(name) for name in names[:SHOWN]) + more


def _layer(name: str) -> str | None:
    """The first number among a name's parts, as PEFT counts layers."""
    return next((part for part in name.split(".") if part.isdecimal()), None)


def _kind(name: str) -> str:
    return re.sub(r"(?<![^.])[0-9]+(?![^.])", "*", name)


def _short(kind: str) -> str:
    """What stands behind the layer's number."""
    return kind.removesuffix(".weight").rpartition("*.")[2]
