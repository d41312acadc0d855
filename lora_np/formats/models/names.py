"""What each family of models calls its modules, a row of a table each. Ours to theirs."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from ...model import ENCODER, Config


@dataclass(frozen=True)
class Family:
    """The names that a family of models gives to what DESIGN's flat names mean.

    fits            whether a configuration is of this family
    modules         our name -> theirs, without the trunk's; {i} is the layer
    trunk           the attribute that holds the modules in a model with a head (GPT2LMHeadModel.transformer)
    heads           by Config.head: our name -> theirs of what stands beside the trunk
    fan_in_fan_out  whether the layers' weights are stored (in, out), as GPT-2's Conv1D does
    """

    fits: Callable[[Config], bool]
    modules: Mapping[str, str]
    trunk: str
    heads: Mapping[str, Mapping[str, str]]
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
        and config.activation != "silu_gated"
        and config.causal
        and config.n_types == 0
        and config.bias
        and config.kv_heads == config.n_head
        and not config.disentangled
        and not config.n_encoder
    )


def _is_encoder(config: Config) -> bool:
    """BERT or RoBERTa. Their language models have a head of more than one matrix, which none of ours has."""
    return (
        config.norm == "layer"
        and not config.norm_first
        and config.positions == "learned"
        and config.activation != "silu_gated"
        and not config.causal
        and config.head != "lm"
        and config.n_types > 0
        and config.bias
        and config.kv_heads == config.n_head
        and not config.disentangled
    )


def _is_bert(config: Config) -> bool:
    return _is_encoder(config) and config.position_offset == 0 and not config.pooler_in_head


def _is_roberta(config: Config) -> bool:
    return _is_encoder(config) and config.position_offset > 0 and config.pooler_in_head


def _is_llama(config: Config) -> bool:
    return (
        config.norm == "rms"
        and config.norm_first
        and config.positions == "rotary"
        and config.activation == "silu_gated"
        and config.causal
        and config.n_types == 0
        and not config.bias
        and not config.disentangled
    )


GPT2 = Family(
    fits=_is_gpt2,
    modules={
        "embed.tokens": "wte",
        "embed.positions": "wpe",
        "layers.{i}.norm1": "h.{i}.ln_1",
        "layers.{i}.attn.qkv": "h.{i}.attn.c_attn",
        "layers.{i}.attn.o": "h.{i}.attn.c_proj",
        "layers.{i}.norm2": "h.{i}.ln_2",
        "layers.{i}.mlp.up": "h.{i}.mlp.c_fc",
        "layers.{i}.mlp.down": "h.{i}.mlp.c_proj",
        "norm": "ln_f",
    },
    trunk="transformer",
    heads={"lm": {"head": "lm_head"}, "classify": {"head": "score"}, "tag": {"head": "classifier"}},
    fan_in_fan_out=True,
)

_ENCODER = {
    "embed.tokens": "embeddings.word_embeddings",
    "embed.positions": "embeddings.position_embeddings",
    "embed.types": "embeddings.token_type_embeddings",
    "embed.norm": "embeddings.LayerNorm",
    "layers.{i}.attn.q": "encoder.layer.{i}.attention.self.query",
    "layers.{i}.attn.k": "encoder.layer.{i}.attention.self.key",
    "layers.{i}.attn.v": "encoder.layer.{i}.attention.self.value",
    "layers.{i}.attn.o": "encoder.layer.{i}.attention.output.dense",
    "layers.{i}.norm1": "encoder.layer.{i}.attention.output.LayerNorm",
    "layers.{i}.mlp.up": "encoder.layer.{i}.intermediate.dense",
    "layers.{i}.mlp.down": "encoder.layer.{i}.output.dense",
    "layers.{i}.norm2": "encoder.layer.{i}.output.LayerNorm",
}

BERT = Family(
    fits=_is_bert,
    modules={**_ENCODER, "pooler": "pooler.dense"},
    trunk="bert",
    heads={"classify": {"head": "classifier"}, "tag": {"head": "classifier"}},
)

ROBERTA = Family(  # its classifier has a dense layer of its own where BERT's reads the pooler
    fits=_is_roberta,
    modules=_ENCODER,
    trunk="roberta",
    heads={
        "classify": {"pooler": "classifier.dense", "head": "classifier.out_proj"},
        "tag": {"head": "classifier"},
    },
)

LLAMA = Family(
    fits=_is_llama,
    modules={
        "embed.tokens": "embed_tokens",
        "layers.{i}.norm1": "layers.{i}.input_layernorm",
        "layers.{i}.attn.q": "layers.{i}.self_attn.q_proj",
        "layers.{i}.attn.k": "layers.{i}.self_attn.k_proj",
        "layers.{i}.attn.v": "layers.{i}.self_attn.v_proj",
        "layers.{i}.attn.o": "layers.{i}.self_attn.o_proj",
        "layers.{i}.norm2": "layers.{i}.post_attention_layernorm",
        "layers.{i}.mlp.gate": "layers.{i}.mlp.gate_proj",
        "layers.{i}.mlp.up": "layers.{i}.mlp.up_proj",
        "layers.{i}.mlp.down": "layers.{i}.mlp.down_proj",
        "norm": "norm",
    },
    trunk="model",
    heads={"lm": {"head": "lm_head"}, "classify": {"head": "score"}, "tag": {"head": "score"}},
)

_LAYER = "norm1 attn.q attn.k attn.v attn.qkv attn.o norm2 mlp.gate mlp.up mlp.down"
_CROSS = "norm_cross cross.q cross.k cross.v cross.qkv cross.o"

OWN = Family(
    fits=lambda config: True,
    modules={
        name: name
        for name in (
            "embed.tokens",
            "embed.norm",
            *(f"layers.{{i}}.{part}" for part in f"{_LAYER} {_CROSS}".split()),
            *(f"{ENCODER}layers.{{i}}.{part}" for part in _LAYER.split()),
            "encoder.embed.norm",
            "encoder.norm",
            "norm",
            "pooler",
        )
    },
    trunk="",
    heads={head: {"head": "head"} for head in ("lm", "classify", "tag")},
)

FAMILIES = (GPT2, BERT, ROBERTA, LLAMA, OWN)  # the first that fits


def family_of(config: Config) -> Family:
    """The family whose names a model's files use: the package's own if it is nobody else's."""
    return next(family for family in FAMILIES if family.fits(config))


