"""What a decoder beside an encoder is given, as transformers shifts labels: T5, BART, Marian."""

import numpy as np
import peers
import pytest

import lora_np as ln
from lora_np.training.records import Pair
from lora_np.training.text import ByteTokenizer
from lora_np.training.translation import decoder_start, encode_translation

torch, transformers = peers.torch, peers.transformers
pytestmark = peers.FILTERS

SIZES = {"vocab_size": 300, "d_model": 16}
BARTS = {
    **SIZES, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
}  # fmt: skip
MODELS = {
    "T5ForConditionalGeneration": ("T5Config", {**SIZES, "d_ff": 16, "d_kv": 8, "num_heads": 2, "num_layers": 1,
                                                "pad_token_id": 0, "decoder_start_token_id": 0}),
    "BartForConditionalGeneration": ("BartConfig", BARTS),
    "MarianMTModel": ("MarianConfig", {**BARTS, "pad_token_id": 299, "decoder_start_token_id": 299}),
}  # fmt: skip


class Ends(ByteTokenizer):
    """Bytes with 1 behind them."""

    eos = 1

    def encode(self, text, *, special=True):
        return [*super().encode(text), *([1] if special else [])]


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_the_targets_that_transformers_shifts(tmp_path, name):
    """By the start token that its own config.json says."""
    config, sizes = MODELS[name]
    model = getattr(transformers, name)(getattr(transformers, config)(**sizes))
    model.save_pretrained(tmp_path)
    ours = ln.Config(300, 32, 1, 2, 16, 16, n_encoder=1)
    example = encode_translation(Ends(), Pair("abc", "xyz"), 32, decoder_start(tmp_path, ours, Ends())).example
    theirs = model.prepare_decoder_input_ids_from_labels(torch.tensor(example.targets[None]))
    assert np.array_equal(example.tokens[None], theirs.numpy())
    assert example.targets.tolist() == [*b"xyz", 1]
