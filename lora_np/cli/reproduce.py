"""lora-np reproduce: the paper's claims, checked."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..formats.files.lock import occupied
from ..formats.models.folder import model_hash
from ..training.plot import check_matplotlib
from .base import AddCommand, shown_on, tokenizer_of
from .output import Bar, emit

if TYPE_CHECKING:
    from ..reproduce.kept import Done, Kept
    from ..reproduce.run import Part, Plan


def run_reproduce(args: argparse.Namespace) -> int:
    from ..reproduce import kept, page, report, run  # imported here: no other command needs it

    if not args.full == (args.base is not None) == (args.data is not None):
        raise ValueError("--full, --base and --data: expected all three, or none of them")
    plan = run.QUICK if args.quick else run.FULL if args.full else run.STANDARD
    with occupied(args.out) as there, Bar() as bar:
        report.expect_report(args.out, there)
        real = run.labelled_study(args.base, args.data, tokenizer_of) if args.full else None
        marks = [] if real is None else [model_hash(real.model), run.data_hash(args.data)]
        parts = kept.Kept(args.out, report.key(plan, marks))
        todo = run.parts(plan, shown_on(bar), parts, real)
        done = _measured(args.out, plan, todo, parts, bar)
        result = report.write(args.out, plan, done, left=(), pictures=_can_draw())
        parts.discard_trainings()
    sections = [one.section for one in done]
    lines = [page.tally(sections), *([page.QUICK_FORM] if args.quick else []), *([] if _can_draw() else [page.WITHOUT])]
    for section in sections:
        lines += ["", section.title]
        for claim in section.claims:
            lines += [f"  {claim.verdict.upper():14} {claim.claim}", f"  {'':14} {claim.figure}"]
    emit(args, result, [*lines, "", f"the report is in {args.out / report.HTML}"])
    return 0


def _measured(out: Path, plan: Plan, todo: list[Part], kept: Kept, bar: Bar) -> list[Done]:
    """Each section, as it was kept or made now; the page is written anew after each that is made."""
    from ..reproduce import report
    from ..reproduce.kept import Done
    from ..reproduce.section import as_quick

    there = {part.id: kept.section(part.id) for part in todo}
    missing = [part for part in todo if there[part.id] is None]
    before = len(todo) - len(missing)
    if before:
        bar.note(f"{out}: {before} of {len(todo)} sections are there, of the same version and settings")
    if missing:
        bar.note(f"{out}: {len(missing)} sections to measure, {_duration(missing)}")
    for n, part in enumerate(missing):
        bar.note(f"{n + 1} of {len(missing)}: {part.title}: {_duration([part])}")
        began = time.perf_counter()
        try:
            section = part.make()
        except KeyboardInterrupt:
            bar.note(f"{out}: {before + n} of {len(todo)} sections are done; the same command goes on from there")
            raise
        section = as_quick(section) if plan.name == "quick" else section
        made = Done(section, time.perf_counter() - began, report.today())
        kept.keep_section(made)
        there[part.id] = made
        left = [one.title for one in missing[n + 1 :]]
        report.write(out, plan, list(filter(None, there.values())), left=left, pictures=_can_draw())
    return list(filter(None, there.values()))


def _duration(parts: list[Part]) -> str:
    """How long sections take, in words: not known where a base and data are the user's."""
    seconds = sum(part.seconds or 0 for part in parts)
    if seconds == 0:
        return "how long depends on the base and the data"
    words = f"about {seconds / 60:.0f} minutes" if seconds >= 90 else f"about {seconds:.0f} s"
    return f"{words} on two cores" + (", and the real base's" if any(part.seconds is None for part in parts) else "")


def _can_draw() -> bool:
    try:
        check_matplotlib()
    except ImportError:
        return False
    return True


def add_commands(command: AddCommand) -> None:
    """The command of this file, and its arguments."""
    p = command("reproduce", run_reproduce, "check the paper's claims: figures and verdicts, as a page of HTML")
    p.add_argument(
        "--out", type=Path, default=Path("report"), metavar="DIR",
        help="the folder for the report (default: report); one that was stopped goes on from what is there",
    )  # fmt: skip
    size = p.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a few seconds: shows that all runs, not what holds")
    size.add_argument("--full", action="store_true", help="also a real base on real data, with --base and --data")
    p.add_argument("--base", type=Path, metavar="DIR", help="with --full: a model's folder, MiniLM's say")
    p.add_argument(
        "--data", type=Path, metavar="DIR", help="with --full: train.tsv and dev.tsv of text<TAB>label lines"
    )
