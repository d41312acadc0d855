"""Decoding straight from weights held in fewer bits: tokens a second beside llama.cpp and the limit of their own bytes.

SmolLM2's shape with random weights, in a .gguf file that both sides read: greedy, batch 1, a prompt of 8 tokens. Here a
block of rows is widened to float32 where it is used; llama.cpp computes with the blocks' whole numbers. The limit: the
bytes of the weights as they are held, all of which a token reads, at the speed at which the machine reads.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lora_np as ln
from lora_np.formats.models.gguf import file_name
from lora_np.formats.models.gguf_file import import_gguf

from . import roofline
from .decode import NEW, PROMPT, beside_the_limit
from .figures import Figure
from .measure import Side, measure
from .models import Work, work
from .options import Options
from .step import OURS
from .timing import Cases

PEER = "llama.cpp"
# What the file's matrices are stored in, and how they are loaded here.
KINDS: dict[str, tuple[str, str | None]] = {
    "float32": ("F32", None),
    "bfloat16": ("BF16", "bfloat16"),
    "NF4": ("F32", "nf4"),
    "Q8_0": ("Q8_0", "gguf"),
    "Q4_0": ("Q4_0", "gguf"),
    "Q4_1": ("Q4_1", "gguf"),
}


def ours(path: str, tokens: list[int], n: int, storage: Any) -> Cases:
    """n tokens after a prompt; and the bytes that the weights are held in."""
    model = ln.load_model(path, storage=storage)
    return {
        "greedy": lambda: ln.generate(model, [tokens], n=n)[0, len(tokens) :].tolist(),
        "bytes": lambda: sum(W.nbytes for W in model.weights.values()),
    }


def of_work(quick: bool) -> Work:
    """SmolLM2; quick: a tiny one, whose rows fill blocks of 32 and of 64."""
    w = work("smollm2", quick=quick)
    return w._replace(config=replace(w.config, d_model=64, d_ff=64, n_head=4, n_kv_head=2)) if quick else w


def case(w: Work, kind: str) -> str:
    """What a table calls it."""
    return f"{w.title} held in {kind}, greedy, batch 1"


def write_gguf(path: Path, w: Work, stored: str) -> None:
    """The model in a .gguf file, its matrices stored so, with a vocabulary of names, which llama.cpp asks for."""
    gguf, c = import_gguf(), w.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(c.n_layer)
    writer.add_context_length(c.n_positions)
    writer.add_embedding_length(c.d_model)
    writer.add_feed_forward_length(c.d_ff)
    writer.add_head_count(c.n_head)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_layer_norm_rms_eps(c.eps)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", "\n", *(f"t{i}" for i in range(4, c.vocab_size))])
    writer.add_token_scores([0.0] * c.vocab_size)
    writer.add_token_types([3] * 4 + [1] * (c.vocab_size - 4))
    for name, value in w.weights().items():
        kind = gguf.GGMLQuantizationType[stored if value.ndim == 2 else "F32"]
        writer.add_tensor(file_name(name), gguf.quants.quantize(ln.asnumpy(value), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def figures(o: Options) -> Iterator[Figure]:
    """Each way of holding the weights, from a file in a temporary folder."""
    try:
        import_gguf()
    except ImportError as error:
        print(f"held: left out: {error}", file=sys.stderr)
        return
    for kind in KINDS:
        with TemporaryDirectory() as folder:
            yield from _kind(kind, Path(folder) / "model.gguf", o)


def _kind(kind: str, path: Path, o: Options) -> Iterator[Figure]:
    w, (n, prompt), (stored, storage) = of_work(o.quick), (8, 4) if o.quick else (NEW, PROMPT), KINDS[kind]
    write_gguf(path, w, stored)
    given = {"path": str(path), "tokens": w.batch()[0][0, :prompt].tolist(), "n": n}
    sides = [Side(OURS, "bench.held:ours", {**given, "storage": storage}), *roofline.sides(o.quick)]
    if not o.alone and storage != "nf4":  # llama.cpp has no NF4
        sides.append(Side(PEER, "bench.llama_cpp_side:decode", given))
    measured = measure(sides, o)
    speeds = {
        side: Figure("held", case(w, kind), side, "s", measured[side]["greedy"].seconds).rate(n, side, "tokens/s")
        for side in (OURS, PEER)
        if side in measured
    }
    yield from speeds.values()
    if PEER in measured:
        yield speeds[OURS].over(speeds[PEER])
    yield from beside_the_limit(speeds[OURS], measured, measured[OURS]["bytes"].value, o.quick)
