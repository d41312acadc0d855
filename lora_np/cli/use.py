"""lora-np generate: what a model says, with an adapter or without."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from ..decode import generate_on
from ..training.examples import prompt_ids
from .base import AddCommand, adapted, add_base, add_seed, add_storage, base_path, tokenizer_of, utf8, whole
from .output import Bar, emit


def run_generate(args: argparse.Namespace) -> int:
    if not args.prompt:
        raise ValueError("--prompt: expected some text to go on from, got none")
    with Bar() as bar:
        path = base_path(args, bar)
    model, adapter = adapted(args, path)
    tokenizer = tokenizer_of(path, model.config)
    prompt = np.array([prompt_ids(tokenizer, args.prompt)])
    tokens = generate_on(
        model, prompt, adapter, n=args.n, temperature=args.temperature, top_k=args.top_k,
        top_p=args.top_p, seed=args.seed if args.temperature > 0 else None,
    )[0].tolist()  # fmt: skip
    new = tokens[prompt.shape[1] :]
    if tokenizer.eos in new:
        new = new[: new.index(tokenizer.eos)]
    text = args.prompt + tokenizer.decode(new)
    emit(
        args, {"prompt": args.prompt, "text": text}, text.split("\n"), longest=sys.maxsize
    )  # JSON has it to the letter
    return 0


def add_commands(command: AddCommand) -> None:
    """The commands of this file, and their arguments."""
    p = command("generate", run_generate, "text after a prompt")
    add_base(p)
    add_storage(p)
    p.add_argument("--adapter", type=Path, metavar="DIR", help="the adapter's folder")
    p.add_argument("--prompt", type=utf8, required=True, help="the text to go on from")
    p.add_argument("-n", type=whole, default=200, help="tokens (default: %(default)s)")
    p.add_argument("--temperature", type=float, default=0.7, help="0: always the likeliest (default: %(default)s)")
    p.add_argument("--top-k", type=whole, help="draw from the k likeliest")
    p.add_argument("--top-p", type=float, help="draw from the likeliest that together reach p")
    add_seed(p, "the draws")
