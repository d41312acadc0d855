"""lora-np merge, inspect: what can be done with files of adapters."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..formats.files.atomic import expect_new
from ..formats.files.messages import shown
from ..formats.merged.any_base import open_any_base
from ..formats.merged.beside import beside
from ..formats.merged.dora_evidence import scalings
from ..formats.merged.folder import merge_folder
from ..formats.merged.gguf import merge_gguf
from ..formats.merged.norms import base_norms
from ..formats.merged.plan import plan_merge
from ..formats.merged.survey import Module, Survey, survey
from .base import AddCommand, add_base, base_path, fitting
from .output import Bar, emit, table

SHOWN = 5  # names in one line


def run_merge(args: argparse.Namespace) -> int:
    weights = args.weights or [1.0] * len(args.adapter)
    if len(weights) != len(args.adapter):
        raise ValueError(f"--weights: expected one for each --adapter, got {len(weights)} for {len(args.adapter)}")
    expect_new(args.out)
    with Bar() as bar:
        base = base_path(args, bar)
    if base.suffix.lower() == ".gguf":
        merged = merge_gguf(base, args.adapter, weights, args.out)
        line = f"the merged model is {args.out}: {merged.made} tensors are new, {merged.kept} are the base's bytes"
        emit(args, {"out": str(args.out), **merged._asdict()}, [line])
        return 0
    with fitting(args, *args.adapter):
        done = merge_folder(base, args.adapter, weights, args.out)
    lines = [
        f"the merged model is in {args.out}: {done.made} tensors are new, {done.kept} are the base's bytes",
        *(f"left out, as it has the weights of the base: {name}" for name in done.left_out),
        *(f"from the adapter's folder: {name}" for name in done.taken),
        *(f"but {remark}" for remark in done.remarks),
    ]
    emit(args, {"out": str(args.out), **done._asdict()}, lines)
    return 0


def run_inspect(args: argparse.Namespace) -> int:
    if args.other is not None:
        if args.base is not None:
            raise ValueError("--base: expected one adapter beside it, got two")
        return _run_beside(args)
    is_folder = args.base is not None and args.base.is_dir()
    found = survey(args.adapter, open_any_base(args.base) if is_folder else None)
    untrained = all(module.norm_B == 0 for module in found.modules)
    bases = None if args.base is None else base_norms(args.base, args.adapter, found.modules)
    columns = ["module", "shape", "rank", "effective", "first", "90 %", "99 %", "s", "|A|", "|B|", "|s B A|"]
    rows = [columns if bases is None else [*columns, "|W0|", "|s B A|/|W0|"]]
    modules = [
        module._asdict() | {"carry_90": module.carrying(0.9), "carry_99": module.carrying(0.99)}
        for module in found.modules
    ]
    for i, m in enumerate(found.modules):
        norms = [m.norm_A, m.norm_B, m.norm_update]
        if bases is not None:
            size = bases[i]
            ratio = m.norm_update / size if size else None
            modules[i] |= {"norm_W0": size, "ratio": ratio}
            norms += [math.nan if n is None else n for n in (size, ratio)]
        shape = f"{m.experts} x {m.n_out} x {m.n_in}" if m.experts > 1 else f"{m.n_out} x {m.n_in}"
        carry = [f"{modules[i]['carry_90']}", f"{modules[i]['carry_99']}"]
        first = f"{100 * m.shares[0]:.1f} %" if m.shares else "-"
        rows.append(
            [m.name, shape, str(m.rank), f"{m.effective_rank:.2f}", first, *carry, f"{m.scale:g}"]
            + [f"{n:.4g}" for n in norms]
        )
    config = {key: found.config.get(key) for key in ("target_modules", "r", "lora_alpha", "lora_dropout", "bias")}
    has_dora = found.config.get("use_dora") is True
    plan = plan_merge(args.base, [args.adapter], [1.0]) if has_dora and is_folder else None
    ratios = None if plan is None else scalings(plan)
    dead = {"dead_layers": found.dead_layers, "dead_modules": found.dead_modules}
    lines = [
        ", ".join(f"{key} {shown(str(value))}" for key, value in config.items() if value is not None),
        _verdict(found.modules),
        *([] if all(m.is_dead for m in found.modules) else _dead_lines(found)),
        *([f"trained whole: {', '.join(found.whole)}"] if found.whole else []),
        *([_dora_line(ratios)] if has_dora else []),
        *found.remarks,
    ]
    about = [
        "effective: the rank as e to the entropy of the singular values' shares of their sum; norms: Frobenius",
        "first, 90 %, 99 %: the first direction's share of |s B A|^2, and how many directions carry so much of it",
    ]
    result = {
        **config, "B_is_zero": untrained, **dead, "whole": found.whole, "remarks": found.remarks, "modules": modules,
        "use_dora": has_dora, "m_over_c": ratios,
    }  # fmt: skip
    emit(args, result, [*lines, "", *table(rows), "", *about])
    return 0


def _dora_line(ratios: Mapping[str, tuple[float, float]] | None) -> str:
    """What is said of magnitudes; ratios: of each tensor, the least and the largest m / c, where there is a base."""
    line = "DoRA: W' = (m / c) (W0 + s B A), row by row"
    if ratios is None:
        return f"{line}; |s B A| is without m"
    least, largest = (pick(pair[i] for pair in ratios.values()) for i, pick in enumerate((min, max)))
    return f"{line}; m / c is from {least:.4g} to {largest:.4g}"


def _dead_lines(found: Survey) -> list[str]:
    zero = sum(m.zero_directions for m in found.modules if not m.is_dead)
    return [
        *([_named("layers change nothing (A, B or s is zero)", found.dead_layers)] if found.dead_layers else []),
        *([_named("modules change nothing (A, B or s is zero)", found.dead_modules)] if found.dead_modules else []),
        *([f"{zero} directions of the other modules have a row of A or a column of B that is zero"] if zero else []),
    ]


def _named(what: str, names: Sequence[str]) -> str:
    """How many there are, and the names of a few."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} {what}: {' '.join(map(shown, names[:SHOWN]))}{more}"


