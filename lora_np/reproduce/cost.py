"""What training costs (paper 4.2): optimizer state, memory, time of a step; as arithmetic and as measured here."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from ..adapter import Adapter, LoRAConfig, count_parameters, init_adapter
from ..backend import backend_name
from ..batch import BatchDict
from ..formats.models.presets import PRESETS
from ..model import Config, Model, init_weights
from ..training.loop import Settings, State, placed, train
from ..training.text import encode, random_windows, standard_library
from .counts import HALF, size
from .section import Claim, Section, Table, graded, told
from .timing import Ratio, in_turn, ratio

THIRD = 3.0  # "GPU memory requirement by 3 times"
FASTER = 1.25  # "a 25% speedup during training"
NEAR = 0.9  # a measured figure may fall short of the printed one by a tenth
LORA = LoRAConfig(r=4)


@dataclass(frozen=True)
class Measured:
    """A model to measure on: its configuration, and the batch."""

    name: str
    config: Config
    N: int
    T: int


class Bytes(NamedTuple):
    """Of one training: what it holds between steps (weights, optimizer state), and the most within a step."""

    held: int
    peak: int


class Memory(NamedTuple):
    """Both trainings of one model."""

    what: Measured
    full: Bytes
    lora: Bytes

    @property
    def held(self) -> float:
        """How many times more every weight's training holds between steps."""
        return self.full.held / self.lora.held

    @property
    def peak(self) -> float:
        """How many times more it needs at its peak."""
        return self.full.peak / self.lora.peak


def measure_memory(what: Measured) -> Memory:
    """Bytes that Python's tracemalloc sees, arrays among them; activations included."""
    _bytes(what, LORA)  # the first step of all imports modules, whose bytes are no training's
    return Memory(what, _bytes(what, None), _bytes(what, LORA))


def _bytes(what: Measured, lora: LoRAConfig | None) -> Bytes:
    batches = _batches(what)
    tracing = tracemalloc.is_tracing()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        model = Model(what.config, init_weights(what.config, seed=0))
        adapter = None if lora is None else init_adapter(model, lora, seed=0)
        state = _step(model, adapter, batches, None)
        model, adapter = placed(model, adapter, state)  # the weights before the step are let go of
        held = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.reset_peak()
        _step(model, adapter, batches, state)
        return Bytes(held, tracemalloc.get_traced_memory()[1] - before)
    finally:
        if not tracing:
            tracemalloc.stop()


def _step(model: Model, adapter: Adapter | None, batches: Callable[[int], BatchDict], state: State | None) -> State:
    """One step more than the state has taken."""
    steps = 1 if state is None else state.step + 1
    return train(model, adapter, batches, Settings(steps=steps, lr=1e-3), state=state)


def _batches(what: Measured) -> Callable[[int], BatchDict]:
    text = encode(standard_library(100_000))
    return lambda step: random_windows(text, N=what.N, T=what.T, seed=0, step=step)._asdict()


def measure_speed(what: Measured, rounds: int) -> Ratio:
    """The time of a step of every weight over that of a step of LoRA, in turn."""
    batches = _batches(what)
    model = Model(what.config, init_weights(what.config, seed=0))
    adapter = init_adapter(model, LORA, seed=0)
    kinds: dict[str, Adapter | None] = {"full": None, "lora": adapter}
    states = {name: _step(model, kind, batches, None) for name, kind in kinds.items()}
    functions = {
        name: lambda name=name, kind=kind: _step(model, kind, batches, states[name]) for name, kind in kinds.items()
    }
    return ratio(in_turn(functions, rounds=rounds), "full", "lora")


def state_claim(whole: int, trained: int, measured: int, expected: int) -> Claim:
    """Adam's two moments are kept of what is trained alone. measured, expected: bytes of the state of an adapter."""
    return Claim(
        "the optimizer's state is kept for the trained parameters alone", "paper, 4.2",
        f"AdamW's two moments on GPT-3, r = 4, in float32: {8 * trained / 1e6:,.0f} MB instead of "
        f"{8 * whole / 1e12:.2f} TB; measured here, {measured:,} bytes where {expected:,} are due",
        graded(measured == expected, False), exact=True,
    )  # fmt: skip


