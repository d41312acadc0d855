"""One training step: LoRA here, in PyTorch + PEFT, eager and compiled, and JAX; full fine-tuning; the roofline's share.

A LoRA step is the loss and its gradients by A and B, float32, no dropout; both sides have the same weights and batch,
and their losses must agree. The share: the step's products at the speed of large products, over the step's time. On a
GPU the other side runs twice: its products in float32 throughout, and in TF32; ours are in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import lora_np as ln
from lora_np.backend import backend_name

from . import roofline
from .figures import Figure
from .flops import step_flops
from .measure import Measured, Side, measure
from .models import WORKS, Work, work
from .options import Options
from .timing import Cases

OURS, EAGER, COMPILED, JAX = "lora_np", "PyTorch + PEFT", "PyTorch + PEFT, compiled", "JAX, compiled"
LORA, FULL = "lora_np: LoRA", "lora_np: every weight"
LORA_ADAMW, FULL_ADAMW = f"{LORA}, with AdamW", f"{FULL}, with AdamW"
RECOMPUTED = f"{LORA}, blocks computed again"
PRODUCTS = "the step's products"
COMPILATION = f"{JAX}: seconds to compile"
LONG = (("gpt2", 1024), ("smollm2", 1024), ("smollm2", 2048))  # models and T of a step with one long sequence


def long_work(name: str, T: int, *, quick: bool = False) -> Work:
    """One sequence of T tokens, or of few."""
    return work(name, quick=quick, N=1, T=T // 64 if quick else T)


def ours(name: str, full: bool, **sizes: Any) -> Cases:
    """LoRA; and with `full`, LoRA that keeps less for backward, and every weight, with the optimizer and without."""
    w = work(name, **sizes)
    model, batch = w.model(), w.batch()
    adapter = w.adapter(model)
    cases: dict[str, Callable[[], Any]] = {LORA: lambda: ln.sharded_loss_and_grads(model, adapter, *batch)[0]}
    if full:
        cases[RECOMPUTED] = lambda: ln.sharded_loss_and_grads(model, adapter, *batch, recompute=True)[0]
        cases[FULL] = lambda: ln.sharded_loss_and_grads(model, None, *batch, trainable="all")[0]
        cases |= {LORA_ADAMW: Training(w, model, full=False).step, FULL_ADAMW: Training(w, model, full=True).step}
    return cases


class Training:
    """Steps of training, the optimizer's among them."""

    def __init__(self, w: Work, model: ln.Model, *, full: bool, recompute: bool = False) -> None:
        self.batch, self.model, self.recompute = w.batch(), model, recompute
        self.adapter = None if full else w.adapter(model)
        self.state: Any = None

    def step(self) -> float:
        """One step. -> the loss before it."""
        if self.adapter is None:
            loss, grads = ln.sharded_loss_and_grads(self.model, None, *self.batch, trainable="all")
            params, self.state = ln.adamw(self.model.weights, grads, self.state, lr=1e-4)
            self.model = ln.Model(self.model.config, params)
        else:
            loss, grads = ln.sharded_loss_and_grads(self.model, self.adapter, *self.batch, recompute=self.recompute)
            params, self.state = ln.adamw(self.adapter.params, grads, self.state, lr=1e-4)
            self.adapter = replace(self.adapter, params=params)
        return loss

    def optimizer_bytes(self) -> int:
        """What the optimizer keeps between steps."""
        return sum(value.nbytes for moments in (self.state.m, self.state.v) for value in moments.values())


Ways: TypeAlias = Mapping[str, Mapping[str, Any]]  # the other sides by name: what sets each apart


def in_each_precision(ways: Ways, backend: str = backend_name) -> Ways:
    """On a GPU, each of them with TF32 off and on."""
    if backend != "cupy":
        return ways
    return {
        f"{way}, TF32 {'on' if tf32 else 'off'}": {**given, "tf32": tf32}
        for way, given in ways.items()
        for tf32 in (False, True)
    }


