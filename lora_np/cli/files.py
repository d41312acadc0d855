"""lora-np merge, inspect: what can be done with files of adapters."""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import adapter as adapters
from ..formats.adapters import load_adapter
from ..formats.folder import save_model
from ..formats.survey import survey
from .base import AddCommand, add_base, base_model
from .output import Bar, emit, table


def run_merge(args: argparse.Namespace) -> int:
    with Bar() as bar:
        model = base_model(args, bar)
    save_model(args.out, adapters.merge(model, load_adapter(args.adapter, model)))
    emit(args, {"out": str(args.out)}, f"the merged model is in {args.out}")
    return 0


def run_inspect(args: argparse.Namespace) -> int:
    found = survey(args.adapter)
    untrained = all(module.norm_B == 0 for module in found.modules)
    rows = [["module", "shape", "rank", "s", "|A|", "|B|", "|s B A|"]]
    for m in found.modules:
        norms = (f"{size:.4g}" for size in (m.norm_A, m.norm_B, m.norm_update))
        rows.append([m.name, f"{m.n_out} x {m.n_in}", str(m.rank), f"{m.scale:g}", *norms])
    config = {key: found.config.get(key) for key in ("target_modules", "r", "lora_alpha", "lora_dropout", "bias")}
    lines = [
        ", ".join(f"{key} {value}" for key, value in config.items()),
        "B is zero throughout: this adapter is not trained" if untrained else "B is not zero: this adapter is trained",
        *([f"trained whole: {', '.join(found.whole)}"] if found.whole else []),
    ]
    result = {**config, "B_is_zero": untrained, "whole": found.whole, "modules": [m._asdict() for m in found.modules]}
    emit(args, result, "\n".join([*lines, "", table(rows)]))
    return 0


def add_commands(command: AddCommand) -> None:
    """The commands of this file, and their arguments."""
    p = command("merge", run_merge, "base and adapter as one model, with no latency added")
    add_base(p)
    p.add_argument("--adapter", type=Path, required=True, metavar="PATH", help="the adapter")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder for the merged model")

    p = command("inspect", run_inspect, "what is in an adapter: targets, ranks, norms, is B still zero")
    p.add_argument("adapter", type=Path, metavar="DIR", help="the adapter's folder")
