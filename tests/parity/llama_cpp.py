"""llama.cpp as a peer: small models in its files, and what it makes of them, in float32 throughout."""

import json
import warnings

import numpy as np
import pytest

from lora_np.formats.adapters.gguf import in_pairs, tensor_name

REASON = "a peer: pip install lora-np[peers]"
gguf = pytest.importorskip("gguf", reason=REASON)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    xllamacpp = pytest.importorskip("xllamacpp", reason=REASON)


class Runner:
    """A model in llama.cpp, with adapters' files or none: float32 in keys, values and products, one thread."""

    def __init__(self, model, *adapters, scale=1.0):
        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 128, 1, False, -1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.no_extra_bufts, params.fit_params = True, False
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(path), scale) for path in adapters]
        self._server = xllamacpp.Server(params)

    def greedy(self, tokens, n, vocab_size):
        """What it says next. -> the n tokens, and the log-probabilities of all before each (n, V)"""
        asked = {
            "prompt": list(map(int, tokens)), "n_predict": n, "temperature": 0, "n_probs": vocab_size,
            "cache_prompt": False, "ignore_eos": True,
        }  # fmt: skip
        answer = self._server.handle_completions(asked)
        answer = json.loads(answer) if isinstance(answer, str) else answer
        said = answer["choices"][0]["logprobs"]["content"]
        logprobs = np.full((n, vocab_size), np.nan)
        for row, place in zip(logprobs, said, strict=True):
            for one in place["top_logprobs"]:
                row[one["id"]] = one["logprob"]
        return [place["id"] for place in said], logprobs
