"""What a family of models is: how its config.json says ours, and what its files call the weights. families/ has them.

Each key of config.json that has a bearing on the result is named: one that gives a field of our Config, or one that
must have the value with which it changes nothing. Each tensor of the files is a weight, or known to be none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from ...model import Config

KINDS = {int: "an integer", float: "a number above 0", str: "a name", bool: "true or false"}
NEEDED: Any = object()  # stands for a default: there is none
FREE = ("n_labels", "prefix", "family", "eps")  # fields of our Config that any family's may have


class Key(NamedTuple):
    """A field of our Config: the type of its value in config.json, and what an absent key means.

    least: the least value; plus: what is added to it
    """

    field: str
    kind: type
    default: Any = NEEDED
    least: int | None = None
    plus: int = 0


@dataclass(frozen=True)
class Family:
    """A family of models. What is done with its files follows from these fields.

    name            Config.family, and its model_type in config.json
    type_of         the family whose model_type it has, if not its own: the activation tells the two apart
    classes         Config.head by the names of its classes
    keys            the keys of config.json that give a field of our Config
    activations     Config.activation by their names
    fixed           the fields that all of its models share
    neutral         the keys that must have one of these values; the first stands for an absent key
    same            other names of keys: where both are there, they must agree
    more            what no key alone says: of config.json, the fields so far, and where it stands -> fields
    says            the names of these fields
    within          the key of config.json under which all of this stands, if it does; its classes do not
    modules         our name -> theirs, without the trunk's; {i} is the layer. attn.qkv and mlp.gate_up are fused:
                    the rows of q, k and v, or of gate and up, one below the other
    trunk           the attribute that holds the modules in a model with a head (GPT2LMHeadModel.transformer)
    heads           by Config.head: our name -> theirs of what stands beside the trunk
    fan_in_fan_out  whether the layers' weights are stored (in, out), as GPT-2's Conv1D does
    ties_absent     whether a head that the files lack is the token table, whatever config.json says
    copies          modules that files may have beside the token table: copies of it
    zeros           tensors that files may have, and that must be zero
    stored          what names begin with, in files -> by what, where the model in memory has other names
    left_out        tensors that are no weights of ours, without the trunk's name: a regular expression
    gguf            llama.cpp's name of the architecture, if its files are read or written
    """

    name: str
    classes: Mapping[str, str]
    keys: Mapping[str, Key]
    activations: Mapping[str, str]
    fixed: Mapping[str, Any]
    neutral: Mapping[str, tuple[Any, ...]]
    modules: Mapping[str, str]
    trunk: str
    heads: Mapping[str, Mapping[str, str]]
    left_out: str
    same: Mapping[str, str] = field(default_factory=dict)
    more: Callable[[Mapping[str, Any], Mapping[str, Any], str], Mapping[str, Any]] = lambda raw, said, where: {}
    says: tuple[str, ...] = ()
    within: str | None = None
    type_of: str | None = None
    ties_absent: bool = False
    copies: tuple[str, ...] = ()
    zeros: tuple[str, ...] = ()
    stored: Mapping[str, str] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    gguf: str | None = None

    @property
    def model_type(self) -> str:
        """What config.json calls it."""
        return self.type_of or self.name

    def activation(self, raw: Mapping[str, Any]) -> str | None:
        """Our name of the activation that a config.json says, if the family's models may have it."""
        name, key = next((name, key) for name, key in self.keys.items() if key.field == "activation")
        value = raw.get(name, key.default)
        return self.activations.get(value) if isinstance(value, str) else None

    def fits(self, config: Config) -> bool:
        """Whether config.json of this family can say a configuration."""
        due: dict[str, Any] = {one.name: one.default for one in fields(Config)} | dict(self.fixed)
        said = {key.field for key in self.keys.values()} | {*FREE, *self.says, "head", "activation"}
        idle = {  # what has no bearing on what is computed
            "tie_head": config.head != "lm",
            "pooler": not config.has_pooler,
            "pooler_in_head": config.causal,
            "n_kv_head": config.kv_heads == config.n_head,
            "rope_theta": config.positions != "rotary",
        }
        said.update(name for name, is_idle in idle.items() if is_idle)
        return (
            config.head in ("none", *self.heads)
            and config.activation in self.activations.values()
            and all(getattr(config, name) == due[name] for name in due.keys() - said)
            and all(
                getattr(config, key.field) >= key.least + key.plus
                for key in self.keys.values()
                if key.least is not None
            )
        )


def check_values(raw: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]], where: str) -> None:
    """A ValueError that names a key which has none of its values; the first stands for an absent key."""
    for key, values in allowed.items():
        value = raw.get(key, values[0])
        if not any(value == one and type(value) is type(one) for one in values):
            raise ValueError(f"{where}: {key}: {value!r:.60} is not supported, only {values[0]!r}")


def value_of(raw: Mapping[str, Any], name: str, key: Key, where: str) -> Any:
    """A key's value, of its type. A whole number will do for a float."""
    value = raw.get(name, key.default)
    if value is None and key.default is None:
        return None
    if value is NEEDED:
        raise ValueError(f"{where}: {name} is missing")
    kinds = (int, float) if key.kind is float else (key.kind,)
    if type(value) not in kinds or (key.kind is float and value <= 0):
        raise ValueError(f"{where}: {name}: expected {KINDS[key.kind]}, got {value!r:.60}")
    if key.least is not None and value < key.least:
        raise ValueError(f"{where}: {name}: expected at least {key.least}, got {value}")
    return value + key.plus if key.plus else value


def classes(prefix: str, **heads: str) -> dict[str, str]:
    """Config.head by a family's classes: these, a model without a head, and those for labels."""
    ends = {**heads, "Model": "none", "ForSequenceClassification": "classify", "ForTokenClassification": "tag"}
    return {prefix + end: head for end, head in ends.items()}


GELU = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,), "is_encoder_decoder": (False,), "pruned_heads": ({},),
    "quantization_config": (None,),
}  # fmt: skip
