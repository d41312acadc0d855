"""The families of models that are run here, a file each."""

from __future__ import annotations

from collections.abc import Mapping

from ..family import Family
from .bert import BERT
from .gpt2 import GPT2
from .llama import LLAMA
from .own import OWN
from .roberta import ROBERTA

FAMILIES: Mapping[str, Family] = {family.name: family for family in (GPT2, BERT, ROBERTA, LLAMA)}  # by model_type

__all__ = ["FAMILIES", "OWN"]
