"""Large bases on this machine: a LoRA step on held weights, its memory, PEFT + bitsandbytes beside it; held or wide.

Of Llama's shapes: one sequence of 256 tokens, r = 8 on q and v, blocks computed again in backward. The weights are
drawn as they are held, a tensor at a time: random codes and absolute maxima as large as those of N(0, 0.02). No
matrix of a layer is ever wide as a whole. NF4 is for the matrices of the layers, the table and an untied head stay
float32; bfloat16 is for every matrix: as `load_model` holds a file's. Then GPT-2 small's step on a held base over the
wide base's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np

import lora_np as ln
from lora_np.backend import Array, xp
from lora_np.storage import NF4, OUTER, Q4_0, Q8_0, BFloat16, Held, Matrix

from . import roofline
from .figures import Figure
from .flops import step_flops
from .measure import Side, measure
from .models import Work, work
from .options import Options
from .timing import Cases

WIDE = "float32"
PEFT = "PyTorch + PEFT, bitsandbytes' NF4"
STEP, TOKENS, PEAK, WEIGHTS, SHARE = "step", "tokens", "peak", "weights", "share of the roofline"
SPARE = 2e9  # bytes that a step and the rest of the machine need beside the weights
# What is measured of each shape, so that a run takes minutes.
WAYS: Mapping[str, Sequence[str]] = {
    "Llama-3.2-1B": ("bfloat16", "NF4", PEFT), "Llama-3.2-3B": ("bfloat16", "NF4"), "Llama-2-7B": ("NF4",),
}  # fmt: skip

_LLAMA = ln.PRESETS["smollm2-135m"]
SHAPES: Mapping[str, ln.Config] = {
    "Llama-3.2-1B": replace(
        _LLAMA, vocab_size=128256, n_layer=16, n_head=32, n_kv_head=8, d_model=2048, d_ff=8192, rope_theta=5e5
    ),
    "Llama-3.2-3B": replace(
        _LLAMA, vocab_size=128256, n_layer=28, n_head=24, n_kv_head=8, d_model=3072, d_ff=8192, rope_theta=5e5
    ),
    "Llama-2-7B": replace(
        _LLAMA, vocab_size=32000, n_layer=32, n_head=32, n_kv_head=None, d_model=4096, d_ff=11008, rope_theta=1e4,
        tie_head=False,
    ),
}  # fmt: skip
TINY: dict[str, Any] = {"vocab_size": 64, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_model": 128, "d_ff": 256}


def large_work(name: str, quick: bool) -> Work:
    """One of SHAPES, with LoRA and a batch; quick: a tiny model."""
    config = replace(SHAPES[name], **TINY) if quick else SHAPES[name]
    return Work(f"{name}'s shape", config, ln.LoRAConfig(r=8), 1, 8 if quick else 256)


def gpt2_work(quick: bool) -> Work:
    """GPT-2 small; quick: tiny, of rows that GGUF's blocks fill."""
    w = work("gpt2", quick=quick)
    return w._replace(config=replace(w.config, n_head=4, d_model=64, d_ff=64)) if quick else w


# --- Weights drawn as they are held ----------------------------------------------------------------------------------


def _bytes(rng: np.random.Generator, *shape: int) -> Array:
    return xp.asarray(rng.integers(0, 256, shape, dtype=np.uint8))


def _bfloat16(shape: tuple[int, int], rng: np.random.Generator) -> BFloat16:
    """Of either sign, from 2^-7 to 2^-5: their root mean square is 0.019."""
    return BFloat16(shape, xp.asarray(rng.integers(0, 2**16, shape, dtype=np.uint16) & 0x80FF | 0x3C00))