def module_names(config: Config, *, in_trunk: bool | None = None) -> dict[str, str]:
    """Our name of each module -> its full name in the family's models: layers.0.attn.o -> transformer.h.0.attn.c_proj.

    in_trunk: whether the modules stand in the family's trunk; None: as they do in its model with this head. Names of
    modules that the configuration lacks may be among them.
    """
    family = family_of(config)
    if in_trunk is None:
        in_trunk = config.head != "none"
    trunk = f"{family.trunk}." if family.trunk and in_trunk else ""
    return _each_layer(config, {ours: trunk + theirs for ours, theirs in family.modules.items()})


def our_names(modules: Collection[str]) -> dict[str, str] | None:
    """Our name of each of these modules, by their family's, in its trunk or not; None if they are of no one family."""
    for family in FAMILIES:
        templates = {theirs: ours for one in (family.modules, *family.heads.values()) for ours, theirs in one.items()}
        found = {}
        for module in modules:
            bare = module.removeprefix(f"{family.trunk}.")
            layer = re.search(r"(?:^|\.)(\d+)\.", bare)
            ours = templates.get(bare if layer is None else f"{bare[: layer.start(1)]}{{i}}{bare[layer.end(1) :]}")
            if ours is not None:
                found[module] = ours.replace("{i}", layer[1] if layer else "")
        if len(found) == len(modules):
            return found
    return None


def short_names(config: Config) -> dict[str, str]:
    """Our name of each module -> what its full name ends in, in every layer: layers.0.attn.o -> attn.c_proj."""
    modules = family_of(config).modules
    return _each_layer(config, {ours: theirs.split("{i}.")[-1] for ours, theirs in modules.items()})


def module_of(matrix: str, family: Family) -> str:
    """The module that holds a matrix, by our name: itself, or the one that q, k and v share."""
    return f"{matrix[:-1]}qkv" if family.fused and matrix.endswith((".q", ".k", ".v")) else matrix


def saved_whole(config: Config, stem: str = "head") -> str:
    """The module that PEFT trains whole for the head (or pooler): RoBERTa's classifier holds both of its matrices."""
    return module_names(config)[stem].split(".")[0]


def _each_layer(config: Config, names: Mapping[str, str]) -> dict[str, str]:
    """The names with {i} replaced by each layer's number, and the head's."""
    result = {}
    for ours, theirs in names.items():
        n_layer = config.n_encoder if ours.startswith(ENCODER) else config.n_layer
        for i in range(n_layer if "{i}" in ours else 1):
            result[ours.replace("{i}", str(i))] = theirs.replace("{i}", str(i))
    return result | dict(family_of(config).heads.get(config.head, {}))
