"""lora-np reproduce: the paper's claims, checked."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from ..formats.files.atomic import expect_new
from ..training.plot import check_matplotlib
from .base import AddCommand, shown_on, tokenizer_of
from .output import Bar, emit


def run_reproduce(args: argparse.Namespace) -> int:
    from ..reproduce import page, report, run  # imported here: no other command needs it

    expect_new(args.out)
    if not args.full == (args.base is not None) == (args.data is not None):
        raise ValueError("--full, --base and --data: expected all three, or none of them")
    plan = run.QUICK if args.quick else run.FULL if args.full else run.STANDARD
    began = time.perf_counter()
    real = run.labelled_study(args.base, args.data, tokenizer_of) if args.full else None
    with Bar() as bar:
        sections = list(run.sections(plan, shown_on(bar), real))
    about = {**report.environment(), "seconds": round(time.perf_counter() - began)}
    pictures = _can_draw()
    report.write(args.out, sections, about, pictures=pictures)
    lines = [page.tally(sections), *([] if pictures else [page.WITHOUT])]
    for section in sections:
        lines += ["", section.title]
        for claim in section.claims:
            lines += [f"  {claim.verdict.upper():14} {claim.claim}", f"  {'':14} {claim.figure}"]
    emit(args, report.as_data(sections, about), [*lines, "", f"the report is in {args.out / report.HTML}"])
    return 0


def _can_draw() -> bool:
    try:
        check_matplotlib()
    except ImportError:
        return False
    return True


def add_commands(command: AddCommand) -> None:
    """The command of this file, and its arguments."""
    p = command("reproduce", run_reproduce, "check the paper's claims: figures and verdicts, as a page of HTML")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder for the report, a new one")
    size = p.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a few seconds: shows that all runs, not what holds")
    size.add_argument("--full", action="store_true", help="also a real base on real data, with --base and --data")
    p.add_argument("--base", type=Path, metavar="DIR", help="with --full: a model's folder, MiniLM's say")
    p.add_argument(
        "--data", type=Path, metavar="DIR", help="with --full: train.tsv and dev.tsv of text<TAB>label lines"
    )
