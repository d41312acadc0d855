"""Transformers' Conv1D, whose weight is stored (in, out): by its name in models of some types."""

from __future__ import annotations

from ..models.families import FAMILIES

TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
NAMES = ("c_attn", "q_attn", "c_proj", "c_fc")


def is_conv1d(key: str, model_type: str, said: bool = False) -> bool:
    """Whether a module, or its weight, is one.

    said: what the adapter's fan_in_fan_out says, which counts in models of types that are not known alone. PEFT goes by
    the module's class.
    """
    if model_type in TYPES:
        return key.removesuffix(".weight").rpartition(".")[2] in NAMES
    return said and model_type not in FAMILIES
