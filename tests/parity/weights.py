"""The names of Hugging Face's GPT-2, BERT, RoBERTa and Llama, and of PEFT's adapters, beside ours. NumPy alone.

The mapping is written by hand and apart from lora_np.formats, so that either can be checked against the other. It is
linear (renaming, transposing, splitting), so that it serves weights and gradients alike.
"""

import re

import numpy as np

# Ours -> theirs: * is the layer's number, (?:a|b) the one or the other.
_GPT2 = {
    "embed.tokens": "wte",
    "embed.positions": "wpe",
    "layers.*.norm1": "h.*.ln_1",
    "layers.*.attn.qkv": "h.*.attn.c_attn",
    "layers.*.attn.o": "h.*.attn.c_proj",
    "layers.*.norm2": "h.*.ln_2",
    "layers.*.mlp.up": "h.*.mlp.c_fc",
    "layers.*.mlp.down": "h.*.mlp.c_proj",
    "norm": "ln_f",
    "head": "(?:lm_head|score|classifier)",
}
_BERT = {
    "embed.tokens": "embeddings.word_embeddings",
    "embed.positions": "embeddings.position_embeddings",
    "embed.types": "embeddings.token_type_embeddings",
    "embed.norm": "embeddings.LayerNorm",
    "layers.*.attn.q": "encoder.layer.*.attention.self.query",
    "layers.*.attn.k": "encoder.layer.*.attention.self.key",
    "layers.*.attn.v": "encoder.layer.*.attention.self.value",
    "layers.*.attn.o": "encoder.layer.*.attention.output.dense",
    "layers.*.norm1": "encoder.layer.*.attention.output.LayerNorm",
    "layers.*.mlp.up": "encoder.layer.*.intermediate.dense",
    "layers.*.mlp.down": "encoder.layer.*.output.dense",
    "layers.*.norm2": "encoder.layer.*.output.LayerNorm",
    "pooler": "pooler.dense",
    "head": "classifier",
}
_LLAMA = {
    "embed.tokens": "embed_tokens",
    "layers.*.norm1": "layers.*.input_layernorm",
    "layers.*.attn.q": "layers.*.self_attn.q_proj",
    "layers.*.attn.k": "layers.*.self_attn.k_proj",
    "layers.*.attn.v": "layers.*.self_attn.v_proj",
    "layers.*.attn.o": "layers.*.self_attn.o_proj",
    "layers.*.norm2": "layers.*.post_attention_layernorm",
    "layers.*.mlp.gate": "layers.*.mlp.gate_proj",
    "layers.*.mlp.up": "layers.*.mlp.up_proj",
    "layers.*.mlp.down": "layers.*.mlp.down_proj",
    "norm": "norm",
    "head": "(?:lm_head|score)",
}
NAMES = {
    "gpt2": _GPT2,
    "bert": _BERT,
    "roberta": _BERT | {"pooler": "classifier.dense", "head": "classifier.out_proj"},
    "llama": _LLAMA,
}


def pattern(family: str, name: str, layers: str = r"\d+") -> str:
    """A regular expression for their names of what we call `name`: a target ("q") or a matrix ("layers.1.attn.q").

    layers: an expression for the layers' numbers, where `name` is a target.
    """
    if name.startswith("layers."):
        layers = name.split(".")[1]
        name = re.sub(r"\d+", "*", name, count=1)
    name = "embed.tokens" if name == "embed" else name
    (theirs,) = (theirs for ours, theirs in NAMES[family].items() if ours == name or ours.endswith(f".{name}"))
    return theirs.replace(".", r"\.").replace("*", layers)


def our_name(family: str, name: str) -> str:
    """Our name of their module `name`, with or without the name of the model in front of it."""
    for ours, theirs in NAMES[family].items():
        found = re.fullmatch(r"(?:\w+\.)?" + theirs.replace(".", r"\.").replace("*", r"(\d+)"), name)
        if found:
            return ours.replace("*", found[1]) if "*" in ours else ours
    raise KeyError(f"{family}: {name} has no name of ours")


def bare(name: str) -> str:
    """Their name without what PEFT puts around it."""
    name = name.removeprefix("base_model.model.").replace(".base_layer", "")
    return re.sub(r"\.modules_to_save\.\w+", "", name)


def flat(family: str, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Their weights, gradients or adapter tensors under our names, each matrix (out, in), GPT-2's c_attn in three.

    state: {name: array} as named_parameters gives it, PEFT's wrappers included.
    """
    result = {}
    for name, value in state.items():
        stem, part = _stem_and_part(bare(name))
        ours = our_name(family, stem)
        if part in ("A", "B", "m"):
            result[f"{ours}.{part}"] = value
        elif ours.startswith("embed.") and ours != "embed.norm":
            result[ours] = value
        elif family == "gpt2" and ours.startswith("layers."):
            value = value.T  # Conv1D holds (in, out); a vector stays as it is
            names = [ours.replace("qkv", letter) for letter in "qkv"] if ours.endswith("qkv") else [ours]
            result |= {f"{n}.{part}": v for n, v in zip(names, np.split(value, len(names)), strict=True)}
        else:
            result[f"{ours}.{part}"] = value
    return result


def _stem_and_part(name: str) -> tuple[str, str]:
    """("h.0.attn.c_attn", "weight" or "bias", or for an adapter's factors "A" or "B", and for its magnitudes "m")."""
    factor = re.fullmatch(r"(.*)\.lora_(?:embedding_)?([AB]|magnitude_vector)\.\w+(?:\.weight)?", name)
    if factor:
        return factor[1], factor[2][0]
    stem, _, part = name.rpartition(".")
    return stem, part
