"""The families of models that are run here, a file each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..family import Family
from .bart import BART
from .bert import BERT
from .deberta import DEBERTA
from .distilbert import DISTILBERT
from .gemma import GEMMA
from .gemma3 import GEMMA3, GEMMA3_TEXT
from .gpt2 import GPT2
from .llama import LLAMA
from .mistral import MISTRAL
from .opt import OPT
from .own import OWN
from .phi3 import PHI3
from .qwen2 import QWEN2
from .qwen3 import QWEN3
from .roberta import ROBERTA
from .t5 import MT5, T5, T5_GATED

_ALL = (
    GPT2, BERT, ROBERTA, LLAMA, DISTILBERT, MISTRAL, QWEN2, QWEN3, GEMMA, GEMMA3_TEXT, GEMMA3, PHI3, OPT,
    DEBERTA, T5, T5_GATED, MT5, BART,
)  # fmt: skip
FAMILIES: Mapping[str, Family] = {family.name: family for family in _ALL}  # of two that fit, the first
MODEL_TYPES = {kind: [one for one in _ALL if one.model_type == kind] for kind in (one.model_type for one in _ALL)}


def family_in(raw: Mapping[str, Any]) -> Family:
    """The family whose config.json `raw` is, of a known model type; of several, the one that has its activation."""
    several = MODEL_TYPES[raw["model_type"]]
    return next((one for one in several if one.activation(raw) is not None), several[0])


__all__ = ["FAMILIES", "MODEL_TYPES", "OWN", "family_in"]
