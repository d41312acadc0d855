"""A LoRA step's time against the batch, the texts' length, layers and rank: GPT-2 small, around N=4, T=128, r=8."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lora_np as ln

from .figures import Figure
from .flops import step_flops
from .measure import Side, measure
from .models import work
from .options import Options
from .step import OURS
from .timing import Cases

BASE = {"N": 4, "T": 128, "layers": 12, "r": 8}
AGAINST = {"N": (2, 4, 8, 16), "T": (64, 128, 256, 512), "layers": (3, 6, 12, 24), "r": (1, 4, 16, 64)}
TINY_BASE = {"N": 2, "T": 8, "layers": 2, "r": 2}
TINY = {"N": (1, 2), "T": (4, 8), "layers": (1, 2), "r": (1, 2)}


def points(quick: bool) -> Iterator[tuple[str, int, dict[str, int]]]:
    """What is varied, its value, and all four."""
    base, against = (TINY_BASE, TINY) if quick else (BASE, AGAINST)
    for name, values in against.items():
        for value in values:
            yield name, value, {**base, name: value}


def cases(quick: bool) -> Cases:
    """A step for each point; all models are the lowest layers of one."""
    most = max(sizes["layers"] for _, _, sizes in points(quick))
    weights = work("gpt2", quick=quick, layers=most).model().weights

    def step(sizes: dict[str, int]) -> Any:
        w = work("gpt2", quick=quick, **sizes)
        model = ln.Model(w.config, {name: weights[name] for name in w.config.weight_shapes()})
        adapter, batch = w.adapter(model), w.batch()
        return lambda: ln.sharded_loss_and_grads(model, adapter, *batch)[0]

    return {f"{name}={value}": step(sizes) for name, value, sizes in points(quick)}


def figures(o: Options) -> Iterator[Figure]:
    """For each point the time, and the operations of the step's products: what the time would follow alone."""
    timings = measure([Side(OURS, "bench.scaling:cases", {"quick": o.quick})], o)[OURS]
    for name, value, sizes in points(o.quick):
        point, w = f"{name}={value}", work("gpt2", quick=o.quick, **sizes)
        yield Figure("scaling", f"against {name}", point, "s", timings[point].seconds)
        products = step_flops(w.config, w.N, w.T, w.lora) / 1e9
        yield Figure("scaling", f"against {name}", f"{point}, products", "GFLOP", [products])
