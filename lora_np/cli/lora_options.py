"""What an adapter is to be, in options: or what the one is already that training starts from."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from ..adapter import TARGETS, Adapter, LoRAConfig
from ..model import Config
from .base import whole
from .targets import targets_of


def add_lora(parser: argparse.ArgumentParser) -> None:
    """The arguments --r, --alpha, --targets, --dropout and --dora."""
    new = LoRAConfig()
    parser.add_argument("--r", type=whole, help=f"rank (default: {new.r}, or --adapter's)")
    parser.add_argument("--alpha", type=float, help=f"s = alpha / r (default: {new.alpha:g}, or --adapter's)")
    parser.add_argument(
        "--targets", nargs="+", metavar="T",
        help=f"of {' '.join(TARGETS)}; all: every matrix of the layers; or a family's names, as q_proj "
        f"(default: {' '.join(new.targets)}, or --adapter's)",
    )  # fmt: skip
    parser.add_argument(
        "--dropout", type=float, help=f"on the low-rank branch (default: {new.dropout}, or --adapter's)"
    )
    parser.add_argument(
        "--dora",
        action="store_true",
        default=None,
        help="DoRA: train each row's length too (default: --adapter's)",
    )


def _said(args: argparse.Namespace, config: Config) -> dict[str, Any]:
    """The fields of a LoRAConfig that the options say."""
    fields = {name: getattr(args, name) for name in ("r", "alpha", "dropout", "dora")}
    fields["targets"] = None if args.targets is None else targets_of(args.targets, config)
    return {name: value for name, value in fields.items() if value is not None}


def new_config(args: argparse.Namespace, config: Config, *, train_head: bool) -> LoRAConfig:
    """The configuration of a new adapter of a model."""
    return LoRAConfig(**_said(args, config), train_head=train_head)


def continued(args: argparse.Namespace, start: Adapter, config: Config) -> Adapter:
    """The adapter that training starts from: it stays what it is; --dropout, which is training's, may be another.

    A ValueError if an option says otherwise.
    """
    said = _said(args, config)
    dropout = said.pop("dropout", start.config.dropout)
    has = {name: getattr(start.config, name) for name in said}
    wrong = [name for name in said if _comparable(said[name]) != _comparable(has[name])]
    if wrong:
        expected, got = (" ".join(f"--{name} {_words(of[name])}" for name in wrong) for of in (has, said))
        raise ValueError(f"{args.adapter}: training goes on from it as it is: expected {expected}, or none; got {got}")
    return replace(start, config=replace(start.config, dropout=dropout))


def _comparable(value: Any) -> Any:
    return set(value) if isinstance(value, tuple) else value


def _words(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value) if isinstance(value, bool) else f"{value:g}"