def memory_claim(arithmetic: float, with_gradients: float, measured: Memory | None) -> Claim:
    """A third of the memory. arithmetic: weights and moments over weights; with gradients too."""
    figure = f"GPT-3, by arithmetic: {arithmetic:.2f} times with two moments, {with_gradients:.2f} with gradients too"
    if measured is None:
        return Claim(_MEMORY, "paper, abstract and 4.2", f"{figure}; not measured on a GPU", "not checked")
    figure += (
        f"; measured here, where weights outweigh activations: {measured.held:.2f} times between steps, "
        f"{measured.peak:.2f} at the peak"
    )
    enough = [value >= NEAR * THIRD for value in (arithmetic, measured.held, measured.peak)]
    return Claim(_MEMORY, "paper, abstract and 4.2", figure, graded(all(enough), any(enough)))


_MEMORY = "training needs 3 times less memory (GPT-3: 350 GB instead of 1.2 TB, 3.4 times)"


def speed_claim(found: Ratio) -> Claim:
    """A step is a quarter faster. A speed-up that is smaller than the rounds' spread decides nothing."""
    faster = told(found.median - 1, 0, max(found.median - found.least, found.most - found.median))
    return Claim(
        "training is 25 % faster than full fine-tuning", "paper, 4.2: GPT-3",
        f"a step of every weight takes {found.median:.2f} times as long as one of LoRA ({found.least:.2f} to "
        f"{found.most:.2f})",
        graded(faster and found.median >= NEAR * FASTER, faster),
    )  # fmt: skip


def cost(heavy: Measured, light: Measured, rounds: int) -> Section:
    """heavy: a model whose weights outweigh its activations, as GPT-3's do; light: one with the batch of the report."""
    gpt3 = PRESETS["gpt3-175b"]
    whole, trained = size(gpt3), count_parameters(gpt3, LORA)
    memory = [] if backend_name == "cupy" else [measure_memory(what) for what in (heavy, light)]
    speed = measure_speed(light, rounds)
    claims = [
        state_claim(whole, trained, *_state_bytes(light)),
        memory_claim(
            3 * whole / (whole + 3 * trained), 4 * whole / (whole + 4 * trained), memory[0] if memory else None
        ),
        speed_claim(speed),
    ]
    rows = [
        [
            f"{m.what.name}, batch {m.what.N} x {m.what.T}", f"{size(m.what.config):,}",
            _mb(m.full.held), _mb(m.lora.held), f"{m.held:.2f}", _mb(m.full.peak), _mb(m.lora.peak), f"{m.peak:.2f}",
        ]
        for m in memory
    ]  # fmt: skip
    head = ["", "parameters", "full: held", "LoRA: held", "times", "full: peak", "LoRA: peak", "times"]
    return Section(
        "cost", "What training costs",
        f"In float16, GPT-3's weights alone are {whole * HALF / 1e9:.0f} GB: what LoRA is left with. Full fine-tuning "
        "adds as much for each of AdamW's moments, and for gradients. Measured with Python's tracemalloc on models of "
        "random weights, r = 4 on W_q and W_v: held is what stays between steps (weights, moments), the peak includes "
        "gradients, activations, and the new parameters beside the old ones. The saving shrinks as the batch grows, "
        "for activations are needed either way.",
        claims,
        tables=[Table("Memory of a training, float32", head, rows)] if rows else [],
        data={
            "memory": [{"model": m.what.name, "full": m.full._asdict(), "lora": m.lora._asdict()} for m in memory],
            "step": speed._asdict(),
        },
    )  # fmt: skip


def _state_bytes(what: Measured) -> tuple[int, int]:
    """The bytes of AdamW's state after a step of LoRA, and what they should be: two float32 for each trained number."""
    model = Model(what.config, init_weights(what.config, seed=0))
    state = _step(model, init_adapter(model, LORA, seed=0), _batches(what), None)
    assert state.optimizer is not None
    found = sum(value.nbytes for moment in (state.optimizer.m, state.optimizer.v) for value in moment.values())
    return found, 8 * count_parameters(what.config, LORA)


def _mb(n: int) -> str:
    return f"{n / 1e6:,.1f} MB"
