"""What GGUF files say of a model: the architectures of llama.cpp's that are run here, and the Config of each.

Keys and defaults are llama.cpp's. What it computes of them is what a file means, but for one thing: it passes over the
window of Phi-3, which transformers and this package keep.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

from ...model import Config
from .base import check_layers
from .gguf_file import GGUFFile
from .names import family_of

Value: TypeAlias = Callable[..., Any]  # of a key of the architecture's; its type and its default follow

# Keys of every architecture that are read, or that have no meaning for what is read here.
READ = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "attention.head_count",
    "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "attention.key_length", "attention.value_length",
    "rope.freq_base", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear",
    "rope.scaling.original_context_length", "rope.scaling.finetuned",
)  # fmt: skip
# Any other must have the value given here, with which it changes nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "rope.scaling.attn_factor": (1,), "expert_count": (0,), "expert_used_count": (0,), "attention.causal": (True,),
    "use_parallel_residual": (False,), "tensor_data_layout": ("Meta AI original pth",), "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,), "attention.sliding_window": (0,), "logit_scale": (1,), "embedding_scale": (1,),
    "residual_scale": (1,), "attn_logit_softcapping": (0,), "final_logit_softcapping": (0,),
}  # fmt: skip
SCALED = ("none", "linear")  # types of rotary scaling
FREQUENCIES = "rope_freqs.weight"
LAYER_NAMES = {
    "norm1": "attn_norm", "attn.q": "attn_q", "attn.k": "attn_k", "attn.v": "attn_v", "attn.qkv": "attn_qkv",
    "attn.q_norm": "attn_q_norm", "attn.k_norm": "attn_k_norm", "attn.o": "attn_output",
    "norm1_out": "post_attention_norm", "norm2": "ffn_norm", "mlp.gate": "ffn_gate", "mlp.up": "ffn_up",
    "mlp.gate_up": "ffn_up", "mlp.down": "ffn_down", "norm2_out": "post_ffw_norm",
}  # fmt: skip


class NotRun(ValueError):
    """A model that is not computed here. Adapters are merged onto it by the names of its tensors."""


@dataclass(frozen=True)
class Architecture:
    """How an architecture maps to Config, and how its tensors stand.

    name      llama.cpp's
    family    whose module names its adapters have
    fixed     Config's fields that all its models share
    more      the fields that depend on what else is said; read: the keys that it reads
    layer     the tensor of each weight of a layer; one that several name has the rows of each below one another
    in_pairs  whether the rows of each head of q and k are in pairs (2j, 2j+1), where T11 turns (j, j + K/2)
    frequencies, partial  whether it may have FREQUENCIES, and may turn a part of K
    """

    name: str
    family: str
    fixed: Mapping[str, Any]
    more: Callable[[Value, Mapping[str, Any]], dict[str, Any]] = lambda value, fields: {}
    read: tuple[str, ...] = ()
    layer: Mapping[str, str] = field(default_factory=lambda: LAYER_NAMES)
    in_pairs: bool = False
    frequencies: bool = False
    partial: bool = False


def _gemma3(value: Value, fields: Mapping[str, Any]) -> dict[str, Any]:
    """A window in all layers but every sixth; scores by D / H instead of K in the largest model, of 62 layers."""
    D, n_layer = fields["d_model"], fields["n_layer"]
    found: dict[str, Any] = {"embed_scale": D**0.5}
    if n_layer == 62:
        found["score_scale"] = (D // fields["n_head"]) ** -0.5
    period = value("attention.sliding_window_pattern", int, 6)
    if window := value("attention.sliding_window", int, 0):
        full = tuple(range(period - 1, n_layer, period)) if period else ()
        found |= {"window": window, "full_layers": full, "window_theta": value("rope.freq_base_swa", float, 10000.0)}
    return found


def _phi3(value: Value, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"window": value("attention.sliding_window", int, 0) or None}


_LLAMA: dict[str, Any] = {"norm": "rms", "positions": "rotary", "activation": "silu_gated", "bias": False}
_FUSED = {"attn.q": "attn_qkv", "attn.k": "attn_qkv", "attn.v": "attn_qkv", "mlp.gate": "ffn_up"}
_ALL = (
    Architecture("llama", "llama", _LLAMA, in_pairs=True, frequencies=True),
    Architecture("qwen2", "qwen2", {**_LLAMA, "qkv_bias": True}),
    Architecture("qwen3", "qwen3", {**_LLAMA, "qk_norm": True}),
    Architecture(
        "gemma3", "gemma3_text",
        {**_LLAMA, "norm": "rms_1p", "norm_outputs": True, "activation": "gelu_tanh_gated", "qk_norm": True},
        more=_gemma3,
        read=("attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"),
    ),
    Architecture(
        "phi3", "phi3", _LLAMA, more=_phi3, read=("attention.sliding_window",), layer={**LAYER_NAMES, **_FUSED},
        partial=True,
    ),
)  # fmt: skip
ARCHITECTURES = {architecture.name: architecture for architecture in _ALL}


def architecture_of(file: GGUFFile) -> Architecture:
    """A file's architecture; NotRun if it is another, or asks for what is not computed here."""
    name = file.get("general.architecture", str)
    if name not in ARCHITECTURES:
        known = " ".join(ARCHITECTURES)
        raise NotRun(f"{file.path}: architecture {name!r:.100} is not supported; {known} are")
    architecture = ARCHITECTURES[name]
    for key, value in file.metadata.items():
        own = key.removeprefix(f"{name}.")
        if own != key and own not in (*READ, *architecture.read) and value not in NEUTRAL.get(own, ()):
            raise NotRun(f"{file.path}: {key!r:.100} = {value!r:.100} is not supported")
    return architecture


