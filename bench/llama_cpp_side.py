"""The other side of decoding from a file: llama.cpp, with its own settings, by the package xllamacpp."""

from __future__ import annotations

import warnings

from .timing import Cases, cores

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what it says about itself at import
    import xllamacpp


def decode(path: str, tokens: list[int], n: int) -> Cases:
    """Greedy decoding of n tokens after a prompt, by as many threads as there are cores. -> their numbers"""
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.verbosity, params.fit_params = len(tokens) + n, 1, -1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = cores()
    server = xllamacpp.Server(params)
    asked = {
        "prompt": tokens, "n_predict": n, "temperature": 0, "n_probs": 1, "cache_prompt": False, "ignore_eos": True,
    }  # fmt: skip

    def run() -> list[int]:
        answer = server.handle_completions(asked)
        return [place["id"] for place in answer["choices"][0]["logprobs"]["content"]]

    return {"greedy": run}
