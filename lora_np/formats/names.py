"""What each family of models calls its modules, a row of a table each. Ours to theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..model import Config


@dataclass(frozen=True)
class Family:
    """The names that a family of models gives to what DESIGN's flat names mean.

    fits            whether a configuration is of this family
    modules         our name -> theirs, without the trunk's; {i} is the layer
    trunk           the attribute that holds the modules in a model with a head (GPT2LMHeadModel.transformer)
    heads           the head's name, by Config.head
    fan_in_fan_out  whether the weights are stored (in, out), as GPT-2's Conv1D does
    """

    fits: Callable[[Config], bool]
    modules: Mapping[str, str]
    trunk: str
    heads: Mapping[str, str]
    fan_in_fan_out: bool = False

    @property
    def fused(self) -> bool:
        """Whether q, k and v are one module, our qkv."""
        return "layers.{i}.attn.q" not in self.modules


def _is_gpt2(config: Config) -> bool:
    return (
        config.norm == "layer"
        and config.norm_first
        and config.positions == "learned"
        and config.position_offset == 0
        and config.activation == "gelu_tanh"
        and config.causal
        and config.n_types == 0
        and config.bias
        and config.kv_heads == config.n_head
        and not config.disentangled
    )


GPT2 = Family(
    fits=_is_gpt2,
    modules={
        "embed.tokens": "wte",
        "layers.{i}.norm1": "h.{i}.ln_1",
        "layers.{i}.attn.qkv": "h.{i}.attn.c_attn",
        "layers.{i}.attn.o": "h.{i}.attn.c_proj",
        "layers.{i}.norm2": "h.{i}.ln_2",
        "layers.{i}.mlp.up": "h.{i}.mlp.c_fc",
        "layers.{i}.mlp.down": "h.{i}.mlp.c_proj",
        "norm": "ln_f",
    },
    trunk="transformer",
    heads={"lm": "lm_head", "classify": "score", "tag": "classifier"},
    fan_in_fan_out=True,
)

_LAYER = "norm1 attn.q attn.k attn.v attn.qkv attn.o norm2 mlp.gate mlp.up mlp.down"

OWN = Family(
    fits=lambda config: True,
    modules={
        name: name
        for name in (
            "embed.tokens",
            "embed.norm",
            *(f"layers.{{i}}.{part}" for part in _LAYER.split()),
            "norm",
            "pooler",
        )
    },
    trunk="",
    heads=dict.fromkeys(("lm", "classify", "tag"), "head"),
)

FAMILIES = (GPT2, OWN)  # the first that fits


def family_of(config: Config) -> Family:
    """The family whose names a model's files use: the package's own if it is nobody else's."""
    return next(family for family in FAMILIES if family.fits(config))


def module_names(config: Config) -> dict[str, str]:
    """Our name of each module -> its full name in the family's models: layers.0.attn.o -> transformer.h.0.attn.c_proj.

    Names of modules that the configuration lacks may be among them.
    """
    family = family_of(config)
    trunk = f"{family.trunk}." if family.trunk and config.head != "none" else ""
    return _each_layer(config, {ours: trunk + theirs for ours, theirs in family.modules.items()})


def short_names(config: Config) -> dict[str, str]:
    """Our name of each module -> what its full name ends in, in every layer: layers.0.attn.o -> attn.c_proj."""
    modules = family_of(config).modules
    return _each_layer(config, {ours: theirs.split("{i}.")[-1] for ours, theirs in modules.items()})


def _each_layer(config: Config, names: Mapping[str, str]) -> dict[str, str]:
    """The names with {i} replaced by each layer's number, and the head's."""
    result = {}
    for ours, theirs in names.items():
        for i in range(config.n_layer if "{i}" in ours else 1):
            result[ours.replace("{i}", str(i))] = theirs.replace("{i}", str(i))
    if config.head != "none":
        result["head"] = family_of(config).heads[config.head]
    return result
