"""python -m bench.translate --base FILE.gguf: SmolLM2 learns to translate Django's messages, here and with PEFT.

As bench.e2e: LoRA r = 8, alpha 16 on q and v, lr 1e-3 down a cosine, the source left out of the loss; both sides have
the same batches, and start from the same adapter. Held-out loss, chrF (sacrebleu's) of greedy translations of some
texts of these, the time of the training, some translations side by side.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from sacrebleu.metrics.chrf import CHRF

import lora_np as ln
from lora_np.training.examples import Example
from lora_np.training.records import Pair
from lora_np.training.translation import encode_translation, source_prompt

from .catalogues import split, translations
from .e2e import LONGEST, Work, ours, theirs
from .environment import environment


def chrf(found: Sequence[str], pairs: Sequence[Pair]) -> float:
    """How near texts are to the translations of pairs: 100 is each of their letters in each of their orders."""
    return float(CHRF().corpus_score(list(found), [[pair.completion for pair in pairs]]).score)


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m bench.translate", description=__doc__.split("\n\n")[0])
    parser.add_argument("--base", type=Path, required=True, metavar="FILE.gguf", help="SmolLM2")
    parser.add_argument("--language", default="fr", help="as Django names it (default: %(default)s)")
    parser.add_argument("--longest", type=int, default=120, help="characters of a text at most (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--texts", type=int, default=24, help="held out, that are translated (default: %(default)s)")
    parser.add_argument("-N", type=int, default=8, help="examples a batch (default: %(default)s)")
    parser.add_argument("--alone", action="store_true", help="without PyTorch + PEFT")
    parser.add_argument("--json", action="store_true", help="as JSON")
    args = parser.parse_args()
    tokenizer = ln.load_tokenizer(args.base)

    def examples(pairs: Sequence[Pair]) -> list[Example]:
        encoded = [encode_translation(tokenizer, pair, LONGEST, None) for pair in pairs]
        return [one.example for one in encoded if one is not None]

    train, dev = split(translations(args.language, args.longest))
    shown = dev[:: max(1, len(dev) // args.texts)][: args.texts]
    prompts = [source_prompt(tokenizer, pair.prompt) for pair in shown]
    work = Work(args.base, examples(train), examples(dev), prompts, args.N, args.steps, tokenizer.eos)
    sides = {"lora_np": ours} if args.alone else {"lora_np": ours, "PyTorch + PEFT": theirs}
    found = {name: side(work) for name, side in sides.items()}
    for side in found.values():
        for kind in [kind for kind in ("base", "adapted") if kind in side]:
            side[kind] = [tokenizer.decode(ids).strip() for ids in side[kind]]
            side[f"chrF, {kind}"] = chrf(side[kind], shown)
    if args.json:
        print(json.dumps({"environment": environment(), "translated": shown, "sides": found}))
        return
    print(", ".join(f"{key} {value}" for key, value in environment().items()))
    print(f"{len(train)} texts with translations, {len(dev)} held out; {args.steps} steps of {args.N}")
    for name, side in found.items():
        print(
            f"{name:16} held-out loss {side['before'].loss:.4f} -> {side['after'].loss:.4f} nats a token, "
            + "".join(f"{kind} {side[kind]:.1f}, " for kind in side if kind.startswith("chrF"))
            + f"{side['seconds']:.1f} s"
        )
    for i, pair in enumerate(shown):
        print(f"\n{pair.prompt}\n  {'Django':24} {pair.completion}")
        for name, side in found.items():
            for kind in [kind for kind in ("base", "adapted") if kind in side]:
                print(f"  {f'{name}, {kind}':24} {side[kind][i]!r:.100}")


if __name__ == "__main__":
    main()
