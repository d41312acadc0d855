"""The command line: the only place that prints. Results go to standard output, progress to standard error.

Exit status: 0, done; 1, it ran and the answer is no (a check failed, training diverged); 2, the input or the command
line is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from . import __version__, data, demo, finetune, plot
from . import adapter as adapters
from .backend import backend_name
from .decode import generate_on
from .formats.folder import load_model, save_model
from .formats.peft import load_adapter
from .formats.survey import survey
from .lora import TARGETS, Adapter, LoRAConfig
from .model import Model
from .train import Settings, TrainingError

EXAMPLES = """\
examples:
  lora-np demo --plot losses.png                       LoRA and full fine-tuning side by side, nothing to download
  lora-np finetune --data notes.txt --out adapter      adapt the embedded base to your text
  lora-np eval --data notes.txt --adapter adapter      its loss, with the adapter and without
  lora-np generate --adapter adapter --prompt "The "   text from it
  lora-np inspect adapter                              what is in it
  lora-np merge --adapter adapter --out merged         base and adapter as one model
  lora-np gradcheck                                    every derivative, against complex steps
"""


class Bar:
    """Progress on standard error: tqdm's bar where it is installed and somebody watches, else a line now and then."""

    def __init__(self) -> None:
        self.stage = ""
        self.bar: Any = None
        self.last_line = 0.0

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()

    def show(self, stage: str, step: int, steps: int, text: str) -> None:
        """Shows that a stage is at `step` of `steps`."""
        if stage != self.stage:
            self._start(stage, steps)
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(step - self.bar.n)
        elif step == steps or time.monotonic() - self.last_line > 5:
            self.last_line = time.monotonic()
            print(f"{stage}: step {step} of {steps}, {text}", file=sys.stderr, flush=True)

    def _start(self, stage: str, steps: int) -> None:
        self.stage, self.last_line = stage, time.monotonic()
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self.bar = tqdm(total=steps, desc=stage, file=sys.stderr, leave=True)


def _emit(args: argparse.Namespace, result: dict[str, Any], text: str) -> None:
    """The result: as JSON with --json, else as text."""
    print(json.dumps(result, indent=2) if args.json else text)


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as aligned columns, all but the first to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _base(args: argparse.Namespace, bar: Bar) -> Model:
    """The model of --base, or the embedded one."""
    if args.base is not None:
        return load_model(args.base)
    return demo.default_base(_shown_on(bar), demo.STANDARD)[0]


def _shown_on(bar: Bar) -> Callable[[demo.Progress], None]:
    return lambda p: bar.show(p.stage, p.step, p.steps, f"loss {p.loss:.3f}")


def _adapter(args: argparse.Namespace, model: Model) -> Adapter | None:
    return None if args.adapter is None else load_adapter(args.adapter, model)


# --- The commands --------------------------------------------------------------------------------------------------


def run_demo(args: argparse.Namespace) -> int:
    if args.plot:
        plot.check_matplotlib()
    with Bar() as bar:
        out = demo.run(_shown_on(bar), demo.QUICK if args.quick else demo.STANDARD)
    if args.plot:
        plot.loss_curves(args.plot, "Adapting to Python source", out.curves, {"base": out.losses["base"]})
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
    text = "\n".join(
        [
            "Adapting a model of bytes from Python's language reference to the source of its standard library.",
            "Loss in nats a byte, on text held out.", "", _table(rows), "",
            "A continuation of held-out source, with the base and with LoRA:", *texts, "",
            "Checks:", *checks, "", f"Time: {times}.",
        ]
    )  # fmt: skip
    result = {
        "losses": out.losses, "curves": out.curves, "seconds": out.seconds, "parameters": out.parameters,
        "bytes": out.bytes, "samples": out.samples, "checks": [check._asdict() for check in out.checks],
    }  # fmt: skip
    _emit(args, result, text)
    return 0 if all(check.held for check in out.checks) else 1


