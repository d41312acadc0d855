"""python -m bench.marian: a small encoder-decoder learns French from nothing, every weight of it; then German by LoRA.

As Marian has it, but of bytes, and pre-norm: an encoder and a decoder of two layers, D = 128, H = 4, F = 512, SiLU,
learned positions, one table for what is read, written and scored. Both languages are Django's messages, with the same
sources held out. The held-out loss beside that of bytes as frequent as in the training targets, and beside the loss
where each target gets another's source; chrF of the greedy translations (sacrebleu).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import lora_np as ln
from lora_np.batch import BatchDict
from lora_np.training.examples import Example, bucketed, in_order
from lora_np.training.loop import Settings, evaluate, placed, train
from lora_np.training.records import Pair
from lora_np.training.text import BYTES
from lora_np.training.translation import EndedByteTokenizer, encode_source, encode_translation

from .catalogues import split, translations
from .environment import environment

N, SEED = 32, 0
TOKENIZER = EndedByteTokenizer()
START = TOKENIZER.eos
CHARACTERS = 80  # of a text at most


class Task(NamedTuple):
    """A language's examples to learn from and held out, and the pairs that the latter are of."""

    train: list[Example]
    dev: list[Example]
    pairs: list[Pair]

    def batch(self, step: int) -> BatchDict:
        return bucketed(self.train, N=N, seed=SEED, step=step)


def config_of(D: int, layers: int, longest: int) -> ln.Config:
    """A small Marian of bytes; longest: tokens of a source, or of a target."""
    return ln.Config(BYTES, longest, layers, n_head=4, d_model=D, d_ff=4 * D, n_encoder=layers, activation="silu")


def task_of(language: str, characters: int, longest: int) -> Task:
    """The examples of a language."""
    parts = split(translations(language, characters))
    train, dev = ([_encoded(pair, longest) for pair in pairs] for pairs in parts)
    return Task(train, dev, parts.dev)


def _encoded(pair: Pair, longest: int) -> Example:
    found = encode_translation(TOKENIZER, pair, longest, START)
    assert found is not None
    return found.example


def unigram_loss(task: Task) -> float:
    """The held-out loss of bytes as frequent as in the training targets, where each is counted once more."""
    counts = 1.0 + np.bincount(np.concatenate([one.targets for one in task.train]), minlength=BYTES)
    return float(-np.log(counts / counts.sum())[np.concatenate([one.targets for one in task.dev])].mean())


def score(model: ln.Model, adapter: ln.Adapter | None, examples: Sequence[Example]) -> float:
    """The held-out loss, nats a byte."""
    return evaluate(model, adapter, in_order(examples, N=N)).loss


def misread(examples: Sequence[Example]) -> list[Example]:
    """Each target beside the source of another."""
    return [one._replace(source=examples[i - 1].source) for i, one in enumerate(examples)]


def from_nothing(config: ln.Config, task: Task, steps: int, lr: float) -> ln.Model:
    """A model whose every weight was trained.

    Matrices begin larger than GPT-2's, at N(0, 1 / in), tables at N(0, 0.1), as the model is so much smaller.
    """
    weights = ln.init_weights(config, seed=SEED)  # N(0, 0.02)
    for name, w in weights.items():
        if w.ndim == 2:
            weights[name] = w * (
                (0.1 if name.removeprefix("encoder.").startswith("embed.") else w.shape[1] ** -0.5) / 0.02
            )
    model = ln.Model(config, weights)
    settings = Settings(steps=steps, lr=lr, warmup=min(100, steps // 4), weight_decay=0.01, seed=SEED)
    return placed(model, None, train(model, None, task.batch, settings))[0]


def adapted(model: ln.Model, task: Task, steps: int, r: int) -> ln.Adapter:
    """LoRA on every matrix of the layers, trained on a task."""
    targets = ("q", "k", "v", "o", "up", "down")
    adapter = ln.init_adapter(model, ln.LoRAConfig(r=r, alpha=2 * r, targets=targets), seed=SEED)
    settings = Settings(steps=steps, lr=3e-3, warmup=min(20, steps // 4), seed=SEED)
    found = placed(model, adapter, train(model, adapter, task.batch, settings))[1]
    assert found is not None
    return found


def translated(model: ln.Model, adapter: ln.Adapter | None, pairs: Sequence[Pair]) -> list[str]:
    """Greedy translations of the sources."""
    longest, texts = model.config.longest, []
    for pair in pairs:
        source = encode_source(TOKENIZER, pair.prompt, longest).tokens[None]
        ids = ln.generate(model, [[START]], adapter, n=longest - 1, source=source, stop=[START])[0, 1:]
        texts.append(TOKENIZER.decode(ids[ids != START]))
    return texts


def main() -> None:
    """Runs what the command line asks for."""
    from .translate import chrf

    parser = argparse.ArgumentParser(prog="python -m bench.marian", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--first", default="fr", help="the language that is learned from nothing (default: %(default)s)"
    )
    parser.add_argument("--then", default="de", help="the language that LoRA learns (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="from nothing (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=3e-3, help="from nothing (default: %(default)s)")
    parser.add_argument("--lora-steps", type=int, default=150, help="of LoRA (default: %(default)s)")
    parser.add_argument("-r", type=int, default=16, help="the rank (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="writes the first language's model there")
    parser.add_argument("--json", action="store_true", help="as JSON")
    args = parser.parse_args()
    config = config_of(128, 2, 128)
    first, then = (task_of(language, CHARACTERS, config.longest) for language in (args.first, args.then))
    found: dict[str, Any] = {"environment": environment()}

    def add(name: str, model: ln.Model, adapter: ln.Adapter | None, task: Task, began: float | None = None) -> None:
        texts = translated(model, adapter, task.pairs)
        found[name] = {
            "seconds": None if began is None else time.perf_counter() - began,
            "unigram": unigram_loss(task), "loss": score(model, adapter, task.dev),
            "misread": score(model, adapter, misread(task.dev)), "chrF": chrf(texts, task.pairs),
            "texts": [[*pair, text] for pair, text in zip(task.pairs, texts, strict=True)],
        }  # fmt: skip

    began = time.perf_counter()
    model = from_nothing(config, first, args.steps, args.lr)
    if args.out is not None:
        ln.save_model(args.out, model)
    add(f"{args.first}, every weight", model, None, first, began)
    add(f"{args.then}, before", model, None, then)
    began = time.perf_counter()
    adapter = adapted(model, then, args.lora_steps, args.r)
    add(f"{args.then}, LoRA", model, adapter, then, began)
    if args.json:
        print(json.dumps(found))
        return
    print(", ".join(f"{key} {value}" for key, value in found.pop("environment").items()))
    print(f"{len(first.train)} and {len(then.train)} texts, {len(first.dev)} and {len(then.dev)} held out")
    weights, trained = (sum(v.size for v in d.values()) for d in (model.weights, adapter.params))
    print(f"{weights:,} weights, of which LoRA trains {trained:,}")
    for name, one in found.items():
        print(
            f"{name:20} loss {one['loss']:.3f}, unigram {one['unigram']:.3f}, others' sources {one['misread']:.3f}, "
            f"chrF {one['chrF']:.1f}" + ("" if one["seconds"] is None else f", {one['seconds']:.0f} s")
        )
        for source, target, text in one["texts"][:6]:
            print(f"    {source!r}: {text!r} ({target!r})")


if __name__ == "__main__":
    main()