PYTORCH = in_each_precision({EAGER: {"compiled": False}, COMPILED: {"compiled": True}})
PEERS = (*PYTORCH, JAX)


def peers(name: str, o: Options, **arguments: Any) -> list[Side]:
    """The other sides' processes; torch.compile on GPT-2 alone: it takes a minute. JAX's side has decoders alone."""
    if o.alone:
        return []
    given = {"name": name, "quick": o.quick, **arguments}
    sides = [
        Side(way, "bench.peft_side:step", {**given, **more})
        for way, more in PYTORCH.items()
        if not more["compiled"] or (o.compile and name == "gpt2")
    ]
    if WORKS[name].config.causal:
        sides.append(Side(JAX, "bench.jax_side:step", given))
    return sides


def eager(name: str, o: Options, **arguments: Any) -> Side:
    """PyTorch + PEFT's process; on a GPU, in float32 throughout."""
    way, more = next(iter(PYTORCH.items()))
    return Side(way, "bench.peft_side:step", {"name": name, "quick": o.quick, **more, **arguments})


def check_losses(measured: Measured) -> None:
    """A ValueError unless all sides found the same loss: then they did the same work."""
    mine = measured[OURS][LORA].value
    for side in theirs(measured):
        tf32 = PYTORCH.get(side, {}).get("tf32")
        loss, bound = measured[side]["step"].value, 1e-3 if tf32 else 1e-4  # TF32 has 11 bits
        if abs(loss - mine) > bound * abs(mine):
            raise ValueError(f"step: the sides differ: loss {mine} here, {loss} with {side}")


def theirs(measured: Measured) -> list[str]:
    """The other sides that were measured."""
    return [side for side in PEERS if side in measured]


def figures(o: Options) -> Iterator[Figure]:
    """The times of each model's step, and of those with one long sequence."""
    for name in ("gpt2", "minilm", "smollm2"):
        yield from _beside(name, work(name, quick=o.quick), peers(name, o), o, full=name == "gpt2")
    for name, T in LONG:
        w = long_work(name, T, quick=o.quick)
        yield from _beside(name, w, [] if o.alone else [eager(name, o, N=w.N, T=w.T)], o, full=False)


def _beside(name: str, w: Work, others: Sequence[Side], o: Options, *, full: bool) -> Iterator[Figure]:
    """A step's times, the ratios to the peers and to full fine-tuning, and the roofline's share."""
    given = {"name": name, "quick": o.quick, "full": full, "N": w.N, "T": w.T}
    measured = measure([Side(OURS, "bench.step:ours", given), *roofline.sides(o.quick), *others], o)
    check_losses(measured)
    mine = {case: Figure("step", w.case, case, "s", timing.seconds) for case, timing in measured[OURS].items()}
    for case, figure in mine.items():
        yield from (figure, *measured[OURS][case].asked(figure))
    for side in theirs(measured):
        beside = Figure("step", w.case, side, "s", measured[side]["step"].seconds)
        yield from (beside, beside.over(mine[LORA]))
    if JAX in measured:
        yield Figure("step", w.case, COMPILATION, "s", [measured[JAX]["compile"].value])
    if full:
        yield from (mine[kind].over(mine[LORA]) for kind in (FULL, RECOMPUTED))
        yield mine[FULL_ADAMW].over(mine[LORA_ADAMW])
    yield from _shares(w, mine[LORA], roofline.figures("step", measured, o.quick))


def _shares(w: Work, lora: Figure, found: dict[str, Figure]) -> Iterator[Figure]:
    """The speed of the step's products, the machine's, and the share."""
    speed = lora.rate(step_flops(w.config, w.N, w.T, w.lora) / 1e9, PRODUCTS, "GFLOP/s")
    yield speed
    for way in (roofline.EACH_CORE, roofline.ALL_THREADS):
        roof = found[way]._replace(case=w.case)
        yield from (roof, speed.over(roof, "share"))
