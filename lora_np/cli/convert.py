"""lora-np convert: an adapter in another format."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..formats.adapters.adapter import kind_of, load_adapter, save_adapter
from ..formats.adapters.base import load_base_for
from ..formats.adapters.peft import records_base
from ..formats.files.atomic import expect_new
from ..formats.merged.mended import fits_as_it_is, mend_adapter
from ..formats.models.folder import can_run
from .base import AddCommand, add_base, base_path
from .output import Bar, emit


def run_convert(args: argparse.Namespace) -> int:
    expect_new(args.out)
    with Bar() as bar:
        path = base_path(args, bar)
    if _is_to_be_mended(args, path):
        lines = mend_adapter(path, args.adapter, args.out)
        result = {"out": str(args.out), "from": "peft", "to": "peft", "remarks": lines}
        emit(
            args,
            result,
            [f"{args.out}: PEFT's format, by the names of {path}", *(f"the old one: {one}" for one in lines)],
        )
        return 0
    model = load_base_for(args.adapter, path)
    adapter = load_adapter(args.adapter, model, alpha=args.alpha, enabled=args.enabled)
    save_adapter(args.out, adapter, model)
    result = {"out": str(args.out), "from": kind_of(args.adapter), "to": kind_of(args.out)}
    emit(args, result, ["{out}: {to}'s format, from {from}'s".format(**result)])
    return 0


def _is_to_be_mended(args: argparse.Namespace, base: Path) -> bool:
    """Whether an adapter's folder goes into another by its modules' names alone: what is run needs no such thing."""
    if base.suffix.lower() == ".gguf" or not args.adapter.is_dir() or records_base(args.adapter):
        return False
    if kind_of(args.out) != "peft":
        return False
    return not can_run(base) or not fits_as_it_is(base, args.adapter)


def add_commands(command: AddCommand) -> None:
    """The command of this file, and its arguments."""
    p = command(
        "convert",
        run_convert,
        "an adapter in another format: PEFT's, loralib's, llama.cpp's or .npz; or by right names",
    )
    add_base(p)
    p.add_argument("--adapter", type=Path, required=True, metavar="PATH", help="the adapter: its path says what it is")
    p.add_argument(
        "--out", type=Path, required=True, metavar="PATH",
        help="what to write, which must not be there yet: a folder (PEFT's), .safetensors, .gguf or .npz",
    )  # fmt: skip
    p.add_argument("--alpha", type=float, metavar="A", help="lora_alpha, which loralib's own files do not say")
    p.add_argument(
        "--enabled", nargs="+", choices=["q", "k", "v"], metavar="P",
        help="of q k v: what loralib's MergedLinear adapts (default: q v, or all three)",
    )  # fmt: skip
