"""lora_np: the executable specification of LoRA. A transformer in NumPy, forward and backward written by hand."""

from .cli import early as _early  # noqa: F401  # first, as what follows takes a while

# isort: split
from importlib import import_module as _import_module
from typing import Any as _Any

from .adapter import Adapter, LoRAConfig, combine, count_parameters, init_adapter, merge, unmerge
from .backend import asnumpy, backend_name
from .decode import generate
from .lora import lora_linear, lora_linear_backward
from .loss import forward, loss, loss_and_grads
from .model import PRESETS, Config, Model, init_weights
from .optim import adamw
from .parallel import sharded_loss_and_grads

__version__ = "0.1.0"

# What few programs use is imported on first use.
_LAZY = {
    "load_adapter": "formats.adapters.adapter",
    "save_adapter": "formats.adapters.adapter",
    "load_model": "formats.models.folder",
    "load_tokenizer": "formats.models.tokenizer",
    "save_model": "formats.models.folder",
    "analysis": "analysis",
    "gradcheck": "gradcheck",
    "testing": "testing",
}

__all__ = [
    "PRESETS",
    "Adapter",
    "Config",
    "LoRAConfig",
    "Model",
    "adamw",
    "asnumpy",
    "backend_name",
    "combine",
    "count_parameters",
    "forward",
    "generate",
    "init_adapter",
    "init_weights",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "lora_linear",
    "lora_linear_backward",
    "loss",
    "loss_and_grads",
    "merge",
    "save_adapter",
    "save_model",
    "sharded_loss_and_grads",
    "unmerge",
]


def __getattr__(name: str) -> _Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _import_module(f".{_LAZY[name]}", __name__)
    return module if name == _LAZY[name] else getattr(module, name)
