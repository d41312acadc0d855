"""DistilBERT (Sanh et al. 2019): BERT without token types; its classifier has a dense layer of its own, with a ReLU."""

from ..family import GELU, NEUTRAL, Family, Key, classes

DISTILBERT = Family(
    name="distilbert",
    classes=classes("DistilBert", ForMaskedLM="none"),
    keys={
        "vocab_size": Key("vocab_size", int),
        "max_position_embeddings": Key("n_positions", int, 512),
        "n_layers": Key("n_layer", int),
        "n_heads": Key("n_head", int),
        "dim": Key("d_model", int),
        "hidden_dim": Key("d_ff", int),
        "activation": Key("activation", str, "gelu"),
    },
    activations={**GELU, "relu": "relu"},
    fixed={
        "norm_first": False, "causal": False, "tie_head": False, "eps": 1e-12, "pooler": "relu", "pooler_in_head": True,
    },
    neutral={**NEUTRAL, "is_decoder": (False,)},
    modules={
        "embed.tokens": "embeddings.word_embeddings",
        "embed.positions": "embeddings.position_embeddings",
        "embed.norm": "embeddings.LayerNorm",
        "layers.{i}.attn.q": "transformer.layer.{i}.attention.q_lin",
        "layers.{i}.attn.k": "transformer.layer.{i}.attention.k_lin",
        "layers.{i}.attn.v": "transformer.layer.{i}.attention.v_lin",
        "layers.{i}.attn.o": "transformer.layer.{i}.attention.out_lin",
        "layers.{i}.norm1": "transformer.layer.{i}.sa_layer_norm",
        "layers.{i}.mlp.up": "transformer.layer.{i}.ffn.lin1",
        "layers.{i}.mlp.down": "transformer.layer.{i}.ffn.lin2",
        "layers.{i}.norm2": "transformer.layer.{i}.output_layer_norm",
    },
    trunk="distilbert",
    heads={"classify": {"pooler": "pre_classifier", "head": "classifier"}, "tag": {"head": "classifier"}},
    left_out=r"embeddings\.position_ids|vocab_(transform|layer_norm|projector)\..*",
)  # fmt: skip
