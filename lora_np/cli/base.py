"""What several commands take: the base, and its adapter."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from .. import demo
from ..formats.folder import load_model
from ..formats.peft import load_adapter
from ..lora import Adapter
from ..model import Model
from .output import Bar

Run: TypeAlias = Callable[[argparse.Namespace], int]  # a command: its arguments in, the exit status out
AddCommand: TypeAlias = Callable[[str, Run, str], argparse.ArgumentParser]


def add_base(parser: argparse.ArgumentParser) -> None:
    """The argument --base."""
    parser.add_argument("--base", type=Path, metavar="DIR", help="the base model's folder (default: the embedded one)")


def base_model(args: argparse.Namespace, bar: Bar) -> Model:
    """The model of --base, or the embedded one."""
    if args.base is not None:
        return load_model(args.base)
    return demo.default_base(shown_on(bar), demo.STANDARD)[0]


def shown_on(bar: Bar) -> Callable[[demo.Progress], None]:
    return lambda p: bar.show(p.stage, p.step, p.steps, f"loss {p.loss:.3f}")


def adapter_of(args: argparse.Namespace, model: Model) -> Adapter | None:
    return None if args.adapter is None else load_adapter(args.adapter, model)
