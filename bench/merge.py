"""A merged model beside its base: inference must cost the same; what an unmerged adapter costs; merging itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lora_np as ln

from .figures import Figure
from .measure import Side, measure
from .models import Work, work
from .options import Options
from .step import OURS
from .timing import Cases

NEW = 16
BASE, MERGED, UNMERGED = "base", "merged", "unmerged"


def cases(name: str, n: int, **sizes: Any) -> Cases:
    """Logits of a batch, and decoding n tokens of one text: base, merged, unmerged; and merging."""
    w = work(name, **sizes)
    model, tokens = w.model(), w.batch()[0]
    adapter = w.trained_adapter(model, 0)
    merged, start = ln.merge(model, adapter), tokens[:1, :1]
    return {
        f"logits, {BASE}": lambda: ln.forward(model, tokens),
        f"logits, {MERGED}": lambda: ln.forward(merged, tokens),
        f"logits, {UNMERGED}": lambda: ln.forward(model, tokens, adapter),
        f"decoding, {BASE}": lambda: ln.generate(model, start, n=n),
        f"decoding, {MERGED}": lambda: ln.generate(merged, start, n=n),
        f"decoding, {UNMERGED}": lambda: ln.generate(model, start, adapter, n=n),
        "merging": lambda: ln.merge(model, adapter),
    }


def decoding_case(w: Work, n: int = NEW) -> str:
    """What a table calls it."""
    return f"{w.title}, {n} tokens, batch 1"


def figures(o: Options) -> Iterator[Figure]:
    """GPT-2 small: the times, and their ratios to the base's."""
    w, n = work("gpt2", quick=o.quick), 4 if o.quick else NEW
    side = Side(OURS, "bench.merge:cases", {"name": "gpt2", "quick": o.quick, "n": n})
    timings = measure([side], o)[OURS]
    for what, case in (("logits", w.case), ("decoding", decoding_case(w, n))):
        kinds = (BASE, MERGED, UNMERGED)
        seconds = {kind: Figure("merge", case, kind, "s", timings[f"{what}, {kind}"].seconds) for kind in kinds}
        yield from seconds.values()
        yield from (seconds[kind].over(seconds[BASE]) for kind in (MERGED, UNMERGED))
    yield Figure("merge", w.title, "merging", "s", timings["merging"].seconds)
