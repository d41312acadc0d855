"""Hugging Face's model folders: GPT-2, BERT, RoBERTa and Llama, from config.json and safetensors.

Each key of config.json that has a bearing on the result is in a table below: one that gives a field of our Config, or
one that must have the value with which it changes nothing. Each tensor of the files is a weight, or known to be none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...adapter import fused_parts
from ...backend import Array, asnumpy, xp
from ...model import Config, Model
from ...ops import widened
from ..files.json_file import from_fields
from ..files.messages import shown
from ..files.safetensors_file import WIDENED
from .base import Wanted, check_layers, held
from .heads import completed, taken, with_head
from .names import family_of, module_names, module_of
from .shards import Stored, stored_tensors

CONFIG = "config.json"
NEEDED: Any = object()  # stands for a default: there is none


class Key(NamedTuple):
    """A field of our Config: the type of its value in config.json, and what an absent key means."""

    field: str
    kind: type
    default: Any = NEEDED


@dataclass(frozen=True)
class ModelType:
    """A model type: how its config.json is read.

    heads     Config.head by the names of its classes
    keys      the keys that give a field of our Config
    neutral   the keys that must have one of these values; the first stands for an absent key
    fixed     the fields that all models of this type share
    activations   Config.activation by their names
    left_out  tensors that are no weights of ours, without the trunk's name: a regular expression
    same      other names of keys: where both are there, they must agree
    """

    heads: Mapping[str, str]
    keys: Mapping[str, Key]
    neutral: Mapping[str, tuple[Any, ...]]
    fixed: Mapping[str, Any]
    activations: Mapping[str, str]
    left_out: str
    same: Mapping[str, str] = field(default_factory=dict)


def _classes(prefix: str, **heads: str) -> dict[str, str]:
    return {prefix + name: head for name, head in heads.items()}


_HEADS = {"Model": "none", "ForSequenceClassification": "classify", "ForTokenClassification": "tag"}
_GELU = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,), "is_encoder_decoder": (False,), "pruned_heads": ({},),
    "quantization_config": (None,),
}  # fmt: skip
_ENCODER = ModelType(
    heads={},
    keys={
        "vocab_size": Key("vocab_size", int),
        "max_position_embeddings": Key("n_positions", int),
        "num_hidden_layers": Key("n_layer", int),
        "num_attention_heads": Key("n_head", int),
        "hidden_size": Key("d_model", int),
        "intermediate_size": Key("d_ff", int),
        "type_vocab_size": Key("n_types", int, 2),
        "layer_norm_eps": Key("eps", float, 1e-12),
        "hidden_act": Key("activation", str, "gelu"),
    },
    neutral={**_NEUTRAL, "position_embedding_type": ("absolute",), "is_decoder": (False,)},
    fixed={"norm": "layer", "norm_first": False, "positions": "learned", "causal": False, "tie_head": False},
    activations=_GELU,
    left_out=r"embeddings\.position_ids|pooler\.dense\.(weight|bias)",
)
# Encoders' heads for masked words are left out: such a file is read as one without a head.
MODEL_TYPES: Mapping[str, ModelType] = {
    "gpt2": ModelType(
        heads=_classes("GPT2", LMHeadModel="lm", **_HEADS),
        keys={
            "vocab_size": Key("vocab_size", int),
            "n_positions": Key("n_positions", int, 1024),
            "n_layer": Key("n_layer", int),
            "n_head": Key("n_head", int),
            "n_embd": Key("d_model", int),
            "n_inner": Key("d_ff", int, None),
            "layer_norm_epsilon": Key("eps", float, 1e-5),
            "activation_function": Key("activation", str, "gelu_new"),
            "tie_word_embeddings": Key("tie_head", bool, True),
        },
        neutral={**_NEUTRAL, "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)},
        same={
            "max_position_embeddings": "n_positions", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
            "hidden_size": "n_embd",
        },
        fixed={"norm": "layer", "norm_first": True, "positions": "learned", "causal": True},
        activations=_GELU,
        left_out=r"h\.\d+\.attn\.(bias|masked_bias)",
    ),
    "bert": replace(
        _ENCODER,
        heads=_classes("Bert", ForMaskedLM="none", ForPreTraining="none", **_HEADS),
        left_out=rf"{_ENCODER.left_out}|cls\..*",
    ),
    "roberta": replace(
        _ENCODER,
        heads=_classes("Roberta", ForMaskedLM="none", **_HEADS),
        keys={**_ENCODER.keys, "pad_token_id": Key("position_offset", int, 1)},
        fixed={**_ENCODER.fixed, "pooler_in_head": True},
        left_out=rf"{_ENCODER.left_out}|lm_head\..*",
    ),
    "llama": ModelType(
        heads=_classes("Llama", ForCausalLM="lm", **_HEADS),
        keys={
            "vocab_size": Key("vocab_size", int),
            "max_position_embeddings": Key("n_positions", int, 2048),
            "num_hidden_layers": Key("n_layer", int),
            "num_attention_heads": Key("n_head", int),
            "num_key_value_heads": Key("n_kv_head", int, None),
            "hidden_size": Key("d_model", int),
            "intermediate_size": Key("d_ff", int),
            "rms_norm_eps": Key("eps", float, 1e-6),
            "hidden_act": Key("activation", str, "silu"),
            "tie_word_embeddings": Key("tie_head", bool, False),
        },
        neutral={
            **_NEUTRAL, "attention_bias": (False,), "mlp_bias": (False,), "partial_rotary_factor": (1.0, None),
        },
        fixed={"norm": "rms", "norm_first": True, "positions": "rotary", "causal": True, "bias": False},
        activations={"silu": "silu_gated"},
        left_out=r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
    ),
}  # fmt: skip
BUFFERS = r".*\.(inv_freq|position_ids|masked_bias)"  # of any type
ROTARY = ("rope_parameters", "rope_scaling")  # the newer key, and the older


class Files(NamedTuple):
    """A folder's tensors, checked against its config.json, before any is read.

    saved, config   what the file is a model of, and what it is read as, which may have another head
    tensors         every tensor of the files, by its key
    places          the tensors that `config` has weights in; own: those that `saved` has
    tied            a copy of the token table, under the tied head's key
    in_trunk        whether the trunk's name stands in front of the keys
    """

    saved: Config
    config: Config
    tensors: dict[str, Stored]
    places: dict[str, Place]
    own: dict[str, Place]
    tied: dict[str, Place]
    in_trunk: bool

    @property
    def dtype(self) -> str:
        """What is computed in, if nothing else is asked for."""
        return "float64" if any(self.tensors[key].dtype == "F64" for key in self.own) else "float32"

    def check_tied(self, table: Array, dtype: str, where: str) -> None:
        """A ValueError unless the tied head's copy is the token table (V,D), a host array."""
        for key in self.tied:
            if not np.array_equal(self.tensors[key].read(dtype), table):
                raise ValueError(
                    f"{self.tensors[key]}: {where} says that it is tied to the token table, but it differs"
                )


