"""PEFT's prefix tuning beside a prefix (T9): its text stands at position P, ours at 0."""

from dataclasses import replace

import numpy as np
import peers
import pytest
from peers import peft, torch

import lora_np as ln

pytestmark = peers.FILTERS
P = 3
MODELS = {
    "learned": ("gpt2", peers.GPT2),
    "rotary": ("llama", replace(peers.LLAMA, n_kv_head=3)),
    "rotary, shared heads": ("llama", replace(peers.LLAMA, n_head=6, n_kv_head=3)),
}


def turned(keys, config, by):
    """Keys (..., K) turned from their position to `by` places further (T11), in complex numbers."""
    half = config.head_width // 2
    z = keys[..., :half] + 1j * keys[..., half:]
    z = z * np.exp(1j * by * config.rope_theta ** (-np.arange(half) / half))
    return np.concatenate([z.real, z.imag], axis=-1)


def of_peft(table, config):
    """PEFT's table (P, 2 L G K) as our prefixes (G,P,K); its keys turned by -P if the model's are turned."""
    by_layer = table.reshape(P, config.n_layer, 2, config.kv_heads, config.head_width)
    prefixes = {}
    for i in range(config.n_layer):
        k, v = (by_layer[:, i, part].swapaxes(0, 1) for part in range(2))  # (P,G,K) -> (G,P,K)
        k = turned(k, config, -P) if config.positions == "rotary" else k
        prefixes |= {f"layers.{i}.attn.prefix.k": k, f"layers.{i}.attn.prefix.v": v}
    return prefixes


def with_prefix(kind):
    """A pair with PEFT's prefix in their module, no number of it zero; and its table."""
    family, config = MODELS[kind]
    pair = peers.make(family, config, seed=0)
    tuned = peft.PrefixTuningConfig(
        num_virtual_tokens=P, task_type="CAUSAL_LM", num_attention_heads=config.kv_heads,
        token_dim=config.kv_heads * config.head_width,
    )  # fmt: skip
    module = peft.get_peft_model(pair.module, tuned).double().eval()
    (table,) = (p for p in module.parameters() if p.requires_grad)
    with torch.no_grad():
        table.copy_(torch.randn(table.shape, generator=torch.Generator().manual_seed(1), dtype=table.dtype))
    return replace(pair, module=module), table


def prefixed(pair, table, **changes):
    """Our model with that prefix."""
    config = replace(pair.model.config, prefix=P, **changes)
    return replace(pair, model=ln.Model(config, {**pair.model.weights, **of_peft(table.detach().numpy(), config)}))


@pytest.mark.proves("T9", "T11")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("padding", [None, "right"])
@pytest.mark.parametrize("kind", MODELS)
def test_pefts_prefix_is_ours_with_the_text_at_p(kind, padding):
    """Logits and the prefix's gradient: learned positions from P on; or rotary ones, its keys turned by -P."""
    pair, table = with_prefix(kind)
    pair = prefixed(pair, table, position_offset=P if pair.model.config.positions == "learned" else 0)
    batch = peers.make_batch(pair.model.config, seed=5, padding=padding)
    peers.compare_logits(pair, batch)
    _, grads = ln.loss_and_grads(pair.model, None, batch.tokens, batch.targets, mask=batch.mask, trainable="all")
    peers.their_loss(pair, batch).backward()
    theirs = of_peft(table.grad.numpy(), pair.model.config)
    peers.assert_close({name: grads[name] for name in theirs}, theirs)


@pytest.mark.proves("T9")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_pefts_text_does_not_stand_at_0():
    """Else our statement says something of others that is no longer so."""
    pair, table = with_prefix("learned")
    pair, batch = prefixed(pair, table), peers.make_batch(pair.model.config, seed=5)
    ours, theirs = ln.asnumpy(ln.forward(pair.model, batch.tokens)), peers.their_logits(pair, batch).detach().numpy()
    assert abs(ours - theirs).max() > 0.1 * abs(theirs).max()
