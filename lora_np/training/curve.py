"""Held-out scores over a training: which is the best, and whether it ends worse than it was."""

from __future__ import annotations

from typing import TypeAlias

from .loop import Score

Curve: TypeAlias = dict[int, Score]  # what the adapter is worth on held-out data, after some steps, from 0 on

RISE, NOISE = 0.1, 0.01  # parts of what was gained, and of the loss: a rise of no more than either is not told


def best(curve: Curve) -> int:
    """The step after which the held-out loss was the lowest."""
    return min(curve, key=lambda step: curve[step].loss)


def worse(curve: Curve) -> str | None:
    """What to say of a training that ends worse than it began, or than it was by more than RISE and NOISE, else None.

    The second is a rise from the lowest loss by more than a tenth of what was gained till there, and by more than a
    hundredth of it.
    """
    start, end, lowest = curve[0].loss, curve[max(curve)].loss, curve[best(curve)].loss
    if end <= start and end - lowest <= max(RISE * (start - lowest), NOISE * lowest):
        return None
    than, when = "began" if end > start else "was", f"after step {best(curve)}" if best(curve) else "before"
    return (
        f"the run ends worse than it {than}: held-out loss {end:.4f} after step {max(curve)}, {start:.4f} before; the "
        f"lowest is {lowest:.4f}, {when}"
    )
