"""Whether a folder is an adapter's, and what it is instead."""

from __future__ import annotations

from pathlib import Path

from ..files.safetensors_file import refuse_pickle
from .peft_config import CONFIG, WEIGHTS
from .unfinished import CHECKPOINT, stands_at

MODEL_CONFIG = "config.json"


def expect_adapter(folder: Path) -> None:
    """A FileNotFoundError or ValueError unless it is a folder that has an adapter's configuration.

    It says what it is instead, if that is known: training's that is not finished, or a model's.
    """
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not folder.is_dir():
        refuse_pickle(folder, WEIGHTS, is_dict=True)
        raise ValueError(f"{folder}: expected an adapter's folder, with {CONFIG} and {WEIGHTS}, got a file")
    if (folder / CONFIG).exists():
        return
    if (folder / CHECKPOINT).is_file():
        raise ValueError(
            f"{folder}: training is not finished: its checkpoint is at {stands_at(folder)}; the same lora-np finetune "
            "with --resume goes on from there"
        )
    if is_model(folder):
        raise ValueError(f"{folder}: expected an adapter's folder, with {CONFIG}, got a model's")
    raise FileNotFoundError(f"{folder / CONFIG}: no such file")


def is_model(folder: Path) -> bool:
    """Whether a folder is a model's, and no adapter's."""
    return (folder / MODEL_CONFIG).is_file() and not (folder / CONFIG).exists()
