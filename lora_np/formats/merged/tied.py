"""Which tensors of a transformers model are one: a language model's head and its token table, and the head's biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..models.shards import Stored

TABLES = (
    "embed_tokens", "wte", "word_embeddings", "embed_in", "shared", "tok_embeddings", "embeddings", "tokens_embed",
)  # fmt: skip
HEADS = (
    "lm_head", "embed_out", "cls.predictions.decoder", "lm_head.decoder", "predictions.decoder", "vocab_projector",
    "generator_lm_head", "decoder", "lm_loss", "proj_out", "output_projection",
)  # fmt: skip
# Heads of other names, by a tensor that files have of them beside the weight, or by the model's type.
SHOWN_BY = {
    "cls.predictions.bias": "cls.predictions.decoder", "lm_head.dense.weight": "lm_head.decoder",
    "predictions.bias": "predictions.decoder", "vocab_projector.bias": "vocab_projector",
    "generator_lm_head.bias": "generator_lm_head", "decoder.bias": "decoder", "lm_loss.bias": "lm_loss",
}  # fmt: skip
OF_TYPE = {"whisper": "proj_out", "biogpt": "output_projection"}
LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining")


class Tied(NamedTuple):
    """table, head: their keys; head is None where it is not tied, or there is none.

    copies   of what is tied, the keys that the files do not have, and the key of the tensor that each is
    """

    table: str | None
    head: str | None
    copies: Mapping[str, str]


def tied(raw: Mapping[str, Any], tensors: Mapping[str, Stored]) -> Tied:
    """What is tied, by a config.json and the tensors beside it."""
    table, module = _table(tensors), _head(raw, tensors)
    if module is None or not _is_tied(raw, f"{module}.weight" in tensors):
        return Tied(table, None, {})
    head, bias = f"{module}.weight", f"{module}.bias"
    shown = {head: table, bias: f"{module.rpartition('.')[0]}.bias"}  # the bias of a decoder is its parent's
    return Tied(table, head, {k: v for k, v in shown.items() if k not in tensors and v is not None and v in tensors})


def is_table(key: str) -> bool:
    """Whether a tensor of this name is a table of tokens."""
    return key.removesuffix(".weight").rpartition(".")[2] in TABLES


def is_head(key: str) -> bool:
    """Whether a tensor of this name is a language model's head."""
    return key.removesuffix(".weight") in HEADS


def _table(tensors: Mapping[str, Stored]) -> str | None:
    """The key of the token table."""
    found = [key for key in tensors if key.endswith(".weight") and is_table(key)]
    return min(found, key=lambda key: (key.count("."), len(key)), default=None)


def _head(raw: Mapping[str, Any], tensors: Mapping[str, Stored]) -> str | None:
    """The module of a language model's head, whether the files have it or not; None if the model is another."""
    classes = raw.get("architectures")
    if not str(classes[0] if isinstance(classes, list) and classes else "").endswith(LANGUAGE_MODELS):
        return None
    shown = next((head for key, head in SHOWN_BY.items() if key in tensors), OF_TYPE.get(str(raw.get("model_type"))))
    return shown or next((head for head in HEADS if f"{head}.weight" in tensors), HEADS[0])


def _is_tied(raw: Mapping[str, Any], is_there: bool) -> bool:
    text = raw.get("text_config")
    said = [one["tie_word_embeddings"] for one in (raw, text) if isinstance(one, dict) and "tie_word_embeddings" in one]
    return any(said) if said else not is_there or raw.get("model_type") == "gpt2"
