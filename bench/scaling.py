"""A LoRA step's time against the batch, layers and rank, of GPT-2 small, and against one sequence's length, of SmolLM2.

Around N=4, T=128, 12 layers, r=8. Against the length, N=1, PyTorch + PEFT stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lora_np as ln

from .figures import Figure
from .flops import step_flops
from .measure import Side, measure
from .models import Work, work
from .options import Options
from .step import EAGER, LORA, OURS, eager
from .timing import Cases

BASE = {"N": 4, "T": 128, "layers": 12, "r": 8}
AGAINST = {"N": (2, 4, 8, 16), "layers": (3, 6, 12, 24), "r": (1, 4, 16, 64)}
TINY_BASE = {"N": 2, "T": 8, "layers": 2, "r": 2}
TINY = {"N": (1, 2), "layers": (1, 2), "r": (1, 2)}
LENGTHS, TINY_LENGTHS = tuple(2**i for i in range(7, 14)), (4, 8)  # 128 to 8192
ONE_ROUND = 2048  # tokens from which a step is measured once: it takes long
MOST_BYTES = 20e9  # of both sides of a comparison


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


def both_bytes(w: Work) -> float:
    """About what a step of PyTorch keeps, and half as much for ours, whose process lives beside it.

    For each token, in float32, logits three times, and 10 D + 5 F a layer: so SmolLM2's peak grows from T=1024 to 2048.
    """
    c = w.config
    return 1.5 * 4 * w.N * w.T * (3 * c.vocab_size + c.n_layer * (10 * c.d_model + 5 * c.d_ff))


def figures(o: Options) -> Iterator[Figure]:
    """For each point the time, and the operations of the step's products: what the time would follow alone."""
    timings = measure([Side(OURS, "bench.scaling:cases", {"quick": o.quick})], o)[OURS]
    for name, value, sizes in points(o.quick):
        point, w = f"{name}={value}", work("gpt2", quick=o.quick, **sizes)
        yield Figure("scaling", f"against {name}", point, "s", timings[point].seconds)
        yield _products(f"against {name}", point, w)
    works = (work("smollm2", quick=o.quick, N=1, T=T) for T in (TINY_LENGTHS if o.quick else LENGTHS))
    yield from sorted((f for w in works for f in _of_length(w, o)), key=lambda f: f.case)  # a side after the other


def _of_length(w: Work, o: Options) -> Iterator[Figure]:
    """The same for one sequence; PyTorch's time too, where both sides fit in MOST_BYTES."""
    given = {"name": "smollm2", "quick": o.quick, "N": w.N, "T": w.T}
    sides = [Side(OURS, "bench.step:ours", {**given, "full": False})]
    if not o.alone and both_bytes(w) <= MOST_BYTES:
        sides.append(eager("smollm2", o, N=w.N, T=w.T))
    measured = measure(sides, o._replace(rounds=1) if w.T >= ONE_ROUND else o)
    yield Figure("scaling", "against T", f"T={w.T}", "s", measured[OURS][LORA].seconds)
    yield _products("against T", f"T={w.T}", w)
    if EAGER in measured:
        yield Figure("scaling", f"against T, {EAGER}", f"T={w.T}", "s", measured[EAGER]["step"].seconds)


def _products(case: str, point: str, w: Work) -> Figure:
    products = step_flops(w.config, w.N, w.T, w.lora) / 1e9
    return Figure("scaling", case, f"{point}, products", "GFLOP", [products])
