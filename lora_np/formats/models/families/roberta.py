"""RoBERTa (Liu et al. 2019): BERT, but positions count from the padding token's row on, and the classifier has a dense
layer of its own where BERT's reads the pooler."""

from dataclasses import replace

from ..family import Key, classes
from .bert import BERT, BUFFERS

ROBERTA = replace(
    BERT,
    name="roberta",
    classes=classes("Roberta", ForMaskedLM="none"),
    keys={**BERT.keys, "pad_token_id": Key("position_offset", int, 1, least=0, plus=1)},
    fixed={**BERT.fixed, "pooler_in_head": True},
    modules={ours: theirs for ours, theirs in BERT.modules.items() if ours != "pooler"},
    trunk="roberta",
    heads={
        "classify": {"pooler": "classifier.dense", "head": "classifier.out_proj"},
        "tag": {"head": "classifier"},
    },
    left_out=rf"{BUFFERS}|lm_head\..*",
    gguf=None,
)
