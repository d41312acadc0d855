"""Models of the llama architecture in GGUF files."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from ...model import Config, Model
from .base import LazyWeights, Wanted, check_layers, held
from .gguf_file import GGUFFile, open_gguf
from .heads import completed, taken, with_head

ARCHITECTURE = "llama"
NAMES = {
    "embed.tokens": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "head.weight": "output.weight",
}
LAYER_NAMES = {
    "norm1": "attn_norm", "attn.q": "attn_q", "attn.k": "attn_k", "attn.v": "attn_v", "attn.qkv": "attn_qkv",
    "attn.o": "attn_output", "norm2": "ffn_norm", "mlp.gate": "ffn_gate", "mlp.up": "ffn_up", "mlp.down": "ffn_down",
}  # fmt: skip
# Keys of the architecture that are read; any other must have the value given here, with which it changes nothing.
READ = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "attention.head_count",
    "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "attention.key_length", "attention.value_length",
    "rope.freq_base", "rope.dimension_count",
)  # fmt: skip
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none",), "rope.scaling.factor": (1, 0), "rope.scale_linear": (1,), "expert_count": (0,),
    "expert_used_count": (0,), "attention.causal": (True,), "use_parallel_residual": (False,),
    "tensor_data_layout": ("Meta AI original pth",), "attention.clamp_kqv": (0,), "attention.max_alibi_bias": (0,),
    "logit_scale": (1,), "embedding_scale": (1,), "residual_scale": (1,),
}  # fmt: skip


def load_gguf(path: Path, wanted: Wanted) -> Model:
    """The model in a .gguf file of the llama architecture, as load_model is asked for it.

    Tensors of every type that the gguf package decodes; the head is tied where the file has none. They are
    read one by one: no more is held than the weights in their dtype, float32 if none is wanted, and one tensor as the
    file has it. A ValueError, in one line, names what is damaged or not supported: the file, and the key or the tensor.
    """
    with open_gguf(path) as file:
        saved, found = open_weights(file, wanted.dtype or "float32")
        config = with_head(saved, wanted.head, wanted.n_labels)
        weights = {
            name: held(found[name], wanted.storage, f"{file.path}: {file_name(name)}") for name in taken(saved, config)
        }
    return Model(config, completed(config, weights, wanted.seed, str(path)))


def open_weights(file: GGUFFile, dtype: str) -> tuple[Config, LazyWeights]:
    """A file's Config and its weights in `dtype`, which are read when asked for; errors are those of `load_gguf`."""
    config = read_config(file)
    _check_tensors(file, config)
    readers = {
        name: partial(file.read, file_name(name), dtype, heads=paired_heads(name, config))
        for name in config.weight_shapes()
    }
    return config, LazyWeights(readers)


def read_config(file: GGUFFile) -> Config:
    """The Config in a file's metadata; a ValueError names what is not supported."""
    architecture = file.get("general.architecture", str)
    if architecture != ARCHITECTURE:
        raise ValueError(f"{file.path}: architecture {architecture!r:.100} is not supported; {ARCHITECTURE} is")
    _check_keys(file)

    def value(key: str, kind: type = int, default: Any = None) -> Any:
        return file.get(f"{ARCHITECTURE}.{key}", kind, default)

    n_layer, n_head = value("block_count"), value("attention.head_count")
    check_layers(n_layer, len(file.tensors), f"{file.path}: block_count")
    table = file.tensors.get("token_embd.weight")
    if table is None or not table.shape:
        raise ValueError(f"{file.path}: the tensor token_embd.weight is missing")
    fields: dict[str, Any] = {
        "vocab_size": value("vocab_size", default=table.shape[0]),
        "n_positions": value("context_length"),
        "n_layer": n_layer,
        "n_head": n_head,
        "n_kv_head": value("attention.head_count_kv", default=n_head),
        "d_model": value("embedding_length"),
        "d_ff": value("feed_forward_length"),
        "tie_head": "output.weight" not in file.tensors,
        "eps": value("attention.layer_norm_rms_epsilon", float),
        "rope_theta": value("rope.freq_base", float, 10000.0),
    }
    try:
        config = Config(**fields, norm="rms", positions="rotary", activation="silu_gated", bias=False)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from None
    for key in ("rope.dimension_count", "attention.key_length", "attention.value_length"):
        if value(key, default=config.head_width) != config.head_width:
            raise ValueError(f"{file.path}: {key}: expected a head's width, {config.head_width}, got {value(key)}")
    return config


def file_name(name: str) -> str:
    """The file's name of one of our weights."""
    if name in NAMES:
        return NAMES[name]
    _, layer, part = name.removesuffix(".weight").split(".", 2)
    return f"blk.{layer}.{LAYER_NAMES[part]}.weight"


def paired_heads(name: str, config: Config) -> int:
    """How many heads have their rows in pairs (2j, 2j+1) in the file, where T11 turns (j, j + K/2); 0: in order."""
    if name.endswith("attn.q.weight"):
        return config.n_head
    return config.kv_heads if name.endswith("attn.k.weight") else 0


def _check_keys(file: GGUFFile) -> None:
    """A ValueError if a key asks for what is not computed here."""
    for key, value in file.metadata.items():
        name = key.removeprefix(f"{ARCHITECTURE}.")
        if name != key and name not in READ and (name not in NEUTRAL or value not in NEUTRAL[name]):
            raise ValueError(f"{file.path}: {key!r:.100} = {value!r:.100} is not supported")
    check_one_file(file)
    if "rope_freqs.weight" in file.tensors:
        raise ValueError(f"{file.path}: rope_freqs.weight: rope scaling is not supported")


def check_one_file(file: GGUFFile) -> None:
    """A ValueError if the file is one of several of a model."""
    if file.metadata.get("split.count", 0) not in (0, 1):
        raise ValueError(f"{file.path}: split.count: a model in several files is not supported; merge them first")


def _check_tensors(file: GGUFFile, config: Config) -> None:
    """A ValueError that names a tensor: one that is missing, belongs nowhere, has another shape, or cannot be read."""
    shapes = {file_name(name): shape for name, shape in config.weight_shapes().items()}
    for name in sorted(shapes.keys() - file.tensors.keys()):
        raise ValueError(f"{file.path}: the tensor {name} is missing")
    for name in sorted(file.tensors.keys() - shapes.keys()):
        raise ValueError(f"{file.path}: the tensor {name} has no place in this model")
    for name, shape in shapes.items():
        if file.tensors[name].shape != shape:
            raise ValueError(f"{file.path}: {name}: expected shape {shape}, got {file.tensors[name].shape}")
    file.check_tensors()
