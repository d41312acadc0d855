"""A merged model goes over to another adapter: unmerge and merge, here and with PEFT; unmerged, it is an argument."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle
from typing import Any

import lora_np as ln

from .figures import Figure
from .measure import Side, measure
from .models import Work, work
from .options import Options
from .step import EAGER, OURS
from .timing import Cases

SWITCH, THEIRS = f"{OURS}: unmerge, merge", f"{EAGER}: unmerge, set_adapter, merge"
SAME, ANOTHER = "unmerged: logits of a token, the same adapter", "unmerged: logits of a token, another adapter"


def ours(name: str, **sizes: Any) -> Cases:
    """From one adapter to the other and back; the logits of one token with the same adapter again, and with another."""
    w = work(name, **sizes)
    model = w.model()
    adapters = [w.trained_adapter(model, seed) for seed in (0, 1)]
    turns, token = cycle(adapters), w.batch()[0][:1, :1]
    merged = ln.merge(model, adapters[1])

    def switch() -> None:
        nonlocal merged
        assert merged.merged_adapter is not None
        old, new = merged.merged_adapter, adapters[merged.merged_adapter is adapters[0]]
        merged = ln.merge(ln.unmerge(merged, old), new)

    def another() -> None:
        ln.forward(model, token, next(turns))

    return {"switch": switch, "same": lambda: ln.forward(model, token, adapters[0]), "another": another}


def case(w: Work) -> str:
    """What a table calls it."""
    return f"{w.title}, r={w.lora.r}"


def figures(o: Options) -> Iterator[Figure]:
    """SmolLM2-135M, whose adapter is the same file on both sides."""
    w, given = work("smollm2", quick=o.quick), {"name": "smollm2", "quick": o.quick}
    sides = [Side(OURS, "bench.switch:ours", given)]
    if not o.alone:
        sides.append(Side(EAGER, "bench.peft_side:switch", given))
    measured = measure(sides, o)
    mine, same, another = (
        Figure("switch", case(w), what, "s", measured[OURS][name].seconds)
        for name, what in (
            ("switch", SWITCH),
            ("same", SAME),
            ("another", ANOTHER),
        )
    )
    yield mine
    if EAGER in measured:
        theirs = Figure("switch", case(w), THEIRS, "s", measured[EAGER]["switch"].seconds)
        yield from (theirs, theirs.over(mine))
    yield from (same, another, another.over(same))