def open_huggingface(folder: Path, raw: Mapping[str, Any], *, head: str | None, n_labels: int | None) -> Files:
    """The tensors in a folder whose config.json says `raw`; head and n_labels as load_model has them."""
    where = str(folder / CONFIG)
    saved = read_config(raw, where)
    tensors = stored_tensors(folder)
    check_layers(saved.n_layer, len(tensors), where)
    config = with_head(saved, head, n_labels)
    family = family_of(saved)
    if family_of(config) is not family:
        raise ValueError(f"{folder}: a {raw['model_type']} model with head {config.head!r} is not supported")
    in_trunk = any(name.startswith(f"{family.trunk}.") for name in tensors)
    own = with_old_names(places(saved, in_trunk=in_trunk), tensors)
    usable = set(taken(saved, config))
    wanted = {
        key: place
        for key, place in with_old_names(places(config, in_trunk=in_trunk), tensors).items()
        if usable.issuperset(place.parts) and (key in tensors or key in own)
    }
    tied = _tied_head(saved, tensors)
    _check_tensors(folder, {**wanted, **own, **tied}, tensors, left_out(raw["model_type"], saved))
    return Files(saved, config, tensors, wanted, own, tied, in_trunk)


def load_huggingface(folder: Path, raw: Mapping[str, Any], wanted: Wanted) -> Model:
    """The model in a folder whose config.json says `raw`, as load_model is asked for it.

    Tensors are read one by one: no more is held than the weights in their dtype, and one tensor.
    """
    files = open_huggingface(folder, raw, head=wanted.head, n_labels=wanted.n_labels)
    dtype = wanted.dtype or files.dtype
    weights: dict[str, Array] = {}
    for key, place in files.places.items():
        parts = place.split(files.tensors[key].read(dtype))
        weights |= {name: held(part, wanted.storage, str(files.tensors[key])) for name, part in parts.items()}
    files.check_tied(asnumpy(widened(weights["embed.tokens"])), dtype, str(folder / CONFIG))
    return Model(files.config, completed(files.config, weights, wanted.seed, str(folder)))


# --- config.json ---------------------------------------------------------------------------------------------------


