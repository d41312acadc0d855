"""python -m bench ops | step: a table of times, or with --json the figures and what they depend on."""

from __future__ import annotations

import argparse
import json

from . import ops, step
from .timing import Times, environment, measure


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Micro-benchmarks on the backend in use.")
    parser.add_argument("what", choices=["ops", "step"], help="each primitive; or a whole training step")
    parser.add_argument("--rounds", type=int, default=5, help="times that each is measured, in turn (default: 5)")
    parser.add_argument("--preset", default="gpt2", help="the model of `step` (default: gpt2)")
    parser.add_argument("-N", type=int, default=4, help="texts in the batch of `step` (default: 4)")
    parser.add_argument("-T", type=int, default=256, help="tokens in each (default: 256)")
    parser.add_argument("--json", action="store_true", help="as JSON")
    args = parser.parse_args()
    flops: dict[str, float] = {}
    if args.what == "ops":
        cases = ops.cases()
        functions, flops = {name: f for name, (f, _) in cases.items()}, {name: n for name, (_, n) in cases.items()}
    else:
        functions = step.cases(args.preset, args.N, args.T)
    times = measure(functions, rounds=args.rounds)
    if args.json:
        figures = {name: {**t._asdict(), "flops": flops.get(name)} for name, t in times.items()}
        print(json.dumps({"environment": environment(), "seconds": figures}, indent=2))
    else:
        print(", ".join(f"{key} {value}" for key, value in environment().items()))
        print("\n".join(_line(name, t, flops.get(name, 0)) for name, t in times.items()))


def _line(name: str, t: Times, flops: float) -> str:
    rate = f"{flops / t.median / 1e9:7.1f} GFLOP/s" if flops else ""
    return f"{name:24} {t.median * 1e3:9.3f} ms  ({t.least * 1e3:.3f} to {t.most * 1e3:.3f})  {rate}".rstrip()


main()
