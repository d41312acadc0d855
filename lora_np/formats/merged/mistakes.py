"""What a wrong merge looks like: known mistakes by name, and the tensors in which each was made."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from ..files.messages import listed, shown
from .comparison import Comparison, Difference
from .evidence import NEAR
from .gguf import HEAD as GGUF_HEAD
from .tied import is_head

ALIGNED = 0.9  # cos^2 of M - W0 and the update, from which on the one is called a multiple of the other
MANY = 0.1  # part of the elements, from which on it is not some that were changed
NOT_MERGED, ALL_BASE = "not merged", "the base: nothing was merged"
OTHER_BASE = "the adapter on another base, or on this one rounded in a way that is not known here"
ELSE = "something else than this adapter"


def explained(comparison: Comparison, config: Mapping[str, Any]) -> str | None:
    """What was merged instead, where a folder looks like something known; None: it does not.

    config: the adapter's, as adapter_config.json says it.
    """
    if comparison.holds:
        return None
    return "; ".join(text for text in (_still_tied(comparison), _of_updates(comparison, config)) if text) or None


def _still_tied(comparison: Comparison) -> str | None:
    """A head of its own that was left out, as if it were the token table still, of which one end is adapted."""
    heads = [key for key in comparison.missing if is_head(key) or key == GGUF_HEAD]
    return f"{shown(heads[0])} tied to the token table still, which the adapter unties" if heads else None


def _of_updates(comparison: Comparison, config: Mapping[str, Any]) -> str | None:
    adapted = [one for one in comparison.changed if one.scale is not None]
    wrong = [one for one in adapted if not one.fits]
    if not adapted or comparison.scale is None or (not wrong and abs(comparison.scale - 1) <= NEAR):
        return None
    if not wrong:  # each is near, and together they are off
        return ", or ".join(looks_like(_together(comparison, adapted), config)).replace(NOT_MERGED, ALL_BASE) or None
    known = {one.tensor: looks_like(one, config) for one in wrong}
    if len(wrong) == len(adapted):
        common = [text for text in known[wrong[0].tensor] if all(text in texts for texts in known.values())]
        if common:
            return ", or ".join(common).replace(NOT_MERGED, ALL_BASE)
    groups: dict[str, set[str]] = {}
    for name, texts in known.items():
        for text in texts:
            groups.setdefault(text, set()).add(name)
    lines, left = [], set(known)
    while some := max((names & left for names in groups.values()), key=len, default=set()):
        texts = [text for text, names in groups.items() if names & left == some]
        lines.append(f"{', or '.join(texts)}: {which(some, [one.tensor for one in adapted])}")
        left -= some
    return "; ".join(lines) or None


def _together(comparison: Comparison, adapted: Sequence[Difference]) -> Difference:
    """All tensors as one."""
    alike = len({(one.s, one.r) for one in adapted}) == 1
    s, r = (adapted[0].s, adapted[0].r) if alike else (None, None)
    return adapted[0]._replace(scale=comparison.scale, aligned=comparison.aligned, is_off=True, s=s, r=r)


def looks_like(one: Difference, config: Mapping[str, Any]) -> list[str]:
    """What a tensor looks like that is not what it should be: all that fits."""
    if one.fits or one.scale is None:
        return []
    if one.is_dora and abs(one.scale) <= NEAR and one.aligned >= ALIGNED:
        return [NOT_MERGED]
    if one.instead is not None:
        return [one.instead]
    if one.rounded_to is not None:
        return [f"a merge onto the base rounded to {one.rounded_to}"]
    if one.scale_turned is not None and abs(one.scale_turned - 1) <= 2 * NEAR and abs(one.scale) < 0.5:
        return ["the transpose of the update"]
    if one.is_dora and abs(one.scale - 1) > NEAR:
        return [ELSE]
    fitting = [
        text
        for value, text in _multiples(one, config)
        if abs(value - 1) > NEAR and abs(one.scale - value) <= NEAR * max(abs(value), 1.0)
    ]
    if abs(one.scale - 1) <= NEAR and one.scale_error < NEAR:
        return [OTHER_BASE] if one.beyond > MANY * one.elements else []
    if one.aligned < ALIGNED:
        return [ELSE]
    return fitting or [f"the adapter with {one.scale:.4g} times its scale"]


def _multiples(one: Difference, config: Mapping[str, Any]) -> Iterable[tuple[float, str]]:
    """Known multiples of an update."""
    yield from ((-1.0, "the adapter subtracted"), (2.0, "the adapter merged twice"), (0.0, NOT_MERGED))
    s, r, rslora = one.s, one.r, config.get("use_rslora") is True
    if not s or not r:
        return
    root = math.sqrt(r) if rslora else r
    alpha = s * root
    yield 1 / s, "B A with no scale: alpha / r is missing"
    yield alpha / s, "B A times alpha: the division by r is missing"
    yield alpha / math.sqrt(r) / s, "the scale alpha / sqrt(r) in the place of alpha / r"
    yield alpha / r / s, "the scale alpha / r in the place of alpha / sqrt(r)"
    yield s, "the scale applied twice"
    said_r, said_alpha = config.get("r"), config.get("lora_alpha")
    if type(said_r) is int and said_r > 0:
        yield root / (math.sqrt(said_r) if rslora else said_r), "the scale of the rank r: rank_pattern is passed over"
    if isinstance(said_alpha, (int, float)) and type(said_alpha) is not bool:
        yield said_alpha / alpha, "the scale of lora_alpha: alpha_pattern is passed over"


def which(names: Collection[str], known: Sequence[str]) -> str:
    """Some of the tensors in few words: layers of which they are all, or kinds of matrices of which they are all."""
    layers = _parts({name: _split(name)[0] for name in known}, names)
    if layers:
        return f"layer{'s' * (len(layers) > 1)} {listed(layers)}"
    kinds = _parts({name: _split(name)[1] for name in known}, names)
    return f"{listed(kinds)} of all layers" if kinds else listed(sorted(names))


def _parts(of: Mapping[str, str], names: Collection[str]) -> list[str]:
    """The parts of the model, by each tensor's own, that hold these tensors and no other; none if there are no such."""
    parts = sorted({of[name] for name in names}, key=lambda text: (len(text), text))
    exact = set(names) == {name for name, part in of.items() if part in parts}
    return parts if exact and "" not in parts and len(set(of.values())) > 1 else []


def _split(name: str) -> tuple[str, str]:
    """A tensor's layer, and what it is within that; "" where it has none."""
    parts = name.removesuffix(".weight").split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return ("", "") if at is None else (parts[at], ".".join(parts[at + 1 :]))
