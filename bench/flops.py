"""The products of a training step, counted from the Config: 2 (rows) (out) (in) floating-point operations for each.

As the equations have them: attention over all T x T scores, masked or not. Elementwise work is not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import lora_np as ln
from lora_np.adapter import target_of


class Product(NamedTuple):
    """A product with a weight, from the bottom of the model up: its stage, what it maps, and for how many rows."""

    stage: int  # products of one stage read the same input
    name: str
    n_out: int
    n_in: int
    rows: int


def products(config: ln.Config, N: int, T: int) -> Iterator[Product]:
    """The products of the forward pass with each weight, for a batch (N,T) without padding whose targets all count.

    Of a classifier's last layer, one token a text is computed, but for the keys and values that it looks at.
    """
    stages = (("q", "k", "v"), ("o",), ("up", "gate"), ("down",))
    stage_of = {target: i for i, targets in enumerate(stages) for target in targets}
    one_a_text = config.head == "classify"
    for name, (n_out, n_in) in config.matrix_shapes().items():
        if name.startswith("layers."):
            layer, target = int(name.split(".")[1]), target_of(name)
            read = one_a_text and layer == config.n_layer - 1 and target not in ("k", "v")
            yield Product(len(stages) * layer + stage_of[target], name, n_out, n_in, N if read else N * T)
    top = len(stages) * config.n_layer
    if config.has_pooler:
        yield Product(top, "pooler", config.d_model, config.d_model, N)
    if config.head != "none":
        yield Product(top + 1, "head", config.head_size, config.d_model, N if one_a_text else N * T)


def attention_products(config: ln.Config, N: int, T: int) -> Iterator[tuple[int, float]]:
    """For each layer the stage that its attention feeds, and the operations of q k^T and p v. (N,H,T,K) (N,H,K,T)."""
    for product in products(config, N, T):
        if target_of(product.name) == "o":
            yield product.stage, 2 * 2.0 * product.rows * T * config.d_model


def forward_flops(config: ln.Config, N: int, T: int, lora: ln.LoRAConfig | None = None) -> float:
    """T2, T9, L2: the operations of one forward pass, with the low-rank branches of `lora`."""
    total = sum(flops for _, flops in attention_products(config, N, T))
    for p in products(config, N, T):
        total += 2.0 * p.rows * p.n_out * p.n_in + 2.0 * p.rows * _rank(lora, p) * (p.n_out + p.n_in)
    return total


def step_flops(config: ln.Config, N: int, T: int, lora: ln.LoRAConfig | None) -> float:
    """L4: the operations of forward and backward where `lora` is trained, its targets being projections or the head;
    None: every weight. What lies below the lowest trained matrix is not differentiated."""
    total = forward_flops(config, N, T, lora)
    lowest = -1 if lora is None else min(p.stage for p in products(config, N, T) if _rank(lora, p))
    for p in products(config, N, T):
        r, need_dx = _rank(lora, p), p.stage > lowest
        weight_trained = lora is None or (lora.train_head and p.name == "head")
        total += 2.0 * p.rows * p.n_out * p.n_in * (need_dx + weight_trained)  # g W0; g^T x
        total += 2.0 * p.rows * r * (2 * p.n_out + p.n_in + p.n_in * need_dx)  # g B, dB; dA; (g B) A
    return total + sum(2 * flops for stage, flops in attention_products(config, N, T) if stage > lowest)


def _rank(lora: ln.LoRAConfig | None, product: Product) -> int:
    """r of a matrix, 0 where it is not adapted."""
    if lora is None or target_of(product.name) not in lora.targets:
        return 0
    layer = product.name.split(".")[1] if product.name.startswith("layers.") else None
    adapted = lora.layers is None or layer is None or int(layer) in lora.layers
    return lora.rank(product.name) if adapted else 0
