"""lora-np vectors, conform: is another implementation right?"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from ..formats.files.atomic import expect_new
from ..formats.files.messages import shown
from ..formats.files.safetensors_file import import_safetensors
from ..vectors.adapter_files import FILES
from ..vectors.adapter_results import Refused, judge_files, judge_refusals
from ..vectors.cases import VERSIONS, all_cases
from ..vectors.conform import Found, Verdict, compare
from ..vectors.files import made, read_vectors, write_vectors
from ..vectors.narrow import narrowed
from ..vectors.precision import FLOAT32, PRECISIONS
from ..vectors.refusals import REFUSALS
from .base import AddCommand
from .output import emit, table

SHOWN = 8  # cases, or tensors, that are named


def run_vectors(args: argparse.Namespace) -> int:
    expect_new(args.out)
    import_safetensors()
    vectors = made(version=args.version, precision=args.precision)
    write_vectors(args.out, vectors)
    ids = len({case.id for case, _ in vectors.cases})
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    result = {
        "out": str(args.out), "version": vectors.version, "precision": vectors.precision, "cases": len(vectors.cases),
        "ids": ids, "bytes": size, "digest": vectors.digest,
    }  # fmt: skip
    where = "" if vectors.precision == FLOAT32.name else " in {precision}"
    line = "{out}: {version}" + where + ", {cases} cases of {ids} ids, {bytes:,} bytes, digest {digest}"
    emit(args, result, [line.format(**result)])
    return 0


def run_conform(args: argparse.Namespace) -> int:
    if not args.results.is_dir():
        raise FileNotFoundError(f"{args.results}: no such folder")
    there = {path.stem for path in args.results.glob("*.safetensors")}
    theirs = None if args.vectors is None else read_vectors(args.vectors)
    if theirs is None:
        ours = made(there, precision=args.precision or FLOAT32.name)
    else:
        if args.precision not in (None, theirs.precision):
            raise ValueError(f"{args.vectors}: expected vectors in {args.precision}, got {theirs.precision}")
        ours = made((), version=theirs.version, precision=theirs.precision)
    vectors = ours if theirs is None else theirs
    verdicts = compare(args.results, vectors, name_mistakes=vectors.digest == ours.digest)
    run = [one for one in verdicts if one.run]
    files, refused = _of_adapters(args.results)
    if not (run or files or refused):
        raise ValueError(f"{args.results}: there are no results: expected files like L2.safetensors, with tensors "
                         "like bias/out/h")  # fmt: skip
    asked = narrowed(all_cases(), vectors.precision)[0] if theirs is None else [case for case, _ in theirs.cases]
    ids = [case.id for case in asked]
    unknown = sorted(there - {*ids, FILES})
    absent = [id for id in dict.fromkeys(ids) if id not in {one.id for one in run}]
    right = sum(len(one.right) for one in run)
    holds = all(one.holds for one in [*run, *files]) and not (args.all and right < len(ids))
    holds &= refused is None or refused.holds
    lines = [*_lines([*run, *files]), *(f"not read: {shown(id)}.safetensors: there is no such id" for id in unknown)]
    lines += [f"no results: {' '.join(absent)}"] if absent else []
    lines += [] if refused is None else _of_refusals(refused)
    where = "" if vectors.precision == FLOAT32.name else f" in {vectors.precision}"
    lines.append(f"conforms{where}: {'yes' if holds else 'no'}, {right} of {len(ids)} cases")
    result = {
        "precision": vectors.precision, "holds": holds, "right": right, "cases": len(ids), "absent": absent,
        "not_read": unknown, "ids": [_as_json(one) for one in run], "files": [_as_json(one) for one in files],
        "refusals": None if refused is None else {**refused._asdict(), "holds": refused.holds},
    }  # fmt: skip
    emit(args, result, lines)
    return 0 if holds else 1


def _of_adapters(folder: Path) -> tuple[list[Verdict], Refused | None]:
    """What was made of adapters' files, if there are results of these; they are cases apart from the ids'."""
    files, refused = folder / f"{FILES}.safetensors", folder / f"{REFUSALS}.json"
    return [judge_files(files)] if files.is_file() else [], judge_refusals(refused) if refused.is_file() else None


def _of_refusals(found: Refused) -> list[str]:
    total = len(found.refused) + len(found.accepted) + len(found.missing)
    lines = [f"refusals: {len(found.refused)} of {total} refused"]
    for what, names in (("accepted", found.accepted), ("missing", found.missing), ("not read", found.unread)):
        lines += [f"refusals: {what}: {' '.join(map(shown, names[:SHOWN]))}"] if names else []
        lines += [f"refusals: {what}: and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return lines


def _lines(run: list[Verdict]) -> list[str]:
    """The table, and what is wrong, missing or not read."""
    columns = ["id", "cases", "passed", "failed", "missing", "worst error / bound", "in"]
    return [*table([columns, *map(_row, run)]), *(line for one in run for line in _reasons(one))]


def _row(one: Verdict) -> list[str]:
    counts = [len(one.found), len(one.right), len(one.failed), len(one.missing)]
    where = f"{one.worst.case.name}/{one.worst.worst}" if one.worst.worst else "-"
    return [one.id, *map(str, counts), f"{one.worst.ratio:.2g}", where]


def _reasons(one: Verdict) -> list[str]:
    """What there is to say about an id that does not pass."""
    lines = [f"{one.id} {found.case.name}: {_reason(found)}" for found in one.found if found.failed or found.missing]
    lines = lines[:SHOWN] + ([f"{one.id}: and {len(lines) - SHOWN} cases more"] if len(lines) > SHOWN else [])
    if not one.right:
        lines.append(f"{one.id}: no case of it is there whole, and right")
    if one.unread:
        more = f" and {len(one.unread) - SHOWN} more" if len(one.unread) > SHOWN else ""
        lines.append(f"{one.id}: not read, as no case asks for it: {' '.join(map(shown, one.unread[:SHOWN]))}{more}")
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
    return {
        "id": one.id, "holds": one.holds, "passed": one.passed, "looks_like": one.looks_like and one.looks_like[0],
        "not_read": one.unread, "cases": cases,
    }  # fmt: skip


def add_commands(command: AddCommand) -> None:
    """The commands of this file, and their arguments."""
    p = command("vectors", run_vectors, "test vectors for any implementation of LoRA, in any language")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder, which must not be there yet")
    p.add_argument("--version", choices=VERSIONS, default=VERSIONS[-1], help="of the cases (default: %(default)s)")
    p.add_argument("--precision", choices=PRECISIONS, default=FLOAT32.name,
                   help="what they are for: its inputs, and its bounds (default: %(default)s)")  # fmt: skip

    p = command("conform", run_conform, "what another implementation computed, beside the vectors")
    p.add_argument(
        "results",
        type=Path,
        metavar="RESULTS_DIR",
        help="a folder of files like L2.safetensors; of adapters, files.safetensors and refusals.json",
    )
    p.add_argument("--vectors", type=Path, metavar="DIR", help="the vectors (default: made here and now)")
    p.add_argument("--precision", choices=PRECISIONS,
                   help="of vectors that are made here and now (default: float32)")  # fmt: skip
    p.add_argument("--all", action="store_true", help="every case must be there: what is missing is wrong")