def run_finetune(args: argparse.Namespace) -> int:
    if args.plot:
        plot.check_matplotlib()
    text = data.read_text(args.data)
    job = finetune.Job(
        lora=LoRAConfig(r=args.r, alpha=args.alpha, targets=tuple(args.targets), dropout=args.dropout),
        settings=Settings(
            steps=args.steps, lr=args.lr, b_ratio=args.b_ratio, weight_decay=args.weight_decay,
            warmup=min(args.warmup, args.steps), accumulate=args.accumulate, seed=args.seed,
        ),
        N=args.batch, T=args.window, held_out=args.held_out, every=args.every,
    )  # fmt: skip
    began = time.perf_counter()
    with Bar() as bar:
        model = _base(args, bar)

        def report(seen: finetune.Seen) -> None:
            held_out = "" if seen.held_out is None else f", held out {seen.held_out:.3f}"
            bar.show("fine-tuning", seen.step, seen.steps, f"loss {seen.loss:.3f}{held_out}")

        done = finetune.finetune(model, text, args.out, job, resume=args.resume, report=report)
    if args.plot:
        plot.loss_curves(args.plot, f"Adapting to {args.data.name}", {"LoRA": done.curve}, {"base": done.curve[0][1]})
    result = {
        "out": str(args.out), "steps": args.steps, "parameters": done.parameters, "curve": done.curve,
        "loss": {"base": done.curve[0][1], "adapter": done.curve[-1][1]}, "seconds": time.perf_counter() - began,
    }  # fmt: skip
    _emit(
        args,
        result,
        f"held-out loss: base {done.curve[0][1]:.3f}, adapted {done.curve[-1][1]:.3f} nats a byte\n"
        f"trained {done.parameters:,} parameters in {args.steps} steps; the adapter is in {args.out}",
    )
    return 0


def run_eval(args: argparse.Namespace) -> int:
    tokens = data.encode(data.read_text(args.data))
    with Bar() as bar:
        model = _base(args, bar)
    finetune.check_bytes(model)
    adapter = _adapter(args, model)
    kinds = {"base": None} if adapter is None else {"base": None, "adapter": adapter}
    T = min(args.window, model.config.longest)
    losses = {name: finetune.held_out_loss(model, kind, tokens, T=T, most=args.windows) for name, kind in kinds.items()}
    _emit(args, {"losses": losses}, "\n".join(f"{name}: {loss:.4f} nats a byte" for name, loss in losses.items()))
    return 0


def run_generate(args: argparse.Namespace) -> int:
    with Bar() as bar:
        model = _base(args, bar)
    finetune.check_bytes(model)
    if not args.prompt:
        raise ValueError("--prompt: expected some text to go on from, got none")
    prompt = data.encode(args.prompt).astype(np.int64)[None]
    tokens = generate_on(
        model, prompt, _adapter(args, model), n=args.n, temperature=args.temperature, top_k=args.top_k,
        top_p=args.top_p, seed=args.seed if args.temperature > 0 else None,
    )  # fmt: skip
    text = data.decode(tokens[0])
    _emit(args, {"prompt": args.prompt, "text": text}, text)
    return 0


def run_merge(args: argparse.Namespace) -> int:
    with Bar() as bar:
        model = _base(args, bar)
    save_model(args.out, adapters.merge(model, load_adapter(args.adapter, model)))
    _emit(args, {"out": str(args.out)}, f"the merged model is in {args.out}")
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
    _emit(args, result, "\n".join([*lines, "", _table(rows)]))
    return 0


def run_gradcheck(args: argparse.Namespace) -> int:
    from . import gradcheck  # imported here: no other command needs it

    rows = []
    for row in gradcheck.table(seed=args.seed):
        rows.append(row)
        if not args.json:
            verdict = "ok" if row.error <= row.bound else "FAIL"
            print(
                f"{row.id:4} {row.what:40} {row.error:8.1e}  bound {row.bound:.0e}  {row.method:18} {verdict}",
                flush=True,
            )
    if args.json:
        print(json.dumps([row._asdict() for row in rows], indent=2))
    return 0 if all(row.error <= row.bound for row in rows) else 1


# --- The arguments -------------------------------------------------------------------------------------------------