def _run_beside(args: argparse.Namespace) -> int:
    found = beside(args.adapter, args.other)
    rows = [["module", "ranks", "scales", "cosine", "distance", "phi", "by chance"]]
    for m in found.modules:
        numbers = ["-" if n is None else f"{n:.4g}" for n in (m.cosine, m.distance, m.phi, m.chance)]
        rows.append([m.name, "{}, {}".format(*m.ranks), "{:g}, {:g}".format(*m.scales), *numbers])
    lists = (
        (f"only in {args.adapter}", found.only_first), (f"only in {args.other}", found.only_second),
        ("modules are of other shapes", found.other_shapes),
        ("ranks differ", [m.name for m in found.modules if m.ranks[0] != m.ranks[1]]),
        ("scales differ", [m.name for m in found.modules if m.scales[0] != m.scales[1]]),
    )  # fmt: skip
    lines = [
        f"{len(found.modules)} modules of both are of the same shapes",
        *([f"names begin with {' and '.join(shown(p or 'nothing') for p in found.prefix)}"] if found.prefix else []),
        *(_named(what, names) for what, names in lists if names),
        *(f"{shown(key)}: {shown(str(a))} and {shown(str(b))}" for key, (a, b) in found.config.items()),
        *found.remarks,
    ]
    about = [
        "cosine: of the two updates; distance: |dW1 - dW2| / |dW1|; phi (A1): how much of the smaller row space of A",
        "is in the other, from 0 to 1; by chance: what random ones have",
    ]
    result = {**found._asdict(), "modules": [m._asdict() for m in found.modules]}
    emit(args, result, [*lines, "", *table(rows), "", *about])
    return 0


def _verdict(modules: Sequence[Module]) -> str:
    if all(module.norm_B == 0 for module in modules):
        return "B is zero throughout: this adapter is not trained"
    if all(0 in (module.norm_B, module.scale) for module in modules):
        return "B is not zero, but its scale is 0: it changes nothing"
    return "B is not zero: this adapter is trained"


def add_commands(command: AddCommand) -> None:
    """The commands of this file, and their arguments."""
    p = command("merge", run_merge, "base and adapter as one model, with no latency added")
    add_base(p)
    p.add_argument(
        "--adapter", type=Path, required=True, action="append", metavar="PATH", help="an adapter; may be repeated"
    )
    p.add_argument("--weights", type=float, nargs="+", metavar="W", help="of each adapter's update (default: 1)")
    p.add_argument(
        "--out", type=Path, required=True, metavar="PATH", help="the merged model: a folder, or .gguf as the base is"
    )

    p = command("inspect", run_inspect, "what is in an adapter: targets, ranks, norms, is B still zero")
    p.add_argument("adapter", type=Path, metavar="PATH", help="the adapter's folder, or its file")
    p.add_argument("other", type=Path, nargs="?", metavar="OTHER", help="another, to be compared with the first")
    p.add_argument("--base", type=Path, metavar="DIR", help="a model's folder, or a .gguf file, to compare norms with")
