"""Operations are counted as they are made."""

from dataclasses import replace

import pytest

import lora_np as ln
from bench.flops import forward_flops, step_flops
from bench.models import WORKS, work
from lora_np import lora, transformer


class Counter:
    """Operations of the products that are made, counted where they are made."""

    def __init__(self, monkeypatch):
        self.flops = 0.0
        for module in (transformer, lora):
            for name, count in {
                "linear": lambda x, W: x.size * W.shape[0],  # (..., in) (out, in)
                "linear_backward": lambda dy, W: dy.size * W.shape[1],  # (..., out) (out, in)
                "linear_weight_backward": lambda dy, x: dy.size * x.shape[-1],  # (..., out) (..., in)
            }.items():
                if hasattr(module, name):
                    self._watch(monkeypatch, module, name, count)
        self._watch(monkeypatch, transformer, "attention", lambda q, k: 2 * q.size * k.shape[2])  # q k^T; p v
        self._watch(monkeypatch, transformer, "attention_backward", lambda dy, saved: 4 * dy.size * saved.k.shape[-2])

    def _watch(self, monkeypatch, module, name, count):
        original = getattr(module, name)

        def watched(a, b, *rest, **options):
            self.flops += 2 * count(a, b)
            return original(a, b, *rest, **options)

        monkeypatch.setattr(module, name, watched)


LORAS = [
    ln.LoRAConfig(r=2),
    ln.LoRAConfig(r=3, targets=("k", "o", "down"), rank_pattern={"o": 1}),
    ln.LoRAConfig(r=2, targets=("down",)),
    ln.LoRAConfig(r=2, targets=("up",), layers=(1,)),
    ln.LoRAConfig(r=1, targets=("q", "head")),
]


@pytest.mark.parametrize("name", WORKS)
@pytest.mark.parametrize("lora_config", [*LORAS, None], ids=lambda c: "all" if c is None else "-".join(c.targets))
def test_the_products_of_a_step_are_counted_as_they_are_made(name, lora_config, monkeypatch):
    w = work(name, quick=True, N=3)
    if lora_config is not None and w.lora.train_head:
        lora_config = replace(lora_config, train_head="head" not in lora_config.targets)
    model, batch = w.model(), w.batch()
    adapter = None if lora_config is None else ln.init_adapter(model, lora_config, seed=0)
    counter = Counter(monkeypatch)
    ln.loss_and_grads(model, adapter, *batch, trainable="all" if adapter is None else "adapter")
    assert counter.flops == step_flops(w.config, w.N, w.T, lora_config)


@pytest.mark.parametrize("name", WORKS)
def test_the_products_of_a_forward_pass_are_counted_as_they_are_made(name, monkeypatch):
    w = work(name, quick=True)
    model, counter = w.model(), Counter(monkeypatch)
    adapter = ln.init_adapter(model, w.lora, seed=0)
    ln.forward(model, w.batch()[0], adapter)
    assert counter.flops == forward_flops(w.config, w.N, w.T, w.lora)


def test_gpt2s_step_is_two_operations_a_weight_and_token_each_way():
    """By algebra, LoRA on q and v: each matrix twice, but once the lowest q, k and v; attention three times."""
    w = work("gpt2")
    D, F, V, L, M, T, r = 768, 3072, 50257, 12, 4 * 256, 256, 8
    matrices = L * (4 * D * D + 2 * D * F) + V * D
    attention = 3 * L * 2 * D * T
    branches = 2 * L * (2 * 3 * r * D) - 2 * r * D  # forward A, B; backward g B, dB, dA, (g B) A, but for the lowest
    assert step_flops(w.config, w.N, w.T, w.lora) == 2.0 * M * (2 * matrices - 3 * D * D + attention + branches)
    assert 525e9 < step_flops(w.config, w.N, w.T, w.lora) < 535e9
