"""BERT (Devlin et al. 2019). Its head for masked words is left out: such a file is read as one without a head."""

from ..family import GELU, NEUTRAL, Family, Key, classes

BUFFERS = r"embeddings\.position_ids|pooler\.dense\.(weight|bias)"  # the pooler, where no classifier reads it

BERT = Family(
    name="bert",
    classes=classes("Bert", ForMaskedLM="none", ForPreTraining="none"),
    keys={
        "vocab_size": Key("vocab_size", int),
        "max_position_embeddings": Key("n_positions", int),
        "num_hidden_layers": Key("n_layer", int),
        "num_attention_heads": Key("n_head", int),
        "hidden_size": Key("d_model", int),
        "intermediate_size": Key("d_ff", int),
        "type_vocab_size": Key("n_types", int, 2, least=1),
        "layer_norm_eps": Key("eps", float, 1e-12),
        "hidden_act": Key("activation", str, "gelu"),
    },
    activations=GELU,
    fixed={"norm": "layer", "norm_first": False, "positions": "learned", "causal": False, "tie_head": False},
    neutral={**NEUTRAL, "position_embedding_type": ("absolute",), "is_decoder": (False,)},
    modules={
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
        "pooler": "pooler.dense",
    },
    trunk="bert",
    heads={"classify": {"head": "classifier"}, "tag": {"head": "classifier"}},
    left_out=rf"{BUFFERS}|cls\..*",
    gguf="bert",
)
