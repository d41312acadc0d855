"""The README's table of figures, written from a run: what was measured, beside what, and what it was to reach."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from . import decode, merge, peers, step, switch
from .figures import Run, shown
from .models import work
from .roofline import EACH_CORE

BEGIN, END = "<!-- written by python -m bench table -->", "<!-- end of what it wrote -->"
GPT2, MINILM, SMOLLM2 = work("gpt2"), work("minilm"), work("smollm2")


class Row(NamedTuple):
    """A line: the work; the figures of it and of what it is beside, by bench, case and names; the ratio aimed at."""

    work: str
    bench: str
    case: str
    ours: str
    beside: str
    aim: str = ""


def _rows() -> list[Row]:
    rows_case = f"{GPT2.title}, {decode.ROWS_NEW} tokens a row"
    texts_case = GPT2._replace(N=decode.ROWS, T=decode.ROWS_T).case
    decoding_case = f"{GPT2.title}, {merge.NEW} tokens, batch 1"
    switch_case = f"{SMOLLM2.title}, r={SMOLLM2.lora.r}"
    roof = f"products, {EACH_CORE}"
    return [
        Row(f"LoRA step, {GPT2.case}", "step", GPT2.case, step.LORA, step.EAGER, "1.4x"),
        Row("the same", "step", GPT2.case, step.LORA, step.COMPILED, "1.22x"),
        Row("its products beside large ones", "step", GPT2.case, step.PRODUCTS, roof, "88 %"),
        Row("peak memory of its process", "memory", GPT2.case, step.LORA, step.EAGER, "at most 0.30x"),
        Row("the same", "memory", GPT2.case, step.LORA, step.COMPILED),
        Row(f"LoRA step, {MINILM.case}", "step", MINILM.case, step.LORA, step.EAGER, "1.2x"),
        Row(f"LoRA step, {SMOLLM2.case}", "step", SMOLLM2.case, step.LORA, step.EAGER, "1.35x"),
        Row("LoRA beside full fine-tuning, GPT-2 small: gradients", "step", GPT2.case, step.LORA, step.FULL, "1.5x"),
        Row("gradients and AdamW", "step", GPT2.case, step.LORA_ADAMW, step.FULL_ADAMW),
        Row("peak memory", "memory", GPT2.case, step.LORA, step.FULL, "at most 0.40x"),
        Row(
            "the optimizer's memory",
            "memory",
            GPT2.case,
            f"{step.LORA}, the optimizer's",
            f"{step.FULL}, the optimizer's",
        ),
        *(
            row
            for w, aim in ((GPT2, "1.3x"), (SMOLLM2, "1.5x"))
            for row in (
                Row(decode.greedy_case(w), "decode", decode.greedy_case(w), step.OURS, decode.PEER, aim),
                Row("the same", "decode", decode.greedy_case(w), step.OURS, decode.LIMIT, "near it"),
            )
        ),
        Row(f"logits, {GPT2.case}", "merge", GPT2.case, merge.MERGED, merge.BASE, "1.00x"),
        Row("the same", "merge", GPT2.case, merge.UNMERGED, merge.BASE),
        Row("decoding, GPT-2 small", "merge", decoding_case, merge.MERGED, merge.BASE, "1.00x"),
        Row("the same", "merge", decoding_case, merge.UNMERGED, merge.BASE),
        Row(f"to another adapter, {switch_case}", "switch", switch_case, switch.SWITCH, switch.THEIRS, "faster"),
        Row("the same", "switch", switch_case, switch.ANOTHER, switch.SAME, "1.00x"),
        Row("decoding, GPT-2 small", "decode", rows_case, decode.EACH, decode.APART, "2.2x"),
        Row("the same", "decode", rows_case, decode.EACH, decode.ONE, "at most 1.15x"),
        Row(f"logits, {texts_case}", "decode", texts_case, decode.EACH, decode.APART, "1.00x"),
        Row("the same", "decode", texts_case, decode.EACH, decode.ONE, "at most 1.15x"),
        Row("import", "peers", "import", step.OURS, peers.TORCH_PEFT, "20x"),
        Row("installed, with all that is required", "peers", "installed size", step.OURS, peers.TORCH_PEFT, "10x"),
    ]


def table(run: Run) -> str:
    """The table in Markdown: a line for each row of which both figures were measured; then the machine and the date."""
    lines = ["| work | here | beside it | ratio (least to most) | aim |", "| --- | --- | --- | --- | --- |"]
    for row in _rows():
        found = [run.find(row.bench, row.case, what) for what in (row.ours, row.beside)]
        ratio = run.ratio(row.bench, row.case, row.ours, row.beside)
        if ratio is None or None in found:
            continue
        ours, beside = (f"{f.what}: {shown(f.median, f.unit)}" for f in found if f is not None)
        spread = (
            f" ({shown(ratio.least, ratio.unit)} to {shown(ratio.most, ratio.unit)})" if len(ratio.values) > 1 else ""
        )
        lines.append(f"| {row.work} | {ours} | {beside} | {shown(ratio.median, ratio.unit)}{spread} | {row.aim} |")
    return "\n".join([*lines, "", machine(run)])


def machine(run: Run) -> str:
    """A sentence of what the figures depend on."""
    found = dict(run.environment)
    versions = [
        f"{name} {found[name]}" for name in ("python", "numpy", "torch", "peft", "transformers") if name in found
    ]
    rounds = max((len(figure.values) for figure in run.figures), default=0)
    parts = [
        f"{found.get('date')}, {found.get('processor')}, {found.get('cores')} cores, {found.get('memory')}",
        f"{found.get('blas')}, kernel {found.get('kernel')}" if "blas" in found else "",
        ", ".join(versions),
        f"medians of {rounds} rounds",
    ]
    return "Measured on " + "; ".join(filter(None, parts)) + "."


def write(path: Path, run: Run) -> None:
    """Puts the table between the two marks in the file; a ValueError if they are not there, or the run was quick."""
    if "sizes" in run.environment:
        raise ValueError(f"expected a run of the real sizes, got one of {run.environment['sizes']} ones")
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{path}: expected the lines {BEGIN} and {END}, between which the table goes")
    path.write_text(f"{before}{begin}\n\n{table(run)}\n\n{end}{after}", encoding="utf-8")
