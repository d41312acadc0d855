"""The tables in bench/README.md, each written from a run: one on a CPU, with what it was to reach, and one on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from . import decode, held, large, load, merge, peers, step, switch
from .counting import FETCHED, LAUNCHES, SENT
from .figures import Run, shown
from .models import work
from .roofline import EACH_CORE

BEGIN, END = "<!-- written by python -m bench table -->", "<!-- end of what it wrote -->"
GPU_BEGIN, GPU_END = "<!-- written by python -m bench table, on a GPU -->", "<!-- end of what it wrote on a GPU -->"
GPT2, MINILM, SMOLLM2 = work("gpt2"), work("minilm"), work("smollm2")
LONG = [step.long_work(name, T).case for name, T in step.LONG]


class Group(NamedTuple):
    """Lines of the table on one piece of work: where its figures are, and pairs (ours, what it is beside, the aim)."""

    work: str
    bench: str
    case: str
    pairs: Sequence[tuple[str, str, str]]


def _groups() -> list[Group]:
    """The lines in their order."""
    roof, kept = f"products, {EACH_CORE}", "the optimizer's"
    return [
        Group(
            f"LoRA step, {GPT2.case}", "step", GPT2.case,
            [
                (step.LORA, step.EAGER, "1.4x"), (step.LORA, step.COMPILED, "1.22x"), (step.LORA, step.JAX, ""),
                (step.PRODUCTS, roof, "85 %"),
            ],
        ),
        Group(
            "peak memory of its process", "memory", GPT2.case,
            [(step.LORA, step.EAGER, "at most 0.28x"), (step.LORA, step.COMPILED, ""), (step.LORA, step.JAX, "")],
        ),
        Group("that step, with activation checkpointing", "step", GPT2.case, [(step.RECOMPUTED, step.LORA, "")]),
        Group("its peak memory", "memory", GPT2.case, [(step.RECOMPUTED, step.LORA, "")]),
        Group(f"LoRA step, {MINILM.case}", "step", MINILM.case, [(step.LORA, step.EAGER, "1.2x")]),
        Group(
            f"LoRA step, {SMOLLM2.case}", "step", SMOLLM2.case,
            [(step.LORA, step.EAGER, "1.4x"), (step.LORA, step.JAX, "")],
        ),
        *(
            Group(what, bench, case, [(step.LORA, step.EAGER, aim)])
            for case in LONG
            for what, bench, aim in (
                (f"LoRA step, {case}", "step", "1.4x"), ("its peak memory", "memory", "at most 0.45x"),
            )
        ),
        Group(
            f"LoRA beside full fine-tuning, {GPT2.title}", "step", GPT2.case,
            [(step.LORA, step.FULL, "1.5x"), (step.LORA_ADAMW, step.FULL_ADAMW, "")],
        ),
        Group(
            "their peak memory, and the optimizer's part", "memory", GPT2.case,
            [(step.LORA, step.FULL, "at most 0.40x"), (f"{step.LORA}, {kept}", f"{step.FULL}, {kept}", "")],
        ),
        *(
            Group(case, "decode", case, [(step.OURS, decode.PEER, aim), (step.OURS, decode.LIMIT, "")])
            for case, aim in ((decode.greedy_case(GPT2), "1.3x"), (decode.greedy_case(SMOLLM2), "1.5x"))
        ),
        *(
            Group(case, "held", case, [(step.OURS, held.PEER, ""), (step.OURS, decode.LIMIT, "")])
            for case in (held.case(SMOLLM2, kind) for kind in held.KINDS)
        ),
        *(
            Group(
                f"inference: {what}, {case}", "merge", case,
                [(merge.MERGED, merge.BASE, "1.00x"), (merge.UNMERGED, merge.BASE, aim)],
            )
            for what, case, aim in (
                ("logits", GPT2.case, "at most 1.15x"), ("decoding", merge.decoding_case(GPT2), ""),
            )
        ),
        Group(
            f"to another adapter, {switch.case(SMOLLM2)}", "switch", switch.case(SMOLLM2),
            [(switch.SWITCH, switch.THEIRS, "faster"), (switch.ANOTHER, switch.SAME, "1.00x")],
        ),
        *(
            Group(
                f"{what}, {case}", "decode", case,
                [(decode.EACH, decode.APART, aim), (decode.EACH, decode.ONE, "at most 1.15x")],
            )
            for what, case, aim in (
                ("decoding", decode.rows_case(GPT2), "2.2x"),
                ("logits", GPT2._replace(N=decode.ROWS, T=decode.ROWS_T).case, "1.00x"),
            )
        ),
        *(
            Group(
                load.case(base), "load", load.case(base),
                [
                    (f"{step.OURS}: {load.PEAK}", f"{step.OURS}: {load.KEPT}", "at most 1.10x"),
                    (f"{step.OURS}: {load.PEAK}", f"{load.PEER}: {load.PEAK}", ""),
                    (step.OURS, load.PEER, ""),
                ],
            )
            for base in load.BASES
        ),
        *(
            Group(
                f"{what}, {GPT2.case}", "large", GPT2.case,
                [(f"{how}, {figure}", f"{large.WIDE}, {figure}", aim) for how, aim in aims.items()],
            )
            for what, figure, aims in (
                (
                    "LoRA step on a held base", large.STEP,
                    {"bfloat16": "at most 1.15x"} | dict.fromkeys(("NF4", "Q8_0", "Q4_0"), "at most 1.35x"),
                ),
                ("memory of its weights", large.WEIGHTS, {"bfloat16": "0.50x", "NF4": "", "Q8_0": "", "Q4_0": ""}),
            )
        ),
        Group("import", "peers", "import", [(step.OURS, peers.TORCH_PEFT, "20x")]),
        Group("installed with what it requires", "peers", "installed size", [(step.OURS, peers.TORCH_PEFT, "10x")]),
    ]  # fmt: skip


def _gpu_groups() -> list[Group]:
    """The lines on a GPU; their last cell is not an aim, but what our side asks of it."""
    ways = step.in_each_precision({step.EAGER: {}, step.COMPILED: {}}, "cupy")
    peers = step.in_each_precision({decode.PEER: {}}, "cupy")
    roof = f"products, {EACH_CORE}"
    whole = Group(f"LoRA beside full fine-tuning, {GPT2.title}", "step", GPT2.case, [(step.LORA, step.FULL, "")])
    trained = Group("with AdamW", "step", GPT2.case, [(step.LORA_ADAMW, step.FULL_ADAMW, "")])
    return [
        *(
            Group(f"LoRA step, {w.case}", "step", w.case, [(step.LORA, way, "") for way in ways])
            for w in (GPT2, MINILM, SMOLLM2)
        ),
        Group("its products", "step", GPT2.case, [(step.PRODUCTS, roof, "")]),
        whole,
        trained,
        Group(
            "the device's peak memory, with AdamW", "memory", GPT2.case,
            [(step.LORA, beside, "") for beside in (*ways, step.FULL)],
        ),
        *(
            Group(case, "decode", case, [(step.OURS, beside, "") for beside in (*peers, decode.LIMIT)])
            for case in map(decode.greedy_case, (GPT2, SMOLLM2))
        ),
        Group(
            f"decoding, {decode.rows_case(GPT2)}", "decode", decode.rows_case(GPT2),
            [(decode.EACH, decode.APART, ""), (decode.EACH, decode.ONE, "")],
        ),
    ]  # fmt: skip


def table(run: Run) -> str:
    """The table in Markdown: a line for each pair of which both were measured; then the machine and the date.

    On a GPU the primitives follow. A ValueError if there is no such pair.
    """
    gpu = on_gpu(run)
    last = "launches and copies here" if gpu else "aim"
    lines = [f"| work | here | beside | ratio (least to most) | {last} |", "| --- | --- | --- | --- | --- |"]
    for group in _gpu_groups() if gpu else _groups():
        label = group.work
        for ours, beside, aim in group.pairs:
            cells = _cells(run, group, ours, beside)
            if cells is not None:
                asked = _asked(run, group, ours) if gpu and label else aim
                lines.append(f"| {label} | {cells} | {asked} |")
                label = ""
    if len(lines) == 2:
        raise ValueError("expected a run with some pair of the table's figures, got none")
    return "\n".join([*lines, "", *(_primitives(run) if gpu else _large(run)), machine(run)])


def _large(run: Run) -> list[str]:
    """The lines of a table of large bases, if they were measured: what fits where."""
    lines = [
        "| base | held in | weights | peak memory of its process | a step | speed | share of the roofline |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for shape in large.SHAPES:
        case = large.large_work(shape, quick=False).case
        for how in (large.WIDE, "bfloat16", "NF4", large.PEFT):
            whats = (large.WEIGHTS, large.PEAK, large.STEP, large.TOKENS, large.SHARE)
            found = [run.find("large", case, f"{how}, {what}") for what in whats]
            if any(found):
                cells = ["" if f is None else shown(f.median, f.unit) for f in found]
                lines.append(f"| {' | '.join([case, how, *cells])} |")
    return [*lines, ""] if len(lines) > 2 else []


def on_gpu(run: Run) -> bool:
    """Whether it was one through CuPy."""
    return run.environment.get("backend") == "cupy"


def _asked(run: Run, group: Group, ours: str) -> str:
    """What a call of ours asks of the GPU."""
    found = {what: run.find(group.bench, group.case, f"{ours}, {what}") for what in (LAUNCHES, SENT, FETCHED)}
    return ", ".join(f"{what} {figure.median:,.0f}" for what, figure in found.items() if figure is not None)


_OF_A_PRIMITIVE = ("time", f"time, {LAUNCHES}", "share of the roofline")


def _primitives(run: Run) -> list[str]:
    """The lines of a table of them, if they were measured."""
    whats = {what: {f.case: f for f in run.of("ops") if f.what == what} for what in _OF_A_PRIMITIVE}
    if not whats["time"]:
        return []
    lines = ["| primitive | time | launches | share of the roofline |", "| --- | --- | --- | --- |"]
    for case in whats["time"]:
        cells = [shown(found[case].median, found[case].unit) if case in found else "" for found in whats.values()]
        lines.append(f"| {' | '.join([case, *cells])} |")
    return [*lines, ""]


def _cells(run: Run, group: Group, *names: str) -> str | None:
    """The two figures of a line and their ratio; None if one of them was not measured."""
    found = [run.find(group.bench, group.case, name) for name in names]
    ratio = run.ratio(group.bench, group.case, *names)
    if ratio is None or None in found:
        return None
    values = [f"{f.what}, {shown(f.median, f.unit)}" for f in found if f is not None]
    spread = f" ({shown(ratio.least, ratio.unit)} to {shown(ratio.most, ratio.unit)})" if len(ratio.values) > 1 else ""
    return " | ".join([*values, shown(ratio.median, ratio.unit) + spread])


def machine(run: Run) -> str:
    """A sentence of what the figures depend on."""
    found = dict(run.environment)
    versions = [
        f"{name} {found[name]}" for name in ("python", "numpy", "torch", "peft", "transformers", "jax") if name in found
    ]
    rounds = max((len(figure.values) for figure in run.figures), default=0)
    parts = [
        f"{found.get('date')}, {found.get('processor')}, {found.get('cores')} cores, {found.get('memory')}",
        f"{found['device']}, CUDA {found.get('cuda')}, cupy {found.get('cupy')}" if "device" in found else "",
        f"{found.get('blas')}, kernel {found.get('kernel')}" if "blas" in found else "",
        ", ".join(versions),
        f"medians of {rounds} rounds",
    ]
    return "Measured on " + "; ".join(filter(None, parts)) + "."


def write(path: Path, run: Run) -> None:
    """Puts the table between its two marks in the file; a ValueError if they are not there, or the run was quick."""
    if "sizes" in run.environment:
        raise ValueError(f"expected a run of the real sizes, got one of {run.environment['sizes']} ones")
    first, last = (GPU_BEGIN, GPU_END) if on_gpu(run) else (BEGIN, END)
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not (begin and end):
        raise ValueError(f"{path}: expected the lines {first} and {last}, between which the table goes")
    path.write_text(f"{before}{begin}\n\n{table(run)}\n\n{end}{after}", encoding="utf-8")
