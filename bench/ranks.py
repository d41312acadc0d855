"""Training steps on MPI's ranks: their time, and the bytes that travel in each.

mpirun -n 2 python -m bench.ranks        two ranks; without mpirun one process
mpirun -n 2 python -m bench.ranks --all  every weight, beside the adapter's A and B alone
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from typing import Any

import numpy as np

import lora_np as ln
from lora_np.batch import BatchDict
from lora_np.training.loop import Progress, Settings, train
from lora_np.training.ranks import Ranks, world

from .environment import environment


def main() -> None:
    """Runs the steps; the first rank prints."""
    parser = argparse.ArgumentParser(prog="python -m bench.ranks", description="Training steps on MPI's ranks.")
    parser.add_argument("--preset", default="gpt2", help="the model (default: gpt2)")
    parser.add_argument("--layers", type=int, help="of it, so many layers (default: all)")
    parser.add_argument("--all", action="store_true", help="train every weight, not LoRA r = 8 on q and v")
    parser.add_argument("-N", type=int, default=4, help="texts in the batch of all ranks (default: 4)")
    parser.add_argument("-T", type=int, default=256, help="tokens in each (default: 256)")
    parser.add_argument("--shards", type=int, help="parts of the batch (default: from its shape)")
    parser.add_argument("--steps", type=int, default=5, help="that are timed, after one that warms up (default: 5)")
    args = parser.parse_args()
    ranks = world()
    try:
        result = measured(args, ranks)
    except BaseException:
        if ranks.size > 1:
            ranks.end(1)
        raise
    if ranks.is_first:
        print(json.dumps({**result, "environment": environment()}, indent=2))


def measured(args: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    """The figures: seconds of a step, bytes of it that all ranks together received."""
    config = ln.PRESETS[args.preset]
    config = config if args.layers is None else replace(config, n_layer=args.layers)
    model = ln.Model(config, ln.init_weights(config, seed=0))
    adapter = None if args.all else ln.init_adapter(model, ln.LoRAConfig(r=8), seed=0)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (args.N, args.T + 1))
    batch: BatchDict = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    ends: list[float] = []

    def report(_: Progress) -> None:
        ends.append(time.perf_counter())

    settings = Settings(steps=args.steps + 1, lr=1e-6, shards=args.shards)
    train(model, adapter, lambda _: batch, settings, report=report, ranks=ranks)
    seconds = np.diff(ends)
    return {
        "ranks": ranks.size,
        "threads": ranks.threads,
        "parameters": sum(p.size for p in (model.weights if adapter is None else adapter.params).values()),
        "bytes_a_step": sum(ranks.gather([ranks.received])) // settings.steps,
        "seconds": {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds)},
    }


if __name__ == "__main__":
    main()
