"""lora-np extract, combine: adapters made of a model's weights, and of other adapters."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..formats.merged.combined import combine_files
from ..formats.merged.extract import LeftOut, Lost, extract, total_lost
from .base import AddCommand, whole
from .output import emit, table

SHOWN = 10  # rows


def run_extract(args: argparse.Namespace) -> int:
    found = extract(args.base, args.tuned, args.rank, args.out, args.targets or ())
    lines = [
        f"{args.out}: {_total_line(found.modules)}; {found.unchanged} tensors are the base's",
        "",
        *_lost_lines(found.modules),
    ]
    if found.left_out:
        lines += ["", f"{len(found.left_out)} tensors differ and are left out:", *_left_out_lines(found.left_out)]
    result = {
        "out": str(args.out), **_as_json(found.modules), "left_out": [one._asdict() for one in found.left_out],
        "unchanged": found.unchanged,
    }  # fmt: skip
    emit(args, result, lines)
    return 0


def run_combine(args: argparse.Namespace) -> int:
    weights = args.weights or [1.0] * len(args.adapter)
    if len(weights) != len(args.adapter):
        raise ValueError(f"--weights: expected one for each --adapter, got {len(weights)} for {len(args.adapter)}")
    found = combine_files(args.adapter, weights, args.out, args.rank)
    lines = [f"{args.out}: {_total_line(found.modules)}", *(f"but {remark}" for remark in found.remarks)]
    emit(
        args,
        {"out": str(args.out), **_as_json(found.modules), "remarks": found.remarks},
        [*lines, "", *_lost_lines(found.modules)],
    )
    return 0


def _as_json(modules: Sequence[Lost]) -> dict[str, object]:
    norm, lost = total_lost(modules)
    return {"norm": norm, "lost": lost, "modules": [{**m._asdict(), "share": m.share} for m in modules]}


def _total_line(modules: Sequence[Lost]) -> str:
    norm, lost = total_lost(modules)
    return f"{len(modules)} modules; lost in all |dW - s B A| / |dW| = {lost / norm if norm else 0.0:.3g}"


def _lost_lines(modules: Sequence[Lost]) -> list[str]:
    """The modules that lose most."""
    rows = [["module", "shape", "rank", "|dW|", "lost"]]
    for m in sorted(modules, key=lambda m: -m.share)[:SHOWN]:
        rows.append([m.name, f"{m.n_out} x {m.n_in}", str(m.rank), f"{m.norm:.4g}", f"{m.share:.3g}"])
    more = [f"and {len(modules) - SHOWN} more, which lose less"] if len(modules) > SHOWN else []
    return [*table(rows), *more]


def _left_out_lines(left_out: Sequence[LeftOut]) -> list[str]:
    """The tensors that are left out, those that changed most first."""
    rows = [["tensor", "|dW|", "|dW|/|W0|", "why"]]
    for one in sorted(left_out, key=lambda one: -(one.norm or 0.0))[:SHOWN]:
        ratio = f"{one.norm / one.norm_W0:.3g}" if one.norm is not None and one.norm_W0 else "-"
        rows.append([one.name, "-" if one.norm is None else f"{one.norm:.4g}", ratio, one.reason])
    return [*table(rows), *([f"and {len(left_out) - SHOWN} more"] if len(left_out) > SHOWN else [])]


def add_commands(command: AddCommand) -> None:
    """The commands of this file, and their arguments."""
    p = command("extract", run_extract, "the nearest LoRA of a rank to what a training of all weights changed")
    p.add_argument("--base", type=Path, required=True, metavar="DIR", help="the model before: its folder")
    p.add_argument("--tuned", type=Path, required=True, metavar="DIR", help="the model after: its folder")
    p.add_argument("--rank", type=whole, required=True, metavar="R", help="of each module, at most")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="the adapter: a new folder of PEFT's")
    p.add_argument(
        "--targets", nargs="+", metavar="NAME",
        help="what the names of the modules end in that are adapted (default: all linears that differ)",
    )  # fmt: skip

    p = command("combine", run_combine, "a weighted sum of adapters as one adapter, exactly or of a given rank")
    p.add_argument(
        "--adapter", type=Path, required=True, action="append", metavar="DIR", help="an adapter; may be repeated"
    )
    p.add_argument("--weights", type=float, nargs="+", metavar="W", help="of each adapter's update (default: 1)")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="the adapter: a new folder of PEFT's")
    p.add_argument(
        "--rank", type=whole, metavar="R", help="the nearest of this rank, by SVD (default: the ranks' sum, exact)"
    )
