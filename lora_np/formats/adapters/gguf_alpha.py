"""One alpha for a whole adapter, as llama.cpp's files have it: what else B must be multiplied by.

Where ranks and scales are such that one does not do for all (patterns, rsLoRA, GPT-2's q and v as one), B is multiplied
by the ratio: exact where that is a power of two, else rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np

from ...adapter import LoRAConfig
from ...backend import Array, asnumpy
from ...model import Config
from ..files.rounding import rounded
from .peft_config import most_common
from .peft_tensors import checked_groups

SAME = 2.0**-24  # relatively: what a float32, as llama.cpp's scale is, does not hold
LEAST = 2.0**-126  # float32's least normal number: by less, or by more than its inverse, nothing is multiplied


class Folding(NamedTuple):
    """alpha, which float32 holds, and what each matrix's B is multiplied by, so that alpha / r is its scale."""

    alpha: float
    ratios: Mapping[str, float]

    def of(self, name: str) -> float:
        """What a parameter is multiplied by; 1 for all but B."""
        return self.ratios[name[:-2]] if name.endswith(".B") else 1.0


def folding_of(config: Config, lora_config: LoRAConfig, names: Collection[str], where: str) -> Folding:
    """The alpha that fits most of an adapter's matrices; a ValueError if there is none, or a scale is 0."""
    wanted: dict[str, float] = {}
    for parts in checked_groups(config, lora_config, names).values():
        rank = sum(lora_config.rank(part) for part in parts)
        wanted |= {part: lora_config.scale(part) * rank for part in parts}
    return folding_for(wanted, where)


def folding_for(wanted: Mapping[str, float], where: str) -> Folding:
    """The same of matrices of which each wants its own alpha."""
    for part, value in wanted.items():
        if value == 0:
            raise ValueError(f"{where}: {part}: its scale is 0, which llama.cpp takes for 1")
    with np.errstate(over="ignore", under="ignore"):
        alpha = float(most_common((np.float32(value) for value in wanted.values()), np.float32(1)))
    if not (alpha and math.isfinite(alpha)):
        raise ValueError(f"{where}: expected a scale that float32 holds, got {alpha}")
    ratios = {part: _near_power(value / alpha) for part, value in wanted.items()}
    for part, ratio in ratios.items():
        if not LEAST <= abs(ratio) <= 1 / LEAST:
            raise ValueError(
                f"{where}: {part}: its scale is {ratio:g} times that of most: expected less of a difference"
            )
    return Folding(alpha, ratios)


def _near_power(ratio: float) -> float:
    """The power of two that a ratio is, but for the rounding of a float32; else the ratio."""
    mantissa, exponent = math.frexp(abs(ratio))
    nearest = math.ldexp(1.0, exponent - (mantissa < math.sqrt(0.5)))
    return math.copysign(nearest if abs(abs(ratio) / nearest - 1) <= SAME else abs(ratio), ratio)


def times(value: Array, ratio: float) -> Array:
    """An array times a number, rounded once to its own dtype, in host memory."""
    host = asnumpy(value)
    return host if ratio == 1 else rounded(host.astype(np.float64) * ratio, host.dtype)
