"""What several commands take: the base with its tokenizer, and an adapter."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from ..adapter import Adapter
from ..formats.adapters.adapter import kind_of, load_adapter
from ..formats.adapters.base import load_base_for
from ..formats.adapters.expected import expect_adapter
from ..formats.adapters.head import brought_by
from ..formats.adapters.peft_config import CONFIG
from ..formats.files.json_file import read_json
from ..formats.files.messages import shown
from ..formats.files.regular import expect_file
from ..formats.models.base import STORAGES
from ..formats.models.folder import load_model
from ..formats.models.tokenizer import TOKENIZER, load_tokenizer
from ..model import Config, Model
from ..training import embedded
from ..training.examples import Tokens
from ..training.inputs import STANDARD_INPUT, input_name
from ..training.loop import Progress
from ..training.text import BYTES, ByteTokenizer
from .output import Bar

Run: TypeAlias = Callable[[argparse.Namespace], int]  # a command: its arguments in, the exit status out
AddCommand: TypeAlias = Callable[[str, Run, str], argparse.ArgumentParser]


MOST = 2**48  # of a number in an option: more than any computation here could take


def whole(text: str) -> int:
    """An option's integer, of a size that computations are made for."""
    value = int(text)
    if abs(value) > MOST:
        raise argparse.ArgumentTypeError(f"expected a number up to {MOST}")
    return value


def utf8(text: str) -> str:
    """An option's text, which is UTF-8 in any locale."""
    return os.fsencode(text).decode("utf-8")


def add_base(parser: argparse.ArgumentParser) -> None:
    """The argument --base."""
    parser.add_argument(
        "--base", type=Path, metavar="DIR",
        help="the base: a model's folder, or a .gguf file (default: the embedded model of bytes)",
    )  # fmt: skip


def add_storage(parser: argparse.ArgumentParser) -> None:
    """The argument --storage."""
    parser.add_argument(
        "--storage", choices=STORAGES,
        help="how the base's matrices are held (default: float32): bfloat16, where its file has them so; nf4, the "
        "layers' rounded to four bits; gguf, a .gguf file's in Q8_0, Q4_0 and Q4_1 as they are",
    )  # fmt: skip


def add_seed(parser: argparse.ArgumentParser, of: str) -> None:
    """The argument --seed; of: what is drawn from it."""
    parser.add_argument("--seed", type=_seed, default=0, metavar="N", help=f"of {of} (default: %(default)s)")


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected an integer of at least 0, got {text!r}")
    return whole(text)


def base_path(args: argparse.Namespace, bar: Bar) -> Path:
    """--base, or the folder of the embedded base, which is made first if need be.

    That takes a while, so what is wrong with the names of the files to be read is said before.
    """
    _expect_named(args)
    if args.base is not None:
        return Path(args.base)
    return embedded.base_folder(shown_on(bar), embedded.STANDARD)[0]


def _expect_named(args: argparse.Namespace) -> None:
    """An error unless what is named to be read is there: adapters, and files."""
    adapters = getattr(args, "adapter", None)
    for path in adapters if isinstance(adapters, list) else [adapters]:
        if path is not None and kind_of(path) == "peft":
            expect_adapter(path)
    for option in ("data", "dev", "prompts", "chat_template"):
        path = getattr(args, option, None)
        if path is not None and path != STANDARD_INPUT:
            expect_file(path)


def awaited(path: Path, bar: Bar) -> Path:
    """A file to be read; where it is standard input, and somebody sits before it, a line says so."""
    if path == STANDARD_INPUT and sys.stdin is not None and sys.stdin.isatty():
        bar.note(f"{input_name(path)}: a line each, up to the end of the file (Ctrl-D)")
    return path


def adapted(args: argparse.Namespace, path: Path) -> tuple[Model, Adapter | None]:
    """The base in `path`, with the head that --adapter brings, and that adapter, if there is one."""
    if args.adapter is None:
        return load_model(path, storage=args.storage), None
    with fitting(args, args.adapter):
        model = load_base_for(args.adapter, path, storage=args.storage)
        return model, load_adapter(args.adapter, model)


@contextmanager
def fitting(args: argparse.Namespace, *adapters: Path) -> Iterator[None]:
    """A ValueError within, of whole adapters on a base that is not said, tells which base that was, and theirs."""
    try:
        yield
    except ValueError as error:
        theirs = None if args.base is not None else _bases_of(adapters)
        if theirs is None:
            raise
        names = f"; made for {' and '.join(theirs)}" if theirs else ""
        error.args = (f"{error}; no --base was given, so its base is taken for the embedded model of bytes{names}",)
        raise


def _bases_of(adapters: Sequence[Path]) -> list[str] | None:
    """The names that adapters give to their bases, where they do; None if one is damaged, and would fit no base."""
    names = []
    try:
        for adapter in adapters:
            brought_by(adapter)
            if adapter.is_dir():
                names.append(read_json(adapter / CONFIG).get("base_model_name_or_path"))
    except (OSError, ValueError):
        return None
    return [shown(name) for name in dict.fromkeys(names) if isinstance(name, str) and name]


def tokenizer_of(path: Path, config: Config) -> Tokens:
    """A base's own tokenizer; a model of bytes has none."""
    if config.vocab_size == BYTES and path.is_dir() and not (path / TOKENIZER).exists():
        return ByteTokenizer()
    if path.is_dir() and not (path / TOKENIZER).exists():
        raise FileNotFoundError(
            f"{path}: expected a model of bytes, or one with its tokenizer; there is no {TOKENIZER}: copy that of its "
            "base into the folder, or save the model with save_model(path, model, tokenizer=BASE)"
        )
    return load_tokenizer(path)


def shown_on(bar: Bar) -> Callable[[Progress], None]:
    return lambda p: bar.show(p.stage, p.step, p.steps, f"loss {p.loss:.3f}")
