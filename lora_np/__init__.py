"""lora_np: the executable specification of LoRA. A transformer in NumPy, forward and backward written by hand.

In a signature the adapter stands before the data where it is trained, and last where it may be left out:

    loss_and_grads(model, adapter, tokens, targets)    forward(model, tokens, adapter)

That is the right order. In this version the other one is understood too: an adapter is told from data by its type.
"""

from .cli import early as _early  # noqa: F401  # first, as what follows takes a while

# isort: split
from importlib import import_module as _import_module
from typing import TYPE_CHECKING

from .adapter import Adapter, LoRAConfig, combine, count_parameters, init_adapter, init_pissa, merge, unmerge
from .backend import asnumpy, backend_name
from .decode import generate
from .dora import dora_linear, dora_linear_backward
from .formats.models.presets import PRESETS
from .lora import lora_linear, lora_linear_backward
from .loss import forward, loss, loss_and_grads
from .model import Config, Model, init_weights
from .optim import adamw, clip
from .parallel import sharded_loss_and_grads
from .storage import dequantise_nf4, quantise_nf4

__version__ = "0.1.0"

# What few programs use is imported on first use; type checkers and editors read the names below.
if TYPE_CHECKING:
    from . import analysis as analysis
    from . import gradcheck as gradcheck
    from . import testing as testing
    from .formats.adapters.adapter import load_adapter, save_adapter
    from .formats.models.folder import load_model, save_model
    from .formats.models.tokenizer import load_tokenizer
    from .training.loop import Settings, evaluate, train

_LAZY = {
    "analysis": "analysis",
    "gradcheck": "gradcheck",
    "testing": "testing",
    "load_adapter": "formats.adapters.adapter",
    "save_adapter": "formats.adapters.adapter",
    "load_model": "formats.models.folder",
    "save_model": "formats.models.folder",
    "load_tokenizer": "formats.models.tokenizer",
    "Settings": "training.loop",
    "evaluate": "training.loop",
    "train": "training.loop",
}

__all__ = [  # but for testing, which needs an extra
    "PRESETS",
    "Adapter",
    "Config",
    "LoRAConfig",
    "Model",
    "Settings",
    "adamw",
    "analysis",
    "asnumpy",
    "backend_name",
    "clip",
    "combine",
    "count_parameters",
    "dequantise_nf4",
    "dora_linear",
    "dora_linear_backward",
    "evaluate",
    "forward",
    "generate",
    "gradcheck",
    "init_adapter",
    "init_pissa",
    "init_weights",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "lora_linear",
    "lora_linear_backward",
    "loss",
    "loss_and_grads",
    "merge",
    "quantise_nf4",
    "save_adapter",
    "save_model",
    "sharded_loss_and_grads",
    "train",
    "unmerge",
]


def __dir__() -> list[str]:
    hidden = {name for name in globals() if name.startswith("_") and not name.endswith("__")} | {"TYPE_CHECKING"}
    return sorted({*globals(), *_LAZY} - hidden)


if not TYPE_CHECKING:  # to a type checker, it would make any name a public one

    def __getattr__(name):
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = _import_module(f".{_LAZY[name]}", __name__)
        return module if name == _LAZY[name] else getattr(module, name)
