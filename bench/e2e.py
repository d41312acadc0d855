"""python -m bench.e2e --data FILE: SmolLM2 learns to put facts into sentences, here and with PyTorch + PEFT.

LoRA r = 8, alpha 16 on q and v, lr 1e-3 down a cosine, the prompt left out of the loss; both sides have the same
batches, and start from the same adapter, which PEFT reads from our file.
Held-out loss before and after, the time of the training, sentences before and after.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import lora_np as ln
from lora_np.batch import BatchDict
from lora_np.formats.models.base import STORAGES, Storage
from lora_np.formats.models.tokenizer import Tokenizer
from lora_np.training.examples import Example, bucketed, encode_pair, in_order
from lora_np.training.loop import Score, Settings, evaluate, placed, train
from lora_np.training.records import read_records

from .environment import environment

LONGEST, LR, SEED = 160, 1e-3, 0
R, ALPHA = 8, 16
WORDS = 60  # the most tokens of a sentence


class Work(NamedTuple):
    """What both sides do: N examples a step; prompts, as tokens, are gone on from."""

    path: Path
    data: list[Example]
    dev: list[Example]
    prompts: list[list[int]]
    N: int
    steps: int
    eos: int | None
    storage: Storage | None = None  # ours

    def batch(self, step: int) -> BatchDict:
        return bucketed(self.data, N=self.N, seed=SEED, step=step)


def _start(work: Work) -> tuple[ln.Model, ln.Adapter]:
    """The base, and the adapter that both sides start from."""
    model = ln.load_model(work.path, storage=work.storage)
    return model, ln.init_adapter(model, ln.LoRAConfig(r=R, alpha=ALPHA), seed=SEED)


def ours(work: Work) -> dict[str, Any]:
    """The training here: scores, seconds, and the tokens that follow the prompts."""
    model, adapter = _start(work)
    batches = list(in_order(work.dev, N=work.N))
    found: dict[str, Any] = {"before": evaluate(model, None, batches)}
    start = time.perf_counter()
    state = train(model, adapter, work.batch, Settings(steps=work.steps, lr=LR, seed=SEED))
    found["seconds"] = time.perf_counter() - start
    _, trained = placed(model, adapter, state)
    found["after"] = evaluate(model, trained, batches)
    for name, kind in (("base", None), ("adapted", trained)):
        texts = [ln.generate(model, [p], kind, n=WORDS)[0, len(p) :].tolist() for p in work.prompts]
        found[name] = [_up_to(work.eos, ids) for ids in texts]
    return found


def theirs(work: Work) -> dict[str, Any]:
    """The same with PyTorch + PEFT."""
    from . import peft_side

    with tempfile.TemporaryDirectory() as folder:
        model, adapter = _start(work)
        ln.save_adapter(folder, adapter, model)
        net = peft_side.language_model(work.path, Path(folder))
        del model, adapter
    batches = list(in_order(work.dev, N=work.N))
    found: dict[str, Any] = {"before": Score(*peft_side.evaluate(net, batches))}
    found["seconds"] = peft_side.train(net, work.batch, steps=work.steps, lr=LR, clip=1.0)
    found["after"] = Score(*peft_side.evaluate(net, batches))
    found["adapted"] = [_up_to(work.eos, peft_side.generate(net, p, WORDS, work.eos)) for p in work.prompts]
    return found


def _up_to(end: int | None, ids: list[int]) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


def _split(path: Path, tokenizer: Tokenizer, held_out: int) -> tuple[list[Example], list[Example], list[str]]:
    """Examples to train on, examples of other prompts held out, and those prompts."""
    records = read_records(path, "lm", "bars")
    pairs = [] if records is None else records.found
    prompts = list(dict.fromkeys(pair.prompt for pair in pairs))
    out = set(np.random.default_rng(SEED).permutation(prompts)[:held_out].tolist())
    kept, others = (
        [
            found.example
            for pair in pairs
            if (pair.prompt in out) == side and (found := encode_pair(tokenizer, pair, LONGEST))
        ]
        for side in (False, True)
    )
    return kept, others, sorted(out)


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m bench.e2e", description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="lines of a||b")
    parser.add_argument("--base", type=Path, required=True, metavar="FILE.gguf", help="SmolLM2")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("-N", type=int, default=8, help="examples a batch (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=20, help="prompts that are held out (default: %(default)s)")
    parser.add_argument("--storage", choices=STORAGES, help="how ours holds the base's matrices (default: float32)")
    parser.add_argument("--alone", action="store_true", help="without PyTorch + PEFT")
    parser.add_argument("--json", action="store_true", help="as JSON")
    args = parser.parse_args()
    tokenizer = ln.load_tokenizer(args.base)
    data, dev, prompts = _split(args.data, tokenizer, args.held_out)
    shown = prompts[:3]
    sides = {"lora_np": ours} if args.alone else {"lora_np": ours, "PyTorch + PEFT": theirs}
    ids = [tokenizer.encode(prompt) for prompt in shown]
    work = Work(args.base, data, dev, ids, args.N, args.steps, tokenizer.eos, args.storage)
    found = {name: side(work) for name, side in sides.items()}
    for side in found.values():
        for kind in ("base", "adapted"):
            side[kind] = [tokenizer.decode(ids).strip() for ids in side.get(kind, [])]
    if args.json:
        print(json.dumps({"environment": environment(), "prompts": shown, "sides": found}))
        return
    print(", ".join(f"{key} {value}" for key, value in environment().items()))
    print(f"{len(data)} examples, {len(dev)} held out; {args.steps} steps of {args.N}")
    for name, side in found.items():
        before, after = side["before"], side["after"]
        print(f"{name:16} held-out loss {before.loss:.4f} -> {after.loss:.4f} nats a token, {side['seconds']:.1f} s")
    for i, prompt in enumerate(shown):
        print(f"\n{prompt}")
        for name, side in found.items():
            for kind in ("base", "adapted"):
                if side[kind]:
                    print(f"  {name}, {kind}: {side[kind][i]!r}")


if __name__ == "__main__":
    main()
