"""LoRA with a prefix: what is trained, that merging leaves the prefix alone, and the verdicts on planted figures."""

from dataclasses import replace

import numpy as np
import pytest
from strategies import device, random_model, trained_adapter

import lora_np as ln
from lora_np.backend import asnumpy
from lora_np.reproduce import orthogonality
from lora_np.reproduce.orthogonality import BOTH, LORA, PREFIX
from lora_np.reproduce.study import Spread

proves = pytest.mark.proves
CONFIG = ln.Config(256, 16, 2, 2, 8, 12)
BEFORE = 3.0


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG, seed=0)


@proves("T9", "T16")
def test_a_prefix_starts_as_the_keys_and_values_of_a_text(model):
    """In a model without positions, whose first layer reads tokens alone, a prefix of a text is that text before it."""
    config = replace(CONFIG, n_layer=1)
    weights = random_model(config, seed=0).weights
    weights = {name: 0 * w if name == "embed.positions" else w for name, w in weights.items()}
    base = ln.Model(config, weights)
    text = np.random.default_rng(0).integers(0, 256, (1, 9))
    prefixed = orthogonality.with_prefix(base, text[0, :4])
    assert prefixed.config.prefix == 4
    y, whole = (asnumpy(y) for y in (ln.forward(prefixed, text[:, 4:]), ln.forward(base, text)))
    np.testing.assert_allclose(y, whole[:, 4:], rtol=1e-12, atol=1e-13)


@proves("L4", "T9")
def test_what_is_trained_is_the_prefix_or_both(model):
    prefixed = orthogonality.with_prefix(model, np.arange(3))
    prefix = {f"layers.{i}.attn.prefix.{part}" for i in range(2) for part in "kv"}
    both, alone = (orthogonality.start(prefixed, kind, 0) for kind in (BOTH, PREFIX))
    factors = {f"layers.{i}.attn.{m}.{f}" for i in range(2) for m in "qv" for f in "AB"}
    assert set(alone.params) == prefix
    assert set(both.params) == prefix | factors
    tokens = np.arange(10).reshape(2, 5)
    for adapter in (both, alone):
        _, grads = ln.loss_and_grads(prefixed, adapter, tokens, tokens[:, ::-1])
        assert grads.keys() == adapter.params.keys()
        assert all(asnumpy(g).any() for name, g in grads.items() if name.endswith((".k", "prefix.v", ".B")))


@proves("L5", "T9")
def test_merging_leaves_the_prefix_in_its_place(model):
    prefixed = orthogonality.with_prefix(model, np.arange(3))
    adapter = trained_adapter(prefixed, ln.LoRAConfig(r=2), seed=1)
    prefix = {name: w + device(0.3, w.dtype) for name, w in prefixed.weights.items() if ".prefix." in name}
    adapter = replace(adapter, params={**adapter.params, **prefix})
    tokens = np.arange(10).reshape(2, 5)
    assert orthogonality.merged_apart(prefixed, adapter, tokens) <= 1e-12
    merged = ln.merge(prefixed, adapter)
    for name, w in prefix.items():
        np.testing.assert_array_equal(asnumpy(merged.weights[name]), asnumpy(w))
    assert ln.unmerge(merged, adapter) is prefixed


@pytest.mark.parametrize("path", ["folder", "a.npz", "a.safetensors"])
def test_files_of_adapters_have_no_place_for_a_prefix_and_say_so(model, tmp_path, path):
    prefixed = orthogonality.with_prefix(model, np.arange(3))
    with pytest.raises(
        ValueError, match=r"layers\.0\.attn\.prefix\.k: the configuration does not say that it is train"
    ):
        ln.save_adapter(tmp_path / path, orthogonality.start(prefixed, BOTH, 0), prefixed)
    assert list(tmp_path.iterdir()) == []


def test_a_model_with_a_prefix_survives_saving(model, tmp_path):
    pytest.importorskip("safetensors")
    prefixed = orthogonality.with_prefix(model, np.arange(3))
    ln.save_model(tmp_path / "model", prefixed)
    back = ln.load_model(tmp_path / "model")
    assert back.config == prefixed.config
    assert all((asnumpy(back.weights[name]) == asnumpy(w)).all() for name, w in prefixed.weights.items())


def exactly(mean):
    return Spread(mean, 0.0, mean, mean)


@pytest.mark.parametrize(
    ("both", "apart", "verdict"),
    [(2.0, 1e-15, "holds"), (2.0, 1e-3, "holds in part"), (2.49, 1e-15, "holds in part"), (2.6, 1e-3, "does not hold")],
)
def test_the_verdict_on_the_two_together(both, apart, verdict):
    found = {LORA: exactly(2.2), PREFIX: exactly(2.5), BOTH: exactly(both)}
    assert orthogonality.combined_claim(BEFORE, found, apart, 3).verdict == verdict


@pytest.mark.parametrize(("both", "verdict"), [(1.8, "holds"), (2.02, "holds in part"), (2.2, "does not hold")])
def test_the_verdict_on_being_better(both, verdict):
    found = {LORA: exactly(2.0), PREFIX: exactly(2.5), BOTH: exactly(both)}
    claim = orthogonality.better_claim(BEFORE, found, 3)
    assert claim.verdict == verdict
    assert f"{2.0 - both:+.0%}" in claim.figure
