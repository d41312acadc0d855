"""lora-np vectors, conform: is another implementation right?"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from ..formats.files.atomic import refuse_existing
from ..formats.files.safe import shown
from ..vectors.cases import all_cases
from ..vectors.conform import Found, Verdict, compare
from ..vectors.files import made, read_vectors, write_vectors
from .base import AddCommand
from .output import emit, table

SHOWN = 8  # cases that are named


def run_vectors(args: argparse.Namespace) -> int:
    refuse_existing(args.out)
    vectors = made()
    write_vectors(args.out, vectors)
    ids = len({case.id for case, _ in vectors.cases})
    size = sum(path.stat().st_size for path in args.out.iterdir())
    result = {"out": str(args.out), "cases": len(vectors.cases), "ids": ids, "bytes": size, "digest": vectors.digest}
    emit(args, result, ["{out}: {cases} cases of {ids} ids, {bytes:,} bytes, digest {digest}".format(**result)])
    return 0


def run_conform(args: argparse.Namespace) -> int:
    if not args.results.is_dir():
        raise FileNotFoundError(f"{args.results}: no such folder")
    there = {path.stem for path in args.results.glob("*.safetensors")}
    theirs = None if args.vectors is None else read_vectors(args.vectors)
    ours = made(there if theirs is None else ())
    vectors = ours if theirs is None else theirs
    verdicts = compare(args.results, vectors, name_mistakes=vectors.digest == ours.digest)
    run = [one for one in verdicts if one.run]
    if not run:
        raise ValueError(f"{args.results}: there are no results: expected files like L2.safetensors, with tensors "
                         "like bias/out/h")  # fmt: skip
    ids = [case.id for case in all_cases()] if theirs is None else [case.id for case, _ in theirs.cases]
    absent = [id for id in dict.fromkeys(ids) if id not in {one.id for one in run}]
    incomplete = bool(absent) or any(one.missing for one in run)
    holds = not any(one.failed for one in run) and not (args.all and incomplete)
    lines = [*_lines(run, absent), f"conforms: {'yes' if holds else 'no'}"]
    emit(args, {"holds": holds, "absent": absent, "ids": [_as_json(one) for one in run]}, lines)
    return 0 if holds else 1


def _lines(run: list[Verdict], absent: list[str]) -> list[str]:
    """The table, what is wrong or missing, and the ids without a result."""
    columns = ["id", "cases", "passed", "failed", "missing", "worst error / bound", "in"]
    lines = [*table([columns, *map(_row, run)]), *(line for one in run for line in _reasons(one))]
    return [*lines, f"no results: {' '.join(absent)}"] if absent else lines


def _row(one: Verdict) -> list[str]:
    passed = sum(not found.failed and not found.missing for found in one.found)
    counts = [len(one.found), passed, len(one.failed), len(one.missing)]
    where = f"{one.worst.case.name}/{one.worst.worst}" if one.worst.worst else "-"
    return [one.id, *map(str, counts), f"{one.worst.ratio:.2g}", where]


def _reasons(one: Verdict) -> list[str]:
    """What there is to say about an id that does not pass."""
    lines = [f"{one.id} {found.case.name}: {_reason(found)}" for found in one.found if found.failed or found.missing]
    lines = lines[:SHOWN] + ([f"{one.id}: and {len(lines) - SHOWN} cases more"] if len(lines) > SHOWN else [])
    if one.looks_like is not None:
        text, count = one.looks_like
        lines.append(f"{one.id} looks like this mistake: {text} ({count} of {len(one.failed)} failing cases)")
    return lines


def _reason(found: Found) -> str:
    if found.absent:
        return "missing"
    off = f"{found.ratio:.3g} times its bound off" if math.isfinite(found.ratio) else "not what it must be exactly"
    parts = [f"{found.worst} is {off}"] if found.ratio > 1 else []
    parts += [f"of another shape: {' '.join(map(shown, found.misshapen))}"] if found.misshapen else []
    parts += [f"missing: {' '.join(map(shown, found.missing))}"] if found.missing else []
    return "; ".join(parts)


def _as_json(one: Verdict) -> dict[str, Any]:
    cases = [
        {
            "name": found.case.name, "failed": found.failed, "missing": found.missing, "misshapen": found.misshapen,
            "ratio": found.ratio if math.isfinite(found.ratio) else None, "worst": found.worst,
        }
        for found in one.found
    ]  # fmt: skip
    return {"id": one.id, "passed": one.passed, "looks_like": one.looks_like and one.looks_like[0], "cases": cases}


def add_commands(command: AddCommand) -> None:
    """The commands of this file, and their arguments."""
    p = command("vectors", run_vectors, "test vectors for any implementation of LoRA, in any language")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder, which must not be there yet")

    p = command("conform", run_conform, "what another implementation computed, beside the vectors")
    p.add_argument("results", type=Path, metavar="RESULTS_DIR", help="a folder of files like L2.safetensors")
    p.add_argument("--vectors", type=Path, metavar="DIR", help="the vectors (default: made here and now)")
    p.add_argument("--all", action="store_true", help="every case must be there: what is missing is wrong")
