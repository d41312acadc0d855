"""DeBERTa v2 and v3 (He et al. 2021): BERT with disentangled attention; its classifier has a pooler of its own."""

from collections.abc import Mapping
from typing import Any

from ..family import GELU, NEUTRAL, Family, Key, check_values, classes, value_of
from .bert import BERT

# What an absent key means: not this attention.
_ABSENT = {"relative_attention": False, "share_att_key": False, "position_biased_input": True, "norm_rel_ebd": "none"}


def _more(raw: Mapping[str, Any], said: Mapping[str, Any], where: str) -> dict[str, Any]:
    D, kinds = said["d_model"], raw.get("pos_att_type")
    needed: dict[str, tuple[Any, ...]] = {
        "relative_attention": (True,), "share_att_key": (True,), "position_biased_input": (False,),
        "norm_rel_ebd": ("layer_norm",), "embedding_size": (D,), "pooler_hidden_size": (D,),
        "attention_head_size": (D // said["n_head"],),
    }  # fmt: skip
    check_values({**_ABSENT, **raw}, needed, where)
    if (kinds.split("|") if isinstance(kinds, str) else kinds) not in (["p2c", "c2p"], ["c2p", "p2c"]):
        raise ValueError(f"{where}: pos_att_type: {kinds!r:.60} is not supported, only p2c|c2p")
    distance = value_of(raw, "max_relative_positions", Key("score_distance", int, -1), where)
    return {"score_distance": distance if distance > 0 else said["n_positions"]}


DEBERTA = Family(
    name="deberta-v2",
    classes=classes("DebertaV2", ForMaskedLM="none"),
    keys={
        "vocab_size": Key("vocab_size", int),
        "max_position_embeddings": Key("n_positions", int, 512),
        "num_hidden_layers": Key("n_layer", int),
        "num_attention_heads": Key("n_head", int),
        "hidden_size": Key("d_model", int),
        "intermediate_size": Key("d_ff", int),
        "type_vocab_size": Key("n_types", int, 0, least=0),
        "layer_norm_eps": Key("eps", float, 1e-7),
        "hidden_act": Key("activation", str, "gelu"),
        "pooler_hidden_act": Key("pooler", str, "gelu"),
        "position_buckets": Key("score_buckets", int),
    },
    more=_more,
    says=("score_distance",),
    activations={**GELU, "relu": "relu"},
    fixed={
        "norm_first": False, "positions": "none", "causal": False, "tie_head": False, "disentangled": True,
        "pooler_in_head": True,
    },
    neutral={**NEUTRAL, "conv_kernel_size": (0,)},
    modules={
        **{ours: theirs for ours, theirs in BERT.modules.items() if ours not in ("embed.positions", "pooler")},
        "embed.distances": "encoder.rel_embeddings",
        "embed.distances_norm": "encoder.LayerNorm",
        "layers.{i}.attn.q": "encoder.layer.{i}.attention.self.query_proj",
        "layers.{i}.attn.k": "encoder.layer.{i}.attention.self.key_proj",
        "layers.{i}.attn.v": "encoder.layer.{i}.attention.self.value_proj",
    },
    trunk="deberta",
    heads={"classify": {"pooler": "pooler.dense", "head": "classifier"}, "tag": {"head": "classifier"}},
    left_out=r"embeddings\.position_ids|pooler\.dense\.(weight|bias)|(cls|lm_predictions|mask_predictions)\..*",
)  # fmt: skip
