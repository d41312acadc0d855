"""lora-np convert: an adapter in another format."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..formats.adapters.adapter import kind_of, load_adapter, save_adapter
from ..formats.adapters.base import load_base_for
from ..formats.adapters.expected import is_model
from ..formats.adapters.peft import records_base
from ..formats.files.atomic import expect_new
from ..formats.merged.conversion import convert_by_name, fits_as_it_is
from ..formats.merged.folder import GGUF_OF_FOLDER
from ..formats.models.folder import can_run
from .base import AddCommand, add_base, base_path, fitting
from .output import Bar, emit


def run_convert(args: argparse.Namespace) -> int:
    expect_new(args.out)
    if args.out.suffix.lower() == ".gguf" and is_model(args.adapter):
        raise ValueError(f"{args.adapter}: expected an adapter, got a model's folder: {GGUF_OF_FOLDER}")
    with Bar() as bar:
        path = base_path(args, bar)
    result = {"out": str(args.out), "from": kind_of(args.adapter), "to": kind_of(args.out)}
    line = "{out}: {to}'s format, from {from}'s".format(**result)
    with fitting(args, args.adapter):
        if _is_by_name(args, path):
            remarks = convert_by_name(path, args.adapter, args.out)
            emit(args, {**result, "remarks": remarks}, [line, *(f"the old one: {remark}" for remark in remarks)])
            return 0
        model = load_base_for(args.adapter, path)
        adapter = load_adapter(args.adapter, model, alpha=args.alpha, enabled=args.enabled)
        save_adapter(args.out, adapter, model)
    emit(args, result, [line])
    return 0


def _is_by_name(args: argparse.Namespace, base: Path) -> bool:
    """Whether it goes by its modules' names alone: onto what is not run here, or where PEFT would not find it."""
    kinds = {kind_of(args.adapter), kind_of(args.out)}
    if not base.is_dir() or kind_of(args.out) not in ("peft", "gguf") or records_base(args.adapter):
        return False
    return not can_run(base) or (kinds == {"peft"} and not fits_as_it_is(base, args.adapter))


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