def read_config(raw: Mapping[str, Any], where: str) -> Config:
    """The Config of a config.json; a ValueError names the key that is missing, or whose value is not supported."""
    kind = MODEL_TYPES[raw["model_type"]]
    for key, allowed in kind.neutral.items():
        value = raw.get(key, allowed[0])
        if not any(value == one and type(value) is type(one) for one in allowed):
            raise ValueError(f"{where}: {key}: {value!r:.60} is not supported, only {allowed[0]!r}")
    for other, key in kind.same.items():
        if other in raw and raw[other] != raw.get(key):
            raise ValueError(f"{where}: {other}: expected {raw.get(key)!r:.60}, as {key} says, got {raw[other]!r:.60}")
    fields = {key.field: _value(raw, name, key, where) for name, key in kind.keys.items()}
    activation = fields["activation"]
    if activation not in kind.activations:
        name = next(name for name, key in kind.keys.items() if key.field == "activation")
        raise ValueError(f"{where}: {name}: {activation!r:.60} is not supported, only {' '.join(kind.activations)}")
    fields |= {**kind.fixed, "activation": kind.activations[activation], "head": _head(raw, kind, where)}
    if fields["d_ff"] is None:
        fields["d_ff"] = 4 * fields["d_model"]
    if fields.get("n_types") == 0:
        raise ValueError(f"{where}: type_vocab_size: expected at least 1, got 0")
    if "position_offset" in fields:
        if fields["position_offset"] < 0:
            raise ValueError(f"{where}: pad_token_id: expected at least 0, got {fields['position_offset']}")
        fields["position_offset"] += 1  # RoBERTa counts from the padding token's row
    if fields["positions"] == "rotary":
        fields["rope_theta"] = _rope_theta(raw, where)
        _check_head_width(raw, fields, where)
    if fields["head"] in ("classify", "tag"):
        fields["n_labels"] = _labels(raw, where)
    return from_fields(Config, fields, where)


def _value(raw: Mapping[str, Any], name: str, key: Key, where: str) -> Any:
    """A key's value, of its type. A whole number will do for a float."""
    value = raw.get(name, key.default)
    if value is None and key.default is None:
        return None
    if value is NEEDED:
        raise ValueError(f"{where}: {name} is missing")
    kinds = (int, float) if key.kind is float else (key.kind,)
    if type(value) not in kinds or (key.kind is float and value <= 0):
        raise ValueError(f"{where}: {name}: expected {_KINDS[key.kind]}, got {value!r:.60}")
    return value


_KINDS = {int: "an integer", float: "a number above 0", str: "a name", bool: "true or false"}


def _head(raw: Mapping[str, Any], kind: ModelType, where: str) -> str:
    """The head of the class that the file was saved by."""
    value = raw.get("architectures")
    names = value if isinstance(value, list) else [value]
    if len(names) != 1 or not isinstance(names[0], str) or names[0] not in kind.heads:
        raise ValueError(f"{where}: architectures: expected one of {' '.join(kind.heads)}, got {value!r:.60}")
    return kind.heads[names[0]]


def _labels(raw: Mapping[str, Any], where: str) -> int:
    """How many labels there are: the length of id2label; 2 where nothing is said."""
    labels, number = raw.get("id2label"), raw.get("num_labels")
    if labels is not None and not isinstance(labels, dict):
        raise ValueError(f"{where}: id2label: expected an object, got {labels!r:.60}")
    if number is not None and type(number) is not int:
        raise ValueError(f"{where}: num_labels: expected an integer, got {number!r:.60}")
    if labels is not None and number is not None and len(labels) != number:
        raise ValueError(f"{where}: num_labels: id2label has {len(labels)}, got {number!r:.60}")
    return len(labels) if labels is not None else 2 if number is None else number


def _rope_theta(raw: Mapping[str, Any], where: str) -> float:
    """Rotary's base, from where the older and the newer files have it. No scaling is supported."""
    found = {"rope_theta": raw["rope_theta"]} if "rope_theta" in raw else {}
    for key in ROTARY:
        value = raw.get(key)
        if value is None:
            continue
        if not isinstance(value, dict):
            raise ValueError(f"{where}: {key}: expected an object, got {value!r:.60}")
        for name, inner in value.items():
            if name == "rope_theta":
                found[f"{key}.rope_theta"] = inner
            elif (name, inner) not in [("rope_type", "default"), ("type", "default"), ("partial_rotary_factor", 1.0)]:
                raise ValueError(f"{where}: {key}: {shown(name)} = {inner!r:.60} is not supported")
    for name, value in found.items():
        if type(value) not in (int, float) or value <= 0:
            raise ValueError(f"{where}: {name}: expected a number above 0, got {value!r:.60}")
    if len(set(found.values())) > 1:
        raise ValueError(f"{where}: {' and '.join(found)} differ: {' '.join(map(repr, found.values()))}")
    return float(next(iter(found.values()), 10000.0))


