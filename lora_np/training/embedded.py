"""The embedded base: a small language model of bytes, pretrained on text that Python brings, kept in the user's cache.

It reads Python's language reference. Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..adapter import Adapter
from ..backend import Array
from ..batch import BatchDict
from ..formats.files.atomic import discard, expect_new, new_folder
from ..formats.files.safetensors_file import import_safetensors
from ..formats.models.folder import save_model
from ..model import Config, Model, init_weights
from .loop import Progress, Settings, placed, train
from .text import BYTES, encode, language_reference, random_windows, split


@dataclass(frozen=True)
class Recipe:
    """How an embedded base is made: its sizes, the rows of a batch, the training."""

    config: Config
    rows: int
    settings: Settings


STANDARD = Recipe(
    Config(BYTES, 64, n_layer=4, n_head=4, d_model=128, d_ff=512),
    16,
    Settings(steps=500, lr=2e-3, warmup=50, weight_decay=0.01),
)
QUICK = Recipe(Config(BYTES, 64, n_layer=2, n_head=2, d_model=32, d_ff=64), 8, Settings(steps=30, lr=3e-3, warmup=3))


def cache_folder() -> Path:
    """Where pretrained bases are kept: $LORA_NP_CACHE, or lora_np in the user's own cache folder.

    A FileNotFoundError if the environment names none, and the user has no home.
    """
    if os.environ.get("LORA_NP_CACHE"):
        return Path(os.environ["LORA_NP_CACHE"])
    if sys.platform != "darwin" and os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "lora_np"
    try:
        home = Path.home()
    except RuntimeError:
        raise FileNotFoundError("this user has no home to keep a base in: set LORA_NP_CACHE to a folder") from None
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "lora_np"


BASE, SHA256 = "base", "sha256"  # what a cached folder holds: the base's own folder, and the hash of what is in that


def base_folder(report: Callable[[Progress], None], recipe: Recipe) -> tuple[Path, bool]:
    """The pretrained base's folder in the cache; it is made now if need be. -> the folder, and whether it was there.

    One that is damaged is made anew, which the stage that is reported says; an OSError or ImportError, before any work,
    if the cache cannot be written.
    """
    text = language_reference()
    key = hashlib.sha256(f"{recipe.config} {recipe.settings} {recipe.rows} {text}".encode()).hexdigest()[:16]
    folder, stage = cache_folder() / f"base-{key}", "pretraining"
    if _is_whole(folder):
        return folder / BASE, True
    if folder.exists():
        stage = f"pretraining anew, as {folder} was damaged"
        discard(folder)
    import_safetensors()  # which writes it: before the work, not after it
    try:
        expect_new(folder)
        tokens, _ = split(encode(text), 0.1)
        model = Model(recipe.config, init_weights(recipe.config, seed=recipe.settings.seed))
        model, _ = train_on_text(stage, model, None, tokens, recipe.rows, recipe.settings, report)
        with new_folder(folder) as new:
            save_model(new / BASE, model)
            (new / SHA256).write_text(_digest(new / BASE))
    except FileExistsError:  # another process was first
        if not _is_whole(folder):
            raise
    return folder / BASE, False


def _is_whole(folder: Path) -> bool:
    """Whether each byte of a cached base is there as it was written."""
    try:
        return (folder / SHA256).read_bytes() == _digest(folder / BASE).encode()
    except OSError:
        return False


def _digest(folder: Path) -> str:
    """SHA-256 of the names and the bytes of all files in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        digest.update(f"{path.name} {len(data)}\n".encode() + data)
    return digest.hexdigest()


def train_on_text(
    stage: str,
    model: Model,
    adapter: Adapter | None,
    tokens: Array,
    rows: int,
    settings: Settings,
    report: Callable[[Progress], None],
) -> tuple[Model, Adapter | None]:
    """Trains on random windows of a text, `rows` a batch. -> the trained model and adapter."""

    def batch(step: int) -> BatchDict:
        T = model.config.n_positions
        return random_windows(tokens, N=rows, T=T, seed=settings.seed, step=step)._asdict()

    state = train(model, adapter, batch, settings, report=lambda seen: report(seen._replace(stage=stage)))
    return placed(model, adapter, state)
