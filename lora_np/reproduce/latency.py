"""Latency (paper 3 and 4.1, table 1): merged against the base, against LoRA beside it, and against adapter layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from ..adapter import LoRAConfig, init_adapter, merge
from ..backend import Array, asnumpy
from ..loss import forward
from ..model import Config, Model, init_weights
from .section import Claim, Picture, Section, Table, Verdict, graded
from .timing import Ratio, in_turn, ratio

BASE, AGAIN, MERGED, UNMERGED = "base", "base, again", "merged", "LoRA, not merged"
ADAPTERS, SMALL = "adapter layers", "adapter layers, small"
WIDTH = 9  # the paper's 11M parameters on GPT-2 M are bottlenecks of D / 9
NOISE = 0.05  # a difference below this is not told from none
LORA = LoRAConfig(r=8)


class Shape(NamedTuple):
    """A batch: N texts of T tokens."""

    N: int
    T: int


Ratios = Mapping[Shape, Mapping[str, Ratio]]  # of each variant's time to the base's


def measure(config: Config, shapes: Sequence[Shape], rounds: int) -> Ratios:
    """Forward passes of random weights, in turn."""
    base = Model(config, init_weights(config, seed=0))
    variants = _variants(base)
    found: dict[Shape, dict[str, Ratio]] = {}
    for shape in shapes:
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape)
        functions = {name: partial(_done, run, tokens) for name, run in variants.items()}
        seconds = in_turn(functions, rounds=rounds)
        found[shape] = {name: ratio(seconds, name, BASE) for name in variants if name != BASE}
    return found


def _variants(base: Model) -> dict[str, Callable[[Array], Array]]:
    """What is timed, by name: tokens (N,T) in, states out."""
    adapter = init_adapter(base, LORA, seed=0)
    merged = merge(base, adapter)
    variants = {
        BASE: lambda tokens: forward(base, tokens),
        AGAIN: lambda tokens: forward(base, tokens),
        MERGED: lambda tokens: forward(merged, tokens),
        UNMERGED: lambda tokens: forward(base, tokens, adapter),
    }
    houlsby = adapter_layers()
    if houlsby is not None:
        for name, width in ((ADAPTERS, max(1, base.config.d_model // WIDTH)), (SMALL, LORA.r)):
            layers = houlsby.init_bottlenecks(base, width, seed=0)
            variants[name] = partial(houlsby.forward, base, layers)
    return variants


def adapter_layers() -> Any:
    """The baseline of adapter layers, which lives beside the package, in a clone; None without one."""
    try:
        return import_module("bench.houlsby")
    except ImportError:
        return None


def _done(run: Callable[[Array], Array], tokens: Array) -> Array:
    """A pass whose result has arrived."""
    return asnumpy(run(tokens)[:1, :1])


def same_work(base: Model, merged: Model) -> bool:
    """Whether two models run the very same operations: one configuration, and arrays of the same shapes and dtypes."""
    return base.config == merged.config and {n: (w.shape, w.dtype) for n, w in base.weights.items()} == {
        n: (w.shape, w.dtype) for n, w in merged.weights.items()
    }


def merged_claim(found: Ratios, same: bool) -> Claim:
    """Merged, an adapter costs no time."""
    worst = max(found.values(), key=lambda ratios: ratios[MERGED].median)[MERGED].median - 1
    noise = _noise(found)
    return Claim(
        "merged, LoRA adds no inference latency", "paper, 4.1 and table 1",
        f"{'the same operations on arrays of the same shapes' if same else 'other operations'}; measured, at most "
        f"{worst:+.1%}, where the base differs from itself by up to {noise:.1%}",
        _unless_lost(worst, noise, graded(same and worst <= NOISE, same)),
    )  # fmt: skip


def adapters_claim(found: Ratios) -> Claim:
    """Adapter layers cost time, most where batches are small."""
    source = "paper, 3 and table 1"
    claim = "adapter layers add latency, most at batch 1 (20 to 30 %), little at batch 32 (2 to 3 %)"
    if any(ADAPTERS not in ratios for ratios in found.values()):
        return Claim(claim, source, "needs a clone: there, `python -m lora_np reproduce` measures them", "not checked")
    over = {shape: ratios[ADAPTERS].median - 1 for shape, ratios in found.items()}
    shown = ", ".join(f"{value:+.1%} at {shape.N} x {shape.T}" for shape, value in over.items())
    noise = _noise(found)
    small, large = min(over), max(over)
    told = max(NOISE, noise)
    verdict = graded(over[small] > told and over[small] - over[large] > told, any(o > told for o in over.values()))
    figure = f"{shown}; the base differs from itself by up to {noise:.1%}"
    return Claim(claim, source, figure, _unless_lost(max(over.values()), noise, verdict))


def _unless_lost(effect: float, noise: float, verdict: Verdict) -> Verdict:
    """The verdict, unless the noise is more than what can be told, and more than the effect that it is about."""
    return "not decided" if noise > NOISE and abs(effect) <= noise else verdict


def _noise(found: Ratios) -> float:
    """How far the base differs from itself."""
    return max(abs(ratios[AGAIN].median - 1) for ratios in found.values())


def _cell(of: Ratio) -> str:
    return f"{of.median - 1:+.1%} ({of.least - 1:+.1%} to {of.most - 1:+.1%})"


def _percent(of: Ratio) -> tuple[float, float, float]:
    """Beyond the base's time."""
    return 100 * (of.median - 1), 100 * (of.least - 1), 100 * (of.most - 1)


def latency(config: Config, shapes: Sequence[Shape], rounds: int) -> Section:
    """The section; the numbers in the weights do not matter to it."""
    found = measure(config, shapes, rounds)
    base = Model(config, init_weights(config, seed=0))
    same = same_work(base, merge(base, init_adapter(base, LORA, seed=0)))
    names = list(found[shapes[0]])
    rows = [[f"{shape.N} x {shape.T}", *(_cell(ratios[name]) for name in names)] for shape, ratios in found.items()]
    points = {
        f"{name}, {shape.N} x {shape.T}": _percent(ratios[name]) for name in names for shape, ratios in found.items()
    }
    return Section(
        "latency", "Inference latency",
        f"The forward pass of {config.n_layer} layers, D = {config.d_model}, without a head, in float32; batch x "
        f"length. Each variant is timed in turn with the base, {rounds} times; its ratio to the base is taken "
        'round by round: the median, and the least and the most. "base, again" is the base a second time: what differs '
        "there is noise. Adapter layers are Houlsby's: two bottlenecks a layer, of D / 9 as in the paper's table (11M "
        "on GPT-2 M), or small, of as many parameters as LoRA with r = 8.",
        [merged_claim(found, same), adapters_claim(found)],
        tables=[Table("Time beyond the base's", ["batch", *names], rows)],
        pictures=[Picture("Time beyond the base's, in percent.", "spread_points", [points, "percent"])],
        data={f"{s.N}x{s.T}": {name: value._asdict() for name, value in r.items()} for s, r in found.items()},
    )  # fmt: skip
