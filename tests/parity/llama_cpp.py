"""llama.cpp as a peer: small models in its files, and what it makes of them, in float32 throughout."""

import warnings

import numpy as np
import pytest

REASON = "a peer: the extra peers"
gguf = pytest.importorskip("gguf", reason=REASON)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the peer says about itself at import
    xllamacpp = pytest.importorskip("xllamacpp", reason=REASON)

PROMPT = [1, 5, 17, 200, 33]


class Runner:
    """A model in llama.cpp, with adapters' files or none: keys, values and products in float32, one thread.

    pooled: for `mean_state`; without it, for `greedy`
    """

    def __init__(self, model, *adapters, scale=1.0, pooled=False):
        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 128, 1, False, -1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.no_extra_bufts, params.fit_params = True, False
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(path), scale) for path in adapters]
        if pooled:
            params.embedding, params.pooling_type = True, xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
        self._server = xllamacpp.Server(params)

    def greedy(self, tokens, n, vocab_size):
        """What it says next. -> the n tokens, and the log-probabilities of all before each (n, V)"""
        asked = {
            "prompt": list(map(int, tokens)), "n_predict": n, "temperature": 0, "n_probs": vocab_size,
            "cache_prompt": False, "ignore_eos": True,
        }  # fmt: skip
        answer = self._server.handle_completions(asked)
        said = answer["choices"][0]["logprobs"]["content"]
        logprobs = np.full((n, vocab_size), np.nan)
        for row, place in zip(logprobs, said, strict=True):
            for one in place["top_logprobs"]:
                row[one["id"]] = one["logprob"]
        return [place["id"] for place in said], logprobs

    def says(self, text, n):
        """How it goes on from a text, by at most n tokens."""
        asked = {"prompt": text, "n_predict": n, "temperature": 0, "cache_prompt": False}
        return self._server.handle_completions(asked)["choices"][0]["text"]

    def mean_state(self, tokens):
        """The mean of the last layer's states (D,)."""
        asked = {"input": list(map(int, tokens)), "encoding_format": "float", "embd_normalize": -1}
        return np.array(self._server.handle_embeddings(asked)["data"][0]["embedding"])


def write_model(path, architecture, keys, tensors, vocab_size):
    """A model's file with a vocabulary of words, as llama.cpp needs one.

    keys: without the architecture's name; tensors: arrays, or bytes and the type that they are of
    """
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](f"{architecture}.{key}", value)
    first = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] if architecture == "bert" else ["<unk>", "<s>", "</s>", "\n"]
    writer.add_tokenizer_model("bert" if architecture == "bert" else "llama")
    writer.add_token_list([*first, *(f"t{i}" for i in range(vocab_size - len(first)))])
    writer.add_token_type_count(2)
    writer.add_token_scores([0.0] * vocab_size)
    writer.add_token_types([3] * len(first) + [1] * (vocab_size - len(first)))
    for name, value in tensors.items():
        data, kind = value if isinstance(value, tuple) else (value, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
