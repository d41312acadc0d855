"""lora-np demo: the demonstration; lora-np gradcheck: every derivative."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..training import demonstration, plot
from .base import AddCommand, add_seed, shown_on
from .output import Bar, emit, table
from .streams import show


def run_demo(args: argparse.Namespace) -> int:
    if args.plot:
        plot.check_picture(args.plot)
    with Bar() as bar:
        out = demonstration.run(shown_on(bar), demonstration.QUICK if args.quick else demonstration.STANDARD)
    if args.plot:
        plot.loss_curves(
            args.plot, "Adapting to Python source", out.curves, {"base": out.losses["base"]}, unit="nats a byte"
        )
    base, trained = out.parameters["base"], out.parameters["LoRA"]
    whole, update = f"{out.bytes['base']:,} B", f"{out.bytes['LoRA']:,} B"
    rows = [
        ["", "held-out loss", "trained parameters", "file"],
        ["base, trained on Python's reference", f"{out.losses['base']:.3f}", "-", whole],
        ["+ LoRA on q, v", f"{out.losses['LoRA']:.3f}", f"{trained:,} ({trained / base:.1%})", update],
        ["+ full fine-tuning", f"{out.losses['full fine-tuning']:.3f}", f"{base:,}", whole],
    ]  # fmt: skip
    checks = [f"  {'ok  ' if check.held else 'FAIL'}  {check.claim}: {check.seen}" for check in out.checks]
    texts = [f"  {name:6}  {out.samples[name]!r}" for name in ("prompt", "base", "LoRA")]
    times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in out.seconds.items())
    lines = [
        "Adapting a model of bytes from Python's language reference to the source of its standard library.",
        "Loss in nats a byte, on text held out.", "", *table(rows), "",
        "A continuation of held-out source, with the base and with LoRA:", *texts, "",
        "Checks:", *checks, "", f"Time: {times}.",
    ]  # fmt: skip
    result = {
        "losses": out.losses, "curves": out.curves, "seconds": out.seconds, "parameters": out.parameters,
        "bytes": out.bytes, "samples": out.samples, "checks": [check._asdict() for check in out.checks],
    }  # fmt: skip
    emit(args, result, lines)
    return 0 if all(check.held for check in out.checks) else 1


def run_gradcheck(args: argparse.Namespace) -> int:
    from ..vectors import derivatives  # imported here: no other command needs it

    rows = []
    for row in derivatives.table(seed=args.seed):
        rows.append(row)
        if not args.json:
            verdict = "ok" if row.error <= row.bound else "FAIL"
            show(f"{row.id:4} {row.what:40} {row.error:8.1e}  bound {row.bound:.0e}  {row.method:18} {verdict}")
    if args.json:
        emit(args, [row._asdict() for row in rows], [])
    return 0 if all(row.error <= row.bound for row in rows) else 1


def add_commands(command: AddCommand) -> None:
    """The commands of this file, and their arguments."""
    p = command("demo", run_demo, "pretrain a small model, adapt it with LoRA and in full, check the claims")
    p.add_argument("--quick", action="store_true", help="a few seconds: shows that all runs, not how well")
    p.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the loss curves")

    p = command("gradcheck", run_gradcheck, "every derivative against complex steps: its worst error")
    add_seed(p, "the inputs")
