"""A tokenizer beside a model's weights: another folder's files, or what a .gguf file says, in such files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ..files.json_file import write_json
from ..files.regular import expect_file
from .chat_template import TEMPLATE, find_chat_template
from .tokenizer import TOKENIZER, TOKENIZER_CONFIG, Tokenizer, load_tokenizer

# What a folder has of its tokenizer, for this package and others.
TOKENIZER_FILES = (
    TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", TEMPLATE, "chat_template.json",
    "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model",
)  # fmt: skip


def write_tokenizer(folder: Path, source: str | os.PathLike[str] | Tokenizer) -> None:
    """Writes the tokenizer of `source`, a model's folder or .gguf file, or one that was loaded from it, with its chat
    template. Errors are those of `load_tokenizer`."""
    tokenizer = source if isinstance(source, Tokenizer) else load_tokenizer(source)
    expect_file(tokenizer.path)
    if tokenizer.path.suffix.lower() != ".gguf":
        for name in TOKENIZER_FILES:
            if (tokenizer.path.parent / name).is_file():
                shutil.copyfile(tokenizer.path.parent / name, folder / name)
        return
    template = find_chat_template(tokenizer.path)
    tokenizer.backend.save(str(folder / TOKENIZER))
    write_json(folder / TOKENIZER_CONFIG, tokenizer.special())
    if template is not None:
        (folder / TEMPLATE).write_text(template.source, encoding="utf-8", newline="")
