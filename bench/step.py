"""One training step of a whole model: LoRA on q and v, and every weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import lora_np as ln


def cases(preset: str, N: int, T: int) -> dict[str, Callable[[], Any]]:
    """Functions to time: forward alone, a LoRA step, a step of full fine-tuning, of random weights."""
    config = ln.PRESETS[preset]
    model = ln.Model(config, ln.init_weights(config, seed=0))
    adapter = ln.init_adapter(model, ln.LoRAConfig(r=8), seed=0)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (N, T + 1))
    batch = tokens[:, :-1], tokens[:, 1:]
    return {
        "loss alone": lambda: ln.loss(model, *batch, adapter),
        "LoRA": lambda: ln.sharded_loss_and_grads(model, adapter, *batch),
        "every weight": lambda: ln.sharded_loss_and_grads(model, None, *batch, trainable="all"),
    }