def read_config(file: GGUFFile, architecture: Architecture) -> Config:
    """The Config in a file's metadata; a ValueError names what is wrong, NotRun what is not computed here."""

    def value(key: str, kind: type = int, default: Any = None) -> Any:
        return file.get(f"{architecture.name}.{key}", kind, default)

    n_layer, n_head, D = value("block_count"), value("attention.head_count"), value("embedding_length")
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
        "d_model": D,
        "d_ff": value("feed_forward_length"),
        "tie_head": "output.weight" not in file.tensors,
        "eps": value("attention.layer_norm_rms_epsilon", float),
        "rope_theta": value("rope.freq_base", float, 10000.0),
    }
    made = partial(_config, file, architecture.fixed)
    width = value("attention.key_length", default=0)
    if width and width * n_head != D:
        fields["d_head"] = width
    width = made(fields).head_width  # of sizes that are checked
    for key in ("attention.value_length", *(() if architecture.partial else ("rope.dimension_count",))):
        if value(key, default=width) != width:
            raise ValueError(f"{file.path}: {key}: expected a head's width, {width}, got {value(key)}")
    turned = value("rope.dimension_count", default=width)
    if turned != width:
        fields["rope_width"] = turned
    fields["rope_factors"] = _factors(file, architecture, value, turned)
    config = made({**fields, **architecture.more(value, fields)})
    return config if family_of(config).name == architecture.family else replace(config, family=architecture.family)


def _config(file: GGUFFile, fixed: Mapping[str, Any], fields: Mapping[str, Any]) -> Config:
    try:
        return Config(**{**fixed, **fields})
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from None


def _factors(file: GGUFFile, architecture: Architecture, value: Value, turned: int) -> tuple[float, ...]:
    """T11: what rotary's frequencies are divided by. Without a type, llama.cpp takes a factor to be linear."""
    kind = value("rope.scaling.type", str, "linear")
    if kind not in SCALED:
        raise NotRun(f"{file.path}: {architecture.name}.rope.scaling.type = {kind!r:.60} is not supported")
    factor = value("rope.scaling.factor", float, value("rope.scale_linear", float, 0.0)) or 1.0
    linear = 1.0 if kind == "none" else factor
    if not architecture.frequencies or FREQUENCIES not in file.tensors:
        return (linear,)
    if file.tensors[FREQUENCIES].shape != (turned // 2,):
        shape = file.tensors[FREQUENCIES].shape
        raise ValueError(f"{file.path}: {FREQUENCIES}: expected shape {(turned // 2,)}, got {shape}")
    file.check_tensors()
    return tuple(linear * each for each in file.read(FREQUENCIES, "float64").tolist())
