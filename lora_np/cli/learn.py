"""lora-np finetune, eval, generate: from data to an adapter, and what it is worth."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from .. import data, finetune, plot
from ..decode import generate_on
from ..lora import TARGETS, LoRAConfig
from ..train import Settings
from .base import AddCommand, adapter_of, add_base, base_model
from .output import Bar, emit


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
        model = base_model(args, bar)

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
    emit(
        args,
        result,
        f"held-out loss: base {done.curve[0][1]:.3f}, adapted {done.curve[-1][1]:.3f} nats a byte\n"
        f"trained {done.parameters:,} parameters in {args.steps} steps; the adapter is in {args.out}",
    )
    return 0


def run_eval(args: argparse.Namespace) -> int:
    tokens = data.encode(data.read_text(args.data))
    with Bar() as bar:
        model = base_model(args, bar)
    finetune.check_bytes(model)
    adapter = adapter_of(args, model)
    kinds = {"base": None} if adapter is None else {"base": None, "adapter": adapter}
    T = min(args.window, model.config.longest)
    losses = {name: finetune.held_out_loss(model, kind, tokens, T=T, most=args.windows) for name, kind in kinds.items()}
    emit(args, {"losses": losses}, "\n".join(f"{name}: {loss:.4f} nats a byte" for name, loss in losses.items()))
    return 0


def run_generate(args: argparse.Namespace) -> int:
    with Bar() as bar:
        model = base_model(args, bar)
    finetune.check_bytes(model)
    if not args.prompt:
        raise ValueError("--prompt: expected some text to go on from, got none")
    prompt = data.encode(args.prompt).astype(np.int64)[None]
    tokens = generate_on(
        model, prompt, adapter_of(args, model), n=args.n, temperature=args.temperature, top_k=args.top_k,
        top_p=args.top_p, seed=args.seed if args.temperature > 0 else None,
    )  # fmt: skip
    text = data.decode(tokens[0])
    emit(args, {"prompt": args.prompt, "text": text}, text)
    return 0


def add_commands(command: AddCommand) -> None:
    """The commands of this file, and their arguments."""
    p = command("finetune", run_finetune, "train an adapter on a text file")
    p.add_argument("--data", type=Path, required=True, metavar="FILE.txt", help="UTF-8 text; its last part is held out")
    add_base(p)
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
    add_base(p)
    p.add_argument("--adapter", type=Path, metavar="DIR", help="the adapter's folder")
    p.add_argument("--window", type=int, default=64, help="tokens a window (default: %(default)s)")
    p.add_argument("--windows", type=int, default=64, help="at most so many, spread evenly (default: %(default)s)")

    p = command("generate", run_generate, "text after a prompt")
    add_base(p)
    p.add_argument("--adapter", type=Path, metavar="DIR", help="the adapter's folder")
    p.add_argument("--prompt", required=True, help="the text to go on from")
    p.add_argument("-n", type=int, default=200, help="tokens (default: %(default)s)")
    p.add_argument("--temperature", type=float, default=0.7, help="0: always the likeliest (default: %(default)s)")
    p.add_argument("--top-k", type=int, help="draw from the k likeliest")
    p.add_argument("--top-p", type=float, help="draw from the likeliest that together reach p")
    p.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