def _add_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", type=Path, metavar="DIR", help="the base model's folder (default: the embedded one)")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lora-np", description="LoRA in NumPy: fine-tune, look inside, check every derivative.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"lora-np {__version__} ({backend_name})")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="the result as JSON")
        return sub

    p = command("demo", run_demo, "pretrain a small model, adapt it with LoRA and in full, check the claims")
    p.add_argument("--quick", action="store_true", help="a few seconds: shows that all runs, not how well")
    p.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the loss curves")

    p = command("finetune", run_finetune, "train an adapter on a text file")
    p.add_argument("--data", type=Path, required=True, metavar="FILE.txt", help="UTF-8 text; its last part is held out")
    _add_base(p)
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder for the adapter")
    p.add_argument("--r", type=int, default=8, help="rank (default: %(default)s)")
    p.add_argument("--alpha", type=float, default=16, help="s = alpha / r (default: %(default)s)")
    p.add_argument(
        "--targets", nargs="+", default=["q", "v"], metavar="T", help=f"of {' '.join(TARGETS)} (default: q v)"
    )
    p.add_argument("--dropout", type=float, default=0.0, help="on the low-rank branch (default: %(default)s)")
    p.add_argument("--steps", type=int, default=200, help="optimizer steps (default: %(default)s)")
    p.add_argument("--lr", type=float, default=1e-2, help="highest learning rate (default: %(default)s)")
    p.add_argument(
        "--b-ratio", type=float, default=1.0, help="B's learning rate over A's, LoRA+ (default: %(default)s)"
    )
    p.add_argument("--weight-decay", type=float, default=0.0, help="decoupled (default: %(default)s)")
    p.add_argument("--warmup", type=int, default=20, help="steps of warm-up (default: %(default)s)")
    p.add_argument("--batch", type=int, default=16, help="windows a step (default: %(default)s)")
    p.add_argument("--accumulate", type=int, default=1, help="parts that a batch is run in (default: %(default)s)")
    p.add_argument("--window", type=int, default=64, help="tokens a window (default: %(default)s)")
    p.add_argument("--held-out", type=float, default=0.1, help="part of the text (default: %(default)s)")
    p.add_argument("--every", type=int, default=50, help="steps between checkpoints (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    p.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    p.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the loss curve")

    p = command("eval", run_eval, "the loss on a text file, without and with an adapter")
    p.add_argument("--data", type=Path, required=True, metavar="FILE.txt", help="UTF-8 text")
    _add_base(p)
    p.add_argument("--adapter", type=Path, metavar="DIR", help="the adapter's folder")
    p.add_argument("--window", type=int, default=64, help="tokens a window (default: %(default)s)")
    p.add_argument("--windows", type=int, default=64, help="at most so many, spread evenly (default: %(default)s)")

    p = command("generate", run_generate, "text after a prompt")
    _add_base(p)
    p.add_argument("--adapter", type=Path, metavar="DIR", help="the adapter's folder")
    p.add_argument("--prompt", required=True, help="the text to go on from")
    p.add_argument("-n", type=int, default=200, help="tokens (default: %(default)s)")
    p.add_argument("--temperature", type=float, default=0.7, help="0: always the likeliest (default: %(default)s)")
    p.add_argument("--top-k", type=int, help="draw from the k likeliest")
    p.add_argument("--top-p", type=float, help="draw from the likeliest that together reach p")
    p.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")

    p = command("merge", run_merge, "base and adapter as one model, with no latency added")
    _add_base(p)
    p.add_argument("--adapter", type=Path, required=True, metavar="DIR", help="the adapter's folder")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder for the merged model")

    p = command("inspect", run_inspect, "what is in an adapter: targets, ranks, norms, is B still zero")
    p.add_argument("adapter", type=Path, metavar="DIR", help="the adapter's folder")

    p = command("gradcheck", run_gradcheck, "every derivative against complex steps: its worst error")
    p.add_argument("--seed", type=int, default=0, help="of the inputs (default: %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. -> the exit status."""
    args = _parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            # Numbers that overflow end in a TrainingError, which says more than NumPy's warnings on the way there.
            warnings.simplefilter("ignore", RuntimeWarning)
            return int(args.run(args))
    except TrainingError as error:
        print(f"lora-np: {error}", file=sys.stderr)
        return 1
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"lora-np: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lora-np: interrupted; what was written is whole", file=sys.stderr)
        return 130
