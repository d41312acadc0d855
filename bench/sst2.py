"""python -m bench.sst2 --data DIR: MiniLM learns sentiment, here and with PyTorch + PEFT: accuracy and time.

LoRA r = 8, alpha 16 on q and v and a trained classifier, dropout 0.1 on the branch, lr 1e-3 down a cosine, batches of
32, at most 64 tokens. PEFT pads batches in random order and keeps the base's own dropout, as its examples do. For each
seed one training here, then one there. Then what bucketing by length, leaving padding out, and computing the last layer
for the classifier's token alone bring, each with the others and without.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import lora_np as ln
from lora_np.batch import BatchDict
from lora_np.parallel import sharded_loss_and_grads
from lora_np.training.examples import Example, bucketed, in_order, padded, steps_an_epoch
from lora_np.training.loop import Score, Settings, evaluate, placed, train
from lora_np.training.tasks import read_examples, task_of

from .environment import environment
from .measure import Side, measure
from .options import Options
from .timing import Cases

N, LONGEST, LR = 32, 64, 1e-3
STEPS = 8  # timed at once in the table of parts
LORA = {"r": 8, "dropout": 0.1}


def ours(base: Path, data: list[Example], dev: list[Example], steps: int, seed: int) -> tuple[Score, float]:
    """One training here. -> its score on dev, and the seconds of the training alone."""
    model = ln.load_model(base, head="classify", n_labels=2, seed=seed)
    adapter = ln.init_adapter(model, ln.LoRAConfig(alpha=16, train_head=True, **LORA), seed=seed)  # type: ignore[arg-type]
    start = time.perf_counter()
    settings = Settings(steps=steps, lr=LR, seed=seed)
    state = train(model, adapter, lambda step: bucketed(data, N=N, seed=seed, step=step), settings)
    seconds = time.perf_counter() - start
    return evaluate(*placed(model, adapter, state), in_order(dev, N=N)), seconds


def theirs(base: Path, data: list[Example], dev: list[Example], steps: int, seed: int) -> tuple[Score, float]:
    """One training with PyTorch + PEFT, batches in random order."""
    from . import peft_side

    net = peft_side.classifier(base, 2, {"r": LORA["r"], "lora_alpha": 16, "lora_dropout": LORA["dropout"]}, seed)
    seconds = peft_side.train(net, lambda step: shuffled(data, seed, step), steps=steps, lr=LR, clip=1.0)
    return Score(*peft_side.evaluate(net, in_order(dev, N=N))), seconds


def shuffled(examples: Sequence[Example], seed: int, step: int) -> BatchDict:
    """The batch of a step, in random order: each example once an epoch."""
    epoch, i = divmod(step, steps_an_epoch(examples, N))
    order = np.random.default_rng([seed, epoch]).permutation(len(examples))[N * i : N * (i + 1)]
    return padded([examples[n] for n in order])


def examples_in(base: Path, folder: Path) -> Iterator[list[Example]]:
    """Those of train.tsv and of dev.tsv."""
    tokenizer, task = ln.load_tokenizer(base), task_of("classify", folder / "train.tsv", LONGEST)
    for name in ("train.tsv", "dev.tsv"):
        found, _ = read_examples(folder / name, task, tokenizer)
        assert found is not None
        yield found


def parts(base: str, folder: str) -> Cases:
    """The first STEPS steps of training, with each of the three left out or not.

    Without leaving padding out, it is told that every place is a token; without the last layer's saving, each token
    gets a label.
    """
    data, _ = examples_in(Path(base), Path(folder))
    models = {head: ln.load_model(base, head=head, n_labels=2, seed=0) for head in ("classify", "tag")}
    lora = ln.LoRAConfig(alpha=16, train_head=True, **LORA)  # type: ignore[arg-type]
    adapters = {head: ln.init_adapter(model, lora, seed=0) for head, model in models.items()}

    def case(by_length: bool, skip: bool, one: bool) -> Callable[[], Any]:
        head = "classify" if one else "tag"
        batches = [bucketed(data, N=N, seed=0, step=i) if by_length else shuffled(data, 0, i) for i in range(STEPS)]

        def run() -> None:
            for i, given in enumerate(batches):
                batch = dict(given)
                if not one:
                    batch["targets"] = np.where(batch["mask"], batch["targets"][:, None], -100)
                if not skip:
                    batch["mask"] = None
                sharded_loss_and_grads(models[head], adapters[head], **batch, dropout_seed=i)

        return run

    names = ("by length", "no padding", "last layer")
    return {
        " + ".join(name for name, on in zip(names, on_or_off, strict=True) if on) or "none of them": case(*on_or_off)
        for on_or_off in itertools.product((False, True), repeat=3)
    }


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m bench.sst2", description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="a folder with train.tsv and dev.tsv")
    parser.add_argument("--base", type=Path, required=True, metavar="DIR", help="MiniLM's folder")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5, help="of the table of parts (default: %(default)s; 0: none)")
    parser.add_argument("--alone", action="store_true", help="without PyTorch + PEFT")
    parser.add_argument("--json", action="store_true", help="as JSON")
    args = parser.parse_args()
    data, dev = examples_in(args.base, args.data)
    steps = args.epochs * steps_an_epoch(data, N)
    sides = {"lora_np": ours} if args.alone else {"lora_np": ours, "PyTorch + PEFT": theirs}
    runs: list[dict[str, Any]] = []
    for seed, (name, side) in itertools.product(args.seeds, sides.items()):
        score, seconds = side(args.base, data, dev, steps, seed)
        runs.append({"side": name, "seed": seed, "seconds": seconds, **score._asdict()})
        if not args.json:
            print(
                f"seed {seed}  {name:16} accuracy {score.accuracy:.2%}  loss {score.loss:.4f}  {seconds:.1f} s",
                flush=True,
            )
    given = {"base": str(args.base.resolve()), "folder": str(args.data.resolve())}
    whole = Side("lora_np", "bench.sst2:parts", given)
    table = measure([whole], Options(rounds=args.rounds))[whole.name] if args.rounds else {}
    if args.json:
        step = {name: t.seconds for name, t in table.items()}
        print(json.dumps({"environment": environment(), "runs": runs, "step": step}))
        return
    print(", ".join(f"{key} {value}" for key, value in environment().items()))
    for name in sides:
        mine = [run for run in runs if run["side"] == name]
        if mine:
            accuracy, times = (np.array([run[key] for run in mine]) for key in ("accuracy", "seconds"))
            print(
                f"{name:16} mean accuracy {accuracy.mean():.2%} ({accuracy.min():.2%} to {accuracy.max():.2%}), "
                f"{np.median(times) / args.epochs:.1f} s an epoch"
            )
    for name, t in table.items():
        print(f"{name:40} {np.median(t.seconds) / STEPS * 1e3:7.1f} ms a step")


if __name__ == "__main__":
    main()
