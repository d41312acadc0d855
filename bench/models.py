"""The models that are measured, with random weights, and the batches: one for each family, and tiny ones for a try."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

import lora_np as ln
from lora_np.backend import Array, asnumpy, xp
from lora_np.formats.models.huggingface import Place

TINY: dict[str, Any] = {"vocab_size": 64, "n_positions": 64, "n_layer": 2, "d_model": 36, "d_ff": 48}


class Work(NamedTuple):
    """A model with LoRA on it, and a batch of N texts of T tokens, all of which count."""

    title: str
    config: ln.Config
    lora: ln.LoRAConfig
    N: int
    T: int

    @property
    def case(self) -> str:
        """What a table calls it."""
        return f"{self.title}, N={self.N}, T={self.T}, r={self.lora.r}"

    def weights(self, names: Collection[str] | None = None) -> dict[str, Array]:
        """Those of `model`, or some of them."""
        return ln.init_weights(self.config, seed=0, names=names)

    def stored(self, place: Place) -> Array:
        """A tensor as Hugging Face's files have it."""
        value = np.concatenate([asnumpy(weight) for weight in self.weights(place.parts).values()])
        return np.ascontiguousarray(value.T) if place.transposed else value

    def model(self) -> ln.Model:
        return ln.Model(self.config, self.weights())

    def adapter(self, model: ln.Model) -> ln.Adapter:
        """As training starts: B = 0."""
        return ln.init_adapter(model, self.lora, seed=0)

    def trained_adapter(self, model: ln.Model, seed: int) -> ln.Adapter:
        """An adapter whose B is random."""
        adapter, rng = ln.init_adapter(model, self.lora, seed=seed), np.random.default_rng(seed)
        params = {
            name: xp.asarray(rng.normal(0, 0.02, value.shape).astype("float32")) if name.endswith(".B") else value
            for name, value in adapter.params.items()
        }
        return ln.Adapter(adapter.config, params)

    def batch(self) -> tuple[Array, Array]:
        """tokens (N,T), and targets: (N,T), the tokens that follow, or a classifier's (N,)."""
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, self.config.vocab_size, (self.N, self.T + 1))
        if self.config.head == "classify":
            return tokens[:, :-1], rng.integers(0, self.config.head_size, self.N)
        return tokens[:, :-1], tokens[:, 1:]


_MINILM = replace(ln.PRESETS["bert-base"], n_layer=6, d_model=384, d_ff=1536, head="classify", n_labels=2)

WORKS: Mapping[str, Work] = {
    "gpt2": Work("GPT-2 small", ln.PRESETS["gpt2"], ln.LoRAConfig(r=8), 4, 256),
    "minilm": Work("MiniLM, a classifier", _MINILM, ln.LoRAConfig(r=8, train_head=True), 32, 32),
    "smollm2": Work("SmolLM2-135M", ln.PRESETS["smollm2-135m"], ln.LoRAConfig(r=8), 4, 128),
}


def work(name: str, *, quick: bool = False, r: int | None = None, layers: int | None = None, **sizes: int) -> Work:
    """One of WORKS; quick: a tiny model of its family; r, layers, N, T: other sizes."""
    found = WORKS[name]
    if quick:
        heads = {"n_head": 6, "n_kv_head": 3 if found.config.n_kv_head else None}
        found = found._replace(config=replace(found.config, **{**TINY, **heads}), N=min(found.N, 4), T=8)
    if layers is not None:
        found = found._replace(config=replace(found.config, n_layer=layers))
    if r is not None:
        found = found._replace(lora=replace(found.lora, r=r))
    return found._replace(**sizes)  # type: ignore[arg-type]  # N and T
