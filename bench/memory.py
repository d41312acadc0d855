"""The most memory that a whole process holds in training, each in one of its own; the optimizer's bytes; against B.

Two steps and more with AdamW: LoRA here, every weight here, PyTorch + PEFT eager and compiled, JAX; one long sequence,
here and in PyTorch + PEFT. Then the peak of a LoRA step against the batch: it holds the shards in flight, one a thread,
and does not grow with the batch. On a GPU, where there is one shard, it is the device's memory (see bench.device), and
grows; what a step asks for stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .figures import Figure
from .measure import Side, measure
from .models import Work, work
from .options import Options
from .step import FULL, LONG, LORA, OURS, RECOMPUTED, Training, eager, long_work, peers
from .timing import Cases

BATCHES, T = (2, 4, 8, 16, 32), 128


def ours(name: str, kind: str, **sizes: Any) -> Cases:
    """A step of training; what it gives is the optimizer's bytes."""
    w = work(name, **sizes)
    training = Training(w, w.model(), full=kind == FULL, recompute=kind == RECOMPUTED)

    def run() -> int:
        training.step()
        return training.optimizer_bytes()

    return {"step": run}


def figures(o: Options) -> Iterator[Figure]:
    """Peaks of GPT-2 small, beside the peers and full fine-tuning; of one long sequence; and against the batch."""
    w = work("gpt2", quick=o.quick)
    given = {"name": "gpt2", "quick": o.quick}
    sides = [Side(kind, "bench.memory:ours", {**given, "kind": kind}) for kind in (LORA, RECOMPUTED, FULL)]
    sides += peers("gpt2", o, optimizer=True)
    peaks: dict[str, Figure] = {}
    kept: list[Figure] = []
    asked: list[Figure] = []
    for side in sides:
        for timing in _alone(side, o):
            peaks[side.name] = Figure("memory", w.case, side.name, "B", [timing.peak])
            asked += timing.asked(peaks[side.name])
            if side.name in (LORA, FULL):
                kept.append(Figure("memory", w.case, f"{side.name}, the optimizer's", "B", [timing.value]))
    yield from (*peaks.values(), *kept, *asked)
    yield from (peaks[LORA].over(peak) for kind, peak in peaks.items() if kind not in (LORA, RECOMPUTED))
    yield peaks[RECOMPUTED].over(peaks[LORA])
    yield kept[0].over(kept[1])
    for name, T in LONG:
        yield from _long(name, long_work(name, T, quick=o.quick), o)
    yield from _against_batch(o)


def _alone(side: Side, o: Options) -> list[Any]:
    """The timing of its step, measured with no other process beside it; none where its packages are missing."""
    return [cases["step"] for cases in measure([side], o._replace(rounds=1)).values()]


def _long(name: str, w: Work, o: Options) -> Iterator[Figure]:
    """The peaks of a step with one long sequence."""
    sizes = {"N": w.N, "T": w.T}
    sides = [Side(LORA, "bench.memory:ours", {"name": name, "quick": o.quick, "kind": LORA, **sizes})]
    sides += [] if o.alone else [eager(name, o, optimizer=True, **sizes)]
    peaks = [Figure("memory", w.case, side.name, "B", [t.peak]) for side in sides for t in _alone(side, o)]
    yield from peaks
    yield from (peaks[0].over(peak) for peak in peaks[1:])


def _against_batch(o: Options) -> Iterator[Figure]:
    """The peak of a LoRA step for growing batches."""
    length, batches = (20, BATCHES[:3]) if o.quick else (T, BATCHES)
    given = {"name": "gpt2", "quick": o.quick, "T": length}
    sides = [Side(OURS, "bench.memory:ours", {**given, "kind": LORA, "N": N}) for N in batches]
    if not o.alone:  # not the largest batches: its peak grows with them
        sides += [eager("gpt2", o, N=N, T=length, optimizer=True) for N in batches[:3]]
    for side in sides:
        for timing in _alone(side, o):
            case = f"against the batch, T={length}, {side.name}"
            peak = Figure("memory", case, f"N={side.arguments['N']}", "B", [timing.peak])
            yield from (peak, *timing.asked(peak))