def _check_head_width(raw: Mapping[str, Any], fields: Mapping[str, Any], where: str) -> None:
    """A ValueError unless head_dim, where it is given, is D / H."""
    width = raw.get("head_dim")
    if width is not None and (type(width) is not int or width * fields["n_head"] != fields["d_model"]):
        raise ValueError(f"{where}: head_dim: {width!r:.60} is not supported, only hidden_size / num_attention_heads")


# --- The tensors ---------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """A tensor of the files: its shape there, whether it is stored (in, out), and the rows of each weight in it."""

    shape: tuple[int, ...]
    transposed: bool
    parts: dict[str, slice]

    def split(self, tensor: Array) -> dict[str, Array]:
        """Our weights in the tensor, (out, in), each in an array of its own."""
        if self.transposed:
            tensor = tensor.T
        return {name: xp.asarray(np.ascontiguousarray(tensor[rows])) for name, rows in self.parts.items()}


def places(config: Config, *, in_trunk: bool) -> dict[str, Place]:
    """The tensors of a model's files, by their names. in_trunk: whether the trunk's name stands in front."""
    family, full = family_of(config), module_names(config, in_trunk=in_trunk)
    result: dict[str, Place] = {}
    for name, shape in config.weight_shapes().items():
        stem, kind = (name, "weight") if name in full else name.rsplit(".", 1)
        module = module_of(stem, family)
        transposed = family.fan_in_fan_out and stem.startswith("layers.") and len(shape) == 2
        parts = {f"{part}.{kind}": rows for part, rows in fused_parts(config, module).items()}
        if module == stem:
            parts = {name: slice(None)}
        else:
            shape = (max(rows.stop for rows in parts.values()), *shape[1:])
        result[f"{full[module]}.{kind}"] = Place(shape[::-1] if transposed else shape, transposed, parts)
    return result


def with_old_names(result: dict[str, Place], tensors: Mapping[str, Stored]) -> dict[str, Place]:
    """The places, but gamma and beta where the files still call a norm's weight and bias so."""
    old = {"weight": "gamma", "bias": "beta"}
    names = {}
    for key, place in result.items():
        stem, _, kind = key.rpartition(".")
        is_norm = any("norm" in name for name in place.parts)
        names[key] = f"{stem}.{old[kind]}" if is_norm and f"{stem}.{old[kind]}" in tensors else key
    return {names[key]: place for key, place in result.items()}


def _tied_head(saved: Config, tensors: Mapping[str, Stored]) -> dict[str, Place]:
    """A tied language model's head, where the files have it all the same: a copy of the token table."""
    if saved.head != "lm" or not saved.tie_head:
        return {}
    key = f"{module_names(saved)['head']}.weight"
    return {key: Place(saved.weight_shapes()["embed.tokens"], False, {})} if key in tensors else {}


def left_out(model_type: str, config: Config) -> re.Pattern[str]:
    """The keys of tensors that are no weights of ours, with the trunk's name in front or without."""
    return re.compile(rf"({re.escape(family_of(config).trunk)}\.)?({MODEL_TYPES[model_type].left_out})")


def is_no_weight(key: str, model_type: str) -> bool:
    """Whether files of this type of models may have a tensor of this name that is no weight, as a buffer is none."""
    known = MODEL_TYPES.get(model_type)
    return re.fullmatch(rf"(\w+\.)?({known.left_out})" if known else BUFFERS, key) is not None


def _check_tensors(
    folder: Path, expected: Mapping[str, Place], tensors: Mapping[str, Stored], ignored: re.Pattern[str]
) -> None:
    """A ValueError that names a tensor: one that is missing, belongs nowhere, or has another shape or dtype."""
    for key, place in expected.items():
        if key not in tensors:
            raise ValueError(f"{folder}: the tensor {key} is missing")
        if tensors[key].shape != place.shape:
            raise ValueError(f"{tensors[key]}: expected shape {place.shape}, got {tensors[key].shape}")
        if tensors[key].dtype not in WIDENED:
            raise ValueError(f"{tensors[key]}: expected one of {' '.join(WIDENED)}, got {tensors[key].dtype}")
    for key in sorted(tensors.keys() - expected.keys()):
        if not ignored.fullmatch(key):
            raise ValueError(f"{tensors[key]}: the tensor has no place in this model")