def _nf4(shape: tuple[int, int], rng: np.random.Generator) -> NF4:
    """Double-quantised: the absolute maxima are 0.048 on average, as of 64 numbers of N(0, 0.02), by 0.015 at most."""
    n = shape[0] * shape[1]
    outer = xp.full(-(-n // 64 // OUTER), 0.015, dtype="float32")
    return NF4(shape, 64, _bytes(rng, n // 2), _bytes(rng, n // 64), outer, xp.asarray(0.048, dtype="float32"))


def _blocks_of_32(kind: type[Q8_0] | type[Q4_0], size: int, d: float) -> Draw:
    """Blocks of `size` bytes, all of one d: which makes the root mean square of d q about 0.02."""

    def draw(shape: tuple[int, int], rng: np.random.Generator) -> Held:
        raw = _bytes(rng, shape[0], shape[1] // 32, size)
        raw[..., :2] = xp.asarray(np.array([d], np.float16).view(np.uint8))
        return kind(shape, raw.reshape(shape[0], -1))

    return draw


Draw: TypeAlias = Callable[[tuple[int, int], np.random.Generator], Held]
DRAWS: Mapping[str, Draw] = {
    "bfloat16": _bfloat16, "NF4": _nf4, "Q8_0": _blocks_of_32(Q8_0, 34, 0.02 / 74),
    "Q4_0": _blocks_of_32(Q4_0, 18, 0.02 / 4.6),
}  # fmt: skip
BITS = {WIDE: 32.0, "bfloat16": 16.0, "NF4": 4 + 8 / 64 + 32 / (64 * OUTER), "Q8_0": 8.5, "Q4_0": 4.5}  # of a number


def is_held(name: str, shape: tuple[int, ...], how: str) -> bool:
    """Whether a weight is held in fewer bits where the base is held so."""
    return how != WIDE and len(shape) == 2 and (how != "NF4" or name.startswith("layers."))


def tensors(config: ln.Config, how: str) -> Iterator[tuple[str, Matrix]]:
    """The weights by name, one at a time, the same whenever it is called. how: one of BITS."""
    rng = np.random.default_rng(0)
    for name, shape in config.weight_shapes().items():
        if is_held(name, shape, how):
            yield name, DRAWS[how]((shape[0], shape[1]), rng)
        else:
            yield from ln.init_weights(config, seed=0, names=[name]).items()


def weights_bytes(config: ln.Config, how: str) -> float:
    """What all weights of a base take; NF4's offsets, 4 bytes a matrix, are left out."""
    return sum(
        float(np.prod(shape)) * BITS[how if is_held(name, shape, how) else WIDE] / 8
        for name, shape in config.weight_shapes().items()
    )


# --- What is measured ------------------------------------------------------------------------------------------------


def ours(shape: str, how: str, quick: bool) -> Cases:
    """A LoRA step on a large base that is held so; what it gives is the loss."""
    w = large_work(shape, quick)
    model = ln.Model(w.config, dict(tensors(w.config, how)))
    adapter, batch = w.adapter(model), w.batch()
    return {STEP: lambda: ln.sharded_loss_and_grads(model, adapter, *batch, recompute=True)[0]}


def gpt2(how: str, quick: bool) -> Cases:
    """GPT-2 small's LoRA step on a base that is held so."""
    w = gpt2_work(quick)
    model = ln.Model(w.config, dict(tensors(w.config, how)))
    adapter, batch = w.adapter(model), w.batch()
    return {STEP: lambda: ln.sharded_loss_and_grads(model, adapter, *batch)[0]}


def fits(config: ln.Config, how: str) -> bool:
    """Whether this machine's memory holds such a base, with room for a step."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return weights_bytes(config, how) + SPARE < memory


def figures(o: Options) -> Iterator[Figure]:
    """What fits where, a row for each way to hold each shape; then GPT-2 small, held over wide."""
    roof = roofline.best_products(roofline.figures("large", measure(roofline.sides(o.quick), o), o.quick))
    yield roof
    for shape in SHAPES:
        yield from _of_shape(shape, roof, o)
    yield from _of_gpt2(o)


def _of_shape(shape: str, roof: Figure, o: Options) -> Iterator[Figure]:
    """A shape's weights, held in each way; and, where the machine holds them, the step's time and its process's peak.

    One round, each side alone: what another kept resident would leave this one less room.
    """
    w = large_work(shape, o.quick)
    losses: dict[str, float] = {}
    for how in (WIDE, "bfloat16", "NF4"):
        yield Figure("large", w.case, f"{how}, {WEIGHTS}", "B", [weights_bytes(w.config, how)])
    given = {"shape": shape, "quick": o.quick}
    ways = [how for how in WAYS[shape] if how != PEFT and fits(w.config, how)]
    sides = [Side(how, "bench.large:ours", {**given, "how": how}) for how in ways]
    sides += [Side(PEFT, "bench.bitsandbytes_side:step", given)] if PEFT in WAYS[shape] and not o.alone else []
    for side in sides:
        for cases in measure([side], o._replace(rounds=1)).values():
            timing = cases[STEP]
            step = Figure("large", w.case, f"{side.name}, {STEP}", "s", timing.seconds)
            speed = step.rate(step_flops(w.config, w.N, w.T, w.lora) / 1e9, f"{side.name}, products", "GFLOP/s")
            yield step
            yield step.rate(w.N * w.T, f"{side.name}, {TOKENS}", "tokens/s")
            yield Figure("large", w.case, f"{side.name}, {PEAK}", "B", [timing.peak])
            yield speed._replace(what=f"{side.name}, {SHARE}", unit="share", values=[speed.median / roof.median])
            losses[side.name] = timing.value
    if PEFT in losses and abs(losses[PEFT] - losses["NF4"]) > 1e-4 * losses["NF4"]:
        raise ValueError(f"large: {w.case}: the sides differ: loss {losses['NF4']} here, {losses[PEFT]} with {PEFT}")


def _of_gpt2(o: Options) -> Iterator[Figure]:
    """Steps on a held base over those on the wide one, and the weights' bytes likewise."""
    w = gpt2_work(o.quick)
    measured = measure([Side(how, "bench.large:gpt2", {"how": how, "quick": o.quick}) for how in BITS], o)
    steps = {how: Figure("large", w.case, f"{how}, {STEP}", "s", measured[how][STEP].seconds) for how in BITS}
    held = {how: Figure("large", w.case, f"{how}, {WEIGHTS}", "B", [weights_bytes(w.config, how)]) for how in BITS}
    for found in (steps, held):
        yield from found.values()
        yield from (found[how].over(found[WIDE]) for how in DRAWS)
