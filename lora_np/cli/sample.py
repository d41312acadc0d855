"""lora-np sample: small files of data to try the others on."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from ..training.sample import write_sample
from .base import AddCommand
from .output import emit

OPTIONS = {
    "reviews.tsv": "--task classify",
    "tags.conll": "--task tag",
    "french.tsv": "--task translate",
    "chat.jsonl": "--base MODEL",
}


def run_sample(args: argparse.Namespace) -> int:
    lines = write_sample(args.out)
    said = []
    for name, count in lines.items():
        learn = f"lora-np finetune {OPTIONS.get(name, '')} --data {shlex.quote(str(args.out / name))}"
        said.append(f"{name:12} {count:5,} lines   {' '.join(learn.split())} --out {Path(name).stem}")
    said.append("MODEL: a base with a chat template")
    emit(args, {"out": str(args.out), "lines": lines}, said)
    return 0


def add_commands(command: AddCommand) -> None:
    """The command of this file, and its argument."""
    p = command(
        "sample", run_sample, "small files of data to try things on: text, pairs, chat, translations, labels, tags"
    )
    p.add_argument("out", type=Path, metavar="DIR", help="a new folder for them")
