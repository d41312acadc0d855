"""Greedy decoding with a cache: tokens a second beside transformers and the memory's limit; 8 adapters in one batch.

Batch 1, float32, random weights, a prompt of 8 tokens. The limit: the bytes of weights that a token must read, at the
speed at which the machine reads. Then a batch of 8 rows with an adapter for each, beside 8 calls and beside one
adapter: decoding from a prompt of one token (T = 1), and the logits of texts of 256.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lora_np as ln

from . import roofline
from .figures import Figure
from .measure import Measured, Side, measure
from .models import Work, work
from .options import Options
from .step import OURS, in_each_precision
from .timing import Cases

PROMPT, NEW = 8, 48
ROWS, ROWS_NEW, ROWS_T = 8, 16, 256
PEER, LIMIT = "transformers", "the memory's limit"
PEERS = in_each_precision({PEER: {}})
EACH, APART, ONE = "8 rows, 8 adapters", "8 calls of one row", "8 rows, one adapter"


def ours(name: str, n: int, prompt: int, **sizes: Any) -> Cases:
    """n tokens after a prompt."""
    w = work(name, **sizes)
    model, tokens = w.model(), w.batch()[0][:1, :prompt]
    return {"greedy": lambda: ln.generate(model, tokens, n=n)[0, prompt:].tolist()}


def rows(name: str, n: int, **sizes: Any) -> Cases:
    """N rows with N adapters, the N apart, and N with one: decoding n tokens each, and logits of texts of T."""
    w = work(name, **sizes)
    model, tokens = w.model(), w.batch()[0]
    adapters = [w.trained_adapter(model, seed) for seed in range(w.N)]
    starts = tokens[:, :1]

    def decode_apart() -> None:
        for i, adapter in enumerate(adapters):
            ln.generate(model, starts[i : i + 1], adapter, n=n)

    def texts_apart() -> None:
        for i, adapter in enumerate(adapters):
            ln.forward(model, tokens[i : i + 1], adapter)

    return {
        f"decoding, {EACH}": lambda: ln.generate(model, starts, adapters, n=n),
        f"decoding, {APART}": decode_apart,
        f"decoding, {ONE}": lambda: ln.generate(model, starts, adapters[0], n=n),
        f"texts, {EACH}": lambda: ln.forward(model, tokens, adapters),
        f"texts, {APART}": texts_apart,
        f"texts, {ONE}": lambda: ln.forward(model, tokens, adapters[0]),
    }


def bytes_a_token(config: ln.Config) -> float:
    """float32 weights that decoding one token reads: all matrices and vectors, of the look-ups a row alone."""
    shapes = config.weight_shapes()
    tables = {"embed.tokens", "embed.positions", "embed.types"} - {config.head_weight}
    sizes = [shape[-1] if name in tables else shape[0] * shape[-1] for name, shape in shapes.items() if len(shape) == 2]
    return 4.0 * (sum(sizes) + sum(shape[0] for shape in shapes.values() if len(shape) == 1))


def figures(o: Options) -> Iterator[Figure]:
    """Two models beside transformers, then rows with adapters of their own."""
    for name in ("gpt2", "smollm2"):
        yield from _greedy(name, o)
    yield from _rows(o)


def greedy_case(w: Work) -> str:
    """What a table calls it."""
    return f"{w.title}, greedy, batch 1"


def rows_case(w: Work, n: int = ROWS_NEW) -> str:
    """What a table calls it."""
    return f"{w.title}, {n} tokens a row"


def _greedy(name: str, o: Options) -> Iterator[Figure]:
    w, (n, prompt) = work(name, quick=o.quick), (8, 4) if o.quick else (NEW, PROMPT)
    given = {"name": name, "quick": o.quick, "n": n, "prompt": prompt}
    sides = [Side(OURS, "bench.decode:ours", given), *roofline.sides(o.quick)]
    if not o.alone:
        sides += [Side(peer, "bench.peft_side:decode", {**given, **more}) for peer, more in PEERS.items()]
    measured = measure(sides, o)
    case = greedy_case(w)
    speeds = {
        side: Figure("decode", case, side, "s", measured[side]["greedy"].seconds).rate(n, side, "tokens/s")
        for side in (OURS, *PEERS)
        if side in measured
    }
    yield from (*speeds.values(), *measured[OURS]["greedy"].asked(speeds[OURS]))
    for peer in [side for side in speeds if side != OURS]:
        yield speeds[OURS].over(speeds[peer])
        pairs = zip(measured[OURS]["greedy"].value, measured[peer]["greedy"].value, strict=True)
        what = f"tokens that agree with {peer}"
        yield Figure("decode", case, what, "share", [sum(a == b for a, b in pairs) / n])
    yield from beside_the_limit(speeds[OURS], measured, bytes_a_token(w.config), o.quick)


def beside_the_limit(speed: Figure, measured: Measured, n_bytes: float, quick: bool) -> Iterator[Figure]:
    """How fast the machine reads, the tokens a second which that allows at so many bytes a token, and this one's share
    of them."""
    memory = roofline.best_memory(roofline.figures(speed.bench, measured, quick))._replace(case=speed.case)
    limit = memory._replace(what=LIMIT, unit="tokens/s", values=[rate * 1e9 / n_bytes for rate in memory.values])
    yield from (memory, limit, speed.over(limit, "share"))


def _rows(o: Options) -> Iterator[Figure]:
    N, T, n = (4, 8, 4) if o.quick else (ROWS, ROWS_T, ROWS_NEW)
    w: Work = work("gpt2", quick=o.quick, N=N, T=T)
    given = {"name": "gpt2", "quick": o.quick, "n": n, "N": N, "T": T}
    timings = measure([Side(OURS, "bench.decode:rows", given)], o)[OURS]
    for what, case in (("decoding", rows_case(w, n)), ("texts", w.case)):
        seconds = {
            kind: Figure("decode", case, kind, "s", timings[f"{what}, {kind}"].seconds) for kind in (EACH, APART, ONE)
        }
        for kind, figure in seconds.items():
            yield from (figure, *timings[f"{what}, {kind}"].asked(figure))
        yield seconds[APART].over(seconds[EACH])
        yield seconds[EACH].over(seconds[ONE])
